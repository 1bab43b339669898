"""Print how far the host keeps up with a device of a given speed; no GPU and no weights needed.

The real pipeline runs: captions are read, tokenised, batched, written, digested and published. Only
a forward is replaced: it takes the time that its floating-point operations need at `--tflops`, and
then its output, numbers made once, is in host memory. So a copy from the device costs the host
nothing, as it does with page-locked memory. A ratio of 1 means that the device never waits.
It waits for the first unit to be read and tokenised, which counts: in a long run it is nothing.

    python scripts/benchmarks/simulated_device.py CONFIG [--captions N] [--tflops 500] [--ranks 1]

A `pretrained` folder needs config.json and the tokenizer. The output folder should be on a RAM
disk (`--output`), unless the disk itself is to be measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description="The host next to a simulated device.")
    parser.add_argument("config")
    parser.add_argument("--captions", type=int, help="only the first N (default all)")
    parser.add_argument("--tflops", type=float, default=500.0, help="of the device; default 500")
    parser.add_argument("--ranks", type=int, default=1, help="devices of this node; default 1")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--output", help="folder for the datasets; default: the temporary folder")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(work(arguments)), flush=True)
        return
    print("| captions/s | MB/s | device s | wall s | wall / device | cores busy | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    rounds = [measure(arguments) for _ in range(arguments.rounds)]
    formats = ("{:,.0f}", "{:,.0f}", "{:.2f}", "{:.2f}", "{:.3f}", "{:.2f}", "{:,.0f}")
    for name, values in [("", cells) for cells in rounds] + [
        ("median", [statistics.median(column) for column in zip(*rounds, strict=True)])
    ]:
        cells = [form.format(value) for form, value in zip(formats, values, strict=True)]
        print(f"| {' | '.join(cells)} | {name}", flush=True)


def measure(arguments: argparse.Namespace) -> list[float]:
    """One round: sums over the ranks, times of the slowest, memory of the largest."""
    folder = tempfile.mkdtemp(dir=arguments.output)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={arguments.ranks}", __file__, arguments.config, "--worker"]
    command += ["--output", os.path.join(folder, "out"), "--tflops", str(arguments.tflops)]
    if arguments.captions is not None:
        command += ["--captions", str(arguments.captions)]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    ranks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(ranks) != arguments.ranks:
        sys.exit(f"simulated_device: a worker ended with exit code {done.returncode}.")
    wall, device = (max(rank[key] for rank in ranks) for key in ("wall", "device"))
    samples, shard_bytes, cpu = (
        sum(rank[key] for rank in ranks) for key in ("samples", "bytes", "cpu")
    )
    peak = max(rank["peak"] for rank in ranks)
    cells = [samples / wall, shard_bytes / wall / 1e6, device, wall, wall / device]
    return [*cells, cpu / wall, peak]


def work(arguments: argparse.Namespace) -> dict[str, float]:
    """This rank's share of a run."""
    from embed_precompute.config.files import load_config
    from embed_precompute.encoders import checkpoint
    from embed_precompute.job import run as job
    from embed_precompute.job.stages import Stages

    device = SimulatedDevice(arguments.tflops * 1e12)
    figures: dict[str, float] = {}

    class TimedStages(Stages):
        def run(self) -> None:
            began, cpu = time.monotonic(), time.process_time()
            device.busy = 0.0
            super().run()
            figures["wall"] = time.monotonic() - began
            figures["cpu"] = time.process_time() - cpu
            figures["samples"] = self.samples

    def start(resolved: Any, _device: str, output_dtype: str, *_: str) -> SimulatedEncoder:
        return SimulatedEncoder(device, resolved, output_dtype)

    replaced: dict[Any, dict[str, Any]] = {
        checkpoint: {"_weight_files": lambda *_: []},
        job: {"start": start, "Stages": TimedStages},
    }
    for module, names in replaced.items():
        vars(module).update(names)
    config = load_config(arguments.config)
    output = dataclasses.replace(config.output, path=arguments.output)
    runtime = dataclasses.replace(config.runtime, device="cpu")
    result = job.run(
        dataclasses.replace(config, output=output, runtime=runtime), arguments.captions
    )
    shards = result.root.glob("shards/*/*.safetensors")
    total = sum(path.stat().st_size for path in shards)
    figures["bytes"] = total if os.environ.get("RANK") == "0" else 0  # of all ranks: counted once
    figures["device"] = device.busy
    figures["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


class SimulatedDevice:
    """Runs one forward after the other, each for as long as its operations take."""

    def __init__(self, flops: float) -> None:
        self._flops = flops
        self._free_at = 0.0
        self.busy = 0.0
        """Seconds of work so far."""

    def begin(self, operations: float) -> float:
        """Queues a forward; returns when it will be over, on the clock time.monotonic."""
        seconds = operations / self._flops
        self.busy += seconds
        self._free_at = max(self._free_at, time.monotonic()) + seconds
        return self._free_at


class SimulatedEncoder:
    """Stands for a TextEncoder: the same outputs in shape and dtype, with arbitrary numbers."""

    def __init__(self, device: SimulatedDevice, resolved: Any, output_dtype: str) -> None:
        import torch

        self.resolved, self._device = resolved, device
        self._sizes = resolved.sizes
        decision = resolved.decision
        vectors = max(batch * length for batch, length in (*decision.shapes, decision.null_shape))
        dtype = getattr(torch, output_dtype)
        # Numbers that are never written again: every forward may hand them out.
        self._values = {
            output.suffix: torch.randn(vectors, output.width).to(dtype)
            for output in resolved.outputs
        }

    def submit_all(self, batches: Iterable[Any], _go_on: Any) -> Iterator[Pending]:
        return map(self.submit, batches)

    def submit(self, batch: Any) -> Pending:
        sizes, lengths = self._sizes, batch.lengths.astype(float)
        if not batch.packed:
            lengths[:] = batch.input_ids.shape[1]
        tokens = float(batch.input_ids.size)
        attention = 4.0 * float((lengths**2).sum()) * sizes.inner
        operations = sizes.layers * (2.0 * sizes.linear_weights * tokens + attention)
        outputs: dict[str, Any] = {}
        for output in self.resolved.outputs:
            values = self._values[output.suffix]
            if output.per == "caption":
                outputs[output.suffix] = values[: len(lengths)]
            elif output.positions == "real":
                ends = batch.stored.cumsum().tolist()
                starts = [0, *ends[:-1]]
                outputs[output.suffix] = [values[a:b] for a, b in zip(starts, ends, strict=True)]
            else:
                rows = values[: batch.input_ids.size]
                outputs[output.suffix] = rows.view(*batch.input_ids.shape, -1)
        return Pending(self._device.begin(operations), outputs)


class Pending:
    """Stands for a PendingOutput."""

    def __init__(self, over_at: float, outputs: Mapping[str, Any]) -> None:
        self._over_at, self._outputs = over_at, outputs

    def ready(self) -> bool:
        return time.monotonic() >= self._over_at

    def wait(self) -> Mapping[str, Any]:
        time.sleep(max(0.0, self._over_at - time.monotonic()))
        return self._outputs

    def finite(self) -> dict[str, list[bool]]:
        """A GPU looks for inf and nan itself."""
        return {suffix: [True] * len(values) for suffix, values in self._outputs.items()}


if __name__ == "__main__":
    main()
