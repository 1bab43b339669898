"""The command: every encoder of a configuration, on captions of its table.

Nothing is written, no dataset touched.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from embed_precompute.bench.measure import OURS, bench_encoder, maker
from embed_precompute.bench.report import BenchReport
from embed_precompute.config.schema import Config
from embed_precompute.encoders.device import environment, resolve_device
from embed_precompute.errors import InputError
from embed_precompute.job.prepare import Prepared, prepare

MAX_CORPUS = 10_000
"""Captions of the table from which those that are measured are taken, evenly."""
NUM_CAPTIONS = 192
ALLOCATOR = ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def bench(
    config: Config,
    num_captions: int | None = None,
    num_rounds: int = 5,
    variants: Sequence[str] | None = None,
) -> BenchReport:
    """Measure every encoder of `config` on captions of its table.

    `variants`: names out of `OURS`; all that the family has when not given. `num_captions`: 192, or
    one batch where all captions have one length, when not given. Raises InputError as a run would,
    and when no variant can be measured.
    """
    known = {name: maker(name) for name in OURS}
    if unknown := [name for name in variants or () if name not in known]:
        raise InputError(f"--variants has {', '.join(unknown)}: known are {', '.join(known)}.")
    device = resolve_device(config.runtime.device)
    prepared, texts = with_table(config)
    benches = []
    for encoder in prepared.encoders:
        count = num_captions
        if count is None:
            padded = encoder.decision.padded_length is not None
            count = encoder.decision.shapes[0][0] if padded else NUM_CAPTIONS
        chosen = evenly(texts, count)
        makers = {n: m for n, m in known.items() if OURS[n][0] in encoder.family.implementations}
        wanted = {name: makers[name] for name in variants or makers if name in makers}
        dtype = config.output.dtype
        benches.append(bench_encoder(encoder, chosen, wanted, num_rounds, device, dtype))
    if not any(each.measured for each in benches):
        said = [f"{each.name}, {n}: {why}" for each in benches for n, why in each.left_out.items()]
        raise InputError("nothing could be measured:\n  " + "\n  ".join(said))
    return BenchReport(machine(device), benches)


def with_table(config: Config) -> tuple[Prepared, list[str]]:
    """The encoders, and the texts of the first samples. Raises InputError."""
    with tempfile.TemporaryDirectory() as folder:  # an output without a plan; nothing is put there
        output = dataclasses.replace(config.output, path=str(Path(folder, "none")))
        prepared = prepare(dataclasses.replace(config, output=output), MAX_CORPUS)
    plan = prepared.plan
    reader = prepared.table.reader(plan.num_rows, plan.last_row_samples)
    samples = reader.read(0, plan.num_rows)
    reader.close()
    texts = [sample.text for sample in samples if sample.text is not None]
    if not texts:
        raise InputError(
            f"captions.path {config.captions.path!r}: none of the first {len(samples)} samples has "
            "a text. Give a table with captions."
        )
    return prepared, texts


def evenly(texts: Sequence[str], count: int) -> list[str]:
    """`count` of the texts at most, evenly from first to last."""
    count = min(count, len(texts))
    return [texts[number * len(texts) // count] for number in range(count)]


def machine(device: str) -> dict[str, str]:
    """What the figures depend on."""
    found = environment(device)
    kept = {name: found[name] for name in ("device", "torch", "transformers", "cpu_capability")}
    kept["threads"] = str(torch.get_num_threads())
    chosen = [f"{name}={os.environ[name]}" for name in ALLOCATOR if os.environ.get(name)]
    kept["allocator"] = " ".join(chosen) or "default"
    try:
        kept["colossalai"] = importlib.metadata.version("colossalai")
    except importlib.metadata.PackageNotFoundError:
        kept["colossalai"] = "not installed"
    return kept
