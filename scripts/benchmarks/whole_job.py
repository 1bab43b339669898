"""Print what a whole `run` costs next to its encoders alone.

Both sides encode the same captions in the same batches, on the same number of processes with the
same number of threads each, in alternation; both start as new processes. The encoders alone are
timed from when all processes have loaded and tokenised to when the last one ends. Each round loads
the models twice and encodes the captions twice.

    python scripts/benchmarks/whole_job.py CONFIG [--captions N] [--ranks 1 2] [--rounds 3]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PURE, JOB = "pure", "job"


def main() -> None:
    parser = argparse.ArgumentParser(description="A whole run next to its encoders alone.")
    parser.add_argument("config")
    parser.add_argument("--captions", type=int, help="only the first N (default all)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="default 1")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--worker", choices=(PURE, JOB), help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(work(arguments)), flush=True)
        return
    print("seconds; medians of the rounds, and of their ratios (command - loading) / alone")
    print("| ranks | encoders alone | in the job | loading | command | the ratio |")
    print("|---|---|---|---|---|---|")
    for ranks in arguments.ranks:
        rounds = [measure(arguments, ranks) for _ in range(arguments.rounds)]
        cells = [f"{statistics.median(values):.3f}" for values in zip(*rounds, strict=True)]
        print(f"| {ranks} | {' | '.join(cells)} |", flush=True)


def measure(arguments: argparse.Namespace, ranks: int) -> tuple[float, ...]:
    """One round's cells, of the slowest rank. The job also encodes the null embedding."""
    with tempfile.TemporaryDirectory() as folder:
        pure = max(reports["seconds"] for reports in launch(arguments, ranks, PURE, folder))
        began = time.monotonic()
        reports = launch(arguments, ranks, JOB, folder)
        command = time.monotonic() - began
    loading, encoding = (max(rank[key] for rank in reports) for key in ("loading", "encoding"))
    return pure, encoding, loading, command, (command - loading) / pure


def launch(
    arguments: argparse.Namespace, ranks: int, role: str, folder: str
) -> list[dict[str, Any]]:
    """What each of `ranks` workers reports."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    command += ["--standalone", __file__, arguments.config, "--worker", role]
    command += ["--output", str(Path(folder, role))]
    if arguments.captions is not None:
        command += ["--captions", str(arguments.captions)]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": threads}
    )
    if done.returncode:
        sys.exit(f"whole_job: the {role} side ended with exit code {done.returncode}.")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def work(arguments: argparse.Namespace) -> dict[str, float]:
    from embed_precompute.config.files import load_config
    from embed_precompute.job.run import run

    config = load_config(arguments.config)
    output = dataclasses.replace(config.output, path=arguments.output)
    config = dataclasses.replace(config, output=output)
    if arguments.worker == PURE:
        return {"seconds": encoders_alone(config, arguments.captions)}
    result = run(config, arguments.captions)
    return {"loading": result.load_seconds, "encoding": result.encode_seconds}


def encoders_alone(config: Any, captions: int | None) -> float:
    """Seconds this rank's share takes, begun when every rank is ready."""
    import torch.distributed

    from embed_precompute.distributed import DistContext
    from embed_precompute.encoders.device import resolve_device, start
    from embed_precompute.job.prepare import prepare
    from embed_precompute.job.stages import overlapped
    from embed_precompute.job.units import read_unit

    torch.distributed.init_process_group("gloo")
    dist = DistContext.detect()
    prepared = prepare(config, captions)
    plan = prepared.plan
    reader = prepared.table.reader(plan.num_rows, plan.last_row_samples)
    units = [
        read_unit(plan, number, reader, prepared.encoders)
        for number in range(dist.rank, plan.num_units, dist.world_size)
    ]
    device = resolve_device(config.runtime.device, dist.local_rank)
    dtype = config.output.dtype
    built = [start(each, device, dtype, "never") for each in prepared.encoders]
    torch.distributed.barrier()
    began = time.monotonic()
    for unit in units:
        for encoder in built:
            tokens = unit.tokens[encoder.resolved.name]
            batches = encoder.resolved.batches(tokens, null=unit.is_null)
            for _, pending in overlapped((None, encoder.submit(batch)) for batch in batches):
                pending.wait()
    torch.distributed.barrier()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
