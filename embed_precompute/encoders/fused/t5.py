"""The layers of T5 over a stream: T5 v1.0 (relu), v1.1 and mT5 (gated gelu), umT5 (a bias a layer).

Guarantees: what `fused` guarantees. The relative bias is made by the model's own code, once, and
kept as one row of numbers per head and distance.
Costs: per layer with a bias of its own one [H, L, L] tensor while the layer runs.
"""

from __future__ import annotations

from typing import Any

import torch

from embed_precompute.encoders import offload
from embed_precompute.encoders.batching import TokenBatch
from embed_precompute.encoders.fused.stream import Group, Workspace, attend

PRODUCT_BYTES = 80 << 20
"""Of the widest activations of one matrix product. More rows read the weights less often, until a
cache no longer has what one product hands to the next; measured at the widths of base and XXL."""


class T5Body:
    """See `fused.Body`."""

    def __init__(self, model: Any, workspace: Workspace, length: int) -> None:
        self._encoder = model.encoder
        self._workspace = workspace
        config = model.config
        self._heads, self._inner = config.num_heads, config.num_heads * config.d_kv
        self._activation: str = config.dense_act_fn
        self._eps: float = config.layer_norm_epsilon
        distance = torch.arange(length, device=workspace.device)
        # The bias of query i and key j stands at j - i + length - 1.
        self._distance = distance[None, :] - distance[:, None] + length - 1
        self._bias_rows = bias_rows(model, length, workspace.dtype)
        # Where all layers share one, it is laid out once; umT5's are, one after another, in each
        # forward: all of them at once would outgrow the weights.
        self._shared = self._laid_out(0, length) if len(self._bias_rows) == 1 else None

    @staticmethod
    def product_rows(config: Any, dtype: torch.dtype) -> int:
        """The most rows of one matrix product on a CPU; never so few that libraries split sums
        among threads."""
        row_bytes: int = config.d_ff * dtype.itemsize
        return max(2048, PRODUCT_BYTES // row_bytes)

    def __call__(
        self, ids: torch.Tensor, batch: TokenBatch, groups: list[Group], keep: torch.Tensor | None
    ) -> torch.Tensor:
        """See `fused.Body`."""
        space = self._workspace
        steps = space.steps(len(ids))
        table = self._encoder.embed_tokens.weight
        residual = torch.float32 if space.dtype == torch.float16 else space.dtype
        stream = space.take("stream", steps[-1].stop, table.shape[1], dtype=residual)
        space.kernels.embed(ids, table, stream)
        longest = max(group.length for group in groups)
        for number, block in enumerate(offload.each_on_device(self._encoder.block)):
            bias = self._laid_out(number, longest) if self._shared is None else self._shared
            mixed = self._attention(block.layer[0], stream, steps, groups, bias)
            for rows in steps:
                part = stream[rows]
                space.add_linear(part, mixed[rows], block.layer[0].SelfAttention.o.weight)
                self._feed_forward(block.layer[-1], part)
        wanted = stream[: len(ids)] if keep is None else stream[keep]
        return self._norm(wanted, self._encoder.final_layer_norm.weight)

    def _laid_out(self, layer: int, length: int) -> torch.Tensor:
        """[H, length, length] bias of the layer."""
        return self._bias_rows[layer][:, self._distance[:length, :length]]

    def _norm(self, stream: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        normed = self._workspace.take("normed", *stream.shape)
        self._workspace.kernels.rms_norm(stream, weight, self._eps, normed)
        return normed

    def _attention(
        self,
        layer: Any,
        stream: torch.Tensor,
        steps: list[slice],
        groups: list[Group],
        bias: torch.Tensor,
    ) -> torch.Tensor:
        """[T, H*dk], before the output matrix."""
        space, parts = self._workspace, layer.SelfAttention
        shape = (len(stream), self._inner)
        q, k, v = qkv = (space.take("q", *shape), space.take("k", *shape), space.take("v", *shape))
        for rows in steps:
            normed = self._norm(stream[rows], layer.layer_norm.weight)
            for linear, out in ((parts.q, q), (parts.k, k), (parts.v, v)):
                space.linear(normed, linear.weight, out[rows])
        mixed = space.take("mixed", *shape)
        attend(qkv, groups, self._heads, bias, 1.0, mixed)
        return mixed

    def _feed_forward(self, layer: Any, stream: torch.Tensor) -> None:
        space, parts = self._workspace, layer.DenseReluDense
        normed = self._norm(stream, layer.layer_norm.weight)
        gated = hasattr(parts, "wi_0")
        first = parts.wi_0 if gated else parts.wi
        inner = space.take("inner", len(stream), first.weight.shape[0])
        space.linear(normed, first.weight, inner)
        gate = space.take("gate", *inner.shape) if gated else None
        if gate is not None:
            space.linear(normed, parts.wi_1.weight, gate)
        space.kernels.activate(inner, self._activation, gate)
        space.add_linear(stream, inner, parts.wo.weight)


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
