"""Decoder-only language models as text encoders: Llama, Mistral, Qwen2, Qwen3; a vector per token.

The caption is put into a prompt template, one hidden state is taken, and the positions of the
template before the caption are cropped. The models are causal and padded on the right, so real
tokens never see a pad: the forward passes no mask, and only real positions are stored. Layers after
the hidden state are neither loaded nor run.
"""

from __future__ import annotations

import re
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
from embed_precompute.encoders.tokenizer import CaptionTokenizer, Template
from embed_precompute.errors import InputError, require

if TYPE_CHECKING:
    import torch

BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384)


@dataclass(frozen=True, kw_only=True)
class DecoderOptions(EncoderConfig):
    """A decoder-only language model; one hidden state, a vector per token."""

    kind: Literal["decoder"] = "decoder"
    max_length: int = 256
    """Tokens per caption, counted from the first stored position on."""
    template: str = "{text}"
    """The prompt: a format string with {text}, the model's special tokens written out."""
    crop_start: int | Literal["template"] = "template"
    """Number of positions at the start that are not stored. template: all positions before the
    caption. A number must equal that, or be 0: then the template is stored too."""
    crop_end: int = 0
    """Number of positions at the end of the whole prompt that are not stored."""
    hidden_state: int = -1
    """The layer whose output is taken: 1 is the first, -1 the last, -3 the third from the end."""
    norm: Literal["none", "final"] = "none"
    """final: the model's final norm is applied to the hidden state."""
    batch_tokens: int = 16384
    """Tokens of one forward: a forward of length L has batch_tokens / L captions, at least 1."""
    buckets: tuple[int, ...] | None = None
    """Lengths below max_length that a forward may have, counted as max_length is."""
    implementation: Literal["auto", "hf"] = "auto"
    """hf: transformers; auto is hf."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("batch_tokens")
        require(self.crop_end >= 0, f"crop_end is {self.crop_end}: below 0.")
        require(self.hidden_state != 0, "hidden_state is 0: the embeddings are not offered.")
        self.require_buckets(self.buckets)
        self.prompt()

    def prompt(self) -> Template:
        """The template in its parts. Raises InputError."""
        return Template.parse(self.template, self.crop_start, self.crop_end)

    def spec(self) -> dict[str, Any]:
        return {
            "template": self.template,
            "crop_start": self.crop_start,
            "crop_end": self.crop_end,
            "hidden_state": self.hidden_state,
            "norm": self.norm,
        }


class Decoder(Family[DecoderOptions]):
    options = DecoderOptions
    models = MappingProxyType(
        {
            "llama": "LlamaModel",
            "mistral": "MistralModel",
            "qwen2": "Qwen2Model",
            "qwen3": "Qwen3Model",
        }
    )
    checkpoint_prefix = "model."
    encoder_prefixes = ("layers.", "embed_tokens.", "norm.")
    config_keys = (
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"),
        *("hidden_act", "max_position_embeddings"),
    )
    special_tokens = ()  # pads are never attended

    def open_tokenizer(self, where: str, folder: Path, options: DecoderOptions) -> CaptionTokenizer:
        return CaptionTokenizer(
            where,
            folder,
            options.max_length,
            (),
            options.prompt(),
            text_steps=options.text_steps,
            empty=options.empty,
        )

    def check(self, opened: OpenEncoder[DecoderOptions]) -> None:
        layers = opened.checkpoint.text_config.num_hidden_layers
        if abs(opened.options.hidden_state) > layers:
            raise InputError(
                f"{opened.where}.hidden_state is {opened.options.hidden_state}: the model in "
                f"{opened.checkpoint.folder} has {layers} layers."
            )

    def outputs(self, options: DecoderOptions, checkpoint: Checkpoint) -> tuple[Output, ...]:
        return (Output("", "token", checkpoint.text_config.hidden_size, "real"),)

    def sizes(self, checkpoint: Checkpoint) -> Sizes:
        config = checkpoint.text_config
        width, hidden = config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads
        head_width = getattr(config, "head_dim", None) or width // heads
        inner, keys = heads * head_width, config.num_key_value_heads * head_width
        return Sizes(
            layers=config.num_hidden_layers,
            width=width,
            heads=heads,
            inner=inner,
            hidden=hidden,
            linear_weights=width * (2 * inner + 2 * keys + 3 * hidden),
            vocabulary=config.vocab_size,
        )

    def decide(self, opened: OpenEncoder[DecoderOptions], facts: Facts) -> Decision:
        options = opened.options
        implementation = choose_implementation(opened, self, facts, why_not_fused=None)

        def batch_of(length: int) -> int:
            return max(1, options.batch_tokens // length)

        return in_buckets(opened, implementation, options.buckets, BUCKETS, batch_of)

    def config_changes(self, options: DecoderOptions, checkpoint: Checkpoint) -> dict[str, Any]:
        layers = _num_layers(options, checkpoint)
        changes: dict[str, Any] = {"num_hidden_layers": layers}
        if getattr(checkpoint.text_config, "layer_types", None):
            changes["layer_types"] = checkpoint.text_config.layer_types[:layers]
        return changes

    def is_other_part(self, options: DecoderOptions, checkpoint: Checkpoint, weight: str) -> bool:
        """True for layers after the hidden state.

        False for layers beyond config.json's number of them: `_check_loading` refuses those.
        """
        layer = re.match(r"layers\.(\d+)\.", weight.removeprefix("model."))
        if layer is None:
            return False
        layers = int(checkpoint.text_config.num_hidden_layers)
        return _num_layers(options, checkpoint) <= int(layer[1]) < layers

    def config_values(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Releases of transformers name rotary embeddings and sliding windows differently."""
        import transformers

        config = checkpoint.text_config
        if transformers.__version__.startswith("4."):  # it would ignore rope_parameters
            scaling = getattr(config, "rope_scaling", None)
            rope = {"rope_theta": config.rope_theta, **(scaling or {})}
        else:
            rope = config.rope_parameters
        rope = {"rope_type": "default", **rope}
        rope.pop("type", None)  # the old name of rope_type
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        windows = getattr(config, "layer_types", None) or [
            "sliding_attention" if layer >= getattr(config, "max_window_layers", 0) else ""
            for layer in range(config.num_hidden_layers)
        ]
        return {
            **super().config_values(checkpoint),
            "head_dim": self.sizes(checkpoint).inner // config.num_attention_heads,
            "rope": rope,
            "sliding_window": window,
            "sliding": window and [each == "sliding_attention" for each in windows],
        }

    def adapt(self, model: Any, options: DecoderOptions) -> None:
        import torch

        if options.norm == "none":
            model.norm = torch.nn.Identity()

    def forward(
        self, model: Any, options: DecoderOptions, input_ids: torch.Tensor, lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        # The model ends after the layer that is wanted. Its `hidden_states` are not asked for: the
        # last of them has the final norm in some releases of transformers and not in others.
        return {"": model(input_ids=input_ids, use_cache=False).last_hidden_state}

    def reference(
        self, checkpoint: Path, tokenizer: Path, options: DecoderOptions, device: str
    ) -> Reference:
        import torch
        import transformers

        tokenize = transformers.AutoTokenizer.from_pretrained(tokenizer)
        model = transformers.AutoModel.from_pretrained(checkpoint, **in_dtype(options.dtype))
        model.to(device).eval()
        layer = model.layers[options.hidden_state - (options.hidden_state > 0)]
        states: list[torch.Tensor] = []
        layer.register_forward_hook(
            lambda layer, given, output: states.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        start = options.crop_start
        if start == "template":
            before = options.template.format(text="\0").split("\0")[0]
            probe = tokenize(options.template.format(text="a"), return_offsets_mapping=True)
            ends = [end > len(before) for _, end in probe.offset_mapping]
            start = ends.index(True) if before else 0

        def encode(text: str, padded_length: int | None) -> dict[str, torch.Tensor]:
            prompt = options.template.format(text=text)
            length = start + options.max_length
            inputs = tokenize(prompt, truncation=True, max_length=length, return_tensors="pt")
            with torch.no_grad():
                model(**inputs.to(device))
                state = states.pop()
                state = model.norm(state) if options.norm == "final" else state
            return {"": state[0, start : state.shape[1] - options.crop_end]}

        return encode


def _num_layers(options: DecoderOptions, checkpoint: Checkpoint) -> int:
    """Number of layers up to the hidden state."""
    state = options.hidden_state
    return int(state if state > 0 else checkpoint.text_config.num_hidden_layers + 1 + state)
