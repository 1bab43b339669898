"""Our own encoder body: T5 and CLIP as one stream of tokens, attention strictly inside a caption.

Guarantees: the numbers of the transformers model up to rounding (fp32: relative difference below
3e-6). Every forward has one shape, [T] tokens, and attention runs per caption at the caption's own
length, so an embedding is bitwise a function of the caption and T: neighbours, place in the stream
and order change no bit. Nor does a CPU's number of threads, at the shapes of T5 base, XXL and CLIP
L with products of 2,048 rows (measured; T5's of more not yet); of fewer rows, libraries split
some sums among threads. On a CPU without matrix hardware for half precision, bfloat16
and float16 weights are computed with in float32, which is hundreds of times faster there
and no less exact.
Costs: the weights once, as `hf` holds them (memory-mapped where the file has their dtype, so that
ranks of one node share them), and one set of buffers for T tokens that every forward uses again:
no tensor of a forward's size is allocated anew, whose pages the C library would map each time.

The mathematics follows transformers' modeling_t5.py, modeling_umt5.py and modeling_clip.py.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from embed_precompute.batching import TokenBatch
from embed_precompute.encoders import ResolvedEncoder, hf, offload
from embed_precompute.encoders.copies import Copies, Lines, Pending, upload
from embed_precompute.encoders.kernels import Kernels
from embed_precompute.errors import InternalError


@dataclass(frozen=True)
class Group:
    """Captions of one length that lie side by side in the stream."""

    start: int
    count: int
    length: int


ATTENTION_TOKENS = 2048
"""Tokens of equally long captions that attend in one call: more leave the cache."""


class Body(Protocol):
    """The layers of one model over a stream."""

    def __call__(
        self, ids: torch.Tensor, batch: TokenBatch, groups: list[Group], keep: torch.Tensor | None
    ) -> torch.Tensor:
        """[T] ids -> [T, D], after the final norm; rows of no caption mean nothing.

        `keep` [C]: only these rows are wanted, [C, D]. The tensor may be one that the next forward
        overwrites.
        """
        ...


class Workspace:
    """Buffers that every forward uses again, by name; and the kernels that work on them."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        product_rows: int,
        *,
        compiled: bool,
        converts: bool,
    ) -> None:
        """`product_rows`: the most rows of one matrix product on a CPU.
        `converts`: the weights have another dtype than the computation."""
        self.device, self.dtype = device, dtype
        self.kernels = Kernels(device, compiled=compiled)
        # A weight is converted for each product, so there one product takes all rows.
        whole = device.type != "cpu" or converts
        self._product_rows = 1 << 62 if whole else product_rows
        self._buffers: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}

    def steps(self, num_tokens: int) -> list[slice]:
        """Equal parts of the stream, a matrix product each; the last may reach behind its end.

        One size for all, because a product's rounding depends on its number of rows.
        """
        count = -(-num_tokens // self._product_rows)
        size = -(-num_tokens // count)
        return [slice(start, start + size) for start in range(0, count * size, size)]

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The buffer of that name and shape, with whatever it held last; zeros at first."""
        buffer = self._buffers.get((name, shape))
        if buffer is None:
            # Rows of no caption are computed with, too: never with what was left in memory.
            buffer = torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
            self._buffers[name, shape] = buffer
        return buffer

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in the dtype of the computation; valid until the next one of its shape."""
        if weight.dtype == self.dtype:
            return weight
        return self.take("weight", *weight.shape).copy_(weight)

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

    def add_linear(self, stream: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
        """stream += x weight^T, accumulated by the matrix product itself."""
        if weight.dtype == torch.float32 != self.dtype:  # T5's wo under float16
            stream.add_(functional.linear(x.float(), weight))
            return
        matrix = self.weight(weight).t()
        if stream.dtype == self.dtype:
            stream.addmm_(x, matrix)
        else:
            stream.add_(torch.mm(x, matrix))


def attend(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    groups: list[Group],
    heads: int,
    bias: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
) -> None:
    """Attention of every caption to itself alone.

    Each of `qkv` is [T, H*dk]; `bias` [H, L, L] is added to the scaled products of a caption's
    first tokens, None: a token sees no later one. `out` [T, H*dk] is left as it is where no caption
    is.
    """
    for group in groups:
        at_once = max(1, ATTENTION_TOKENS // group.length)
        for first in range(0, group.count, at_once):
            count = min(at_once, group.count - first)
            start = group.start + first * group.length
            rows = slice(start, start + count * group.length)
            frame = (count, group.length, heads, -1)
            q, k, v = (part[rows].view(frame).transpose(1, 2) for part in qkv)
            mask = None if bias is None else bias[None, :, : group.length, : group.length]
            mixed = functional.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=bias is None, scale=scale
            )  # [count, H, length, dk]
            out[rows].view(frame).copy_(mixed.transpose(1, 2))


def one_attention(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """On a GPU: attention by the kernel that takes a caption's keys in one order, always.

    torch's others choose by the whole shape, or split the keys among processors that would be idle,
    and so a caption's sums would depend on how many of its length there are. The plain products are
    for head sizes that the kernel does not take, which are a model's own.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def groups_of(batch: TokenBatch) -> list[Group]:
    """The captions of a batch as groups of neighbours of one length.

    Without a mask a caption's length is the frame's: its pads take part.
    """
    lines, length = batch.input_ids.shape
    if not batch.packed:
        return [Group(0, lines, length)]
    groups: list[Group] = []
    start = 0
    for tokens in batch.lengths.tolist():
        last = groups[-1] if groups else None
        if last is not None and last.length == tokens:
            groups[-1] = Group(last.start, last.count + 1, tokens)
        else:
            groups.append(Group(start, 1, tokens))
        start += tokens
    return groups


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products run in: float32 on a CPU that has no hardware for `dtype`."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    supported: bool = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if supported else torch.float32


def longest_of(resolved: ResolvedEncoder) -> int:
    """Tokens of the longest caption, pads that are attended included."""
    if resolved.padded_length is not None:
        return max(resolved.padded_length, resolved.null_shape[1])
    return resolved.config.resolved_max_length


class FusedEncoder:
    """A text encoder with our own body."""

    def __init__(
        self, resolved: ResolvedEncoder, device: str, output_dtype: str, *, may_offload: bool
    ) -> None:
        from embed_precompute.encoders import clip, t5

        self.resolved = resolved
        self._device = torch.device(device)
        self._copies = Copies(self._device, getattr(torch, output_dtype))
        self._shapes = {*resolved.shapes, resolved.null_shape}
        dtype: torch.dtype = getattr(torch, resolved.config.dtype)
        self._model: Any = hf.load_on(resolved, self._device, may_offload=may_offload)
        self._body: Body
        if resolved.compiled and self._device.type == "cuda":
            from embed_precompute.encoders import graph

            self._body = graph.body(self._model, longest_of(resolved), pooled=resolved.pooled)
        else:
            make = clip.ClipBody if resolved.pooled else t5.T5Body
            computed = compute_dtype(dtype, self._device)
            workspace = Workspace(
                self._device,
                computed,
                make.product_rows(self._model.config, computed),
                compiled=resolved.compiled,
                converts=computed != dtype,
            )
            self._body = make(self._model, workspace, longest_of(resolved))

    def weight_bytes(self) -> int:
        """See `TextEncoder.weight_bytes`."""
        return offload.num_bytes(self._model)

    def encode(self, batch: TokenBatch) -> Lines:
        """See `TextEncoder.encode`."""
        return self.submit(batch).wait()

    def submit(self, batch: TokenBatch) -> Pending:
        """See `TextEncoder.submit`."""
        frame = batch.input_ids.shape
        if frame not in self._shapes or batch.packed is not self.resolved.packed:
            kind = "packed" if self.resolved.packed else "one caption a line"
            raise InternalError(
                f"A batch is {frame}, packed {batch.packed}: expected {self._shapes}, {kind}. "
                "ResolvedEncoder.batches makes them."
            )
        message = hf.forward_too_large(self.resolved, batch, self._device)
        with (
            torch.inference_mode(),
            hf.out_of_memory(message),
            hf.tf32(self.resolved),
            one_attention(self._device),
        ):
            ids = upload(torch.from_numpy(batch.input_ids).reshape(-1), self._device)
            if self.resolved.pooled:
                keep = upload(torch.from_numpy(self._end_of_text(batch)), self._device)
                pooled = self._body(ids, batch, groups_of(batch), keep)
                return self._copies.download(pooled, reused=True)
            stream = self._body(ids, batch, groups_of(batch), None)
            if not batch.packed:
                return self._copies.download(stream.view(*frame, -1), reused=True)
            lengths: list[int] = batch.lengths.tolist()
            return self._copies.download(stream[: sum(lengths)], lengths, reused=True)

    def _end_of_text(self, batch: TokenBatch) -> np.ndarray:
        """Where each caption is pooled in the stream: its first end-of-text token."""
        stream = batch.input_ids.reshape(-1)
        eos = self.resolved.tokenizer.eos_id
        return np.array(
            [
                start + int(np.argmax(stream[start : start + length] == eos))
                for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
            ],
            dtype=np.int64,
        )


def build(
    resolved: ResolvedEncoder, device: str, output_dtype: str, *, may_offload: bool
) -> FusedEncoder:
    """See `encoders.build`."""
    return FusedEncoder(resolved, device, output_dtype, may_offload=may_offload)
