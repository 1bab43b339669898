"""What `bench` found, as a table and as JSON.

Guarantees: every figure is a median over rounds; ratios are medians of the rounds' own ratios, in
which what slowed a whole round cancels out. The JSON has what was measured and the figures made of
it, and gives the same report again.
Costs: nothing to speak of.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from embed_precompute.bench.variants import BASE, REFERENCE

GEMM_SIZE = 2048
"""Rows and columns of the square product whose rate is the peak."""
CLAIM = "claimed for Shardformer: 20 % less memory, 33 % less time per batch"
SHAPES_LISTED = 4


@dataclass(frozen=True)
class Difference:
    """How far embeddings are from transformers' in float32."""

    largest: float
    """max |a - b|"""
    relative: float
    """max |a - b| / max |b|"""
    rms: float
    """Root mean square of a - b over that of b: steadier, where two roundings are compared."""


@dataclass
class Measured:
    """One variant of one encoder."""

    variant: str
    weight_bytes: int
    start_s: float = 0.0
    """Seconds of loading, compiling and the first turn."""
    buffer_bytes: int | None = None
    """Memory held between forwards beside the weights; None where it cannot be measured."""
    forward_bytes: int | None = None
    """Memory the largest forward takes beside what is held; None likewise."""
    batches: list[tuple[int, int]] = field(default_factory=list)
    """(B, L) of each forward; packed (1, T)."""
    counted: float = 0.0
    """Forwards that count: one that too few captions were left to fill counts by its part, and of
    many that only differ in their ids some count for all."""
    real_share: float = 1.0
    """Of the positions that were computed (and count), those that the captions need."""
    round_s: list[float] = field(default_factory=list)
    """Seconds of each round over all forwards."""
    difference: Difference | None = None
    """None where the reference could not be run."""

    @property
    def peak_bytes(self) -> int | None:
        if self.forward_bytes is None or self.buffer_bytes is None:
            return None
        return self.weight_bytes + self.buffer_bytes + self.forward_bytes


@dataclass(frozen=True)
class EncoderBench:
    """The variants of one encoder over the same captions."""

    name: str
    mode: str
    dtype: str
    chosen: str
    """How the captions were chosen."""
    num_captions: int
    num_tokens: int
    """Tokens whose embeddings count: real ones, and without a mask the pads too."""
    flops: float
    """Multiplications and additions these tokens need: no filler, no pad that is masked."""
    gemm_flops: list[float]
    """Per round, the rate of one square matrix product in the dtype the encoder computes in."""
    num_compared: int
    """Captions whose embeddings were compared with the reference's in float32."""
    rounding: Difference | None
    """Of the float32 reference itself, when stored in output.dtype."""
    measured: list[Measured]
    left_out: dict[str, str]
    """Variant -> why it was not measured."""

    def of(self, variant: str) -> Measured | None:
        return next((each for each in self.measured if each.variant == variant), None)

    def figures(self, measured: Measured) -> dict[str, float | None]:
        """The columns of the table."""
        seconds = statistics.median(measured.round_s)
        base = self.of(BASE)
        return {
            "captions_per_s": self.num_captions / seconds,
            "tokens_per_s": self.num_tokens / seconds,
            "of_gemm": statistics.median(
                self.flops / spent / rate
                for spent, rate in zip(measured.round_s, self.gemm_flops, strict=True)
            ),
            "fused_is": None if base is None else statistics.median(_ratios(measured, base)),
            "peak_bytes": measured.peak_bytes,
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

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> BenchReport:
        return cls(written["environment"], [_encoder(each) for each in written["encoders"]])

    def lines(self) -> list[str]:
        lines = [", ".join(f"{name} {value}" for name, value in self.environment.items())]
        for encoder in self.encoders:
            lines += encoder_lines(encoder)
        return lines


def _encoder(written: dict[str, Any]) -> EncoderBench:
    measured = []
    for entry in written["measured"]:
        known = {key: value for key, value in entry.items() if key != "figures"}
        known["batches"] = [(count, length) for count, length in entry["batches"]]
        known["difference"] = _difference(entry["difference"])
        measured.append(Measured(**known))
    rounding = _difference(written["rounding"])
    return EncoderBench(**{**written, "measured": measured, "rounding": rounding})


def _difference(written: dict[str, float] | None) -> Difference | None:
    return None if written is None else Difference(**written)


def encoder_lines(bench: EncoderBench) -> list[str]:
    """The table of one encoder, and what stands behind it."""
    mean = bench.num_tokens / bench.num_captions
    lines = ["", f"{bench.name}: {bench.mode}, {bench.dtype}"]
    lines.append(
        f"  {bench.num_captions:,} captions, {bench.num_tokens:,} tokens (mean {mean:.1f}): "
        f"{bench.chosen}"
    )
    if bench.measured:
        rate = statistics.median(bench.gemm_flops)
        lines.append(
            f"  {len(bench.gemm_flops)} rounds, medians; a {GEMM_SIZE} x {GEMM_SIZE} product runs "
            f"at {rate / 1e9:,.0f} GFLOP/s; differences are from hf in float32, over "
            f"{bench.num_compared} captions"
        )
        lines += _table(bench)
    if bench.rounding is not None:
        lines.append(f"  storing the embeddings rounds them by {bench.rounding.relative:.1e}")
    lines += [f"  {line}" for measured in bench.measured for line in _behind(measured)]
    reference, shardformer = bench.of(REFERENCE), bench.of("shardformer")
    if reference is not None and shardformer is not None:
        lines.append(f"  {comparison(shardformer, reference)}; {CLAIM}")
    return lines + [f"  {name} left out: {reason}" for name, reason in bench.left_out.items()]


def _table(bench: EncoderBench) -> list[str]:
    width = max(len(measured.variant) for measured in bench.measured)
    lines = [
        f"  {'':<{width}} {'captions/s':>11} {'tokens/s':>10} {'of GEMM':>8} {'fused is':>9} "
        f"{'peak memory':>13} {'largest diff':>13} {'relative':>9} {'rms':>8}"
    ]
    for measured in bench.measured:
        figures, difference = bench.figures(measured), measured.difference
        fused = figures["fused_is"]
        lines.append(
            f"  {measured.variant:<{width}} {figures['captions_per_s']:>11,.1f} "
            f"{figures['tokens_per_s']:>10,.0f} {figures['of_gemm']:>8.2f} "
            f"{'-' if fused is None else f'{fused:.2f}x':>9} {_mib(measured.peak_bytes):>13} "
            f"{'-' if difference is None else f'{difference.largest:.2e}':>13} "
            f"{'-' if difference is None else f'{difference.relative:.1e}':>9} "
            f"{'-' if difference is None else f'{difference.rms:.1e}':>8}"
        )
    return lines


def _behind(measured: Measured) -> list[str]:
    """One variant's forwards, start and memory."""
    parts = [
        f"{_shapes(measured.batches)}, {100 * measured.real_share:.0f} % of it needed",
        f"{statistics.median(measured.round_s):.4f} s a round",
        f"{measured.start_s:.1f} s to start",
        f"weights {_mib(measured.weight_bytes)}, buffers {_mib(measured.buffer_bytes)}, a forward "
        f"{_mib(measured.forward_bytes)}",
    ]
    if measured.counted != len(measured.batches):
        parts[0] += f" (counted as {measured.counted:.2f} forwards)"
    return [f"{measured.variant}: {'; '.join(parts)}"]


def _shapes(batches: Sequence[tuple[int, int]]) -> str:
    """How many forwards there are of each shape; of many shapes the range."""
    shapes = Counter(batches)
    if len(shapes) <= SHAPES_LISTED:
        return ", ".join(f"{n} of {count} x {length}" for (count, length), n in shapes.items())
    lengths = [length for _, length in batches]
    most = max(count for count, _ in batches)
    return f"{len(batches)} of at most {most} x {min(lengths)} to {max(lengths)}"


def _ratios(ours: Measured, base: Measured) -> list[float]:
    """Round by round, how many times `base`'s seconds `ours` took."""
    return [a / b for a, b in zip(ours.round_s, base.round_s, strict=True)]


def comparison(ours: Measured, reference: Measured) -> str:
    """Time and memory of one variant against another."""
    changes: Sequence[float] = [100 * (ratio - 1) for ratio in _ratios(ours, reference)]
    text = (
        f"{ours.variant} against {reference.variant}: time {statistics.median(changes):+.1f} % "
        f"({min(changes):+.1f} to {max(changes):+.1f})"
    )
    peaks = ours.peak_bytes, reference.peak_bytes
    if peaks[0] is not None and peaks[1] is not None:
        text += f", peak memory {100 * (peaks[0] / peaks[1] - 1):+.1f} %"
    return text


def _mib(count: float | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:,.1f} MiB"
