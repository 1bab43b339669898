"""One encoder: its variants over the same captions; speed, memory, and the distance from float32.

The variants of an encoder take turns in one process, in alternating order, so that what slows the
machine slows them alike. Each has the token batches of a job. A batch that too few captions are
left to fill counts by its filled part, for in a job that happens once in a unit of thousands.
Differences are from the family's reference in float32. A variant that cannot run is left out, with
the reason.

Every figure is a median over rounds. Ratios are medians of the rounds' own ratios, in which what
slowed a whole round cancels out.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from embed_precompute.encoders.checkpoint import quiet_transformers
from embed_precompute.encoders.device import check_machine
from embed_precompute.encoders.encoder import build
from embed_precompute.encoders.fused.stream import compute_dtype
from embed_precompute.encoders.loading import Source, num_bytes, num_parameters
from embed_precompute.encoders.resolve import ResolvedEncoder, resolve
from embed_precompute.encoders.tokenizer import TokenBatch, Tokenized
from embed_precompute.errors import InputError
from embed_precompute.steps import steps

OURS = {
    "hf": ("hf", False),
    "fused": ("fused", False),
    "fused-compile": ("fused", True),
    "shardformer": ("shardformer", False),
}
"""Variant -> implementation, compiled."""
NUM_COMPARED = 24
"""Captions that are encoded in float32 as well, from the shortest to the longest."""
GEMM_SIZE = 2048
"""Rows and columns of the square product whose rate is the peak."""
STATUS = "/proc/self/status"
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

    def figures(self, measured: Measured) -> dict[str, float | None]:
        """The columns of the table."""
        seconds = statistics.median(measured.round_s)
        base = next((each for each in self.measured if each.variant == BASE), None)
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
class Contestant:
    """A variant that is ready for the rounds."""

    encoder: Any
    """A TextEncoder, or what has its `encode` and `model`."""
    batches: Sequence[TokenBatch]
    shares: Sequence[float]
    """How much of each batch's seconds counts."""


Maker = Callable[[ResolvedEncoder, Tokenized, str, str], Contestant]
"""(encoder, captions, device, output dtype) -> a variant. Raises InputError: why there is none."""


def bench_encoder(
    encoder: ResolvedEncoder,
    texts: Sequence[str],
    makers: Mapping[str, Maker],
    num_rounds: int,
    device: str,
    output_dtype: str,
) -> EncoderBench:
    """Measure the variants `makers` of an encoder over the same captions."""
    captions = encoder.opened.tokenizer.encode(texts)
    left_out = dict[str, str]()
    try:
        exact = _in_float32(encoder, texts, captions, device)
    except InputError as error:
        exact, left_out["the difference from float32"] = {}, str(error)
    ready: list[tuple[Contestant, Measured]] = []
    for name, make in steps(makers.items(), len(makers), f"{encoder.name}: starting", " variants"):
        try:
            ready.append(_prepare(name, make, encoder, captions, exact, device, output_dtype))
        except InputError as error:
            left_out[name] = str(error)
    gemm = []
    num_rounds = num_rounds if ready else 0
    for number in steps(range(num_rounds), num_rounds, f"{encoder.name}: measuring", " rounds"):
        gemm.append(gemm_flops_of(encoder, device))
        for contestant, measured in ready if number % 2 == 0 else reversed(ready):
            measured.round_s.append(_seconds(contestant))
    lengths = [encoder.decision.padded_length or count for count in captions.num_ids]
    return EncoderBench(
        name=encoder.name,
        dtype=encoder.options.dtype,
        num_captions=len(captions),
        num_tokens=sum(lengths),
        flops=encoder.sizes.flops(lengths),
        gemm_flops=gemm,
        num_compared=len(exact),
        measured=[measured for _, measured in ready],
        left_out=left_out,
    )


def maker(name: str) -> Maker:
    implementation, compiled = OURS[name]

    def make(
        encoder: ResolvedEncoder, captions: Tokenized, device: str, output_dtype: str
    ) -> Contestant:
        variant = as_implementation(encoder, implementation, compiled=compiled)
        check_machine("cpu", device, [variant])
        built = build(variant, device, output_dtype)
        if not variant.decision.packed:
            batches = list(variant.batches(captions))
            return Contestant(built, batches, filled_shares(batches))
        lengths = variant.unshared(captions).num_ids
        rows = topped_up(lengths, variant.decision.shapes[0][1])
        batches = list(variant.batches(captions.select(rows)))
        share = sum(lengths) / sum(lengths[row] for row in rows)
        # Long captions of nearly one length leave gaps, and one more stream, nearly empty.
        filled = [int(batch.lengths.sum()) for batch in batches]
        return Contestant(built, batches, [share * each / max(filled) for each in filled])

    return make


def as_implementation(
    encoder: ResolvedEncoder, implementation: str, *, compiled: bool = False
) -> ResolvedEncoder:
    """The same encoder by another implementation of ours. Raises InputError: it cannot be that."""
    changes: dict[str, Any] = {"implementation": implementation, "compile": compiled}
    if implementation == "fused" and getattr(encoder.options, "buckets", None) is not None:
        changes["buckets"] = None  # they are for hf
    opened = dataclasses.replace(
        encoder.opened, options=dataclasses.replace(encoder.options, **changes)
    )
    return resolve(opened, stored={"padded_length": encoder.decision.padded_length})


def topped_up(lengths: Sequence[int], num_tokens: int) -> list[int]:
    """All captions of these lengths, and so many of them again as their last packed stream has
    space for.

    A job's streams are full. One that is not would seem cheap: its attention has little to do.
    """
    rows = list(range(len(lengths)))
    left = -sum(lengths) % num_tokens
    while fitting := [row for row, count in enumerate(lengths) if 0 < count <= left]:
        for row in fitting:
            if lengths[row] <= left:
                rows.append(row)
                left -= lengths[row]
    return rows


def filled_shares(batches: Sequence[TokenBatch]) -> list[float]:
    """For each batch of padded lines the part of it that captions fill."""
    return [len(batch.rows) / batch.input_ids.shape[0] for batch in batches]


def _prepare(
    name: str,
    make: Maker,
    encoder: ResolvedEncoder,
    captions: Tokenized,
    exact: Mapping[int, Mapping[str, torch.Tensor]],
    device: str,
    output_dtype: str,
) -> tuple[Contestant, Measured]:
    """Load a variant, let it encode everything once, and look at its memory and numbers."""
    began = time.perf_counter()
    before = _memory(device)
    contestant = make(encoder, captions, device, output_dtype)
    pairs: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for batch in contestant.batches:
        outputs = contestant.encoder.encode(batch)
        for line, row in enumerate(batch.rows.tolist()):
            for suffix, expected in exact.get(row, {}).items():
                found = outputs[suffix][line].double()
                pairs.setdefault(row, []).append((found, expected.double()))
    measured = Measured(name, num_bytes(contestant.encoder.model), time.perf_counter() - began)
    with contextlib.suppress(OSError):  # a container may forbid it: then the peak is not known
        if on_gpu := device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _memory(device)
            Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        contestant.encoder.encode(max(contestant.batches, key=lambda batch: batch.input_ids.size))
        after = torch.cuda.max_memory_allocated(device) if on_gpu else _kib(STATUS, "VmHWM")
        if before is not None and after is not None:
            measured.peak_bytes = max(0, after - before)
    if pairs:
        both = [pair for each in pairs.values() for pair in each]
        scale = max(float(b.abs().max()) for _, b in both)
        measured.relative = max(float((a - b).abs().max()) for a, b in both) / scale
        wrong = sum(float((a - b).square().sum()) for a, b in both)
        measured.rms = (wrong / sum(float(b.square().sum()) for _, b in both)) ** 0.5
    return contestant, measured


def _in_float32(
    encoder: ResolvedEncoder, texts: Sequence[str], captions: Tokenized, device: str
) -> dict[int, dict[str, torch.Tensor]]:
    """Caption -> suffix -> the reference's embedding of some captions; the model is dropped.

    Raises InputError where its weights are too much: a CPU's kernel would kill this process.
    """
    opened = encoder.opened
    needed = 4 * num_parameters(Source(opened.checkpoint, encoder.family, opened.options))
    free = None if device.startswith("cuda") else _kib("/proc/meminfo", "MemAvailable")
    if free is not None and needed > free:
        raise InputError(
            f"the weights take {needed / 2**30:.1f} GiB in float32, {free / 2**30:.1f} are free."
        )
    options = dataclasses.replace(opened.options, dtype="float32", tf32=False)
    order = sorted(range(len(texts)), key=lambda row: captions.num_ids[row])
    with quiet_transformers():
        reference = encoder.family.reference(
            opened.checkpoint.folder, opened.tokenizer_folder, options, device
        )
        return {
            order[row]: {
                suffix: values.cpu()
                for suffix, values in reference(
                    texts[order[row]], encoder.decision.padded_length
                ).items()
            }
            for row in {n * len(order) // NUM_COMPARED for n in range(NUM_COMPARED)}
        }


def _seconds(contestant: Contestant) -> float:
    """Seconds of one turn; a batch ends with a copy to the CPU, so the device is done."""
    total = 0.0
    for batch, share in zip(contestant.batches, contestant.shares, strict=True):
        started = time.perf_counter()
        contestant.encoder.encode(batch)
        total += share * (time.perf_counter() - started)
    return total


def gemm_flops_of(encoder: ResolvedEncoder, device: str) -> float:
    """Multiplications and additions per second of one square product: the median of five."""
    dtype = compute_dtype(getattr(torch, encoder.options.dtype), torch.device(device))
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - began)
    return float(2 * GEMM_SIZE**3 / statistics.median(seconds[1:]))


def _memory(device: str) -> int | None:
    """Bytes that are held now: by torch's allocator on a GPU, else resident in this process."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what the C library holds back
    return _kib(STATUS, "VmRSS")


def _kib(path: str, name: str) -> int | None:
    """Bytes of a line such as `VmRSS: 10 kB`; None where there is none."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
