"""Measure an encoder's implementations side by side on the device at hand.

Guarantees: all implementations of an encoder get the same batches and take turns in one process, in
alternating order, so that what slows the machine slows them alike; ratios are medians over rounds.
Differences are of the embeddings as a job would store them. Nothing is written, no dataset touched.
Costs: the weights of every implementation are in memory at once. Peak memory is the weights plus
what the largest forward adds: exact on a GPU (torch's allocator); on a CPU the growth of the
process's resident memory, which wavers by some tens of MiB.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embed_precompute import encoders as encoder_registry
from embed_precompute.batching import TokenBatch
from embed_precompute.config import Config
from embed_precompute.distributed import DistContext
from embed_precompute.encoders import ResolvedEncoder, TextEncoder, shardformer
from embed_precompute.errors import InputError
from embed_precompute.preflight import environment, prepare, resolve_device

REFERENCE = "hf"
WARM_UP = 2
"""Forwards before the first measurement: torch.jit specialises its code during them."""
MEMORY_RUNS = 2
"""Forwards whose memory is looked at; the smaller figure is less the allocator's leftovers."""
MAX_CAPTIONS = 4096
"""Captions looked at when no number is given."""
CLAIM = "claimed for Shardformer: 20 % less memory, 33 % less time per batch"


@dataclass(frozen=True)
class Difference:
    """How far embeddings are from the reference's."""

    largest: float
    """max |a - b|"""
    relative: float
    """max |a - b| / max |b|"""
    identical: bool
    """Every bit."""


@dataclass
class Measured:
    """One implementation of one encoder."""

    implementation: str
    weight_bytes: int
    forward_bytes: int | None = None
    """Memory the largest forward takes beside the weights; None where it cannot be measured."""
    round_s: list[float] = field(default_factory=list)
    """Seconds of each round over all batches."""
    difference: Difference | None = None
    """From the reference; None for the reference itself."""


@dataclass(frozen=True)
class EncoderBench:
    """All implementations of one encoder over the same batches."""

    name: str
    dtype: str
    num_captions: int
    batches: list[tuple[int, int]]
    """(B, L) of each batch."""
    measured: list[Measured]
    """The reference first."""
    left_out: dict[str, str]
    """Implementation -> why it was not measured."""


@dataclass(frozen=True)
class BenchReport:
    """What `embed-precompute bench` found."""

    environment: dict[str, str]
    encoders: list[EncoderBench]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def lines(self) -> list[str]:
        lines = [", ".join(f"{name} {value}" for name, value in self.environment.items())]
        for encoder in self.encoders:
            lines += _encoder_lines(encoder)
        return lines


def bench(config: Config, num_captions: int | None = None, num_rounds: int = 5) -> BenchReport:
    """Measure every encoder of `config` on its first `num_captions` captions.

    When not given, these are as many as one batch of each of its shapes holds. Raises InputError as
    a run would: captions, checkpoints, memory.
    """
    with tempfile.TemporaryDirectory() as folder:  # an output without a plan; nothing is put there
        output = dataclasses.replace(config.output, path=str(Path(folder, "none")))
        prepared = prepare(dataclasses.replace(config, output=output), num_captions or MAX_CAPTIONS)
    plan = prepared.plan
    samples = prepared.table.reader(plan.num_rows, plan.last_row_samples).read(0, plan.num_rows)
    texts = [sample.text for sample in samples if sample.text is not None]
    if not texts:
        raise InputError(
            f"captions.path {config.captions.path!r}: none of the first {len(samples)} samples has "
            "a text. Give --captions a larger number."
        )
    device = resolve_device(config.runtime.device, DistContext())
    measured = []
    for resolved in prepared.encoders:
        first = texts[: num_captions or sum(lines for lines, _ in resolved.shapes)]
        measured.append(_bench_encoder(resolved, first, device, config.output.dtype, num_rounds))
    return BenchReport(_environment(device), measured)


def _environment(device: str) -> dict[str, str]:
    here = environment(device)
    names = ("device", "torch", "transformers")
    found = {name: here[name] for name in names}
    found["threads"] = str(torch.get_num_threads())
    try:
        found["colossalai"] = importlib.metadata.version("colossalai")
    except importlib.metadata.PackageNotFoundError:
        found["colossalai"] = "not installed"
    return found


def _bench_encoder(
    resolved: ResolvedEncoder, texts: Sequence[str], device: str, output_dtype: str, num_rounds: int
) -> EncoderBench:
    names, left_out = _implementations(resolved)
    built = {
        name: encoder_registry.build(
            dataclasses.replace(resolved, implementation=name), device, output_dtype
        )
        for name in names
    }
    tokenizer = resolved.tokenizer
    ids = tokenizer.encode(texts).ids
    batches = list(resolved.batches(ids))
    measured = {name: Measured(name, encoder.weight_bytes()) for name, encoder in built.items()}
    for batch in batches:
        _warm_up(built, measured, batch, device)
    for number in range(num_rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            measured[name].round_s.append(_seconds(built[name], batches))
    return EncoderBench(
        name=resolved.name,
        dtype=resolved.config.dtype,
        num_captions=len(texts),
        batches=[(batch.input_ids.shape[0], batch.input_ids.shape[1]) for batch in batches],
        measured=[measured[name] for name in names],
        left_out=left_out,
    )


def _implementations(resolved: ResolvedEncoder) -> tuple[list[str], dict[str, str]]:
    """Those that can run here, the reference first; and why others cannot."""
    if resolved.pooled:
        return [REFERENCE], {}
    try:
        shardformer.check_usable("not measured", resolved.model_type)
    except InputError as error:
        return [REFERENCE], {"shardformer": str(error)}
    return [REFERENCE, "shardformer"], {}


def _warm_up(
    built: dict[str, TextEncoder], measured: dict[str, Measured], batch: TokenBatch, device: str
) -> None:
    """Run a batch through all, unmeasured; then find the memory and the differences."""
    reference: torch.Tensor | None = None
    for name, encoder in built.items():
        for _ in range(WARM_UP):
            output = encoder.encode(batch)
        rows = _real(output, batch, encoder.resolved)
        if reference is None:
            reference = rows
        else:
            found = _difference(rows, reference)
            known = measured[name].difference
            measured[name].difference = found if known is None else _worse(found, known)
        del output, rows
        runs = [
            _growth(device, functools.partial(encoder.encode, batch)) for _ in range(MEMORY_RUNS)
        ]
        grown = [value for value in runs if value is not None]
        if grown:
            measured[name].forward_bytes = max(min(grown), measured[name].forward_bytes or 0)


def _real(
    output: torch.Tensor | list[torch.Tensor], batch: TokenBatch, resolved: ResolvedEncoder
) -> torch.Tensor:
    """What would be stored of a batch, as [n, D]: no filler, of masked lines only real tokens."""
    num_lines = len(batch.rows)
    if isinstance(output, torch.Tensor) and (resolved.pooled or resolved.padded_length is not None):
        return output[:num_lines].flatten(0, -2)
    return torch.cat([output[line][: batch.lengths[line]] for line in range(num_lines)])


def _difference(ours: torch.Tensor, reference: torch.Tensor) -> Difference:
    largest = float((ours.double() - reference.double()).abs().max())
    scale = float(reference.double().abs().max())
    return Difference(largest, largest / scale, torch.equal(ours, reference))


def _worse(a: Difference, b: Difference) -> Difference:
    return Difference(
        max(a.largest, b.largest), max(a.relative, b.relative), a.identical and b.identical
    )


def _seconds(encoder: TextEncoder, batches: Sequence[TokenBatch]) -> float:
    started = time.perf_counter()
    for batch in batches:
        encoder.encode(batch)  # ends with a copy to the CPU, so the device is done
    return time.perf_counter() - started


def _growth(device: str, forward: Callable[[], object]) -> int | None:
    """Bytes of memory that `forward` needs at its height beyond what is held before it."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        return torch.cuda.max_memory_allocated(device) - before
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # else what an earlier forward freed is still resident
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the height is now what is resident
    except OSError:
        return None
    before = _resident("VmRSS")
    forward()
    return max(0, _resident("VmHWM") - before)


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise InputError(f"/proc/self/status has no {name}: this kernel does not report memory.")


def _encoder_lines(bench: EncoderBench) -> list[str]:
    shapes = ", ".join(f"{lines} x {length}" for lines, length in bench.batches)
    rounds = len(bench.measured[0].round_s)
    lines = [
        "",
        f"{bench.name} ({bench.dtype}): {bench.num_captions:,} captions in batches of {shapes}; "
        f"{rounds} rounds, medians",
        f"  {'':<12} {'weights':>12} {'peak':>12} {'s/batch':>9} {'captions/s':>11}",
    ]
    for measured in bench.measured:
        seconds = statistics.median(measured.round_s)
        lines.append(
            f"  {measured.implementation:<12} {_mib(measured.weight_bytes):>12} "
            f"{_mib(_peak(measured)):>12} {seconds / len(bench.batches):>9.4f} "
            f"{bench.num_captions / seconds:>11.1f}"
        )
    for measured in bench.measured[1:]:
        lines.append(f"  {_comparison(measured, bench.measured[0])}")
        if measured.implementation == "shardformer":
            lines.append(f"  {CLAIM}")
    return lines + [f"  {name}: {reason}" for name, reason in bench.left_out.items()]


def _peak(measured: Measured) -> int | None:
    if measured.forward_bytes is None:
        return None
    return measured.weight_bytes + measured.forward_bytes


def _comparison(ours: Measured, reference: Measured) -> str:
    changes = [100 * (a / b - 1) for a, b in zip(ours.round_s, reference.round_s, strict=True)]
    text = (
        f"{ours.implementation} against {reference.implementation}: time per batch "
        f"{statistics.median(changes):+.1f} % ({min(changes):+.1f} to {max(changes):+.1f})"
    )
    peaks = _peak(ours), _peak(reference)
    if peaks[0] is not None and peaks[1] is not None:
        text += f", peak memory {100 * (peaks[0] / peaks[1] - 1):+.1f} %"
    if ours.difference is not None:
        found = ours.difference
        text += (
            ", every bit equal"
            if found.identical
            else f", largest difference {found.largest:.3g} (relative {found.relative:.2e})"
        )
    return text


def _mib(count: int | None) -> str:
    return "unknown" if count is None else f"{count / 2**20:,.1f} MiB"
