"""The fused layers as one static graph, for a GPU: torch.compile, flex_attention, a CUDA graph.

Guarantees: the numbers equal those of the transformers model up to rounding. Every forward of a
graph has the same shape.
For attention each packed caption gets blocks of its own, with its first token at the start of a
block. So the sums of a caption's attention depend on its length alone: neighbours, place and order
change no bit.
Costs: the weights once (those of q, k and v in one tensor); the memory that the CUDA graph holds
for one forward; compiling at the first forward of a shape, cached on the node. A forward holds at
most one caption for every `TOKENS_PER_BLOCK` tokens of a packed stream; a stream with more is run
in parts.

Not run on a GPU yet: tests compare its numbers on the CPU, compiled and not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from embed_precompute.encoders.fused.layers import bias_rows, pooled_rows
from embed_precompute.encoders.fused.stream import upload
from embed_precompute.encoders.tokenizer import TokenBatch

BLOCK = 128
"""Number of positions in a block of flex_attention; a packed caption takes whole blocks."""
TOKENS_PER_BLOCK = 32
"""Attention has one block of `BLOCK` positions for this many tokens of a packed stream: more
positions than tokens, because a short caption leaves most of its block empty."""
CAPTURE_WARM_UP = 3
"""Number of forwards before a CUDA graph is captured: allocations and tuning are over by then."""

KERNEL_OPTIONS: Any = {"FORCE_USE_FLEX_ATTENTION": True}
"""The same flex_attention kernel is used for fewer than 128 positions too. torch's kernel for short
queries splits the keys by the number of the GPU's processors, and sums in another order on another
GPU."""
SMALL_TILES = {"BLOCK_M": 64, "BLOCK_N": 32}
"""Number of queries and keys in one step of the kernel, in float32: torch 2.5's larger tiles take
115 KB of shared memory with a bias, and GPUs of compute capability 8.6 and 8.9 have 101."""

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""q, k, v [B, H, L, dk] -> [B, H, L, dk]."""


class Packing:
    """Maps the tokens of one packed forward to slots of the attention.

    Its tensors are fixed inputs of a CUDA graph, filled in place. Attention runs over S slots in
    `num_blocks` blocks. `source` [S]: for each slot, the index in the stream of the token that
    fills it. `slot` [T]: for each token of the stream, its slot. `caption` [S]: the number of the
    caption in a slot (-1: none). `slot_position` [S] and `position` [T]: the position in that
    caption.
    """

    def __init__(self, num_tokens: int, longest: int, device: torch.device) -> None:
        """`num_tokens`: length of the packed stream. `longest`: length of the longest caption."""
        self._longest = longest
        self.num_blocks = max(num_tokens // TOKENS_PER_BLOCK, -(-longest // BLOCK))
        size = self.num_blocks * BLOCK

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.source, self.slot_position = zeros(size), zeros(size)
        self.slot, self.position = zeros(num_tokens), zeros(num_tokens)
        self.caption = zeros(size) - 1
        self.counts = zeros(1, 1, self.num_blocks, dtype=torch.int32)
        self.blocks = zeros(1, 1, self.num_blocks, self.num_blocks, dtype=torch.int32)

    def parts(self, lengths: list[int]) -> Iterator[tuple[int, int]]:
        """Yields (first, last + 1) of runs of captions that fit into the blocks together."""
        first = used = 0
        for i, length in enumerate(lengths):
            needed = -(-length // BLOCK)
            if used + needed > self.num_blocks:
                yield first, i
                first, used = i, 0
            used += needed
        yield first, len(lengths)

    def set_layout(self, lengths: list[int]) -> None:
        """Give slots to captions of these lengths; the first caption begins the packed stream."""
        source = np.zeros(len(self.source), np.int64)
        caption = np.full(len(self.source), -1, np.int64)
        # Unused slots may have any position in range.
        slot_position = np.tile(np.arange(BLOCK), self.num_blocks)
        slot = np.zeros(len(self.slot), np.int64)
        position = np.zeros(len(self.slot), np.int64)
        counts = np.zeros(self.num_blocks, np.int32)
        blocks = np.zeros((self.num_blocks, self.num_blocks), np.int32)
        start = block = 0
        for number, length in enumerate(lengths):
            num_blocks, begin = -(-length // BLOCK), block * BLOCK
            inside = np.arange(num_blocks * BLOCK)
            source[begin : begin + length] = start + inside[:length]
            caption[begin : begin + length] = number
            slot_position[begin : begin + len(inside)] = inside
            slot[start : start + length] = begin + inside[:length]
            position[start : start + length] = inside[:length]
            counts[block : block + num_blocks] = num_blocks
            blocks[block : block + num_blocks, :num_blocks] = block + np.arange(num_blocks)
            start, block = start + length, block + num_blocks
        # A slot after a caption's last token may lie beyond the bias table: it gets the last valid
        # position.
        slot_position = np.minimum(slot_position, self._longest - 1)
        fields: dict[str, Any] = {"source": source, "caption": caption, "slot": slot}
        fields |= {"slot_position": slot_position, "position": position}
        for name, values in {**fields, "counts": counts, "blocks": blocks}.items():
            tensor: torch.Tensor = getattr(self, name)
            tensor.copy_(upload(torch.from_numpy(values), tensor.device).view(tensor.shape))

    def block_mask(self, *, causal: bool) -> BlockMask:
        """A mask in which each caption attends to itself; `set_layout` fills its tensors."""
        caption = self.caption

        def visible(
            b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor
        ) -> torch.Tensor:
            own = (caption[q] == caption[kv]) & (caption[kv] >= 0)
            return own & (kv <= q) if causal else own

        return BlockMask.from_kv_blocks(
            self.counts, self.blocks, BLOCK_SIZE=BLOCK, mask_mod=visible
        )


def _biased(bias: torch.Tensor, position: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    """A score_mod that adds bias [H, L, L] by the positions of query and key in their caption."""
    if position is None:
        return lambda score, b, h, q, kv: score + bias[h, q, kv]
    return lambda score, b, h, q, kv: score + bias[h, position[q], position[kv]]


class GraphLayers:
    """See `stream.Forward`; has a graph for each shape."""

    def __init__(self, model: T5Graph | ClipGraph, *, compiled: bool = True) -> None:
        """`model` holds the weights, already rearranged."""
        self._model, self._compiled = model, compiled
        self._graphs: dict[tuple[int, int], StaticGraph] = {}

    def __call__(self, ids: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """See `stream.Forward`."""
        pool_at = self._model.pool_at(batch)
        rows = None if pool_at is None else upload(torch.from_numpy(pool_at), ids.device)
        shape = (batch.input_ids.shape[0], batch.input_ids.shape[1])
        if shape not in self._graphs:
            self._graphs[shape] = StaticGraph(
                self._model, shape, packed=batch.packed, compiled=self._compiled
            )
        output = self._graphs[shape](ids, batch)
        return output if rows is None else output[rows]


class StaticGraph:
    """The layers over ids of one shape, [B, L] (packed: [1, T])."""

    def __init__(
        self, model: T5Graph | ClipGraph, shape: tuple[int, int], *, packed: bool, compiled: bool
    ) -> None:
        self._model, self._shape = model, shape
        device = model.device
        self._packing = Packing(shape[1], model.longest, device) if packed else None
        self._ids = torch.zeros(shape[0] * shape[1], dtype=torch.int64, device=device)
        self._attends = model.attention(self._packing)
        # A packed stream's positions are set for each forward, in the same tensor.
        self._positions = (
            torch.arange(shape[1], device=device).repeat(shape[0])
            if self._packing is None
            else self._packing.position
        )
        self._forward: Callable[[], torch.Tensor] = self._run
        if compiled:
            self._forward = torch.compile(self._run, fullgraph=True, dynamic=False)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._output: torch.Tensor | None = None

    def __call__(self, ids: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """[B * L] ids -> [B * L, D]; the tensor is the graph's own, good until the next call."""
        if self._packing is None:
            self._ids.copy_(ids)
            return self._replay()
        lengths: list[int] = batch.lengths.tolist()
        parts = list(self._packing.parts(lengths))
        ends = np.cumsum([0, *lengths])
        outputs = []
        for first, last in parts:
            start, stop = int(ends[first]), int(ends[last])
            self._ids.zero_()
            self._ids[: stop - start] = ids[start:stop]
            self._packing.set_layout(lengths[first:last])
            output = self._replay()
            outputs.append(output if len(parts) == 1 else output[: stop - start].clone())
        return outputs[0] if len(parts) == 1 else torch.cat(outputs)

    def _run(self) -> torch.Tensor:
        return self._model(self._ids, self._positions, self._attend)

    def _attend(self, layer: int, qkv: torch.Tensor) -> torch.Tensor:
        """[T, 3, H, dk] -> [T, H * dk]."""
        attend = self._attends[layer]
        if self._packing is None:
            lines = qkv.view(*self._shape, *qkv.shape[1:])  # [B, L, 3, H, dk]
            q, k, v = (part.transpose(1, 2) for part in lines.unbind(2))
            return attend(q, k, v).transpose(1, 2).reshape(qkv.shape[0], -1)
        slots = qkv[self._packing.source]  # [S, 3, H, dk]
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in slots.unbind(1))
        mixed = attend(q, k, v)[0].transpose(0, 1)  # [S, H, dk]
        return mixed[self._packing.slot].reshape(qkv.shape[0], -1)

    def _replay(self) -> torch.Tensor:
        if self._ids.device.type != "cuda":
            return self._forward()
        with torch.cuda.device(self._ids.device):  # else the capture is of device 0
            if self._graph is None:
                self._graph, self._output = self._capture()
            self._graph.replay()
        assert self._output is not None
        return self._output

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(CAPTURE_WARM_UP):
                self._forward()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = self._forward()
        return graph, output


class T5Graph:
    """T5's layers as a function that is traced for any shape; computes what `T5Layers` computes."""

    def __init__(self, model: Any, longest: int) -> None:
        config = model.config
        self._encoder = model.encoder
        self._heads, self._eps = config.num_heads, config.layer_norm_epsilon
        self._activation: str = config.dense_act_fn
        self.longest = longest
        self.device = model.encoder.embed_tokens.weight.device
        self._dtype = model.encoder.embed_tokens.weight.dtype
        distance = torch.arange(longest, device=self.device)
        distance = distance[None, :] - distance[:, None] + longest - 1
        rows = bias_rows(model, longest, self._dtype)
        self._bias = {number: row[:, distance].contiguous() for number, row in rows.items()}
        self._qkv = [
            _in_one_tensor([parts.q, parts.k, parts.v])
            for parts in (block.layer[0].SelfAttention for block in self._encoder.block)
        ]

    def pool_at(self, batch: TokenBatch) -> np.ndarray | None:
        """[C] the token rows to return; None: all rows."""
        return None

    def attention(self, packing: Packing | None) -> list[Attend]:
        """Each layer's attention; umT5 has a bias in every layer, others share the first
        layer's."""
        mask = None if packing is None else packing.block_mask(causal=False)
        position = None if packing is None else packing.slot_position
        attends: list[Attend] = []
        for layer in range(len(self._encoder.block)):
            if layer in self._bias:
                attend = _flex(_biased(self._bias[layer], position), mask, 1.0)
            attends.append(attend)
        return attends

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """[T] ids and positions -> [T, D]."""
        dtype = torch.float32 if self._dtype == torch.float16 else self._dtype
        residual = functional.embedding(ids, self._encoder.embed_tokens.weight).to(dtype)
        for number, block in enumerate(self._encoder.block):
            first, last = block.layer[0], block.layer[-1]
            weight, _ = self._qkv[number]
            qkv = functional.linear(self._norm(residual, first.layer_norm), weight)
            mixed = attend(number, qkv.view(len(ids), 3, self._heads, -1))
            residual = residual + functional.linear(mixed, first.SelfAttention.o.weight)
            dense, normed = last.DenseReluDense, self._norm(residual, last.layer_norm)
            gated = hasattr(dense, "wi_0")
            inner = functional.linear(normed, (dense.wi_0 if gated else dense.wi).weight)
            inner = _activated(inner, self._activation)
            if gated:
                inner = inner * functional.linear(normed, dense.wi_1.weight)
            residual = residual + functional.linear(
                inner.to(dense.wo.weight.dtype), dense.wo.weight
            )
        return self._norm(residual, self._encoder.final_layer_norm)

    def _norm(self, residual: torch.Tensor, norm: Any) -> torch.Tensor:
        x = residual.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self._eps)
        normed: torch.Tensor = (x * norm.weight.float()).to(self._dtype)
        return normed


class ClipGraph:
    """Like `T5Graph`; computes what `ClipLayers` computes, but for all rows."""

    def __init__(self, model: Any, longest: int, end_id: int) -> None:
        self._text, self._end_id = getattr(model, "text_model", model), end_id
        config = model.config
        self._heads = config.num_attention_heads
        self._scale = (config.hidden_size // self._heads) ** -0.5
        self._activation: str = config.hidden_act
        self.longest = longest
        self.device = self._text.embeddings.token_embedding.weight.device
        self._qkv = [
            _in_one_tensor([parts.q_proj, parts.k_proj, parts.v_proj])
            for parts in (layer.self_attn for layer in self._text.encoder.layers)
        ]

    def pool_at(self, batch: TokenBatch) -> np.ndarray | None:
        return pooled_rows(batch, self._end_id)

    def attention(self, packing: Packing | None) -> list[Attend]:
        """Causal attention, the same for every layer."""
        assert packing is not None, "pooled captions are packed"
        attend = _flex(None, packing.block_mask(causal=True), self._scale)
        return [attend] * len(self._qkv)

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, attend: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        tables = self._text.embeddings
        residual = functional.embedding(ids, tables.token_embedding.weight)
        residual = residual + functional.embedding(positions, tables.position_embedding.weight)
        for number, layer in enumerate(self._text.encoder.layers):
            weight, bias = self._qkv[number]
            qkv = functional.linear(layer.layer_norm1(residual), weight, bias)
            mixed = attend(number, qkv.view(len(ids), 3, self._heads, -1))
            residual = residual + layer.self_attn.out_proj(mixed)
            inner = _activated(layer.mlp.fc1(layer.layer_norm2(residual)), self._activation)
            residual = residual + layer.mlp.fc2(inner)
        output: torch.Tensor = self._text.final_layer_norm(residual)
        return output


def _flex(
    score_mod: Callable[..., torch.Tensor] | None, mask: BlockMask | None, scale: float
) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        options = KERNEL_OPTIONS | SMALL_TILES if q.dtype == torch.float32 else KERNEL_OPTIONS
        mixed = flex_attention(
            q, k, v, score_mod, block_mask=mask, scale=scale, kernel_options=options
        )
        assert isinstance(mixed, torch.Tensor)
        return mixed

    return attend


@torch.inference_mode()
def _in_one_tensor(linears: list[Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weights of linears in one tensor; the linears get views of it, so none is held twice."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    rows = len(weight) // len(linears)
    for number, linear in enumerate(linears):
        linear.weight.data = weight[number * rows : (number + 1) * rows]
    return weight, bias


def _activated(x: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of that name in config.json."""
    if activation == "relu":
        return torch.relu(x)
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="tanh" if activation == "gelu_new" else "none")
