"""T5's and CLIP's layers, ours, over the weights of transformers' models.

T5: v1.0 (relu), v1.1 and mT5 (gated gelu), umT5 (a bias in every layer). The relative bias is
computed by the model's own code, once, and stored as [H, 2 * length - 1]: a row per head, a number
per distance.

CLIP: causal inside a caption, positions counted from the caption's start. After the last attention
only the rows that are pooled are computed.

The numbers are those of transformers up to rounding. The mathematics follows its modeling_t5.py,
modeling_umt5.py and modeling_clip.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from embed_precompute.encoders.fused.stream import (
    EqualLengthRun,
    FusedLayers,
    Kernels,
    Workspace,
    attend,
    positions_of,
    runs_of,
    upload,
)
from embed_precompute.encoders.tokenizer import TokenBatch

PRODUCT_BYTES = 80 << 20
"""Size of the widest activations of one matrix product. With more rows the weights are read less
often, but beyond this size the next product no longer finds the activations in the cache. Measured
at the widths of base and XXL."""


@dataclass
class T5State:
    """See `stream.FusedLayers`."""

    residual: torch.Tensor
    """[T, D]; its last rows may belong to no token."""
    num_tokens: int
    blocks: list[slice]
    runs: list[EqualLengthRun]


class T5Layers(FusedLayers[T5State]):
    """See `stream.FusedLayers`."""

    def __init__(self, model: Any, longest: int, *, compiled: bool) -> None:
        """`longest`: length of the longest caption."""
        config, self._encoder, self.blocks = model.config, model.encoder, model.encoder.block
        table = self._encoder.embed_tokens.weight
        self._workspace = Workspace(table, PRODUCT_BYTES, row_width=config.d_ff)
        self._kernels = Kernels(table.device, compiled=compiled)
        self._heads, self._inner = config.num_heads, config.num_heads * config.d_kv
        self._activation: str = config.dense_act_fn
        self._eps: float = config.layer_norm_epsilon
        distance = torch.arange(longest, device=table.device)
        # The bias of query i and key j is at index j - i + longest - 1.
        self._distance = distance[None, :] - distance[:, None] + longest - 1
        self._bias_rows = bias_rows(model, longest, self._workspace.dtype)
        # If all layers share one bias, its matrix is made once. umT5's matrices are made one after
        # another in each forward: all of them at once would be larger than the weights.
        self._shared = self._bias_matrix(0, longest) if len(self._bias_rows) == 1 else None

    def begin(self, ids: torch.Tensor, batch: TokenBatch, place: int = 0) -> T5State:
        space, table = self._workspace, self._encoder.embed_tokens.weight
        blocks = space.row_blocks(len(ids))
        dtype = torch.float32 if space.dtype == torch.float16 else space.dtype
        shape = (blocks[-1].stop, table.shape[1])
        residual = space.buffer(f"residual {place}", *shape, dtype=dtype)
        self._kernels.embed(ids, table, residual)
        return T5State(residual, len(ids), blocks, runs_of(batch))

    def layer(self, number: int, state: T5State) -> None:
        bias = self._shared
        if bias is None:
            bias = self._bias_matrix(number, max(run.length for run in state.runs))
        attention, *_, dense = self._encoder.block[number].layer
        mixed = self._attention(attention, state, bias)
        for rows in state.blocks:
            part = state.residual[rows]
            self._workspace.add_linear(part, mixed[rows], attention.SelfAttention.o.weight)
            self._feed_forward(dense, part)

    def end(self, state: T5State) -> torch.Tensor:
        rows = state.residual[: state.num_tokens]
        return self._norm(rows, self._encoder.final_layer_norm.weight)

    def _bias_matrix(self, layer: int, length: int) -> torch.Tensor:
        """[H, length, length] bias of the layer."""
        return self._bias_rows[layer][:, self._distance[:length, :length]]

    def _norm(self, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = self._workspace.buffer("normed", *residual.shape)
        self._kernels.rms_norm(residual, weight, self._eps, normed)
        return normed

    def _attention(self, layer: Any, state: T5State, bias: torch.Tensor) -> torch.Tensor:
        """[T, H*dk], before the output matrix."""
        space, parts = self._workspace, layer.SelfAttention
        shape = (len(state.residual), self._inner)
        q, k, v = (space.buffer(name, *shape) for name in "qkv")
        for rows in state.blocks:
            normed = self._norm(state.residual[rows], layer.layer_norm.weight)
            for linear, out in ((parts.q, q), (parts.k, k), (parts.v, v)):
                space.linear(normed, linear.weight, out[rows])
        mixed = space.buffer("mixed", *shape)
        attend((q, k, v), state.runs, mixed, heads=self._heads, scale=1.0, bias=bias)
        return mixed

    def _feed_forward(self, layer: Any, residual: torch.Tensor) -> None:
        space, parts = self._workspace, layer.DenseReluDense
        normed = self._norm(residual, layer.layer_norm.weight)
        gated = hasattr(parts, "wi_0")
        first = parts.wi_0 if gated else parts.wi
        inner = space.buffer("inner", len(residual), first.weight.shape[0])
        space.linear(normed, first.weight, inner)
        gate = space.buffer("gate", *inner.shape) if gated else None
        if gate is not None:
            space.linear(normed, parts.wi_1.weight, gate)
        self._kernels.activate(inner, self._activation, gate)
        space.add_linear(residual, inner, parts.wo.weight)


@torch.inference_mode()
def bias_rows(model: Any, length: int, dtype: torch.dtype) -> dict[int, torch.Tensor]:
    """Layer with its own relative bias -> [H, 2 * length - 1], by the distance key - query."""
    rows: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.encoder.block):
        attention = block.layer[0].SelfAttention
        if hasattr(attention, "relative_attention_bias"):
            bias = attention.compute_bias(length, length)[0].to(dtype)
            before = bias[:, 1:, 0].flip(1)  # keys before the query
            rows[number] = torch.cat([before, bias[:, 0]], dim=1)
    return rows


@dataclass
class ClipState:
    """See `stream.FusedLayers`."""

    residual: torch.Tensor
    """[T, D]; after the last layer, the pooled rows."""
    pool_at: torch.Tensor
    """[C] the row where each caption is pooled."""
    blocks: list[slice]
    runs: list[EqualLengthRun]


class ClipLayers(FusedLayers[ClipState]):
    """See `stream.FusedLayers`; returns the pooled vectors, [C, D]."""

    def __init__(self, model: Any, end_id: int, *, compiled: bool) -> None:
        """`end_id`: a caption is pooled at its first token with this id."""
        # In transformers 4 the text model is an attribute; in 5 it is the model itself.
        self._text, config = getattr(model, "text_model", model), model.config
        self._projection = getattr(model, "text_projection", None)
        self.blocks, self._end_id = self._text.encoder.layers, end_id
        words = self._text.embeddings.token_embedding.weight
        self._workspace = Workspace(words, 0, row_width=config.intermediate_size)
        self._kernels = Kernels(words.device, compiled=compiled)
        self._heads: int = config.num_attention_heads
        self._scale = (config.hidden_size // self._heads) ** -0.5
        self._activation: str = config.hidden_act
        self._output_bias: dict[int, torch.Tensor] = {}
        """Layer -> its `_output_bias`, from its first call on."""

    def begin(self, ids: torch.Tensor, batch: TokenBatch, place: int = 0) -> ClipState:
        space, tables = self._workspace, self._text.embeddings
        pool_at = upload(torch.from_numpy(pooled_rows(batch, self._end_id)), space.device)
        blocks = space.row_blocks(len(ids))
        words = tables.token_embedding.weight
        runs = runs_of(batch)
        position = upload(torch.from_numpy(positions_of(runs, len(ids))), space.device)
        residual = space.buffer(f"residual {place}", blocks[-1].stop, words.shape[1])
        self._kernels.embed(ids, words, residual)
        residual[: len(ids)].add_(functional.embedding(position, tables.position_embedding.weight))
        return ClipState(residual, pool_at, blocks, runs)

    def layer(self, number: int, state: ClipState) -> None:
        space, layer = self._workspace, self._text.encoder.layers[number]
        if number not in self._output_bias:
            self._output_bias[number] = _output_bias(layer.self_attn)
        mixed = self._attention(layer, state)
        if number == len(self.blocks) - 1:
            # Only pooled rows go on, in products of the same size. With few rows a CPU splits each
            # sum among its threads, and the bits would depend on the number of threads.
            size = state.blocks[0].stop
            pool_at = functional.pad(state.pool_at, (0, -len(state.pool_at) % size))
            state.blocks = state.blocks[: len(pool_at) // size]
            state.residual, mixed = state.residual[pool_at], mixed[pool_at]
        for rows in state.blocks:
            part = state.residual[rows]
            delta = space.buffer("delta", *part.shape)
            space.linear(mixed[rows], layer.self_attn.out_proj.weight, delta)
            self._kernels.add(part, delta, self._output_bias[number])
            self._feed_forward(layer, part, delta)
            self._kernels.add(part, delta, layer.mlp.fc2.bias)

    def end(self, state: ClipState) -> torch.Tensor:
        residual = state.residual
        normed = self._workspace.buffer("pooled", *residual.shape)
        self._kernels.layer_norm(residual, self._text.final_layer_norm, normed)
        if self._projection is None:
            return normed[: len(state.pool_at)]
        weight = self._projection.weight
        projected = self._workspace.buffer("projected", len(normed), len(weight))
        for rows in state.blocks:
            self._workspace.linear(normed[rows], weight, projected[rows])
        return projected[: len(state.pool_at)]

    def _attention(self, layer: Any, state: ClipState) -> torch.Tensor:
        """[T, D], before the output matrix. Two of the biases are added later: `_output_bias`."""
        space, parts, shape = self._workspace, layer.self_attn, state.residual.shape
        q, k, v = (space.buffer(name, *shape) for name in "qkv")
        for rows in state.blocks:
            normed = self._norm(state.residual[rows], layer.layer_norm1)
            space.linear(normed, parts.q_proj.weight, q[rows], parts.q_proj.bias)
            space.linear(normed, parts.k_proj.weight, k[rows])
            space.linear(normed, parts.v_proj.weight, v[rows])
        mixed = space.buffer("mixed", *shape)
        attend((q, k, v), state.runs, mixed, heads=self._heads, scale=self._scale, causal=True)
        return mixed

    def _feed_forward(self, layer: Any, residual: torch.Tensor, out: torch.Tensor) -> None:
        """out [rows, D], without the last bias."""
        space, dense = self._workspace, layer.mlp
        normed = self._norm(residual, layer.layer_norm2)
        inner = space.buffer("inner", len(normed), dense.fc1.weight.shape[0])
        space.linear(normed, dense.fc1.weight, inner)
        self._kernels.activate_biased(inner, self._activation, dense.fc1.bias)
        space.linear(inner, dense.fc2.weight, out)

    def _norm(self, residual: torch.Tensor, norm: Any) -> torch.Tensor:
        normed = self._workspace.buffer("normed", *residual.shape)
        self._kernels.layer_norm(residual, norm, normed)
        return normed


def pooled_rows(batch: TokenBatch, end_id: int) -> np.ndarray:
    """[C] the token row where each caption is pooled: its first end-of-text token."""
    ids = batch.input_ids.reshape(-1)
    return np.array(
        [
            start + int(np.argmax(ids[start : start + length] == end_id))
            for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
        ],
        dtype=np.int64,
    )


@torch.inference_mode()
def _output_bias(attention: Any) -> torch.Tensor:
    """[D] float32: the output's bias, and the values' bias multiplied by the output matrix.

    A query's attention weights sum to one, so the values' bias reaches the output unchanged. The
    keys' bias adds the same number to all scores of a query, which a softmax ignores.
    """
    output, values = attention.out_proj, attention.v_proj
    through: torch.Tensor = output.weight.float() @ values.bias.float() + output.bias.float()
    return through
