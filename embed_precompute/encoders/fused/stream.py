"""A stream of tokens on which the fused layers work: its captions, its buffers, its attention.

Guarantees: attention is strictly inside a caption, at the caption's own length; a matrix product
takes the same number of rows wherever in the stream it is. So neither a caption's neighbours nor
its place change a bit of it.
Costs: one set of buffers for a forward, which the next one uses again: no tensor of a forward's
size is allocated anew, whose pages the C library would map each time.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from embed_precompute.encoders.batching import TokenBatch
from embed_precompute.encoders.fused.kernels import Kernels


@dataclass(frozen=True)
class Group:
    """Captions of one length that lie side by side in the stream."""

    start: int
    count: int
    length: int


ATTENTION_TOKENS = 2048
"""Tokens of equally long captions that attend in one call: more leave the cache."""


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
