"""The layers of CLIP's text model over a stream; positions count from each caption's own start.

Guarantees: what `fused` guarantees; causal inside a caption.
Costs: one [L, L] mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from embed_precompute.batching import TokenBatch
from embed_precompute.encoders.fused import Group, Workspace, attend


class ClipBody:
    """See `fused.Body`."""

    def __init__(self, model: Any, workspace: Workspace, length: int) -> None:
        # transformers 4 wraps the text model once more than 5.
        self._text = getattr(model, "text_model", model)
        self._workspace = workspace
        config = model.config
        self._heads: int = config.num_attention_heads
        self._scale = (config.hidden_size // self._heads) ** -0.5
        self._activation: str = config.hidden_act
        self._causal = torch.full((1, length, length), -torch.inf, device=workspace.device)
        self._causal = self._causal.triu_(1).to(workspace.dtype)

    def __call__(self, ids: torch.Tensor, batch: TokenBatch, groups: list[Group]) -> torch.Tensor:
        """See `fused.Body`."""
        space, num_tokens = self._workspace, ids.shape[0]
        words = self._text.embeddings.token_embedding.weight
        places = self._text.embeddings.position_embedding.weight
        position = torch.from_numpy(_positions(batch)).to(space.device)
        stream = space.take("stream", num_tokens, words.shape[1])
        space.kernels.embed(ids, words, stream)
        stream.add_(functional.embedding(position, places))
        for layer in self._text.encoder.layers:
            self._attention(layer, stream, groups)
            self._feed_forward(layer, stream)
        return self._norm(stream, self._text.final_layer_norm)

    def _norm(self, stream: torch.Tensor, norm: Any) -> torch.Tensor:
        normed = self._workspace.take("normed", *stream.shape)
        kernels = self._workspace.kernels
        kernels.layer_norm(stream, norm.weight, norm.bias, norm.eps, normed)
        return normed

    def _attention(self, layer: Any, stream: torch.Tensor, groups: list[Group]) -> None:
        space, parts = self._workspace, layer.self_attn
        normed = self._norm(stream, layer.layer_norm1)
        qkv = space.take("qkv", stream.shape[0], 3, stream.shape[1])
        for part, linear in enumerate((parts.q_proj, parts.k_proj, parts.v_proj)):
            space.linear(normed, linear.weight, linear.bias, qkv[:, part])
        mixed = space.take("mixed", *stream.shape)
        attend(qkv, groups, self._heads, self._causal, self._scale, mixed)
        space.add_linear(stream, mixed, parts.out_proj.weight, parts.out_proj.bias)

    def _feed_forward(self, layer: Any, stream: torch.Tensor) -> None:
        space, parts = self._workspace, layer.mlp
        normed = self._norm(stream, layer.layer_norm2)
        inner = space.take("inner", stream.shape[0], parts.fc1.weight.shape[0])
        space.linear(normed, parts.fc1.weight, parts.fc1.bias, inner)
        space.kernels.activate(inner, self._activation, None)
        space.add_linear(stream, inner, parts.fc2.weight, parts.fc2.bias)


def _positions(batch: TokenBatch) -> np.ndarray:
    """[T] place of each token in its caption; 0 behind the last caption."""
    lines, length = batch.input_ids.shape
    if not batch.packed:
        return np.tile(np.arange(length, dtype=np.int64), lines)
    position = np.zeros(length, dtype=np.int64)
    for start, tokens in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True):
        position[start : start + tokens] = np.arange(tokens)
    return position
