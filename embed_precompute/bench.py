"""Measure an encoder's implementations side by side on the device at hand.

Guarantees: all implementations of an encoder get the same captions, each in the forwards it would
have in a job, and take turns in one process, in alternating order, so that what slows the machine
slows them alike; ratios are medians over rounds. Differences are of the embeddings as a job would
store them, caption by caption. Nothing is written, no dataset touched.
Costs: the weights of every implementation are in memory at once. Peak memory is the weights plus
what the largest forward adds: exact on a GPU (torch's allocator); on a CPU the growth of the
process's resident memory, which wavers by some tens of MiB.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embed_precompute import encoders as encoder_registry
from embed_precompute.batching import TokenBatch
from embed_precompute.config import Config
from embed_precompute.distributed import DistContext
from embed_precompute.encoders import ResolvedEncoder, TextEncoder
from embed_precompute.encoders.fused import compute_dtype
from embed_precompute.errors import InputError
from embed_precompute.preflight import environment, prepare, resolve_device

REFERENCE = "hf"
PADDED = "hf-pad"
"""The reference with every caption padded to max_length."""
GEMM_SIZE = 2048
"""Rows and columns of the square product whose rate is the peak."""
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
    batches: list[tuple[int, int]] = field(default_factory=list)
    """(B, L) of each forward; packed (1, T)."""
    difference: Difference | None = None
    """From the reference; None for the reference itself."""


@dataclass(frozen=True)
class EncoderBench:
    """All implementations of one encoder over the same batches."""

    name: str
    dtype: str
    num_captions: int
    num_tokens: int
    """Tokens whose embeddings count: real ones, and without a mask the pads too."""
    flops: float
    """Multiplications and additions these tokens need: no filler, no pad that is masked."""
    gemm_flops: list[float]
    """Per round, the rate of one square matrix product in the dtype the encoder computes in."""
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
        first = texts[: num_captions or _one_batch_of_each(resolved)]
        measured.append(_bench_encoder(resolved, first, device, config.output.dtype, num_rounds))
    return BenchReport(_environment(device), measured)


def _one_batch_of_each(resolved: ResolvedEncoder) -> int:
    """As many captions as one batch of each of the reference's shapes holds."""
    return sum(lines for lines, _ in _variants(resolved)[0][REFERENCE].shapes)


def _environment(device: str) -> dict[str, str]:
    here = environment(device)
    names = ("device", "torch", "transformers")
    found = {name: here[name] for name in names}
    found["cpu_capability"] = here["cpu_capability"]
    found["threads"] = str(torch.get_num_threads())
    set_by = ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")
    chosen = [f"{name}={os.environ[name]}" for name in set_by if os.environ.get(name)]
    found["allocator"] = " ".join(chosen) or "default"
    try:
        found["colossalai"] = importlib.metadata.version("colossalai")
    except importlib.metadata.PackageNotFoundError:
        found["colossalai"] = "not installed"
    return found


def _bench_encoder(
    resolved: ResolvedEncoder, texts: Sequence[str], device: str, output_dtype: str, num_rounds: int
) -> EncoderBench:
    variants, left_out = _variants(resolved)
    built = {
        name: encoder_registry.build(variant, device, output_dtype)
        for name, variant in variants.items()
    }
    ids = resolved.tokenizer.encode(texts).ids
    batches = {name: list(variant.batches(ids)) for name, variant in variants.items()}
    measured = {
        name: Measured(
            name,
            encoder.weight_bytes(),
            batches=[(b.input_ids.shape[0], b.input_ids.shape[1]) for b in batches[name]],
        )
        for name, encoder in built.items()
    }
    _warm_up(built, measured, batches, device)
    gemm = []
    for number in range(num_rounds):
        gemm.append(_gemm_flops(resolved, device))
        for name in built if number % 2 == 0 else reversed(built):
            measured[name].round_s.append(_seconds(built[name], batches[name]))
    lengths = [resolved.padded_length or len(tokens) for tokens in ids]
    return EncoderBench(
        name=resolved.name,
        dtype=resolved.config.dtype,
        num_captions=len(texts),
        num_tokens=sum(lengths),
        flops=useful_flops(resolved, lengths),
        gemm_flops=gemm,
        measured=list(measured.values()),
        left_out=left_out,
    )


def _variants(
    resolved: ResolvedEncoder,
) -> tuple[dict[str, ResolvedEncoder], dict[str, str]]:
    """What can run here, the reference first; and why the rest cannot."""
    changes: dict[str, dict[str, Any]] = {REFERENCE: {}}
    left_out = {}
    if resolved.padded_length is None:
        changes[PADDED] = {"buckets": ()}
    changes["fused"] = {"implementation": "fused", "compile": resolved.compiled, "buckets": None}
    if not resolved.pooled:
        changes["shardformer"] = {"implementation": "shardformer"}
    variants = {}
    for name, change in changes.items():
        settings = {"implementation": REFERENCE, "compile": False, **change}
        try:
            config = dataclasses.replace(resolved.config, **settings)
            variants[name] = encoder_registry.resolve(resolved.name, config, resolved.padded_length)
        except InputError as error:
            left_out[name] = str(error)
    return variants, left_out


def useful_flops(resolved: ResolvedEncoder, lengths: Sequence[int]) -> float:
    """Of the layers over captions of these lengths: two for each weight of a linear and token, and
    four L^2 for each channel of the attention (half of them masked in CLIP, and yet counted)."""
    config = json.loads((resolved.folder / "config.json").read_text())
    config = config.get("text_config") or config
    if resolved.pooled:
        width, layers = config["hidden_size"], config["num_hidden_layers"]
        inner, matrices = width, 2
        hidden = config["intermediate_size"]
    else:
        width, layers, hidden = config["d_model"], config["num_layers"], config["d_ff"]
        inner = config["num_heads"] * config["d_kv"]
        matrices = 3 if config.get("feed_forward_proj", "relu").startswith("gated") else 2
    weights = 4 * width * inner + matrices * width * hidden
    squares = sum(length * length for length in lengths)
    return float(layers * (2 * weights * sum(lengths) + 4 * squares * inner))


def _gemm_flops(resolved: ResolvedEncoder, device: str) -> float:
    """Multiplications and additions per second of one square product: the median of five."""
    dtype = compute_dtype(getattr(torch, resolved.config.dtype), torch.device(device))
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return float(2 * GEMM_SIZE**3 / statistics.median(seconds[1:]))


def _warm_up(
    built: dict[str, TextEncoder],
    measured: dict[str, Measured],
    batches: dict[str, list[TokenBatch]],
    device: str,
) -> None:
    """Run the batches through all, unmeasured; then find the memory and the differences."""
    reference: dict[int, torch.Tensor] = {}
    for name, encoder in built.items():
        first_of_shape = {batch.input_ids.shape: batch for batch in reversed(batches[name])}
        for batch in first_of_shape.values():
            for _ in range(WARM_UP - 1):
                encoder.encode(batch)
            runs = [
                _growth(device, functools.partial(encoder.encode, batch))
                for _ in range(MEMORY_RUNS)
            ]
            grown = [value for value in runs if value is not None]
            if grown:
                measured[name].forward_bytes = max(min(grown), measured[name].forward_bytes or 0)
        found: dict[int, torch.Tensor] = {}
        for batch in batches[name]:
            found |= _captions_of(encoder.encode(batch), batch, encoder.resolved)
        if reference:
            measured[name].difference = _difference(found, reference)
        else:
            reference = found


def _captions_of(
    output: torch.Tensor | list[torch.Tensor], batch: TokenBatch, resolved: ResolvedEncoder
) -> dict[int, torch.Tensor]:
    """Row -> what would be stored of it: of masked lines only real tokens."""
    whole = resolved.pooled or resolved.padded_length is not None
    return {
        row: output[line] if whole else output[line][: batch.lengths[line]]
        for line, row in enumerate(batch.rows.tolist())
    }


def _difference(ours: dict[int, torch.Tensor], reference: dict[int, torch.Tensor]) -> Difference:
    """Over all captions."""
    pairs = [(ours[row].double(), expected.double()) for row, expected in reference.items()]
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    scale = max(float(b.abs().max()) for _, b in pairs)
    return Difference(largest, largest / scale, all(torch.equal(a, b) for a, b in pairs))


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
    rounds = len(bench.gemm_flops)
    peak = statistics.median(bench.gemm_flops)
    lines = [
        "",
        f"{bench.name} ({bench.dtype}): {bench.num_captions:,} captions, {bench.num_tokens:,} "
        f"tokens; {rounds} rounds, medians; a {GEMM_SIZE} x {GEMM_SIZE} product runs at "
        f"{peak / 1e9:,.0f} GFLOP/s",
        f"  {'':<12} {'weights':>12} {'peak':>12} {'s/round':>9} {'captions/s':>11} "
        f"{'tokens/s':>10} {'of GEMM':>8}",
    ]
    for measured in bench.measured:
        seconds = statistics.median(measured.round_s)
        share = statistics.median(
            bench.flops / spent / rate
            for spent, rate in zip(measured.round_s, bench.gemm_flops, strict=True)
        )
        lines.append(
            f"  {measured.implementation:<12} {_mib(measured.weight_bytes):>12} "
            f"{_mib(_peak(measured)):>12} {seconds:>9.4f} "
            f"{bench.num_captions / seconds:>11.1f} {bench.num_tokens / seconds:>10.0f} "
            f"{share:>8.2f}"
        )
    for measured in bench.measured:
        shapes = Counter(f"{count} x {length}" for count, length in measured.batches)
        listed = ", ".join(f"{n} of {shape}" for shape, n in shapes.items())
        lines.append(f"  {measured.implementation} forwards: {listed}")
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
    speed = statistics.median(b / a for a, b in zip(ours.round_s, reference.round_s, strict=True))
    text = (
        f"{ours.implementation} against {reference.implementation}: {speed:.2f}x the speed, time "
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
