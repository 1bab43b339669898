"""One encoder: its variants over the same captions, in turn.

Guarantees: the variants take turns in one process, in alternating order, so that what slows the
machine slows them alike. A forward that too few captions are left to fill counts by its filled
part, for in a job that happens once in a unit of thousands. Differences are from transformers in
float32 with the same weights. A variant that fails is left out, with the reason.
Costs: the weights of all variants are in memory at once; before that the weights in float32. Every
variant encodes the captions once before the first round.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from embed_precompute.bench import memory
from embed_precompute.bench.report import GEMM_SIZE, Difference, EncoderBench, Measured
from embed_precompute.bench.variants import MODES, VariantMaker, mode_of
from embed_precompute.bench.workload import WINDOW, Ids, Workload
from embed_precompute.encoders import resolve as encoder_registry
from embed_precompute.encoders.batching import TokenBatch, make_batch
from embed_precompute.encoders.fused.encoder import compute_dtype
from embed_precompute.encoders.spec import ResolvedEncoder, TextEncoder
from embed_precompute.errors import InputError

NUM_COMPARED = 24
"""Captions that are encoded in float32 as well: of the first window, from the shortest to the
longest."""
COMPARED_AT_ONCE = 6
"""Of them, those of one forward: the scores of all would be gigabytes."""
MEMORY_RUNS = 2
"""Forwards whose memory is looked at; the smaller figure is less the allocator's leftovers."""
OURS = ("hf", "fused")
"""Whose failures, other than for bad input, are bugs: no other program has a part in them."""

Embeddings = dict[int, torch.Tensor]
"""Caption -> what is stored of it."""


@dataclass(frozen=True)
class Contestant:
    """A variant that is ready for the rounds."""

    encoder: TextEncoder
    batches: list[TokenBatch]
    shares: list[float]
    """How much of each forward's seconds counts."""
    measured: Measured


def bench_encoder(
    resolved: ResolvedEncoder,
    workload: Workload,
    names: Sequence[str] | None,
    *,
    device: str,
    output_dtype: str,
    num_rounds: int,
) -> EncoderBench:
    """Measure the variants `names` (all of its mode when None) of `resolved`, the reference."""
    ids, left_out = workload.ids, dict[str, str]()
    lengths = [resolved.padded_length or len(tokens) for tokens in ids]
    compared = _evenly(ids)
    try:
        exact = _in_float32(resolved, ids, compared, device)
    except InputError as error:
        exact = {}
        left_out["the difference from float32"] = str(error)
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
    maker = VariantMaker(resolved, ids, device, output_dtype)
    _forget_compiled()
    ready = []
    for name in names or MODES[mode_of(resolved)]:
        try:
            ready.append(_prepare(name, maker, exact, sum(lengths), device))
        except InputError as error:
            left_out[name] = str(error)
        except Exception as error:  # of transformers, torch.compile or ColossalAI, on their own
            if name in OURS:
                raise
            left_out[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    gemm = []
    for number in range(num_rounds if ready else 0):
        gemm.append(_gemm_flops(resolved, device))
        for each in ready if number % 2 == 0 else reversed(ready):
            each.measured.round_s.append(_seconds(each))
    stored = {row: tensor.to(getattr(torch, output_dtype)) for row, tensor in exact.items()}
    rounding = difference(stored, exact) if exact else None
    return EncoderBench(
        name=resolved.name,
        mode=mode_of(resolved),
        dtype=resolved.config.dtype,
        chosen=workload.chosen,
        num_captions=len(ids),
        num_tokens=sum(lengths),
        flops=useful_flops(resolved, lengths),
        gemm_flops=gemm,
        num_compared=len(exact),
        rounding=rounding if rounding is not None and rounding.largest else None,
        measured=[each.measured for each in ready],
        left_out=left_out,
    )


def _prepare(
    name: str, maker: VariantMaker, exact: Embeddings, num_tokens: int, device: str
) -> Contestant:
    """Load a variant, and let it encode everything once."""
    began = time.perf_counter()
    encoder, forwards = maker.make(name)
    batches = forwards.batches
    held = memory.held(device)
    found: Embeddings = {}
    for batch in batches:
        output = encoder.encode(batch)
        found |= _captions_of(output, batch, encoder.resolved, exact)
    shares = [forwards.times * share for share in counted_shares(batches)]
    measured = Measured(
        variant=name,
        weight_bytes=encoder.weight_bytes(),
        start_s=time.perf_counter() - began,
        batches=[(b.input_ids.shape[0], b.input_ids.shape[1]) for b in batches],
        counted=sum(shares),
        real_share=_real_share(batches, shares, num_tokens),
        difference=difference(found, exact) if exact else None,
    )
    after = memory.held(device)
    if held is not None and after is not None:
        measured.buffer_bytes = max(0, after - held)
    largest = max(batches, key=lambda batch: batch.input_ids.size)
    runs = [
        memory.growth(device, functools.partial(encoder.encode, largest))
        for _ in range(MEMORY_RUNS)
    ]
    grown = [value for value in runs if value is not None]
    measured.forward_bytes = min(grown) if grown else None
    return Contestant(encoder, batches, shares, measured)


def counted_shares(batches: Sequence[TokenBatch]) -> list[float]:
    """Of each forward the part that counts: 1, but of the last of its shape only the part that is
    filled, beside how far the others of that shape are."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for number, batch in enumerate(batches):
        by_shape.setdefault(batch.input_ids.shape, []).append(number)
    shares = [1.0] * len(batches)
    for numbers in by_shape.values():
        *others, last = numbers
        usual = statistics.mean(_filled(batches[number]) for number in others) if others else 1.0
        shares[last] = min(1.0, _filled(batches[last]) / usual)
    return shares


def _filled(batch: TokenBatch) -> float:
    """The part of a forward that holds captions."""
    if batch.packed:
        return float(batch.lengths.sum() / batch.input_ids.size)
    return float(len(batch.rows) / batch.input_ids.shape[0])


def _real_share(batches: Sequence[TokenBatch], shares: Sequence[float], num_tokens: int) -> float:
    computed = sum(b.input_ids.size * share for b, share in zip(batches, shares, strict=True))
    return num_tokens / computed


def _evenly(ids: Ids) -> list[int]:
    """Captions of the first window, which every variant encodes, from short to long."""
    order = sorted(range(min(WINDOW, len(ids))), key=lambda row: len(ids[row]))
    count = min(NUM_COMPARED, len(order))
    if count == 1:
        return order[:1]
    return [order[number * (len(order) - 1) // (count - 1)] for number in range(count)]


def _in_float32(resolved: ResolvedEncoder, ids: Ids, rows: list[int], device: str) -> Embeddings:
    """transformers' embeddings of the captions `rows`; the model is dropped."""
    _check_room(resolved, device)
    length = resolved.padded_length or max(len(ids[row]) for row in rows)
    frame = (min(len(rows), COMPARED_AT_ONCE), length)
    config = dataclasses.replace(resolved.config, dtype="float32", tf32=False)
    exact = dataclasses.replace(resolved, config=config, shapes=(frame,))
    tokenizer = resolved.tokenizer
    encoder = encoder_registry.build(exact, device, "float32")
    found: Embeddings = {}
    for first in range(0, len(rows), frame[0]):
        some = rows[first : first + frame[0]]
        batch = make_batch(ids, some, frame, tokenizer.pad_id, tokenizer.filler)
        found |= _captions_of(encoder.encode(batch), batch, exact, some)
    return found


def _check_room(resolved: ResolvedEncoder, device: str) -> None:
    """Raise InputError where the layers in float32 are too much: a CPU's kernel would kill us."""
    layers, weights, _ = _layers(resolved)
    needed, free = 4 * layers * weights, memory.available(device)
    if free is not None and needed > free:
        raise InputError(
            f"the layers in float32 take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free."
        )


def _captions_of(
    output: torch.Tensor | list[torch.Tensor],
    batch: TokenBatch,
    resolved: ResolvedEncoder,
    wanted: Sequence[int] | Embeddings,
) -> Embeddings:
    """What would be stored of the captions `wanted`: of masked lines only real tokens."""
    whole = resolved.pooled or resolved.padded_length is not None
    return {
        row: output[line].clone() if whole else output[line][: batch.lengths[line]].clone()
        for line, row in enumerate(batch.rows.tolist())
        if row in wanted
    }


def difference(ours: Embeddings, exact: Embeddings) -> Difference:
    """Over all captions of `exact`."""
    pairs = [(ours[row].double(), expected.double()) for row, expected in exact.items()]
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    scale = max(float(b.abs().max()) for _, b in pairs)
    wrong = sum(float((a - b).square().sum()) for a, b in pairs)
    power = sum(float(b.square().sum()) for _, b in pairs)
    return Difference(largest, largest / scale, (wrong / power) ** 0.5)


def _seconds(contestant: Contestant) -> float:
    """Of one turn; a forward ends with a copy to the CPU, so the device is done."""
    total = 0.0
    for batch, share in zip(contestant.batches, contestant.shares, strict=True):
        started = time.perf_counter()
        contestant.encoder.encode(batch)
        total += share * (time.perf_counter() - started)
    return total


def useful_flops(resolved: ResolvedEncoder, lengths: Sequence[int]) -> float:
    """Of the layers over captions of these lengths: two for each weight of a linear and token, and
    four L^2 for each channel of the attention (half of them masked in CLIP, and yet counted)."""
    layers, weights, inner = _layers(resolved)
    squares = sum(length * length for length in lengths)
    return float(layers * (2 * weights * sum(lengths) + 4 * squares * inner))


def _layers(resolved: ResolvedEncoder) -> tuple[int, int, int]:
    """How many layers, how many weights in the linears of each, how wide its attention."""
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
    return layers, 4 * width * inner + matrices * width * hidden, inner


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


def _forget_compiled() -> None:
    """An earlier encoder's code counts against the number of variants torch.compile keeps."""
    import torch._dynamo as dynamo

    compiler: Any = dynamo
    compiler.reset()
