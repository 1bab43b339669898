"""What an encoder family is: the one object that knows an architecture and its checkpoints.

T5, CLIP and the decoder-only models are families. Everything outside `families/` asks the family
and never looks at a kind. docs/encoders.md says how to write one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeVar

from embed_precompute.encoders.checkpoint import Checkpoint
from embed_precompute.encoders.text_steps import Empty, Step
from embed_precompute.encoders.tokenizer import CaptionTokenizer, Shape, shape_of
from embed_precompute.errors import InputError, require

if TYPE_CHECKING:
    import torch

    from embed_precompute.encoders.fused.stream import Forward

DType = Literal["bfloat16", "float16", "float32"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MOST_TOKENS = 1 << 26
"""No forward has more tokens or captions: 67 million ids alone are half a gigabyte."""


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """One frozen text encoder; its key in `encoders` names the tensor: `t5` makes `text_t5`."""

    kind: str
    """The family; each family has keys of its own."""
    pretrained: str
    """Checkpoint folder with safetensors, or a hub id (owner/name, or owner/name/folder). `fetch`
    downloads it, and converts it from other forms."""
    revision: str | None = None
    """Hub revision; only for a hub id."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id, when it is not in the weights' folder. In the weights' repository
    it has their revision."""
    reference: str | None = None
    """Where these semantics are written: repository@commit path:line; changes no byte."""
    width: int | None = None
    """Numbers in a stored vector, as a preset states it; a checkpoint with another is refused."""
    max_length: int
    """Tokens per caption, special tokens included."""
    text_steps: tuple[Step, ...] = ()
    """Applied in this order to the recipe's text, for this encoder alone, before template and
    tokenizer. whitespace: runs of it become a space, then strip. html_unescape is one pass.
    clean_caption is PixArt's, one pass. quoted: the quoted passages alone, as glyph encoders take
    them. ftfy and clean_caption need the extra `text`."""
    empty: Empty = "encode"
    """What stands for a caption that is empty after text_steps, and for the null embedding. encode:
    the empty text. space: one space. nothing: no vector is stored, and the loader gives zeros and
    an empty mask; only for outputs per token of real positions."""
    dtype: DType = "bfloat16"
    """The dtype that the encoder computes in."""
    implementation: str = "auto"
    """hf: transformers, the reference. auto: fused if it can run this encoder, else hf."""
    compile: bool = False
    """Only for fused: compile its layers with torch.compile. Changes bits; needs a C++ compiler."""
    tf32: bool = False
    """Only for float32 on an NVIDIA GPU: multiply in TF32, faster, with 10 bits of mantissa."""

    def __post_init__(self) -> None:
        self.require_positive("max_length", *(["width"] if self.width is not None else []))
        require(
            not self.compile or self.implementation in ("auto", "fused"),
            f"compile is true: {self.implementation} is never compiled. Use the "
            "implementation fused, or remove compile.",
        )
        require(
            not self.tf32 or self.dtype == "float32",
            f"tf32 is true with dtype {self.dtype}: it is a way to multiply float32. Remove it.",
        )

    def require_positive(self, *names: str) -> None:
        """Raise InputError unless these fields are counts of 1 or more."""
        for name in names:
            value = getattr(self, name)
            require(
                1 <= value <= MOST_TOKENS,
                f"{name} is {value}: expected 1 or more, at most {MOST_TOKENS}.",
            )

    def require_buckets(self, buckets: tuple[int, ...] | None) -> None:
        """Raise InputError unless `buckets` are lengths up to max_length that hf can run; none of
        them: every caption runs at the full length."""
        if buckets is None:
            return
        require(
            self.implementation != "fused" and not self.compile,
            "buckets are for the implementation hf: fused packs captions end to end. "
            "Remove buckets, or use hf.",
        )
        for length in buckets:
            require(
                1 <= length <= self.max_length,
                f"max_length is {self.max_length}, and buckets has {length}: expected 1 to "
                "max_length.",
            )

    @property
    def positions(self) -> int:
        """Number of positions of a caption in the padded form that a trainer's model gets."""
        return self.max_length

    @property
    def integer_column(self) -> str | None:
        """A column of the caption table whose values the family's decision depends on."""
        return None

    @property
    def stored_pads(self) -> int:
        """How many pads after a caption are stored with its tokens."""
        return 0

    @property
    def taken(self) -> str:
        """What of the model is taken, in words, where options choose it; `plan` shows it."""
        return ""

    @property
    def part(self) -> str | None:
        """Which part of the encoder's weights these options run, in words; None: all. A copy that
        `fetch` makes has no other."""
        return None

    @property
    def other_files(self) -> Mapping[str, str]:
        """Key -> folder or hub id of safetensors that are taken besides the checkpoint's."""
        return {}

    def spec(self) -> dict[str, Any]:
        """The family's own options that change bytes, as JSON; its part of the fingerprint."""
        return {}


@dataclass(frozen=True)
class Output:
    """One tensor that a forward makes for each caption: `text_<encoder><suffix>`."""

    suffix: str
    per: Literal["token", "caption"]
    width: int
    positions: Literal["real", "real+1", "all"] | None
    """For an output per token: "all" stores every position of the padded length, "real" only the
    caption's span of real tokens, "real+1" also the first pad. For an output per caption: None."""


@dataclass(frozen=True)
class Decision:
    """What is decided once for an encoder of a job; all later code uses it."""

    implementation: str
    compiled: bool
    """The fused layers go through torch.compile."""
    padded_length: int | None
    """The one length that all captions run and are stored at, with pads; None if lengths differ."""
    shapes: tuple[Shape, ...]
    """(B, L) of every forward, short ones first."""
    null_shape: Shape
    """(B, L) of the forward that makes the null embedding."""

    @property
    def packed(self) -> bool:
        """Captions lie end to end in packed streams of one length, not one caption per line."""
        return self.implementation == "fused" and self.padded_length is None


@dataclass(frozen=True)
class Sizes:
    """What a text encoder's config.json says about its sizes; for estimates and checks."""

    layers: int
    width: int
    heads: int
    inner: int
    """Width of the attention: the number of heads times their width."""
    hidden: int
    """Width of the feed-forward layer."""
    linear_weights: int
    """Number of weights in the matrices of one layer."""
    vocabulary: int
    """Number of rows of the embedding table."""

    def flops(self, lengths: Sequence[int]) -> float:
        """Multiplications and additions of the layers over captions of these lengths: two for each
        weight of a linear and token, and four L^2 for each channel of the attention (half of them
        masked where it is causal)."""
        squares = sum(length * length for length in lengths)
        of_linears = 2 * self.linear_weights * sum(lengths)
        return float(self.layers * (of_linears + 4 * squares * self.inner))


@dataclass(frozen=True)
class Facts:
    """What a family needs for its decision, in addition to its options."""

    stored: Mapping[str, Any] | None
    """The plan's spec of this encoder; empty if it is not in the plan, None if there is no plan."""
    added_tokens: Mapping[int, int] | None = None
    """Value -> number of rows that have it, in the column that `integer_column` names (for T5 its
    option `added_tokens`); None if the captions were not scanned."""


Options = TypeVar("Options", bound=EncoderConfig)


@dataclass(frozen=True)
class OpenEncoder(Generic[Options]):
    """An encoder whose checkpoint and tokenizer are found and opened; no model is loaded."""

    name: str
    options: Options
    checkpoint: Checkpoint
    tokenizer: CaptionTokenizer
    tokenizer_folder: Path

    @property
    def where(self) -> str:
        """The configuration's key of this encoder; errors begin with it."""
        return f"encoders.{self.name}"

    @property
    def tokenizer_where(self) -> str:
        """The configuration's key that names the tokenizer."""
        return f"{self.where}.{'tokenizer' if self.options.tokenizer else 'pretrained'}"


Reference = Callable[[str, "int | None"], "dict[str, torch.Tensor]"]
"""(text, padded length) -> suffix -> what is stored of the caption, on the device."""


class Family(abc.ABC, Generic[Options]):
    """One architecture. It holds no state; the registry has one object of each."""

    options: ClassVar[type[EncoderConfig]]
    """The dataclass of this kind's keys."""
    models: ClassVar[Mapping[str, str]]
    """model_type of config.json -> transformers' class for its text encoder."""
    model_arguments: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    """Arguments of the transformers class, such as `add_pooling_layer=False`: a part that is never
    run is then not made, and its weights may be missing."""
    checkpoint_prefix: ClassVar[str] = ""
    """What stands before the encoder's names in checkpoints that hold more, or were saved by
    another release: "model." of a decoder with its head."""
    encoder_prefixes: ClassVar[tuple[str, ...]]
    """How the names of the encoder's weights begin, after `checkpoint_prefix`. A weight of such a
    name that the model does not know is an error. Others are not read: they are other parts."""
    second_names: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Second name of a weight -> its name, where a checkpoint may have either or both."""
    loads_canonical_names: ClassVar[bool] = False
    """The class that is loaded knows a weight by its canonical name, and by no other: one part of a
    checkpoint is loaded as a model of its own."""
    releases: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """model_type -> the first release of transformers that has it, where the oldest supported one
    has not."""
    config_keys: ClassVar[tuple[str, ...]]
    """What of transformers' config the encoder's numbers depend on, apart from what the shapes of
    the weights say: it is in the fingerprint."""
    implementations: ClassVar[tuple[str, ...]] = ("hf",)
    special_tokens: ClassVar[tuple[str, ...]] = ("eos_token", "pad_token")
    """Special tokens that the tokenizer must have; pad_token among them if pads can be attended."""
    one_graph: ClassVar[bool] = False
    """Compiled on a GPU, the fused layers are one graph: no layer runs by itself."""
    batch_setting: ClassVar[str] = "batch_tokens"
    """The option that says how large a forward is; errors name it."""

    # -- before a model is loaded: no torch here

    def open_tokenizer(self, where: str, folder: Path, options: Options) -> CaptionTokenizer:
        """The tokenizer in `folder`; errors begin with `where`."""
        return CaptionTokenizer(
            where,
            folder,
            options.max_length,
            self.special_tokens,
            text_steps=options.text_steps,
            empty=options.empty,
            stored_pads=options.stored_pads,
        )

    def check(self, opened: OpenEncoder[Options]) -> None:
        """Raise InputError if options, checkpoint and tokenizer cannot work together."""

    @abc.abstractmethod
    def outputs(self, options: Options, checkpoint: Checkpoint | None) -> tuple[Output, ...]:
        """What is stored of a caption: one tensor of a forward, or several.

        Without a checkpoint each has the width that the options state.
        """

    @abc.abstractmethod
    def sizes(self, checkpoint: Checkpoint) -> Sizes:
        """The sizes in config.json, with transformers' defaults for those that are left out."""

    def spec(self, opened: OpenEncoder[Options]) -> dict[str, Any]:
        """What else changes bytes, as JSON: the family's part of the fingerprint."""
        return opened.options.spec()

    @abc.abstractmethod
    def decide(self, opened: OpenEncoder[Options], facts: Facts) -> Decision:
        """Decide implementation and shapes from these arguments alone, never from the machine.

        `choose_implementation` and `in_buckets` below do most of it.
        """

    # -- the weights: no torch here

    def canonical_name(self, weight: str) -> str | None:
        """The weight's name in the encoder alone, however the checkpoint was saved. None: it is no
        weight of the encoder, or a buffer that the model makes by itself."""
        name = weight.removeprefix(self.checkpoint_prefix)
        name = self.second_names.get(name, name)
        buffer = name.endswith(("position_ids", "inv_freq"))
        return name if name.startswith(self.encoder_prefixes) and not buffer else None

    def is_other_part(self, options: Options, checkpoint: Checkpoint, weight: str) -> bool:
        """Whether a weight of the encoder is never run with these options: it is not read."""
        return False

    def layers_run(self, options: Options, checkpoint: Checkpoint) -> int:
        """Number of layers that are run, counted from the first."""
        return self.sizes(checkpoint).layers

    def extra_weights(
        self, options: Options, checkpoint: Checkpoint
    ) -> Mapping[str, tuple[Path, str]]:
        """Weights that are not the checkpoint's: canonical name -> (file, name in it)."""
        return {}

    def keeps_float32(self, weight: str, dtype: str) -> bool:
        """Whether transformers keeps this weight in float32 when the rest has `dtype`."""
        return False

    def config_values(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The values of `config_keys`, with transformers' defaults for those that are left out."""
        config = checkpoint.text_config
        values = {key: getattr(config, key, None) for key in self.config_keys}
        return {"model_type": config.model_type, **values}

    # -- the model

    def model_class(self, options: Options, checkpoint: Checkpoint) -> str:
        """Name of the transformers class to load."""
        return self.models[checkpoint.model_type]

    def config_changes(self, options: Options, checkpoint: Checkpoint) -> dict[str, Any]:
        """Values that replace those of config.json when the model is made."""
        return {}

    def adapt(
        self,
        model: Any,
        options: Options,
        checkpoint: Checkpoint,
        extra: Mapping[str, torch.Tensor],
    ) -> None:
        """Change the loaded model in place before it is run; `extra`: the `extra_weights`."""

    @abc.abstractmethod
    def forward(
        self, model: Any, options: Options, input_ids: torch.Tensor, lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Suffix -> [B, L, D] or [B, C] of `input_ids` [B, L], padded on the right.

        `lengths` [B] counts the real tokens of each line. The mask is made here, in the form that
        this architecture understands. A caption's numbers must not depend on the other lines.
        """

    def shared_prefix(self, options: Options, tokenizer: CaptionTokenizer) -> list[int]:
        """Ids that all captions begin with, and that the packed streams leave out: the fused layers
        compute them once."""
        return []

    def fused_layers(
        self,
        model: Any,
        options: Options,
        longest: int,
        tokenizer: CaptionTokenizer,
        *,
        compiled: bool,
    ) -> Forward:
        """Our own layers over the weights of the loaded model, on its device.

        `longest`: number of tokens of the longest caption, pads that are attended included.
        """
        raise NotImplementedError(f"{type(self).__name__} has no fused layers.")

    @abc.abstractmethod
    def reference(
        self, checkpoint: Path, tokenizer: Path, options: Options, device: str
    ) -> Reference:
        """The same embeddings in about ten lines of plain transformers: one caption at a time, no
        mask of ours, nothing of this package but `in_dtype`.

        `verify --level deep` and the conformance kit (docs/encoders.md) compare with it.
        """


def in_dtype(name: str) -> dict[str, Any]:
    """The dtype argument of from_pretrained; its name depends on the version of transformers."""
    import torch
    import transformers

    key = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    return {key: getattr(torch, name)}


def choose_implementation(
    opened: OpenEncoder[Any], family: Family[Any], facts: Facts, why_not_fused: str | None
) -> str:
    """The implementation that runs.

    For `auto` it is the plan's, if that one can run; otherwise fused, if it can run; otherwise hf.
    With `compile`, `auto` means fused. `why_not_fused` says why the fused layers cannot run this
    encoder. Raises InputError if fused is asked for nevertheless, or an implementation that the
    family does not have.
    """
    options, possible = opened.options, family.implementations
    asked: str = options.implementation
    if asked == "auto":
        usable = [name for name in possible if name != "fused" or why_not_fused is None]
        planned = (facts.stored or {}).get("implementation")
        if planned in usable and not options.compile:
            return str(planned)
        asked = "fused" if options.compile or "fused" in usable else "hf"
    if asked not in possible:
        raise InputError(
            f"{opened.where}.implementation: {options.kind} has no {asked}. Expected "
            f"{' or '.join(possible)}{'' if 'fused' in possible else ', and compile false'}."
        )
    if asked == "fused" and why_not_fused is not None:
        raise InputError(
            f"{opened.where}.implementation: {why_not_fused} Use the implementation hf."
        )
    return asked


def in_buckets(
    opened: OpenEncoder[Any],
    implementation: str,
    given: tuple[int, ...] | None,
    default: tuple[int, ...],
    batch_of: Callable[[int], int],
) -> Decision:
    """A caption runs in the shortest bucket that holds it; the longest fits any caption.

    `given` are the user's buckets, if any; the lengths in `given` and `default` are counted from
    the first stored position on. `batch_of(length)`: number of captions in a forward of that
    length. Every bucket must hold the empty caption, which fills up batches: a default bucket that
    is too short is left out. Raises InputError.
    """
    tokenizer = opened.tokenizer
    longest, empty = tokenizer.longest, tokenizer.empty.extents[0]
    cropped = longest - opened.options.max_length
    lengths = {cropped + bucket for bucket in (default if given is None else given)}
    lengths = {length for length in lengths if length < longest} | {longest}
    if given is not None and min(lengths) < empty:
        raise InputError(
            f"{opened.where}.buckets has {min(lengths) - cropped}: the empty caption has "
            f"{empty - cropped} tokens, so nothing fits it. Remove that bucket."
        )
    shapes = tuple((batch_of(length), length) for length in sorted(lengths) if length >= empty)
    return Decision(implementation, False, None, shapes, shape_of(empty, shapes))


def mask_of_pads(
    input_ids: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """For a bidirectional model: a line's first `lengths` tokens are attended, its pads are not.

    With transformers 4 the mask is [B, L], 1 for real tokens: version 4 takes no other. With 5 it
    is the finished additive mask, [B, 1, 1, L]. Given [B, L], a model may leave the mask out when
    no line of the batch has a pad, and then a caption's kernel would depend on its neighbours. Not
    for a causal model: it would use a finished mask in place of its causal mask, and its tokens
    would attend to later ones.
    """
    import torch
    import transformers

    real = torch.arange(input_ids.shape[1], device=input_ids.device)[None, :] < lengths[:, None]
    if transformers.__version__.startswith("4."):
        return real.to(torch.int64)
    additive = torch.zeros(real.shape, dtype=dtype, device=input_ids.device)
    return additive.masked_fill(~real, torch.finfo(dtype).min)[:, None, None, :]
