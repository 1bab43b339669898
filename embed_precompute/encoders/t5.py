"""The layers of T5 over a stream: T5 v1.0 (relu), v1.1 and mT5 (gated gelu), umT5 (a bias a layer).

Guarantees: what `fused` guarantees. The relative bias is made by the model's own code, once, and
kept as one row of numbers per head and distance.
Costs: per layer with a bias of its own one [H, L, L] tensor while the layer runs.
"""

from __future__ import annotations

from typing import Any

import torch

from embed_precompute.batching import TokenBatch
from embed_precompute.encoders.fused import Group, Workspace, attend


class T5Body:
    """See `fused.Body`."""

    def __init__(self, model: Any, workspace: Workspace, length: int) -> None:
        self._encoder = model.encoder
        self._workspace = workspace
        config = model.config
        self._heads, self._inner = config.num_heads, config.num_heads * config.d_kv
        self._activation: str = config.dense_act_fn
        self._eps: float = config.layer_norm_epsilon
        self._length = length
        distance = torch.arange(length, device=workspace.device)
        # The bias of query i and key j stands at j - i + length - 1.
        self._distance = distance[None, :] - distance[:, None] + length - 1
        self._bias_rows = bias_rows(model, length, workspace.dtype)

    def __call__(self, ids: torch.Tensor, batch: TokenBatch, groups: list[Group]) -> torch.Tensor:
        """See `fused.Body`."""
        space, num_tokens = self._workspace, ids.shape[0]
        table = self._encoder.embed_tokens.weight
        residual = torch.float32 if space.dtype == torch.float16 else space.dtype
        stream = space.take("stream", num_tokens, table.shape[1], dtype=residual)
        space.kernels.embed(ids, table, stream)
        longest = max(group.length for group in groups)
        bias: torch.Tensor | None = None
        for number, block in enumerate(self._encoder.block):
            if number in self._bias_rows:
                bias = self._bias_rows[number][:, self._distance[:longest, :longest]]
            self._attention(block.layer[0], stream, groups, bias)
            self._feed_forward(block.layer[-1], stream)
        return self._norm(stream, self._encoder.final_layer_norm.weight)

    def _norm(self, stream: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = self._workspace.take("normed", *stream.shape)
        self._workspace.kernels.rms_norm(stream, weight, self._eps, normed)
        return normed

    def _attention(
        self, layer: Any, stream: torch.Tensor, groups: list[Group], bias: torch.Tensor | None
    ) -> None:
        space, parts = self._workspace, layer.SelfAttention
        num_tokens = stream.shape[0]
        normed = self._norm(stream, layer.layer_norm.weight)
        qkv = space.take("qkv", num_tokens, 3, self._inner)
        for part, linear in enumerate((parts.q, parts.k, parts.v)):
            space.linear(normed, linear.weight, None, qkv[:, part])
        mixed = space.take("mixed", num_tokens, self._inner)
        attend(qkv, groups, self._heads, bias, 1.0, mixed)
        space.add_linear(stream, mixed, parts.o.weight, None)

    def _feed_forward(self, layer: Any, stream: torch.Tensor) -> None:
        space, parts = self._workspace, layer.DenseReluDense
        normed = self._norm(stream, layer.layer_norm.weight)
        gated = hasattr(parts, "wi_0")
        first = parts.wi_0 if gated else parts.wi
        inner = space.take("inner", stream.shape[0], first.weight.shape[0])
        space.linear(normed, first.weight, None, inner)
        gate = space.take("gate", *inner.shape) if gated else None
        if gate is not None:
            space.linear(normed, parts.wi_1.weight, None, gate)
        space.kernels.activate(inner, self._activation, gate)
        space.add_linear(stream, inner, parts.wo.weight, None)


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
