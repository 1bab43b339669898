"""What is stored of a decoder's hidden states: which layers, made comparable, combined, projected.

The layers' outputs are taken by hooks, never from `hidden_states`: the last entry of those has the
final norm in some releases and classes of transformers and not in others. The semantics of the two
stages before a projection are those of LTX-2: diffusers 0.42.1, pipelines/ltx2/connectors.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch

EPSILON = 1e-6
OF_ONE_MASK = ("llama", "mistral", "qwen3_vl_text")
"""Models that do not read layer_types, which their config.json may hold nevertheless."""
RANGE = 8
"""LTX-2's scale_factor."""


class Projection(torch.nn.Module):
    """A frozen linear stage. It goes to a device with the model that it is a part of."""

    weight: torch.Tensor
    """[D out, D in]"""
    bias: torch.Tensor | None
    """[D out]"""

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        before: Literal["none", "ltx2_range", "rms"],
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.before = before

    def prepared(self, states: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """`states` [B, L, D, K] of K layers, as the matrix wants them; zeros at pads."""
        if self.before == "none":
            return states
        pads = ~real[:, :, None, None]
        if self.before == "rms":
            squares = torch.mean(states**2, dim=2, keepdim=True) + EPSILON
            # In bfloat16 itself a token's root depends on its place: torch rounds it once or twice.
            scale = torch.rsqrt(squares.float()).to(states.dtype)
            states = (states * scale).masked_fill(pads, 0.0)
            return states * math.sqrt(self.weight.shape[0] / states.shape[2])
        count = (real.sum(-1) * states.shape[2]).view(-1, 1, 1, 1)
        mean = states.masked_fill(pads, 0.0).sum(dim=(1, 2), keepdim=True) / (count + EPSILON)
        least = states.masked_fill(pads, math.inf).amin(dim=(1, 2), keepdim=True)
        most = states.masked_fill(pads, -math.inf).amax(dim=(1, 2), keepdim=True)
        scaled = (states - mean) / (most - least + EPSILON) * RANGE
        return scaled.masked_fill(pads, 0.0).to(states.dtype)


class Readout(torch.nn.Module):
    """Makes one vector per token of the outputs of some layers."""

    projection: Projection | None

    def __init__(
        self,
        layers: tuple[int, ...],
        *,
        combine: Literal["concat", "stack"] = "concat",
        zscore: bool = False,
        projection: Projection | None = None,
    ) -> None:
        """`layers`: 0 is the embeddings, k the output of layer k."""
        super().__init__()
        self.layers, self.combine, self.zscore = layers, combine, zscore
        self.projection = projection

    def forward(self, outputs: Sequence[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
        """[B, L, stored width] of the layers' outputs, each [B, L, D], in the order of `layers`.

        `real` [B, L] bool: where the tokens of the caption and its template are, not pads.
        """
        return self._projected(self._combined(outputs, real))

    def of_packed(self, outputs: Sequence[torch.Tensor], captions: list[slice]) -> torch.Tensor:
        """[T, stored width] of the layers' outputs over a packed stream, each [T, D].

        `captions`: the rows of each caption. Other rows hold arbitrary numbers.
        """
        real = torch.ones((1, len(outputs[0])), dtype=torch.bool, device=outputs[0].device)
        if self.projection is None or self.projection.before != "ltx2_range":
            return self._projected(self._combined([each[None] for each in outputs], real))[0]
        width = len(outputs) * outputs[0].shape[-1]
        values = outputs[0].new_zeros(len(outputs[0]), width)
        for rows in captions:  # each has a mean and a range of its own
            values[rows] = self._combined([each[None, rows] for each in outputs], real[:, rows])[0]
        return self._projected(values)

    def _combined(self, outputs: Sequence[torch.Tensor], real: torch.Tensor) -> torch.Tensor:
        """[B, L, K * D]"""
        projection = self.projection
        states = [_zscore(state) for state in outputs] if self.zscore else list(outputs)
        if (projection is None or projection.before == "none") and self.combine == "concat":
            return torch.cat(states, -1) if len(states) > 1 else states[0]
        stacked = torch.stack(states, -1)  # [B, L, D, K]
        if projection is not None:
            stacked = projection.prepared(stacked, real)
        stacked = stacked if self.combine == "stack" else stacked.transpose(-1, -2)
        return stacked.flatten(-2)

    def _projected(self, values: torch.Tensor) -> torch.Tensor:
        projection = self.projection
        if projection is None:
            return values
        weight = projection.weight  # fused computes in float32 where a CPU has no bfloat16
        return torch.nn.functional.linear(values.to(weight.dtype), weight, projection.bias)


def _zscore(state: torch.Tensor) -> torch.Tensor:
    """Mean 0 and standard deviation 1 for each token, as Cosmos-Predict2.5 has it."""
    return (state - state.mean(-1, keepdim=True)) / (state.std(-1, keepdim=True) + 1e-8)


@contextlib.contextmanager
def taken(model: Any, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """The outputs of `layers` of a decoder's forward within this context, each [B, L, D].

    They are there after the forward. `model`: a transformers model with `layers`.
    """
    found: dict[int, torch.Tensor] = {}

    def embeddings(layer: Any, given: Any) -> None:
        found[0] = given[0]

    def output_of(number: int) -> Any:
        def hook(layer: Any, given: Any, output: Any) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output

        return hook

    with contextlib.ExitStack() as stack:
        for number in layers:
            if number == 0:
                handle = model.layers[0].register_forward_pre_hook(embeddings)
            else:
                handle = model.layers[number - 1].register_forward_hook(output_of(number))
            stack.callback(handle.remove)
        yield found


def real_positions(
    input_ids: torch.Tensor, lengths: torch.Tensor, *, pads_left: bool
) -> torch.Tensor:
    """[B, L] bool: the places of each line's `lengths` tokens."""
    length = input_ids.shape[1]
    place = torch.arange(length, device=input_ids.device)[None, :]
    return place >= length - lengths[:, None] if pads_left else place < lengths[:, None]


def causal_masks(model: Any, real: torch.Tensor, windows: Sequence[int | None]) -> Any:
    """The finished masks of a decoder: a token attends to the real tokens up to its own place.

    Given the plain mask [B, L], a model leaves it out when no line of the batch has a pad, and then
    a caption's kernel would depend on its neighbours. Its numbers are those of the plain mask.
    `windows`: each layer's sliding window, if it has one.
    """
    config = model.config
    place = torch.arange(real.shape[1], device=real.device)
    distance = place[:, None] - place[None, :]
    of_booleans = config._attn_implementation == "sdpa" and _has_dictionaries()

    def finished(window: int | None) -> torch.Tensor:
        near = (distance >= 0) & (distance < (window or len(place)))
        attended = (near[None] & real[:, None, :])[:, None]  # [B, 1, L, L]
        if of_booleans:
            return attended
        additive = torch.zeros(attended.shape, dtype=model.dtype, device=real.device)
        return additive.masked_fill(~attended, torch.finfo(model.dtype).min)

    window = next(filter(None, windows), None)
    if not _has_dictionaries():  # Gemma's layers then cut their window out by themselves
        return finished(None if config.model_type.startswith("gemma") else window)
    if getattr(config, "layer_types", None) and config.model_type not in OF_ONE_MASK:
        return {"full_attention": finished(None), "sliding_attention": finished(window)}
    return finished(window)


@functools.cache
def _has_dictionaries() -> bool:
    """Whether models with sliding windows take a mask for each type of layer: since 4.53."""
    return importlib.util.find_spec("transformers.masking_utils") is not None
