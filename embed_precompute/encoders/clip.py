"""The layers of CLIP's text model over a stream; positions count from each caption's own start.

Guarantees: what `fused` guarantees; causal inside a caption.
Costs: of the last layer only the rows that are pooled are computed after its attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from embed_precompute.batching import TokenBatch
from embed_precompute.encoders.fused import Group, Workspace, attend

KEPT_ROWS = 256
"""Rows of one product over end-of-text tokens: a stream holds some hundred of them."""


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

    def __call__(
        self, ids: torch.Tensor, batch: TokenBatch, groups: list[Group], keep: torch.Tensor | None
    ) -> torch.Tensor:
        """See `fused.Body`."""
        assert keep is not None, "CLIP is pooled"
        space = self._workspace
        steps = space.steps(len(ids))
        words = self._text.embeddings.token_embedding.weight
        places = self._text.embeddings.position_embedding.weight
        position = torch.from_numpy(_positions(batch)).to(space.device)
        stream = space.take("stream", steps[-1].stop, words.shape[1])
        space.kernels.embed(ids, words, stream)
        stream[: len(ids)].add_(functional.embedding(position, places))
        *layers, last = self._text.encoder.layers
        for layer in layers:
            mixed = self._attention(layer, stream, steps, groups)
            for rows in steps:
                self._after_attention(layer, stream[rows], mixed[rows])
        # Of the last layer only what is kept goes on, in products of one size again.
        mixed = self._attention(last, stream, steps, groups)
        keep = functional.pad(keep, (0, -len(keep) % KEPT_ROWS))
        kept, mixed = stream[keep], mixed[keep]
        for start in range(0, len(keep), KEPT_ROWS):
            rows = slice(start, start + KEPT_ROWS)
            self._after_attention(last, kept[rows], mixed[rows])
        return self._norm(kept, self._text.final_layer_norm)[: len(batch.lengths)]

    def _norm(self, stream: torch.Tensor, norm: Any) -> torch.Tensor:
        normed = self._workspace.take("normed", *stream.shape)
        kernels = self._workspace.kernels
        kernels.layer_norm(stream, norm.weight, norm.bias, norm.eps, normed)
        return normed

    def _attention(
        self, layer: Any, stream: torch.Tensor, steps: list[slice], groups: list[Group]
    ) -> torch.Tensor:
        """[T, D], before the output matrix."""
        space, parts = self._workspace, layer.self_attn
        q, k, v = qkv = tuple(space.take(name, *stream.shape) for name in "qkv")
        for rows in steps:
            normed = self._norm(stream[rows], layer.layer_norm1)
            for linear, out in ((parts.q_proj, q), (parts.k_proj, k), (parts.v_proj, v)):
                space.linear(normed, linear.weight, linear.bias, out[rows])
        mixed = space.take("mixed", *stream.shape)
        attend(qkv, groups, self._heads, None, self._scale, mixed)
        return mixed

    def _after_attention(self, layer: Any, stream: torch.Tensor, mixed: torch.Tensor) -> None:
        """The rest of a layer, on rows of the stream, in place."""
        space, output, dense = self._workspace, layer.self_attn.out_proj, layer.mlp
        space.add_linear(stream, mixed, output.weight)
        stream.add_(output.bias)
        normed = self._norm(stream, layer.layer_norm2)
        inner = space.take("inner", len(stream), dense.fc1.weight.shape[0])
        space.linear(normed, dense.fc1.weight, dense.fc1.bias, inner)
        space.kernels.activate(inner, self._activation, None)
        space.add_linear(stream, inner, dense.fc2.weight)
        stream.add_(dense.fc2.bias)


def _positions(batch: TokenBatch) -> np.ndarray:
    """[T] place of each token in its caption; 0 behind the last caption."""
    lines, length = batch.input_ids.shape
    if not batch.packed:
        return np.tile(np.arange(length, dtype=np.int64), lines)
    position = np.zeros(length, dtype=np.int64)
    for start, tokens in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True):
        position[start : start + tokens] = np.arange(tokens)
    return position
