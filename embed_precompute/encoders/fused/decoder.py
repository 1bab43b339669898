"""The layers of decoder-only language models, ours, over the weights of transformers' models.

Llama, Mistral, Qwen2, Qwen3 (and the text towers of Qwen2.5-VL, Qwen3-VL and Mistral 3), Gemma 2
and Gemma 3: causal inside a caption, rotary positions counted from the caption's start, grouped
queries, norms of queries and keys, sliding windows, soft caps of attention scores, norms after
attention and feed-forward. The cosines and sines are computed by the model's own code, once.

A prefix that all captions begin with may be shared: its keys and values are computed once, and each
caption attends to them and to itself. That is the same mathematics; it differs in the last bits.

The numbers are those of transformers up to rounding. The mathematics follows its modeling_llama.py,
modeling_qwen3.py, modeling_gemma2.py and modeling_gemma3.py.

Not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional

from embed_precompute.encoders.fused.layers import PRODUCT_BYTES
from embed_precompute.encoders.fused.stream import (
    EqualLengthRun,
    FusedLayers,
    Kernels,
    Workspace,
    attention_calls,
    positions_of,
    runs_of,
    upload,
)
from embed_precompute.encoders.tokenizer import TokenBatch


@dataclass
class DecoderState:
    """See `stream.FusedLayers`."""

    residual: torch.Tensor
    """[rows, D]; its last rows may belong to no token."""
    num_tokens: int
    blocks: list[slice]
    runs: list[EqualLengthRun]
    position: torch.Tensor
    """[rows] each token's position in its caption, a shared prefix included."""
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer -> its output [T, D], of the layers that are asked for."""


class DecoderLayers(FusedLayers[DecoderState]):
    """See `stream.FusedLayers`; returns what `combine` makes of some layers' outputs.

    Batches are packed. On a GPU `compiled` compiles norms and gates alone, as on a CPU.
    """

    def __init__(
        self,
        model: Any,
        outputs: Sequence[int],
        longest: int,
        *,
        windows: Sequence[int | None],
        combine: Callable[[list[torch.Tensor], list[slice]], torch.Tensor],
        compiled: bool,
        prefix: Sequence[int] = (),
    ) -> None:
        """`outputs`: the layers whose outputs are wanted, 0 for the embeddings; `combine` gets
        them in this order, [T, D] each, and the rows of every caption. `longest`: number of tokens
        of the longest caption. `windows`: each layer's sliding window, if it has one. `prefix`: ids
        that all captions begin with, and that batches leave out."""
        config = model.config
        self._model, self._outputs, self._combine = model, tuple(outputs), combine
        self.blocks, self._windows = model.layers[: max(outputs)], windows
        table = model.embed_tokens.weight
        self._workspace = Workspace(table, PRODUCT_BYTES, row_width=config.intermediate_size)
        self._kernels = Kernels(table.device, compiled=compiled)
        self._heads, self._key_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._eps: float = config.rms_norm_eps
        self._is_gemma = config.model_type.startswith("gemma")
        # Gemma alone reads the setting; others' config.json may hold it nevertheless.
        self._scale = (config.query_pre_attn_scalar if self._is_gemma else self._head_dim) ** -0.5
        self._activation: str = config.hidden_activation if self._is_gemma else config.hidden_act
        # Gemma 3 has the setting too, and its model does not use it.
        capped = config.model_type == "gemma2"
        self._soft_cap: float | None = config.attn_logit_softcapping if capped else None
        self._rotary = rotary_tables(model, longest)
        self._prefix: DecoderState | None = None
        self._prefix_length = len(prefix)
        self._prefix_keys: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Each layer's keys and values of the prefix, [P, K*dk], from the layer's first call on."""
        if prefix:
            ids = torch.tensor(prefix, device=table.device)
            residual = torch.empty(len(ids), table.shape[1], dtype=self._residual_dtype)
            runs = [EqualLengthRun(0, 1, len(ids))]
            self._prefix = self._embedded(ids, runs, residual.to(table.device), 0)

    def begin(self, ids: torch.Tensor, batch: TokenBatch, place: int = 0) -> DecoderState:
        rows = self._workspace.row_blocks(len(ids))[-1].stop
        shape = (rows, self._model.embed_tokens.weight.shape[1])
        residual = self._workspace.buffer(f"residual {place}", *shape, dtype=self._residual_dtype)
        state = self._embedded(ids, runs_of(batch), residual, self._prefix_length)
        for wanted in self._outputs:
            output = residual[: len(ids)]
            if wanted < len(self.blocks):  # later layers add to the residual
                name = f"output {wanted} {place}"
                output = self._workspace.buffer(name, *output.shape, dtype=output.dtype)
            state.outputs[wanted] = output
        self._keep(0, state)
        return state

    def layer(self, number: int, state: DecoderState) -> None:
        if self._prefix is not None and number == len(self._prefix_keys):
            k, v = self._through(number, self._prefix, None)
            self._prefix_keys.append((k.clone(), v.clone()))
        prefix = self._prefix_keys[number] if self._prefix is not None else None
        self._through(number, state, prefix)
        self._keep(number + 1, state)

    def end(self, state: DecoderState) -> torch.Tensor:
        captions = [
            slice(start, start + run.length)
            for run in state.runs
            for start in range(run.start, run.start + run.count * run.length, run.length)
        ]
        return self._combine([state.outputs[number] for number in self._outputs], captions)

    @property
    def _residual_dtype(self) -> torch.dtype:
        dtype = self._workspace.dtype
        return torch.float32 if dtype == torch.float16 else dtype  # it overflows in float16

    def _embedded(
        self, ids: torch.Tensor, runs: list[EqualLengthRun], residual: torch.Tensor, first: int
    ) -> DecoderState:
        """Captions before the first layer; their first token has the position `first`."""
        table = self._model.embed_tokens.weight
        self._kernels.embed(ids, table, residual)
        if self._is_gemma:  # its code rounds the factor to the weights' dtype
            residual.mul_(torch.tensor(table.shape[1] ** 0.5, dtype=table.dtype).item())
        position = torch.from_numpy(positions_of(runs, len(residual), first))
        blocks = self._workspace.row_blocks(len(ids))
        return DecoderState(residual, len(ids), blocks, runs, upload(position, residual.device))

    def _keep(self, number: int, state: DecoderState) -> None:
        """Copy the residual, if it is an output that later layers change."""
        if number in state.outputs and number < len(self.blocks):
            state.outputs[number].copy_(state.residual[: state.num_tokens])

    def _through(
        self, number: int, state: DecoderState, prefix: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take captions through a layer; returns its keys and values [rows, K*dk], which the next
        call overwrites."""
        space, residual, layer = self._workspace, state.residual, self._model.layers[number]
        parts, width = layer.self_attn, self._heads * self._head_dim
        key_width = self._key_heads * self._head_dim
        q, mixed = (space.buffer(name, len(residual), width) for name in ("q", "mixed"))
        k, v = (space.buffer(name, len(residual), key_width) for name in "kv")
        rotary = self._rotary[self._windows[number] is not None]
        for rows in state.blocks:
            normed = self._norm(residual[rows], layer.input_layernorm)
            for linear, out in ((parts.q_proj, q), (parts.k_proj, k), (parts.v_proj, v)):
                space.linear(normed, linear.weight, out[rows], linear.bias)
            for x, norm in ((q, "q_norm"), (k, "k_norm")):
                head_norm = getattr(parts, norm, None)
                weight = None if head_norm is None else self._factor(head_norm)
                self._kernels.rotate(x[rows], state.position[rows], rotary, weight, self._eps)
        self._attend(number, state, (q, k, v), prefix, mixed)
        for rows in state.blocks:
            part = residual[rows]
            after = layer.post_attention_layernorm
            self._add(part, mixed[rows], parts.o_proj, after if self._is_gemma else None)
            before = layer.pre_feedforward_layernorm if self._is_gemma else after
            self._feed_forward(layer, part, self._norm(part, before))
        return k, v

    def _feed_forward(self, layer: Any, residual: torch.Tensor, normed: torch.Tensor) -> None:
        space, parts = self._workspace, layer.mlp
        shape = (len(residual), parts.gate_proj.weight.shape[0])
        inner, gate = space.buffer("inner", *shape), space.buffer("gate", *shape)
        space.linear(normed, parts.gate_proj.weight, inner, parts.gate_proj.bias)
        space.linear(normed, parts.up_proj.weight, gate, parts.up_proj.bias)
        self._kernels.activate(inner, self._activation, gate)
        last = layer.post_feedforward_layernorm if self._is_gemma else None
        self._add(residual, inner, parts.down_proj, last)

    def _add(self, residual: torch.Tensor, x: torch.Tensor, linear: Any, norm: Any) -> None:
        """residual += linear(x), or norm(linear(x))."""
        space = self._workspace
        if norm is None and linear.bias is None:
            space.add_linear(residual, x, linear.weight)
            return
        delta = space.buffer("delta", *residual.shape)
        space.linear(x, linear.weight, delta, linear.bias)
        if norm is None:
            residual.add_(delta)
        else:
            self._kernels.add_rms_norm(residual, delta, self._factor(norm), self._eps)

    def _norm(self, residual: torch.Tensor, norm: Any) -> torch.Tensor:
        normed = self._workspace.buffer("normed", *residual.shape)
        self._kernels.rms_norm(residual, self._factor(norm), self._eps, normed)
        return normed

    def _factor(self, norm: Any) -> torch.Tensor:
        """What a norm multiplies by, in float32."""
        weight: torch.Tensor = norm.weight.float()
        return weight + 1 if self._is_gemma else weight

    def _attend(
        self,
        number: int,
        state: DecoderState,
        qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        prefix: tuple[torch.Tensor, torch.Tensor] | None,
        out: torch.Tensor,
    ) -> None:
        """Attention of every caption to itself, and to a shared prefix before it."""
        window, cap = self._windows[number], self._soft_cap
        before = 0 if prefix is None else len(prefix[0])
        # With a cap the products are a plain batch of matrices, whose sums may depend on how many
        # they are: one caption at a time.
        calls = attention_calls(state.runs, before=before, one_by_one=cap is not None)
        for rows, count, length in calls:
            q = qkv[0][rows].view(count, length, self._heads, -1).transpose(1, 2)
            k, v = (
                self._all_heads(x[rows].view(count, length, -1), prefix and prefix[i])
                for i, x in enumerate(qkv[1:])
            )
            if cap is not None:
                visible = self._visible(length, before, window)
                mixed = _capped_attention(q, k, v, visible, self._scale, cap)
            else:
                is_causal = before == 0 and (window is None or length <= window)
                mask = None if is_causal else self._visible(length, before, window)
                mixed = functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, is_causal=is_causal, scale=self._scale
                )  # [count, H, length, dk]
            out[rows].view(count, length, self._heads, -1).copy_(mixed.transpose(1, 2))

    def _all_heads(self, x: torch.Tensor, prefix: torch.Tensor | None) -> torch.Tensor:
        """[C, L, K*dk] -> [C, H, P + L, dk]: each key head once for every query head of its group.

        Copied: torch's own grouping uses other kernels in some releases.
        """
        count = len(x)
        if prefix is not None:
            x = torch.cat([prefix.expand(count, -1, -1), x], dim=1)
        groups = self._heads // self._key_heads
        x = x.view(count, x.shape[1], self._key_heads, 1, -1).expand(-1, -1, -1, groups, -1)
        return x.reshape(count, x.shape[1], self._heads, -1).transpose(1, 2)

    def _visible(self, length: int, before: int, window: int | None) -> torch.Tensor:
        """[length, before + length]: which keys a query attends to."""
        key = torch.arange(before + length, device=self._workspace.device)
        query = key[before:, None]
        visible = key <= query
        return visible if window is None else visible & (key > query - window)


def _capped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    cap: float,
) -> torch.Tensor:
    """Attention with scores between -cap and cap (Gemma 2), in float32."""
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    scores = torch.tanh(scores / cap) * cap
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
    return torch.matmul(weights, v.float())


@torch.inference_mode()
def rotary_tables(model: Any, length: int) -> dict[bool, tuple[torch.Tensor, torch.Tensor]]:
    """Whether the layer has a sliding window -> cosine and sine, each [length, dk / 2], float32.

    Only Gemma 3 rotates its layers with a window otherwise.
    """
    position = torch.arange(length, device=model.embed_tokens.weight.device)[None]
    if "_vl" in model.config.model_type:
        position = position.expand(3, 1, -1)  # of time, height and width: equal for text
    given = torch.zeros(1, dtype=torch.float32, device=position.device)  # for its dtype
    if hasattr(model, "rotary_emb_local"):  # transformers 4
        rotary = {False: model.rotary_emb, True: model.rotary_emb_local}
        tables = {sliding: each(given, position) for sliding, each in rotary.items()}
    elif hasattr(model.rotary_emb, "layer_types"):  # those that the model has
        kinds = {kind == "sliding_attention": kind for kind in model.rotary_emb.layer_types}
        tables = {sliding: model.rotary_emb(given, position, k) for sliding, k in kinds.items()}
    else:
        tables = dict.fromkeys((False, True), model.rotary_emb(given, position))

    def half(table: torch.Tensor) -> torch.Tensor:
        """The other half, and the tables of height and width, are equal."""
        return table.view(-1, *table.shape[-2:])[0, :, : table.shape[-1] // 2].contiguous()

    return {sliding: (half(cosine), half(sine)) for sliding, (cosine, sine) in tables.items()}
