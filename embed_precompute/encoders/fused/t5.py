"""T5's layers, ours: T5 v1.0 (relu), v1.1 and mT5 (gated gelu), umT5 (a bias in every layer).

The numbers are those of transformers up to rounding. The relative bias is computed by the model's
own code, once, and stored as one row of numbers per head and distance.

The mathematics follows transformers' modeling_t5.py and modeling_umt5.py.
"""

from __future__ import annotations

from typing import Any

import torch

from embed_precompute.encoders.batching import TokenBatch
from embed_precompute.encoders.fused.stream import EqualLengthRun, Kernels, Workspace, attend

PRODUCT_BYTES = 80 << 20
"""Size of the widest activations of one matrix product. More rows read the weights less often,
until a cache no longer has what one product hands to the next; measured at the widths of base and
XXL."""


class T5Layers:
    """See `stream.FusedLayers`."""

    def __init__(self, model: Any, longest: int, *, compiled: bool) -> None:
        """`longest`: tokens of the longest caption."""
        config, self._encoder = model.config, model.encoder
        table = self._encoder.embed_tokens.weight
        self._workspace = Workspace(table, PRODUCT_BYTES, row_width=config.d_ff)
        self._kernels = Kernels(table.device, compiled=compiled)
        self._heads, self._inner = config.num_heads, config.num_heads * config.d_kv
        self._activation: str = config.dense_act_fn
        self._eps: float = config.layer_norm_epsilon
        distance = torch.arange(longest, device=table.device)
        # The bias of query i and key j stands at j - i + longest - 1.
        self._distance = distance[None, :] - distance[:, None] + longest - 1
        self._bias_rows = bias_rows(model, longest, self._workspace.dtype)
        # Where all layers share one bias, its matrix is made once. umT5's are made one after
        # another in each forward: all of them at once would be larger than the weights.
        self._shared = self._bias_matrix(0, longest) if len(self._bias_rows) == 1 else None

    def __call__(
        self, ids: torch.Tensor, batch: TokenBatch, runs: list[EqualLengthRun]
    ) -> torch.Tensor:
        """See `stream.FusedLayers`."""
        space = self._workspace
        blocks = space.row_blocks(len(ids))
        table = self._encoder.embed_tokens.weight
        dtype = torch.float32 if space.dtype == torch.float16 else space.dtype
        residual = space.buffer("residual", blocks[-1].stop, table.shape[1], dtype=dtype)
        self._kernels.embed(ids, table, residual)
        longest = max(run.length for run in runs)
        for number, layer in enumerate(self._encoder.block):
            bias = self._bias_matrix(number, longest) if self._shared is None else self._shared
            mixed = self._attention(layer.layer[0], residual, blocks, runs, bias)
            for rows in blocks:
                part = residual[rows]
                space.add_linear(part, mixed[rows], layer.layer[0].SelfAttention.o.weight)
                self._feed_forward(layer.layer[-1], part)
        return self._norm(residual[: len(ids)], self._encoder.final_layer_norm.weight)

    def _bias_matrix(self, layer: int, length: int) -> torch.Tensor:
        """[H, length, length] bias of the layer."""
        return self._bias_rows[layer][:, self._distance[:length, :length]]

    def _norm(self, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = self._workspace.buffer("normed", *residual.shape)
        self._kernels.rms_norm(residual, weight, self._eps, normed)
        return normed

    def _attention(
        self,
        layer: Any,
        residual: torch.Tensor,
        blocks: list[slice],
        runs: list[EqualLengthRun],
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H*dk], before the output matrix."""
        space, parts = self._workspace, layer.SelfAttention
        shape = (len(residual), self._inner)
        q, k, v = (space.buffer(name, *shape) for name in "qkv")
        for rows in blocks:
            normed = self._norm(residual[rows], layer.layer_norm.weight)
            for linear, out in ((parts.q, q), (parts.k, k), (parts.v, v)):
                space.linear(normed, linear.weight, out[rows])
        mixed = space.buffer("mixed", *shape)
        attend((q, k, v), runs, mixed, heads=self._heads, scale=1.0, bias=bias)
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
    """Layers with a relative bias of their own -> [H, 2 length - 1], by distance key - query."""
    rows: dict[int, torch.Tensor] = {}
    for number, block in enumerate(model.encoder.block):
        attention = block.layer[0].SelfAttention
        if hasattr(attention, "relative_attention_bias"):
            bias = attention.compute_bias(length, length)[0].to(dtype)
            before = bias[:, 1:, 0].flip(1)  # keys before the query
            rows[number] = torch.cat([before, bias[:, 0]], dim=1)
    return rows
