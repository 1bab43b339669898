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
class Message:
    """One message of a chat."""

    role: str
    """Who speaks: system, user or what else the chat template knows."""
    content: str
    """A format string; {text} in it stands for the caption."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """A prompt that the tokenizer's own chat template makes."""

    messages: tuple[Message, ...]
    """The messages, in order; one of them holds {text}."""
    generation_prompt: bool = False
    """Whether the beginning of an answer stands at the end (add_generation_prompt)."""
    thinking: bool | None = None
    """The template's switch enable_thinking; with null it is not given."""

    def __post_init__(self) -> None:
        holding = [message for message in self.messages if "{text}" in message.content]
        require(
            len(holding) == 1,
            f"messages has {{text}} in {len(holding)} of {len(self.messages)} messages: expected "
            "it in one.",
        )
        for message in self.messages:
            Template.parse(message.content if message in holding else message.content + "{text}")


@dataclass(frozen=True, kw_only=True)
class ProjectOptions:
    """A frozen linear stage behind the encoder: what is stored is its output."""

    path: str
    """A safetensors file, or a folder of them."""
    weight: str
    """Name of the matrix, [stored width, width before]."""
    bias: str | None = None
    """Name of the bias, [stored width]."""
    before: Literal["none", "ltx2_range", "rms"] = "none"
    """What the vectors go through before the matrix. ltx2_range: LTX-2's, each layer less its mean
    over the caption, divided by its range, times 8. rms: LTX-2.3's, the root mean square of each
    layer is 1."""


@dataclass(frozen=True, kw_only=True)
class DecoderOptions(EncoderConfig):
    """A decoder-only language model; one hidden state or several, a vector per token."""

    kind: Literal["decoder"] = "decoder"
    max_length: int = 256
    """The most positions of a caption that are stored; more tokens are cut off."""
    template: str = "{text}"
    """The prompt: a format string with {text}, the model's special tokens written out."""
    chat: ChatOptions | None = None
    """In place of template: messages, of which the tokenizer's chat template makes the prompt."""
    crop_start: int | str = "template"
    """Number of positions at the start that are not stored. template: all positions before the
    caption; template-N: all of these but the last N. A number must equal the template's, or be 0:
    then the template is stored too."""
    keep_first: int = 0
    """Number of positions at the very start that are stored nevertheless."""
    crop_end: int = 0
    """Number of positions at the end of the whole prompt that are not stored."""
    layers: tuple[int, ...] = (-1,)
    """The layers whose outputs are taken: 0 is the embeddings, 1 the first layer, -1 the last, -3
    the third from the end."""
    norm: Literal["none", "final"] = "none"
    """final: the model's final norm is applied to the last of `layers`, which must be the model's
    last layer or the only one."""
    combine: Literal["concat", "stack"] = "concat"
    """How several layers become one vector. concat: one layer after the other. stack: the first
    feature of every layer, then the second of every layer, and so on."""
    layer_zscore: bool = False
    """Every layer's vector is made to have mean 0 and standard deviation 1 before they are
    combined."""
    project: ProjectOptions | None = None
    """A frozen linear stage that the combined vectors go through."""
    attention_mask: Literal["none", "padding"] = "none"
    """Only for hf. padding: the model is given a mask of the pads. With padding on the right a real
    token never sees a pad, with or without a mask."""
    padding_side: Literal["right", "left"] = "right"
    """Only for hf: where the pads are; left needs attention_mask padding."""
    keep: Literal["real", "all"] = "real"
    """Which positions are stored. all: every caption runs at max_length and what is cropped, and
    the vectors of its pads are stored too; only for hf."""
    batch_tokens: int = 16384
    """Only for hf. Tokens of one forward: a forward of length L has batch_tokens / L captions, at
    least 1."""
    buckets: tuple[int, ...] | None = None
    """Only for hf: lengths below max_length that a forward may have, counted as max_length is. An
    empty list: every caption runs at the full length."""
    stream_tokens: int = 4096
    """Only for fused: tokens in one forward of packed captions."""
    prefix: Literal["compute", "shared"] = "compute"
    """Only for fused. shared: what the layers make of the template before the caption is computed
    once, not for every caption; it changes the last bits."""
    implementation: Literal["auto", "hf", "fused"] = "auto"
    """hf: transformers, the reference. fused: our own layers. auto: fused if it can run this model
    with these options, else hf."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("batch_tokens", "stream_tokens")
        require(
            self.chat is None or self.template == "{text}",
            "chat and template are both given: the chat template makes the prompt. Remove one.",
        )
        for name in ("crop_end", "keep_first"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}: below 0.")
        require(
            0 < len(self.layers) == len(set(self.layers)),
            f"layers is {list(self.layers)}: expected one layer or more, each once.",
        )
        require(
            self.padding_side == "right" or self.attention_mask == "padding",
            "padding_side is left with attention_mask none: every token would see the pads before "
            "it. Set attention_mask padding.",
        )
        if self.keep == "all":
            require(not self.buckets, "buckets are for keep real: with all there is one length.")
            require(self.crop_end == 0, "crop_end is for keep real: with all the end is pads.")
        for_hf = {"attention_mask": "none", "padding_side": "right", "keep": "real"}
        for name, value in for_hf.items():
            require(
                self.implementation != "fused" or getattr(self, name) == value,
                f"{name} is {getattr(self, name)}: fused packs captions end to end, without pads. "
                "Use the implementation hf, or remove it.",
            )
        self.require_buckets(self.buckets)
        self.prompt()

    def prompt(self) -> Template:
        """The template in its parts. Raises InputError."""
        return Template.parse(self.template, self.crop_start, self.crop_end, self.keep_first)

    def spec(self) -> dict[str, Any]:
        return {
            "template": self.template,
            "crop_start": self.crop_start,
            "keep_first": self.keep_first,
            "crop_end": self.crop_end,
            "layers": list(self.layers),
            "norm": self.norm,
            "combine": self.combine,
            "layer_zscore": self.layer_zscore,
            "attention_mask": self.attention_mask,
            "padding_side": self.padding_side,
            "prefix": self.prefix,
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
        options, layers = opened.options, opened.checkpoint.text_config.num_hidden_layers
        where, folder = opened.where, opened.checkpoint.folder
        for layer in options.layers:
            if not -layers - 1 <= layer <= layers:
                raise InputError(
                    f"{where}.layers has {layer}: the model in {folder} has {layers} layers."
                )
        numbers = layer_numbers(options, opened.checkpoint)
        if len(set(numbers)) < len(numbers):
            raise InputError(
                f"{where}.layers is {list(options.layers)}: with the {layers} layers of the model "
                f"in {folder} one of them is named twice. Name it once."
            )
        if options.norm == "final" and len(numbers) > 1 and numbers[-1] != layers:
            raise InputError(
                f"{where}.norm is final, and the last of {len(numbers)} layers is {numbers[-1]}: "
                f"the final norm belongs to the model's last layer, {layers}. Put that one last, "
                "or set norm none."
            )
        missing: dict[str, Any] = {
            "chat": None,
            "project": None,
            "layer_zscore": False,
            "prefix": "compute",
        }
        missing |= {"attention_mask": "none", "padding_side": "right", "keep": "real"}
        for name, value in missing.items():
            if getattr(options, name) != value or 0 in numbers or len(numbers) > 1:
                raise InputError(f"{where}.{name}: this is not built yet.")

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
        (wanted,) = options.layers
        layer = model.layers[wanted - (wanted > 0)]
        states: list[torch.Tensor] = []
        layer.register_forward_hook(
            lambda layer, given, output: states.append(
                output[0] if isinstance(output, tuple) else output
            )
        )
        start = 0 if isinstance(options.crop_start, str) else options.crop_start
        if options.crop_start == "template":
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


def layer_numbers(options: DecoderOptions, checkpoint: Checkpoint) -> tuple[int, ...]:
    """`options.layers` counted from the embeddings, which are 0."""
    layers = int(checkpoint.text_config.num_hidden_layers)
    return tuple(layer if layer >= 0 else layers + 1 + layer for layer in options.layers)


def _num_layers(options: DecoderOptions, checkpoint: Checkpoint) -> int:
    """Number of layers that are run."""
    return max(layer_numbers(options, checkpoint))
