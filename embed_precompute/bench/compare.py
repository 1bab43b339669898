"""The command: every encoder of a configuration, on captions of its table; as a table and as JSON.

No dataset is written or read.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embed_precompute.bench.measure import (
    GEMM_SIZE,
    OURS,
    EncoderBench,
    Measured,
    bench_encoder,
    maker,
)
from embed_precompute.config.schema import Config
from embed_precompute.encoders.device import environment, resolve_device
from embed_precompute.errors import InputError
from embed_precompute.job.prepare import Prepared, prepare

MAX_CORPUS = 10_000
"""Captions of the table from which those that are measured are taken, evenly."""
NUM_CAPTIONS = 192
ALLOCATOR = ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


@dataclass(frozen=True)
class BenchReport:
    """What `embed-precompute bench` found."""

    environment: dict[str, str]
    encoders: list[EncoderBench]

    def to_json(self) -> dict[str, Any]:
        """All fields, and each variant's figures."""
        written = dataclasses.asdict(self)
        for encoder, target in zip(self.encoders, written["encoders"], strict=True):
            for measured, entry in zip(encoder.measured, target["measured"], strict=True):
                entry["figures"] = encoder.figures(measured)
        return written

    def lines(self) -> list[str]:
        lines = [", ".join(f"{name} {value}" for name, value in self.environment.items())]
        for encoder in self.encoders:
            lines += encoder_lines(encoder)
        return lines


def encoder_lines(bench: EncoderBench) -> list[str]:
    """The table of one encoder."""
    mean = bench.num_tokens / bench.num_captions
    lines = [
        "",
        f"{bench.name}, {bench.dtype}: {bench.num_captions:,} captions, {bench.num_tokens:,} "
        f"tokens (mean {mean:.1f})",
    ]
    if bench.measured:
        rate = statistics.median(bench.gemm_flops)
        lines.append(
            f"  {len(bench.gemm_flops)} rounds, medians; a {GEMM_SIZE} x {GEMM_SIZE} product runs "
            f"at {rate / 1e9:,.0f} GFLOP/s; differences are from transformers in float32, over "
            f"{bench.num_compared} captions"
        )
        width = max(len(measured.variant) for measured in bench.measured)
        lines.append(
            f"  {'':<{width}} {'captions/s':>11} {'tokens/s':>10} {'of GEMM':>8} {'fused is':>9} "
            f"{'peak memory':>13} {'relative':>9} {'rms':>8} {'start':>8}"
        )
        lines += [f"  {_row(bench, measured, width)}" for measured in bench.measured]
    return lines + [f"  {name} left out: {reason}" for name, reason in bench.left_out.items()]


def _row(bench: EncoderBench, measured: Measured, width: int) -> str:
    figures = bench.figures(measured)
    fused, peak = figures["fused_is"], measured.peak_bytes
    relative, rms = ("-" if x is None else f"{x:.1e}" for x in (measured.relative, measured.rms))
    return (
        f"{measured.variant:<{width}} {figures['captions_per_s']:>11,.1f} "
        f"{figures['tokens_per_s']:>10,.0f} {figures['of_gemm']:>8.2f} "
        f"{'-' if fused is None else f'{fused:.2f}x':>9} "
        f"{'unknown' if peak is None else f'{peak / 2**20:,.1f} MiB':>13} "
        f"{relative:>9} {rms:>8} {measured.start_s:>6.1f} s"
    )


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
    return kept
