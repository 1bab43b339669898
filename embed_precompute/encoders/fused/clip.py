"""The layers of CLIP's text model over a stream; positions count from each caption's own start.

Guarantees: what `fused` guarantees; causal inside a caption.
Costs: of the last layer only the rows that are pooled are computed after its attention.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from embed_precompute.encoders import offload
from embed_precompute.encoders.batching import TokenBatch
from embed_precompute.encoders.fused.stream import Group, Workspace, attend
from embed_precompute.encoders.transfers import upload


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
        layers = offload.each_on_device(self._text.encoder.layers)
        self._output_bias = [_output_bias(layer.self_attn) for layer in layers]

    @staticmethod
    def product_rows(config: Any, dtype: torch.dtype) -> int:
        """The most rows of one matrix product on a CPU; the last layer's, of pooled rows alone, are
        filled up to so many."""
        return 2048

    def __call__(
        self, ids: torch.Tensor, batch: TokenBatch, groups: list[Group], keep: torch.Tensor | None
    ) -> torch.Tensor:
        """See `fused.Body`."""
        assert keep is not None, "CLIP is pooled"
        space, layers = self._workspace, self._text.encoder.layers
        steps = space.steps(len(ids))
        words = self._text.embeddings.token_embedding.weight
        places = self._text.embeddings.position_embedding.weight
        position = upload(torch.from_numpy(_positions(batch)), space.device)
        stream = space.take("stream", steps[-1].stop, words.shape[1])
        normed = space.take("normed", *stream.shape)
        space.kernels.embed(ids, words, stream)
        stream[: len(ids)].add_(functional.embedding(position, places))
        for rows in steps:
            space.kernels.layer_norm(stream[rows], layers[0].layer_norm1, normed[rows])
        following = [*(layer.layer_norm1 for layer in layers[1:]), self._text.final_layer_norm]
        for number, layer in enumerate(offload.each_on_device(layers)):
            mixed = self._attention(layer.self_attn, normed, steps, groups)
            if number == len(layers) - 1:
                # Only what is kept goes on, in products of the same size: of few rows a CPU splits
                # the sums among its threads, and their number would show in the bits.
                size = steps[0].stop
                keep = functional.pad(keep, (0, -len(keep) % size))
                steps = steps[: len(keep) // size]
                stream, mixed, normed = stream[keep], mixed[keep], normed[keep]
            for rows in steps:
                self._after_attention(number, stream[rows], mixed[rows], normed[rows])
                delta = self._feed_forward(layer.mlp, normed[rows])
                space.kernels.add_layer_norm(
                    stream[rows], delta, layer.mlp.fc2.bias, following[number], normed[rows]
                )
        return normed[: len(batch.lengths)]

    def _attention(
        self, parts: Any, normed: torch.Tensor, steps: list[slice], groups: list[Group]
    ) -> torch.Tensor:
        """[T, D], before the output matrix. `_output_bias` says where two of the biases are."""
        space = self._workspace
        q, k, v = (space.take(name, *normed.shape) for name in "qkv")
        for rows in steps:
            space.linear(normed[rows], parts.q_proj.weight, q[rows], parts.q_proj.bias)
            space.linear(normed[rows], parts.k_proj.weight, k[rows])
            space.linear(normed[rows], parts.v_proj.weight, v[rows])
        mixed = space.take("mixed", *normed.shape)
        attend((q, k, v), groups, self._heads, None, self._scale, mixed)
        return mixed

    def _after_attention(
        self, number: int, stream: torch.Tensor, mixed: torch.Tensor, normed: torch.Tensor
    ) -> None:
        """Add rows of `mixed` to the stream, through the output matrix; norm the sum."""
        space, layer = self._workspace, self._text.encoder.layers[number]
        delta = space.take("delta", *stream.shape)
        space.linear(mixed, layer.self_attn.out_proj.weight, delta)
        bias = self._output_bias[number]
        space.kernels.add_layer_norm(stream, delta, bias, layer.layer_norm2, normed)

    def _feed_forward(self, dense: Any, normed: torch.Tensor) -> torch.Tensor:
        """[rows, D], without the last bias."""
        space = self._workspace
        inner = space.take("inner", len(normed), dense.fc1.weight.shape[0])
        space.linear(normed, dense.fc1.weight, inner)
        space.kernels.activate_biased(inner, self._activation, dense.fc1.bias)
        delta = space.take("delta", *normed.shape)
        space.linear(inner, dense.fc2.weight, delta)
        return delta


@torch.inference_mode()
def _output_bias(attention: Any) -> torch.Tensor:
    """[D] float32: the output's bias, and that of the values behind the output matrix.

    The weights of attention sum to one, so the values' bias passes through it; that of the keys
    adds the same to every product of a query, which no softmax sees.
    """
    output, values = attention.out_proj, attention.v_proj
    through: torch.Tensor = output.weight.float() @ values.bias.float() + output.bias.float()
    return through


def _positions(batch: TokenBatch) -> np.ndarray:
    """[T] place of each token in its caption; 0 behind the last caption."""
    lines, length = batch.input_ids.shape
    if not batch.packed:
        return np.tile(np.arange(length, dtype=np.int64), lines)
    position = np.zeros(length, dtype=np.int64)
    for start, tokens in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True):
        position[start : start + tokens] = np.arange(tokens)
    return position
