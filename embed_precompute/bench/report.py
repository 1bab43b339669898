"""What `bench` found, as a table and as JSON.

Every figure is a median over rounds. Ratios are medians of the rounds' own ratios, in which what
slowed a whole round cancels out.
"""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import Any

GEMM_SIZE = 2048
"""Rows and columns of the square product whose rate is the peak."""
BASE = "fused"
"""The variant that the others are compared with."""


@dataclass
class Measured:
    """One variant of one encoder."""

    variant: str
    weight_bytes: int
    start_s: float
    """Seconds of loading, compiling and the first turn."""
    peak_bytes: int | None = None
    """Memory at the height of the largest forward, weights included; None where it is not known."""
    round_s: list[float] = field(default_factory=list)
    """Seconds of each round over all captions."""
    relative: float | None = None
    """max |a - b| / max |b| from float32; None where there was no reference."""
    rms: float | None = None
    """Root mean square of a - b over that of b: steadier, where two roundings are compared."""


@dataclass(frozen=True)
class EncoderBench:
    """The variants of one encoder over the same captions."""

    name: str
    dtype: str
    num_captions: int
    num_tokens: int
    """Tokens that the captions need: real ones, and where pads are attended the pads too."""
    flops: float
    """Multiplications and additions these tokens need."""
    gemm_flops: list[float]
    """Per round, the rate of one square matrix product in the dtype the encoder computes in."""
    num_compared: int
    """Captions whose embeddings were compared with the reference's in float32."""
    measured: list[Measured]
    left_out: dict[str, str]
    """Variant -> why it was not measured."""

    def of(self, variant: str) -> Measured | None:
        return next((each for each in self.measured if each.variant == variant), None)

    def figures(self, measured: Measured) -> dict[str, float | None]:
        """The columns of the table."""
        seconds, base = statistics.median(measured.round_s), self.of(BASE)
        shares = [
            self.flops / spent / rate
            for spent, rate in zip(measured.round_s, self.gemm_flops, strict=True)
        ]
        fused_is = None
        if base is not None:
            pairs = zip(measured.round_s, base.round_s, strict=True)
            fused_is = statistics.median(ours / fused for ours, fused in pairs)
        return {
            "captions_per_s": self.num_captions / seconds,
            "tokens_per_s": self.num_tokens / seconds,
            "of_gemm": statistics.median(shares),
            "fused_is": fused_is,
        }


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
    return (
        f"{measured.variant:<{width}} {figures['captions_per_s']:>11,.1f} "
        f"{figures['tokens_per_s']:>10,.0f} {figures['of_gemm']:>8.2f} "
        f"{'-' if fused is None else f'{fused:.2f}x':>9} "
        f"{'unknown' if peak is None else f'{peak / 2**20:,.1f} MiB':>13} "
        f"{_rounded(measured.relative):>9} {_rounded(measured.rms):>8} {measured.start_s:>6.1f} s"
    )


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"
