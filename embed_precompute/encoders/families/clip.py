"""CLIP text encoders: a vector for each caption, for each token, or both from one forward.

CLIP is causal and pooled at its end-of-text token, so nothing after that token reaches the pooled
vector, and a caption may run at any length that holds it. States of tokens are stored as SD3 takes
them: all positions, pads included, so there every caption runs at max_length.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from embed_precompute.encoders.checkpoint import Checkpoint
from embed_precompute.encoders.families.base import (
    Decision,
    EncoderConfig,
    Facts,
    Family,
    OpenEncoder,
    Output,
    Reference,
    Sizes,
    choose_implementation,
    in_buckets,
    in_dtype,
)
from embed_precompute.encoders.tokenizer import CaptionTokenizer
from embed_precompute.errors import InputError, require

if TYPE_CHECKING:
    import torch

    from embed_precompute.encoders.fused.stream import Forward

BUCKETS = (16, 32, 48, 64, 96, 128, 192)
FUSED_ACTIVATIONS = ("quick_gelu", "gelu")
HIDDEN = "_hidden"
ARGMAX_EOS = 2
"""eos_token_id of CLIP configs older than transformers 4.31: it means to pool at the highest id."""


@dataclass(frozen=True, kw_only=True)
class ClipOptions(EncoderConfig):
    """A CLIP text encoder; a vector per caption and, if asked for, per token."""

    kind: Literal["clip"] = "clip"
    max_length: int = 77
    outputs: tuple[Literal["pooled", "hidden"], ...] = ("pooled",)
    """pooled: a vector per caption, tensor `text_NAME`. hidden: a vector for each of max_length
    positions, pads included, tensor `text_NAME_hidden`; by hf only. Both come from one forward."""
    hidden_state: int = -2
    """hidden: which of transformers' hidden_states is stored; -1 is the last layer's output,
    without the final norm."""
    projection: bool | None = None
    """pooled: with true, the vector is multiplied by the checkpoint's text_projection
    (text_embeds). With false it is pooler_output. With null it is pooler_output, and an
    error for a checkpoint that was saved with its projection."""
    batch_size: int = 256
    """Only for hf: captions in one forward."""
    buckets: tuple[int, ...] | None = None
    """Only for hf with pooled output: lengths below max_length that a forward may have."""
    stream_tokens: int = 4096
    """Only for fused: tokens in one forward of packed captions."""
    implementation: Literal["auto", "hf", "fused"] = "auto"
    """hf: transformers, the reference. fused: our own layers, pooled only. auto: fused if it can
    run these options and has the model's activation, and no buckets are given, else hf."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("batch_size", "stream_tokens")
        require(
            0 < len(self.outputs) == len(set(self.outputs)),
            f"outputs is {list(self.outputs)}: expected pooled, hidden or both.",
        )
        require(
            self.stream_tokens >= self.max_length,
            f"stream_tokens is {self.stream_tokens}: expected at least max_length "
            f"({self.max_length}), so that every caption fits.",
        )
        require(
            self.buckets is None or not self.is_padded,
            "buckets are for the output pooled: hidden is stored at max_length, so every "
            "caption runs at it. Remove the field.",
        )
        self.require_buckets(self.buckets)

    @property
    def is_padded(self) -> bool:
        """Every caption runs at max_length, because all of its positions are stored."""
        return "hidden" in self.outputs

    def spec(self) -> dict[str, Any]:
        return {
            "hidden_state": self.hidden_state if self.is_padded else None,
            "projection": bool(self.projection),
        }


class Clip(Family[ClipOptions]):
    options = ClipOptions
    models = MappingProxyType({"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"})
    one_graph = True
    implementations = ("hf", "fused")
    checkpoint_prefix = "text_model."
    encoder_prefixes = ("embeddings.", "encoder.", "final_layer_norm.", "text_projection.")
    config_keys = (
        *("num_hidden_layers", "num_attention_heads", "layer_norm_eps", "hidden_act"),
        "eos_token_id",
    )
    batch_setting = "batch_size"

    def check(self, opened: OpenEncoder[ClipOptions]) -> None:
        options, checkpoint = opened.options, opened.checkpoint
        config = checkpoint.text_config
        if options.max_length > config.max_position_embeddings:
            raise InputError(
                f"{opened.where}.max_length is {options.max_length}: the model in "
                f"{checkpoint.folder} has {config.max_position_embeddings} positions. Lower it."
            )
        if options.is_padded and not 1 <= abs(options.hidden_state) <= config.num_hidden_layers:
            raise InputError(
                f"{opened.where}.hidden_state is {options.hidden_state}: the model in "
                f"{checkpoint.folder} has {config.num_hidden_layers} layers."
            )
        if "pooled" not in options.outputs:
            return
        projected = any(name.endswith("WithProjection") for name in checkpoint.architectures)
        if projected and options.projection is None:
            raise InputError(
                f"{opened.where}.projection is not given: {checkpoint.folder} was saved as "
                f"{checkpoint.architectures[0]}, whose users take the pooled vector projected. Set "
                "projection true to store it so (text_embeds), or false to store pooler_output."
            )
        _check_pooling(opened)

    def outputs(self, options: ClipOptions, checkpoint: Checkpoint | None) -> tuple[Output, ...]:
        pooled = hidden = options.width or 0
        if checkpoint is not None:
            config = checkpoint.text_config
            hidden = config.hidden_size
            pooled = config.projection_dim if options.projection else hidden
        possible = {
            "pooled": Output("", "caption", pooled, None),
            "hidden": Output(HIDDEN, "token", hidden, "all"),
        }
        return tuple(output for name, output in possible.items() if name in options.outputs)

    def sizes(self, checkpoint: Checkpoint) -> Sizes:
        config = checkpoint.text_config
        width, hidden = config.hidden_size, config.intermediate_size
        return Sizes(
            layers=config.num_hidden_layers,
            width=width,
            heads=config.num_attention_heads,
            inner=width,
            hidden=hidden,
            linear_weights=width * (4 * width + 2 * hidden),
            vocabulary=config.vocab_size,
        )

    def decide(self, opened: OpenEncoder[ClipOptions], facts: Facts) -> Decision:
        options, activation = opened.options, opened.checkpoint.text_config.hidden_act
        reason = None
        if options.is_padded:
            reason = "fused makes the pooled vector only."
        elif options.buckets is not None:
            reason = "buckets are given, and fused packs captions end to end."
        elif activation not in FUSED_ACTIVATIONS:
            reason = (
                f"{opened.checkpoint.folder / 'config.json'} has hidden_act {activation!r}, and "
                f"fused computes {', '.join(FUSED_ACTIVATIONS)}."
            )
        implementation = choose_implementation(opened, self, facts, reason)
        if options.is_padded:
            shape = (options.batch_size, options.max_length)
            return Decision(implementation, False, options.max_length, (shape,), shape)
        if implementation == "fused":
            stream = (1, options.stream_tokens)
            return Decision(implementation, options.compile, None, (stream,), stream)
        return in_buckets(
            opened, implementation, options.buckets, BUCKETS, lambda length: options.batch_size
        )

    def model_class(self, options: ClipOptions, checkpoint: Checkpoint) -> str:
        return "CLIPTextModelWithProjection" if options.projection else "CLIPTextModel"

    def is_other_part(self, options: ClipOptions, checkpoint: Checkpoint, weight: str) -> bool:
        return weight.startswith("text_projection.") and not options.projection

    def forward(
        self, model: Any, options: ClipOptions, input_ids: torch.Tensor, lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        output = model(input_ids=input_ids, output_hidden_states=options.is_padded)
        found = {}
        if "pooled" in options.outputs:
            found[""] = output.text_embeds if options.projection else output.pooler_output
        if "hidden" in options.outputs:
            found[HIDDEN] = output.hidden_states[options.hidden_state]
        return found

    def fused_layers(
        self,
        model: Any,
        options: ClipOptions,
        longest: int,
        tokenizer: CaptionTokenizer,
        *,
        compiled: bool,
    ) -> Forward:
        from embed_precompute.encoders.fused import layers

        assert tokenizer.eos_id is not None
        if compiled and model.device.type == "cuda":
            from embed_precompute.encoders.fused import graph  # needs torch 2.5

            return graph.GraphLayers(graph.ClipGraph(model, longest, tokenizer.eos_id))
        return layers.ClipLayers(model, tokenizer.eos_id, compiled=compiled)

    def reference(
        self, checkpoint: Path, tokenizer: Path, options: ClipOptions, device: str
    ) -> Reference:
        import torch
        import transformers

        tokenize = transformers.AutoTokenizer.from_pretrained(tokenizer)
        projected = "WithProjection" if options.projection else ""
        model_class = getattr(transformers, f"CLIPTextModel{projected}")
        model = model_class.from_pretrained(checkpoint, **in_dtype(options.dtype)).to(device).eval()

        def encode(text: str, padded_length: int | None) -> dict[str, torch.Tensor]:
            lengths = {"max_length": options.max_length, "padding": "max_length"}
            inputs = tokenize(text, truncation=True, return_tensors="pt", **lengths)
            with torch.no_grad():
                output = model(inputs.input_ids.to(device), output_hidden_states=True)
            pooled = output.text_embeds if options.projection else output.pooler_output
            hidden = output.hidden_states[options.hidden_state]
            found = {"pooled": ("", pooled[0]), "hidden": (HIDDEN, hidden[0])}
            return dict(found[name] for name in options.outputs)

        return encode


def _check_pooling(opened: OpenEncoder[ClipOptions]) -> None:
    """Raise InputError unless the model pools at the tokenizer's end-of-text token.

    transformers pools at the first token that equals the config's eos_token_id, or at the highest
    id if eos_token_id is 2. If no token matches, it silently pools at position 0.
    """
    tokenizer, eos = opened.tokenizer, opened.checkpoint.text_config.eos_token_id
    pooled_at = tokenizer.max_id if eos == ARGMAX_EOS else eos
    if pooled_at != tokenizer.eos_id:
        rule = "the highest id (eos_token_id is 2)" if eos == ARGMAX_EOS else "eos_token_id"
        raise InputError(
            f"{opened.tokenizer_where}: the tokenizer ends captions with id {tokenizer.eos_id}, "
            f"but the model in {opened.checkpoint.folder} pools at {rule}, {pooled_at}. Use the "
            "tokenizer of this checkpoint, or correct eos_token_id in config.json."
        )
