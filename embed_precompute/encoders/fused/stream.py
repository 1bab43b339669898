"""What all fused layers share: their steps, token rows, buffers, attention, row-wise kernels.

Guarantees: attention is strictly inside a caption, at the caption's own length. A matrix product
takes the same number of rows wherever in the batch they are, and every kernel works row by row. So
the embedding of a caption has the same bits whatever the caption's neighbours and place are.
Compiled and uncompiled kernels differ in rounding only.
Costs: one set of buffers, which every forward uses again, so that the C library does not map their
pages each time. Compiled kernels cost seconds of torch.compile at the first call of each; all ranks
and runs of a node share its cache.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from embed_precompute.encoders.tokenizer import TokenBatch

MOST_VARIANTS = 256
"""Shapes and dtypes that one function is compiled for in a process."""
ATTENTION_TOKENS = 2048
"""At most this many keys of equally long captions are in one call, to fit in the cache."""
KERNEL_ROWS = 256
"""Number of rows in one kernel call: few enough to stay in a CPU's cache."""


@dataclass(frozen=True)
class EqualLengthRun:
    """Captions of one length that lie next to each other."""

    start: int
    count: int
    length: int
    pads: int = 0
    """So many positions at the end attend, and nothing attends to them."""


Forward = Callable[[torch.Tensor, TokenBatch], torch.Tensor]
"""The layers of one model over a batch: its token rows, [T] ids -> [T, D] after the final norm, or
[C, D] if captions are pooled.

Rows of no caption hold arbitrary numbers. The next forward may overwrite the tensor.
"""
State = TypeVar("State")
"""What a batch is between two layers."""


class FusedLayers(abc.ABC, Generic[State]):
    """A `Forward` in steps, so that many batches can pass a layer before the next one is needed.

    The weights of the linears in `blocks[n]` may be on the meta device except while `layer(n)`
    runs. Whatever else the model has is there from the start, norms and biases of layers included.
    """

    blocks: Sequence[torch.nn.Module]
    """transformers' modules of the layers that are run, in order."""

    @abc.abstractmethod
    def begin(self, ids: torch.Tensor, batch: TokenBatch, place: int = 0) -> State:
        """A batch before the first layer. `place`: 0, 1, ... for batches that are under way at the
        same time; what was begun earlier at the same place is overwritten."""

    @abc.abstractmethod
    def layer(self, number: int, state: State) -> None:
        """Take a batch through `blocks[number]`, in place."""

    @abc.abstractmethod
    def end(self, state: State) -> torch.Tensor:
        """What a `Forward` returns, after the last layer."""

    def __call__(self, ids: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """See `Forward`."""
        state = self.begin(ids, batch)
        for number in range(len(self.blocks)):
            self.layer(number, state)
        return self.end(state)


def runs_of(batch: TokenBatch) -> list[EqualLengthRun]:
    """The captions of a batch as runs of one length.

    Padded lines are all as long as the shape: their pads take part in attention.
    """
    lines, length = batch.input_ids.shape
    if not batch.packed:
        return [EqualLengthRun(0, lines, length)]
    runs: list[EqualLengthRun] = []
    start = 0
    sizes = zip(batch.extents.tolist(), (batch.extents - batch.lengths).tolist(), strict=True)
    for (extent, pads), captions in itertools.groupby(sizes):
        count = len(list(captions))
        runs.append(EqualLengthRun(start, count, extent, pads))
        start += count * extent
    return runs


def positions_of(runs: list[EqualLengthRun], num_tokens: int, first: int = 0) -> NDArray[np.int64]:
    """[num_tokens] each token's position in its caption, counted from `first`; 0 after the last
    caption."""
    position = np.zeros(num_tokens, dtype=np.int64)
    for run in runs:
        rows = slice(run.start, run.start + run.count * run.length)
        position[rows] = np.tile(np.arange(first, first + run.length), run.count)
    return position


def attention_calls(
    runs: list[EqualLengthRun], *, before: int = 0, one_by_one: bool = False
) -> Iterator[tuple[slice, int, int]]:
    """(rows, number of captions, their length) of each call of attention over a packed stream.

    `before`: number of keys that each caption attends to besides its own. `one_by_one`: a call for
    each caption.
    """
    for run in runs:
        at_once = 1 if one_by_one else max(1, ATTENTION_TOKENS // (before + run.length))
        for first in range(0, run.count, at_once):
            count = min(at_once, run.count - first)
            start = run.start + first * run.length
            yield slice(start, start + count * run.length), count, run.length


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without waiting for the work that the device has."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products run in: float32 on a CPU that has no hardware for `dtype`.

    On such a CPU float32 is hundreds of times faster, and no less exact.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    supported: bool = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if supported else torch.float32


class Workspace:
    """The buffers of one encoder, by name and shape, and the matrix products that fill them."""

    def __init__(self, weights: torch.Tensor, product_bytes: int, *, row_width: int) -> None:
        """`weights`: any weight of the model, for its device and dtype.

        On a CPU a product takes as many rows of `row_width` numbers as fit into `product_bytes`,
        but at least 2,048: with fewer rows, libraries split some sums among threads.
        """
        self.device, self.dtype = weights.device, compute_dtype(weights.dtype, weights.device)
        self._product_rows = max(2048, product_bytes // (row_width * self.dtype.itemsize))
        if self.device.type != "cpu" or self.dtype != weights.dtype:
            # One product, no parts: a GPU needs none, and for each part a weight of another dtype
            # would be converted again.
            self._product_rows = 1 << 62
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def row_blocks(self, num_tokens: int) -> list[slice]:
        """Equal parts of the token rows, one matrix product for each; the last part may reach past
        the end.

        One size for all, because a product's rounding depends on its number of rows.
        """
        count = -(-num_tokens // self._product_rows)
        size = -(-num_tokens // count)
        return [slice(start, start + size) for start in range(0, count * size, size)]

    def buffer(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The buffer with this name and shape, with its old content; zeros at first."""
        buffer = self._buffers.get((name, shape))
        if buffer is None:
            # Rows without a caption are computed, too: zeros, since old memory may hold nan.
            buffer = torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
            self._buffers[name, shape] = buffer
        return buffer

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in the dtype of the computation; valid until the next weight of its shape."""
        if weight.dtype == self.dtype:
            return weight
        return self.buffer("weight", *weight.shape).copy_(weight)

    def linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> None:
        """out[T, N] = x[T, K] weight[N, K]^T + bias[N]."""
        matrix = self.weight(weight).t()
        if bias is None:
            torch.mm(x, matrix, out=out)
        else:
            torch.addmm(bias.to(self.dtype), x, matrix, out=out)

    def add_linear(self, residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """residual += x weight^T, accumulated by the matrix product itself."""
        if weight.dtype == torch.float32 != self.dtype:  # T5's wo under float16
            residual.add_(functional.linear(x.float(), weight))
            return
        matrix = self.weight(weight).t()
        if residual.dtype == self.dtype:
            residual.addmm_(x, matrix)
        else:
            residual.add_(torch.mm(x, matrix))


def attend(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    runs: list[EqualLengthRun],
    out: torch.Tensor,
    *,
    heads: int,
    scale: float,
    causal: bool = False,
    bias: torch.Tensor | None = None,
) -> None:
    """Attention of every caption to itself alone.

    Each of `qkv` is [T, H*dk]. `causal`: a token attends to no later token. `bias` [H, L, L] is
    added to the scaled attention scores; its index 0 is the first token of each caption. Rows of
    `out` [T, H*dk] that belong to no caption are left as they are.
    """
    for run in runs:
        keys = run.length - run.pads
        mask = None if bias is None else bias[None, :, : run.length, :keys]
        for rows, count, length in attention_calls([run]):
            shape = (count, length, heads, -1)
            q, k, v = (part[rows].view(shape).transpose(1, 2) for part in qkv)
            mixed = functional.scaled_dot_product_attention(
                q, k[:, :, :keys], v[:, :, :keys], attn_mask=mask, is_causal=causal, scale=scale
            )  # [count, H, length, dk]
            out[rows].view(shape).copy_(mixed.transpose(1, 2))


def one_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On a GPU: attention by the kernel that sums over a caption's keys in one order, always.

    torch's other kernels choose their algorithm by the whole shape, or split the keys among idle
    processors. So a caption's sums would depend on how many captions of its length there are. The
    backend MATH is for head sizes that the kernel does not take; a model has one head size, and so
    always the same backend.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


class Kernels:
    """What a layer does besides products and attention, on buffers: embeddings, norms, gates."""

    def __init__(self, device: torch.device, *, compiled: bool) -> None:
        # A GPU takes all rows at once.
        self._rows = KERNEL_ROWS if device.type == "cpu" else 1 << 62
        self._compiled = compiled

    def embed(self, ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
        """out [T, D] = the rows `ids` [T] of a table."""
        for part in _parts(len(ids), self._rows):
            out[part] = functional.embedding(ids[part], table)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """T5's norm of the rows of x [T, D]: no mean, no bias; the statistics in float32."""
        self._run(_rms_norm, (x, out), weight.float(), eps)

    def add_rms_norm(
        self, x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> None:
        """x += the norm of the rows of delta, rounded once; [T, D]."""
        self._run(_add_rms_norm, (x, delta), weight.float(), eps)

    def rotate(
        self,
        x: torch.Tensor,
        position: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        norm: torch.Tensor | None,
        eps: float,
    ) -> None:
        """Rotate every head of x [T, H*dk] by its token's position [T], in place.

        `tables`: cosine and sine, [positions, dk / 2]. `norm` [dk], if given: the weight of a norm
        of every head, which comes first.
        """
        self._run(_rotate, (x, position), *tables, norm, eps)

    def layer_norm(self, x: torch.Tensor, norm: Any, out: torch.Tensor) -> None:
        """CLIP's norm of the rows of x [T, D]; `norm` is the model's module."""
        self._run(_layer_norm, (x, out), norm.weight.float(), norm.bias.float(), norm.eps)

    def add(self, x: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor) -> None:
        """x += delta + bias, rounded once; [T, D]."""
        self._run(_add, (x, delta), bias.float())

    def activate(self, inner: torch.Tensor, activation: str, gate: torch.Tensor | None) -> None:
        """inner = activation(inner) * gate, in place; [T, F]."""
        if gate is None:
            self._run(_activate, (inner,), activation)
        else:
            self._run(_activate_gated, (inner, gate), activation)

    def activate_biased(self, inner: torch.Tensor, activation: str, bias: torch.Tensor) -> None:
        """inner = activation(inner + bias), in place; [T, F]."""
        self._run(_activate_biased, (inner,), bias.float(), activation)

    def _run(self, kernel: Callable[..., None], rows: tuple[torch.Tensor, ...], *rest: Any) -> None:
        if self._compiled:
            _compiled(kernel)(*rows, *rest)
            return
        for part in _parts(len(rows[0]), self._rows):
            kernel(*(tensor[part] for tensor in rows), *rest)


def _parts(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


@functools.cache
def _compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    # Each encoder of a process has its own shapes, and torch gives up at 8 variants of a function.
    torch._dynamo.config.cache_size_limit = MOST_VARIANTS
    # Never for varying shapes: which of its variants ran would then depend on a batch's captions.
    return torch.compile(kernel, fullgraph=True, dynamic=False)


def _rms_norm(x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    out.copy_(functional.rms_norm(x.float(), weight.shape, weight, eps))


def _add_rms_norm(x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    x.copy_(x.float() + functional.rms_norm(delta.float(), weight.shape, weight, eps))


def _rotate(
    x: torch.Tensor,
    position: torch.Tensor,
    cosine: torch.Tensor,
    sine: torch.Tensor,
    norm: torch.Tensor | None,
    eps: float,
) -> None:
    cosine, sine = cosine[position][:, None], sine[position][:, None]  # [T, 1, dk / 2]
    heads = x.view(len(x), -1, 2 * cosine.shape[-1])
    values = heads.float()
    if norm is not None:
        values = functional.rms_norm(values, norm.shape, norm, eps)
    first, second = values.chunk(2, dim=-1)
    turned = [first * cosine - second * sine, second * cosine + first * sine]
    heads.copy_(torch.cat(turned, dim=-1))


def _layer_norm(
    x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> None:
    out.copy_(functional.layer_norm(x.float(), weight.shape, weight, bias, eps))


def _add(x: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor) -> None:
    x.copy_(x.float() + (delta.float() + bias))


def _activate(inner: torch.Tensor, activation: str) -> None:
    inner.copy_(ACTIVATIONS[activation](inner.float()))


def _activate_gated(inner: torch.Tensor, gate: torch.Tensor, activation: str) -> None:
    inner.copy_(ACTIVATIONS[activation](inner.float()) * gate)


def _activate_biased(inner: torch.Tensor, bias: torch.Tensor, activation: str) -> None:
    inner.copy_(ACTIVATIONS[activation](inner.float() + bias))


def _gelu_new(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(u / 2)) as x / (1 + exp(-u)): the same, and half the time of a tanh."""
    return x / (1 + torch.exp(x * (-GELU_LINEAR - GELU_CUBIC * x * x)))


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-1.702 * x))


GELU_LINEAR = 2 * (2 / math.pi) ** 0.5
GELU_CUBIC = 0.044715 * GELU_LINEAR

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_new": _gelu_new,
    "gelu_pytorch_tanh": _gelu_new,
    "silu": _silu,
    "quick_gelu": _quick_gelu,
}
"""Activations in float32, by their names in config.json."""
