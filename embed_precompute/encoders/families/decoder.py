"""Decoder-only language models as text encoders; a vector per token.

Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, and the text towers of LLaVA, Mistral 3, Qwen2.5-VL,
Qwen3-VL and Gemma 3. The caption is put into a prompt, the outputs of one layer or several are
taken, and the positions of the prompt before the caption are cropped. The models are causal: padded
on the right, a real token never sees a pad, so the forward passes no mask unless it is asked for.
Layers after the last one taken, vision towers and heads are neither loaded nor run.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from embed_precompute.documents import nearest_of
from embed_precompute.encoders.checkpoint import Checkpoint, locate, read_origin
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
)
from embed_precompute.encoders.hub import HUB_ID
from embed_precompute.encoders.tokenizer import CaptionTokenizer, Template
from embed_precompute.errors import InputError, one_line, require

if TYPE_CHECKING:
    import torch

    from embed_precompute.encoders.fused.stream import Forward

BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384)
FUSED_ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
FUSED_ROPES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary positions that do not depend on a caption's length."""
PREFIX = re.compile(r"^(model\.language_model\.|language_model\.model\.|language_model\.|model\.)")
"""What stands before a text tower's names, in checkpoints of different releases."""
WITHOUT_WINDOWS = ("llama", "qwen3_vl", "qwen3_vl_text")
"""Models that have no sliding window, whatever their config.json says."""
WEIGHT, BIAS = "project.weight", "project.bias"
MARK = "\x02caption\x02"
CHANGED_BY_CHATS = (" a ", "a\n", "", "{x} </think> b")
"""Captions that some chat template trims or rewrites."""
STRIPPING = {"strip", "whitespace"}
"""Text steps after which no caption has white space at its ends; a later one may bring it back."""


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
    """A safetensors file, or a folder of them; a hub id (owner/name/folder) too."""
    weight: str
    """Name of the matrix, [stored width, width before]."""
    bias: str | None = None
    """Name of the bias, [stored width]. none: there is none. null: the same, and refused where the
    matrix's file has a bias beside it."""
    before: Literal["none", "ltx2_range", "rms"] = "none"
    """What the vectors go through before the matrix. ltx2_range: LTX-2's, each layer less its mean
    over the caption, divided by its range, times 8. rms: LTX-2.3's, each layer divided by its root
    mean square, times the root of the stored width over the layer's."""


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
    """padding: hf gives the model a mask of the pads. With padding on the right a real token never
    sees a pad, with or without a mask, so that fused needs none."""
    padding_side: Literal["right", "left"] = "right"
    """Where hf has the pads; left needs attention_mask padding. fused has none and counts positions
    from the caption's start: the same up to rounding. auto with left is hf."""
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
    """Only for fused. shared: what the layers make of the template before the caption, up to its
    last special token, is computed once, not for every caption; it changes the last bits."""
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
        require(
            self.implementation != "fused" or self.keep == "real",
            f"keep is {self.keep}: fused packs captions end to end, without pads. Use the "
            "implementation hf, or remove it.",
        )
        self.require_buckets(self.buckets)
        self.prompt()

    @property
    def taken(self) -> str:
        layers = f"layer {self.layers[0]}" if len(self.layers) == 1 else f"layers {self.layers}"
        last = "its final norm" if self.norm == "final" else "no norm"
        hint = "; hidden_states[-1] of transformers has the final norm"
        return f"{layers}, {last}{hint * (self.layers[-1] == -1 and self.norm == 'none')}"

    @property
    def part(self) -> str | None:
        if -1 in self.layers:
            return None
        counted = ([each for each in self.layers if (each < 0) == below] for below in (False, True))
        return " and ".join(f"layers up to {max(each)}" for each in counted if each)

    @property
    def other_files(self) -> dict[str, str]:
        return {} if self.project is None else {"project.path": self.project.path}

    def prompt(self) -> Template:
        """The template in its parts. Raises InputError."""
        return Template.parse(self.template, self.crop_start, self.crop_end, self.keep_first)


class Decoder(Family[DecoderOptions]):
    options = DecoderOptions
    models = MappingProxyType(
        {
            "llama": "LlamaModel",
            "mistral": "MistralModel",
            "qwen2": "Qwen2Model",
            "qwen3": "Qwen3Model",
            "gemma2": "Gemma2Model",
            "gemma3_text": "Gemma3TextModel",
            "qwen2_5_vl_text": "Qwen2_5_VLTextModel",
            "qwen3_vl_text": "Qwen3VLTextModel",
            # Checkpoints with a vision tower: the text tower's class.
            "gemma3": "Gemma3TextModel",
            "llava": "LlamaModel",
            "mistral3": "MistralModel",
            "qwen2_5_vl": "Qwen2_5_VLTextModel",
            "qwen3_vl": "Qwen3VLTextModel",
        }
    )
    releases = MappingProxyType(
        {"qwen2_5_vl_text": "4.52.0", "qwen3_vl": "4.57.0", "qwen3_vl_text": "4.57.0"}
    )
    encoder_prefixes = ("layers.", "embed_tokens.", "norm.")
    loads_canonical_names = True
    config_keys = (
        *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rms_norm_eps"),
        *("max_position_embeddings", "query_pre_attn_scalar", "attn_logit_softcapping"),
    )
    special_tokens = ()  # pads are attended with keep all only
    implementations = ("hf", "fused")

    def open_tokenizer(self, where: str, folder: Path, options: DecoderOptions) -> CaptionTokenizer:
        return CaptionTokenizer(
            where,
            folder,
            options.max_length,
            ("pad_token",) if options.keep == "all" else (),
            options.prompt() if options.chat is None else partial(_prompt_of_chat, where, options),
            text_steps=options.text_steps,
            empty=options.empty,
            # As transformers' apply_chat_template: the template writes the special tokens out.
            adds_special_tokens=options.chat is None,
            pads_left=options.padding_side == "left",
        )

    def check(self, opened: OpenEncoder[DecoderOptions]) -> None:
        options, config = opened.options, opened.checkpoint.text_config
        where, folder, layers = opened.where, opened.checkpoint.folder, config.num_hidden_layers
        if config.model_type not in self.models:
            raise InputError(
                f"{where}.pretrained: {folder} holds a text tower of model_type "
                f"{config.model_type!r}: expected {', '.join(self.models)}."
            )
        for key, causal in (("use_bidirectional_attention", False), ("is_causal", True)):
            value = getattr(config, key, None)
            if value not in (None, causal):
                raise InputError(
                    f"{where}.pretrained: the model in {folder} is not causal (config.json has "
                    f"{key} {str(value).lower()}), and the kind decoder is for causal models."
                )
        _check_windows(opened)
        for layer in options.layers:
            if not -layers - 1 <= layer <= layers:
                raise InputError(
                    f"{where}.layers has {layer}: the model in {folder} has {layers} layers."
                )
        numbers = layer_numbers(options, opened.checkpoint)
        origin = read_origin(folder) or {}
        if origin.get("layers", layers) < (needed := self.layers_run(options, opened.checkpoint)):
            raise InputError(
                f"{where}.layers is {list(options.layers)}: {folder} is a copy that fetch made "
                f"with the first {origin['layers']} layers of {origin['pretrained']}, and {needed} "
                "are needed. Name the original as pretrained, and run fetch for these layers."
            )
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
        if options.norm == "final" and numbers == (0,):
            raise InputError(
                f"{where}.norm is final, and layers is the embeddings alone: the final norm "
                "belongs to the layers' outputs. Set norm none."
            )
        if options.keep == "all" and options.padding_side == "left" and opened.tokenizer.first:
            raise InputError(
                f"{where}.keep is all with padding_side left: the positions at the start are pads, "
                "so no template can be cropped there. Set crop_start 0, or keep real."
            )
        if options.project is not None:
            _check_projection(opened, options.project)

    def outputs(self, options: DecoderOptions, checkpoint: Checkpoint | None) -> tuple[Output, ...]:
        width = options.width or 0
        if checkpoint is not None and options.project is not None:
            width = _matrix_shape(checkpoint.where, options.project)[0]
        elif checkpoint is not None:
            width = checkpoint.text_config.hidden_size * len(options.layers)
        return (Output("", "token", width, options.keep),)

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
        options, where, tokenizer = opened.options, opened.where, opened.tokenizer
        reason = _why_not_fused(options, opened.checkpoint)
        implementation = choose_implementation(opened, self, facts, reason)
        why_not = None
        if implementation != "fused":
            why_not = reason or f"only fused shares it, and the implementation is {implementation}."
        elif options.keep_first > 0:
            why_not = f"keep_first is {options.keep_first}, so positions of it are stored."
        elif tokenizer.first == 0:
            why_not = "no position before the caption is left out, so there is nothing to share."
        elif not tokenizer.constant:
            why_not = "no special token stands before the caption, so captions may change all ids."
        elif options.project is not None and options.project.before == "ltx2_range":
            why_not = (
                "project.before is ltx2_range, whose range is over the template's positions, too."
            )
        if options.prefix == "shared" and why_not is not None:
            raise InputError(f"{where}.prefix is shared: {why_not} Set prefix compute.")
        if implementation == "fused":
            longest = tokenizer.longest - len(self.shared_prefix(options, tokenizer))
            if options.stream_tokens < longest:
                raise InputError(
                    f"{where}.stream_tokens is {options.stream_tokens}: the longest caption has "
                    f"{longest} tokens, with its template. Raise it to that number or more."
                )
            stream = (1, options.stream_tokens)
            return Decision(implementation, options.compile, None, (stream,), stream)

        def batch_of(length: int) -> int:
            return max(1, options.batch_tokens // length)

        if options.keep == "all":
            length = opened.tokenizer.longest
            shape = (batch_of(length), length)
            return Decision(implementation, False, length, (shape,), shape)
        return in_buckets(opened, implementation, options.buckets, BUCKETS, batch_of)

    def spec(self, opened: OpenEncoder[DecoderOptions]) -> dict[str, Any]:
        """The prompt as the chat template made it, and layers counted from the embeddings: equal
        encoders are equal, however they are written down."""
        options, tokenizer = opened.options, opened.tokenizer
        return {
            "template": tokenizer.template.format_string,
            "crop_start": tokenizer.first,
            "keep_first": options.keep_first,
            "crop_end": options.crop_end,
            "template_stored": tokenizer.template_stored,
            "layers": list(layer_numbers(options, opened.checkpoint)),
            "norm": options.norm,
            "combine": options.combine,
            "layer_zscore": options.layer_zscore,
            "project": options.project and {"before": options.project.before},
            "attention_mask": options.attention_mask,
            "padding_side": options.padding_side,
            "prefix": options.prefix,
        }

    def canonical_name(self, weight: str) -> str | None:
        name = PREFIX.sub("", weight)
        buffer = name.endswith("inv_freq")
        return name if name.startswith(self.encoder_prefixes) and not buffer else None

    def model_class(self, options: DecoderOptions, checkpoint: Checkpoint) -> str:
        import transformers

        name = self.models[checkpoint.text_config.model_type]
        # Before 4.52 the class of this name was the text tower.
        return name if hasattr(transformers, name) else name.replace("TextModel", "Model")

    def config_changes(self, options: DecoderOptions, checkpoint: Checkpoint) -> dict[str, Any]:
        config, layers = checkpoint.text_config, self.layers_run(options, checkpoint)
        changes: dict[str, Any] = {"num_hidden_layers": layers}
        if getattr(config, "layer_types", None):
            changes["layer_types"] = config.layer_types[:layers]
        if getattr(config, "attn_logit_softcapping", None):
            # torch's attention has no soft caps; transformers 4.51 leaves them out without a word.
            changes["_attn_implementation"] = "eager"
        return changes

    def is_other_part(self, options: DecoderOptions, checkpoint: Checkpoint, weight: str) -> bool:
        """True for layers after the last one that is taken.

        False for layers beyond config.json's number of them: `_check_loading` refuses those.
        """
        layer = re.match(r"layers\.(\d+)\.", PREFIX.sub("", weight))
        if layer is None:
            return False
        layers = int(checkpoint.text_config.num_hidden_layers)
        return self.layers_run(options, checkpoint) <= int(layer[1]) < layers

    def config_values(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Releases of transformers name rotary embeddings and sliding windows differently."""
        config = checkpoint.text_config
        window = _window(config)
        return {
            **super().config_values(checkpoint),
            "model_type": str(config.model_type).removesuffix("_text"),
            "activation": getattr(config, "hidden_activation", None)
            or getattr(config, "hidden_act", None),
            "head_dim": self.sizes(checkpoint).inner // config.num_attention_heads,
            "rope": _rotary(config),
            "sliding_window": window,
            "sliding": window and _sliding_layers(config),
        }

    def layers_run(self, options: DecoderOptions, checkpoint: Checkpoint) -> int:
        return max(1, *layer_numbers(options, checkpoint))

    def extra_weights(
        self, options: DecoderOptions, checkpoint: Checkpoint
    ) -> dict[str, tuple[Path, str]]:
        project = options.project
        if project is None:
            return {}
        names = {WEIGHT: project.weight, BIAS: project.bias if project.bias != "none" else None}
        return {
            canonical: (_file_of(checkpoint.where, project.path, name), name)
            for canonical, name in names.items()
            if name is not None
        }

    def adapt(
        self,
        model: Any,
        options: DecoderOptions,
        checkpoint: Checkpoint,
        extra: Mapping[str, torch.Tensor],
    ) -> None:
        import torch

        from embed_precompute.encoders.readout import Projection, Readout

        if options.norm == "none":
            model.norm = torch.nn.Identity()
        projection = None
        if options.project is not None:
            projection = Projection(extra[WEIGHT], extra.get(BIAS), options.project.before)
        model.readout = Readout(
            layer_numbers(options, checkpoint),
            combine=options.combine,
            zscore=options.layer_zscore,
            projection=projection,
        ).to(model.device)

    def forward(
        self, model: Any, options: DecoderOptions, input_ids: torch.Tensor, lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        from embed_precompute.encoders.readout import causal_masks, real_positions, taken

        real = real_positions(input_ids, lengths, pads_left=options.padding_side == "left")
        windows = sliding_windows(model.config)
        masked = options.attention_mask == "padding"
        mask = causal_masks(model, real, windows) if masked else None
        readout, last = model.readout, len(model.layers)
        with taken(model, [layer for layer in readout.layers if layer != last]) as states:
            # The model ends after the last layer that is taken, and has no norm if none is wanted.
            output = model(input_ids=input_ids, attention_mask=mask, use_cache=False)
        states[last] = output.last_hidden_state
        return {"": readout([states[layer] for layer in readout.layers], real)}

    def shared_prefix(self, options: DecoderOptions, tokenizer: CaptionTokenizer) -> list[int]:
        return tokenizer.constant if options.prefix == "shared" else []

    def fused_layers(
        self,
        model: Any,
        options: DecoderOptions,
        longest: int,
        tokenizer: CaptionTokenizer,
        *,
        compiled: bool,
    ) -> Forward:
        from embed_precompute.encoders.fused.decoder import DecoderLayers

        def combine(outputs: list[torch.Tensor], captions: list[slice]) -> torch.Tensor:
            numbered = zip(model.readout.layers, outputs, strict=True)
            last = len(model.layers)
            states = [model.norm(each) if number == last else each for number, each in numbered]
            combined: torch.Tensor = model.readout.of_packed(states, captions)
            return combined

        return DecoderLayers(
            model,
            model.readout.layers,
            longest,
            windows=sliding_windows(model.config),
            combine=combine,
            compiled=compiled,
            prefix=self.shared_prefix(options, tokenizer),
        )

    def reference(
        self, checkpoint: Path, tokenizer: Path, options: DecoderOptions, device: str
    ) -> Reference:
        from embed_precompute.encoders.families import decoder_reference

        return decoder_reference.reference(checkpoint, tokenizer, options, device)


def layer_numbers(options: DecoderOptions, checkpoint: Checkpoint) -> tuple[int, ...]:
    """`options.layers` counted from the embeddings, which are 0."""
    layers = int(checkpoint.text_config.num_hidden_layers)
    return tuple(layer if layer >= 0 else layers + 1 + layer for layer in options.layers)


def _prompt_of_chat(where: str, options: DecoderOptions, tokenizer: Any) -> Template:
    """The prompt that the tokenizer's chat template makes of the messages. Raises InputError: there
    is no such template, or it changes captions."""
    chat = options.chat
    assert chat is not None
    switch = {} if chat.thinking is None else {"enable_thinking": chat.thinking}

    def rendered(text: str, **functions: str) -> str:
        messages = [
            {"role": each.role, "content": each.content.format(text=text)} for each in chat.messages
        ]
        try:
            made: str = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=chat.generation_prompt,
                **switch,
                **functions,
            )
        except Exception as error:  # a template raises what it likes
            raise InputError(
                f"{where}: the tokenizer's chat template cannot make the prompt of `chat` "
                f"({type(error).__name__}: {one_line(error)[:300]}). Name a tokenizer with a chat "
                "template for these messages, or write the prompt out as `template`."
            ) from error
        return made

    prompt, without_clock = rendered(MARK), None
    before, *rest = prompt.split(MARK)
    if len(rest) != 1:
        raise InputError(
            f"{where}: the tokenizer's chat template puts the caption into the prompt "
            f"{len(rest)} times: expected once. Write the prompt out as `template`."
        )
    with contextlib.suppress(InputError):  # a template that calls it fails
        without_clock = rendered(MARK, strftime_now="")
    if without_clock != prompt:
        raise InputError(
            f"{where}: the tokenizer's chat template puts today's date into the prompt, so another "
            "day would make other embeddings. Write the prompt out as `template`, with one date."
        )
    stripped = STRIPPING & set(options.text_steps[-1:])
    texts = [text.strip() if stripped else text for text in CHANGED_BY_CHATS]
    for text in [*texts, " "] if options.empty == "space" else texts:
        if rendered(text) != before + text + rest[0]:
            remedy = "Write the prompt out as `template`."
            if rendered(text) == before + text.strip() + rest[0]:
                remedy = "It strips it: "
                remedy += (
                    "set empty encode." if stripped else "add strip as the last of text_steps."
                )
            raise InputError(
                f"{where}: the tokenizer's chat template changes the caption {text!r}, so the "
                f"prompt is no fixed text around it. {remedy}"
            )
    return Template(before, rest[0], options.crop_start, options.crop_end, options.keep_first)


def _rotary(config: Any) -> dict[str, Any]:
    """The settings of the rotary embeddings; of Gemma 3's by kind of layer. mrope_section is left
    out: a text's three positions are equal."""
    import transformers

    if transformers.__version__.startswith("4."):  # it would ignore rope_parameters
        scaling = getattr(config, "rope_scaling", None) or {}
        rope = {"rope_theta": config.rope_theta, **scaling}
        if local := getattr(config, "rope_local_base_freq", None):
            rope = {"full_attention": rope, "sliding_attention": {"rope_theta": local}}
    else:
        rope = config.rope_parameters
    return _plain_rotary(rope)


def _plain_rotary(rope: Mapping[str, Any]) -> dict[str, Any]:
    if "full_attention" in rope:
        # What stands beside the kinds of layers is not read.
        kinds = {name: each for name, each in rope.items() if isinstance(each, Mapping)}
        return {name: _plain_rotary(each) for name, each in kinds.items()}
    ignored = ("type", "mrope_section", "mrope_interleaved")  # the first was rope_type's name
    rope = {key: value for key, value in rope.items() if key not in ignored}
    kind = rope.get("rope_type")
    return {**rope, "rope_type": "default" if kind in (None, "mrope") else kind}


def _sliding_layers(config: Any) -> list[bool]:
    """Which layers have a sliding window, if there is one."""
    if config.model_type == "mistral":  # its code reads neither key below
        return [True] * config.num_hidden_layers
    if types := getattr(config, "layer_types", None):
        return [each == "sliding_attention" for each in types]
    layers = range(config.num_hidden_layers)
    if config.model_type == "gemma2":  # before layer_types
        return [layer % 2 == 0 for layer in layers]
    if pattern := getattr(config, "sliding_window_pattern", None):
        return [(layer + 1) % pattern != 0 for layer in layers]
    return [layer >= getattr(config, "max_window_layers", 0) for layer in layers]


def _file_of(where: str, path: str, name: str) -> Path:
    """The safetensors file, `path` or in the folder `path`, that holds the tensor `name`."""
    from safetensors import SafetensorError, safe_open

    key, place = f"{where.rpartition('.')[0]}.project", Path(path).expanduser()
    if not place.exists() and HUB_ID.fullmatch(path):
        place = locate(f"{key}.path", path, None, "tensors")
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    names: list[str] = []
    for file in files:
        try:
            with safe_open(file, "np") as opened:
                names += opened.keys()
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or one_line(error)[:200]
            raise InputError(
                f"{key}.path is {path!r}: {file} cannot be read ({reason}). Expected a safetensors "
                "file, or a folder of them."
            ) from error
        if name in names:
            return file
    raise InputError(
        f"{key}: {path} has no tensor {name!r}: {nearest_of(name, names)}"
        if names
        else f"{key}.path is {path!r}: there is no safetensors file."
    )


def _matrix_shape(where: str, project: ProjectOptions) -> tuple[int, ...]:
    return _shape_of(_file_of(where, project.path, project.weight), project.weight)


def _shape_of(file: Path, name: str) -> tuple[int, ...]:
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        return tuple(opened.get_slice(name).get_shape())


def _names_in(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        return list(opened.keys())


def _check_projection(opened: OpenEncoder[DecoderOptions], project: ProjectOptions) -> None:
    """Raise InputError unless the matrix fits the combined vectors, and the bias the matrix."""
    where, number = f"{opened.where}.project", len(opened.options.layers)
    width = opened.checkpoint.text_config.hidden_size * number
    shape = _matrix_shape(opened.checkpoint.where, project)
    if len(shape) != 2 or shape[1] != width:
        raise InputError(
            f"{where}.weight: {project.path} has {project.weight} of shape {list(shape)}: expected "
            f"[stored width, {width}], for {number} {'layers' if number > 1 else 'layer'} of the "
            "model."
        )
    if project.bias is None:
        file = _file_of(opened.checkpoint.where, project.path, project.weight)
        beside = f"{project.weight.removesuffix('.weight')}.bias"
        if beside in _names_in(file):
            raise InputError(
                f"{where}.bias is null, and {file} has {beside} beside {project.weight}. Name it, "
                "or give none to leave it out."
            )
    elif project.bias != "none":
        file = _file_of(opened.checkpoint.where, project.path, project.bias)
        if (found := _shape_of(file, project.bias)) != shape[:1]:
            raise InputError(
                f"{where}.bias: {project.path} has {project.bias} of shape {list(found)}: expected "
                f"[{shape[0]}]."
            )


def _why_not_fused(options: DecoderOptions, checkpoint: Checkpoint) -> str | None:
    """Why our own layers cannot compute this model with these options; None: they can."""
    config, file = checkpoint.text_config, checkpoint.folder / "config.json"
    if options.buckets is not None:
        return "buckets are given, and fused packs captions end to end."
    if options.keep != "real":
        return f"keep is {options.keep}, and fused packs captions end to end, without pads."
    if options.padding_side != "right" and options.implementation == "auto":
        # Rotary angles of far positions are rounded more: 1e-5 of the numbers, in float32.
        return "padding_side is left, and fused counts positions from the caption's own start."
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in FUSED_ACTIVATIONS:
        return f"{file} has the activation {activation!r}: expected {', '.join(FUSED_ACTIVATIONS)}."
    rope = _rotary(config)
    for each in rope.values() if "full_attention" in rope else (rope,):
        kind = each["rope_type"]
        if kind not in FUSED_ROPES or each.get("partial_rotary_factor", 1.0) != 1.0:
            return f"{file} has the rotary positions {each}: expected {', '.join(FUSED_ROPES)}."
    return None


def sliding_windows(config: Any) -> list[int | None]:
    """Each layer's sliding window: a token attends to this many tokens, itself included. None: to
    all before it."""
    return [_window(config) if slides else None for slides in _sliding_layers(config)]


def _window(config: Any) -> int | None:
    """The sliding window of the layers that have one."""
    kind = config.model_type
    if kind in WITHOUT_WINDOWS or (kind.startswith("qwen") and not config.use_sliding_window):
        return None
    window: int | None = config.sliding_window
    return window


def _check_windows(opened: OpenEncoder[DecoderOptions]) -> None:
    """Raise InputError if Gemma's sliding window is missing, or transformers here misreads it."""
    config, file = opened.checkpoint.text_config, opened.checkpoint.folder / "config.json"
    if config.model_type.startswith("gemma") and config.sliding_window is None:
        raise InputError(
            f"{opened.where}.pretrained: {file} has sliding_window null: expected a number of "
            "tokens, as this model's layers need one."
        )
    window = getattr(config, "sliding_window", None)
    if (
        find_spec("transformers.masking_utils") is None  # before 4.53
        and config.model_type.startswith("qwen")
        and window is not None
        and window < opened.tokenizer.longest
        and not all(sliding_windows(config))
    ):
        raise InputError(
            f"{opened.where}.pretrained: {file} has sliding_window {window}, not for all layers, "
            f"and a caption may have {opened.tokenizer.longest} tokens with its template; this "
            "release of transformers gives every layer the window. Install transformers 4.53 or "
            "newer, or lower max_length."
        )
