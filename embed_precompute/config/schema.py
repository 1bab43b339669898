"""The configuration as frozen dataclasses.

A `Config` that exists is valid by itself: ranges, exclusive fields, names. Making one imports no
torch and touches no file.

Which half a field is in decides what it may change. `captions`, `encoders` and `output` hold the
*spec* (it changes bytes, so it is in the fingerprint or in the plan); `runtime` holds everything
else (it must never change a byte).
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from typing import Literal

from embed_precompute.config.video_buckets import Bucket, VideoTokensConfig
from embed_precompute.errors import InputError, require

ENCODER_NAME = re.compile(r"^[a-z][a-z0-9_]{0,31}$")

RESERVED_ENDINGS = ("_offsets", "_xxh3", "_length", "_mask", "_tokens", "_truncated")

DType = Literal["bfloat16", "float16", "float32"]
Normalization = Literal["ftfy", "nfc", "whitespace"]
Implementation = Literal["auto", "hf", "fused", "shardformer"]
AttentionMask = Literal["none", "padding"]
MOST_TOKENS = 1 << 26
"""No forward is larger: 67 million tokens or captions; ids alone would be half a gigabyte."""


@dataclass(frozen=True)
class RecipeConfig:
    """How a row becomes the text that is encoded."""

    kind: Literal["none", "template", "opensora"] = "none"
    """none: the text column; template: a format string; opensora: Open-Sora v2's suffix."""
    template: str = "{text}"
    """template only: text with {text} (the caption) and {column} (any other column)."""
    fps_column: str | None = "fps"
    """opensora only: the clip's frames per second; null to leave the FPS part out."""
    fps_max: int | None = 16
    """opensora only: the trainer's fps_max; null, or 999 and more, leaves the FPS part out."""
    motion_column: str | None = None
    """opensora only: motion score (score_vmafmotion when the trainer sets vmaf=True), or null."""

    def __post_init__(self) -> None:
        if self.fps_max is not None:
            require(
                self.fps_max > 0, f"captions.recipe.fps_max is {self.fps_max}: expected 1 or more."
            )
        if self.kind == "template":
            self.template_columns()

    def template_columns(self) -> tuple[str, ...]:
        """Names in `template`, in order of first use; `text` stands for the caption itself."""
        where = "captions.recipe.template"
        names: list[str] = []
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise InputError(
                f"{where} {self.template!r} is not a format string: {error}."
            ) from None
        for _, name, spec, conversion in parts:
            if name is None:
                continue
            plain = re.fullmatch(r"[^.\[\]{}!:]+", name) is not None
            require(
                plain and conversion is None and "{" not in (spec or ""),
                f"{where} holds {{{name}}}: expected plain column names such as {{text}} or "
                "{fps}, with at most a format such as {fps:.1f}.",
            )
            if name not in names:
                names.append(name)
        require("text" in names, f"{where} {self.template!r} does not use {{text}}.")
        return tuple(names)


@dataclass(frozen=True)
class CaptionsConfig:
    """The caption table: where it is and how its rows become samples."""

    path: str
    """A parquet file, a folder of them (nested), a glob, or a URI pyarrow reads (s3://, gs://)."""
    text_column: str = "text"
    """Column with the caption: string, or a list of strings (one sample per caption)."""
    id_column: str | None = "id"
    """Column with a unique id, string or integer; null: the row number in file order."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """How a row becomes the text that is encoded."""
    normalize: tuple[Normalization, ...] = ()
    """Applied to the caption before the recipe, always in the order ftfy, nfc, whitespace."""
    on_bad_text: Literal["record", "fail"] = "record"
    """Null text or invalid UTF-8: record it as the sample's status, or fail (exit 2)."""

    def __post_init__(self) -> None:
        require(bool(self.path), "captions.path is empty: expected a parquet file or folder.")


NAMED_BUCKETS = 4
"""Buckets that an error names per padded length; a table has hundreds."""
DEFAULT_CLIP_BUCKETS = (16, 32, 48, 64)
DEFAULT_T5_BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384)


@dataclass(frozen=True)
class EncoderConfig:
    """One frozen text encoder; its key in `encoders` names the tensor: `t5` makes `text_t5`."""

    kind: Literal["t5", "clip"]
    """t5: last_hidden_state, a vector per token. clip: pooler_output, a vector per caption."""
    pretrained: str
    """Checkpoint folder or hub id; weights must be safetensors."""
    revision: str | None = None
    """Hub revision; only for a hub id."""
    tokenizer: str | None = None
    """Tokenizer folder or hub id, when it is not beside the weights."""
    max_length: int | None = None
    """Tokens per caption, special tokens included; 512 for t5 and 77 for clip when not given."""
    attention_mask: AttentionMask = "none"
    """t5: `none` = Open-Sora (pads are attended, all stored); `padding` = only real tokens."""
    seq_align: int = 1
    """t5, attention_mask none: pad until (added_tokens + length) is a multiple of this."""
    added_tokens: int | VideoTokensConfig | str = 0
    """t5: tokens the video adds: a number, the name of an integer column, or buckets (below)."""
    dtype: DType = "bfloat16"
    """dtype the encoder computes in."""
    batch_tokens: int = 16384
    """t5: tokens of one forward; a shape's batch is this over its length, at least 1."""
    batch_size: int = 256
    """clip: captions of one forward."""
    buckets: tuple[int, ...] | None = None
    """Lengths a forward may have below the longest: clip, and t5 with attention_mask padding."""
    stream_tokens: int = 4096
    """fused, where captions are packed end to end: tokens of one forward."""
    implementation: Implementation = "auto"
    """hf: transformers, the reference. fused: our own layers; clip and attention_mask padding
    packed. shardformer: t5, ColossalAI's jit-fused layers. auto: fused where it has the model's
    activation and no buckets are given, else hf."""
    compile: Literal["auto"] | bool = "auto"
    """fused: run its layers through torch.compile, which changes bits. auto: from 20,000 samples
    on, where the machine that makes the plan has a C++ compiler; the plan then decides."""
    tf32: bool = False
    """float32 on an NVIDIA GPU: multiply in TF32, faster, with 10 bits of mantissa."""

    def __post_init__(self) -> None:
        for name in ("max_length", "seq_align", "batch_tokens", "batch_size", "stream_tokens"):
            value = getattr(self, name)
            if value is not None:
                require(
                    1 <= value <= MOST_TOKENS,
                    f"encoder {name} is {value}: expected 1 or more, at most {MOST_TOKENS}.",
                )
        if isinstance(self.added_tokens, VideoTokensConfig):
            self.added_tokens.check()
        elif isinstance(self.added_tokens, int):
            require(
                self.added_tokens >= 0, f"encoder added_tokens is {self.added_tokens}: below 0."
            )
        require(
            self.stream_tokens >= self.resolved_max_length,
            f"encoder stream_tokens is {self.stream_tokens}: expected at least max_length "
            f"({self.resolved_max_length}), so that every caption fits.",
        )
        self._check_kind()
        self._check_compute()
        self._check_buckets()

    def _check_kind(self) -> None:
        """What only the other kind, or the other mask, has."""
        if self.kind == "clip":
            require(
                self.attention_mask == "none" and self.seq_align == 1 and self.added_tokens == 0,
                "a clip encoder takes no attention_mask, seq_align or added_tokens: CLIP is causal "
                "and pooled at its end-of-text token, so pads cannot reach it. Remove the field.",
            )
            require(
                self.implementation != "shardformer",
                "a clip encoder cannot have implementation shardformer: it is for t5 alone. Use hf "
                "or auto.",
            )
        if self.attention_mask == "padding":
            require(
                self.seq_align == 1 and self.added_tokens == 0,
                "seq_align and added_tokens belong to attention_mask none, where pads are encoded. "
                "A masked dataset stores real tokens only and the loader pads it to any length: "
                "remove both fields.",
            )

    def _check_compute(self) -> None:
        require(
            self.compile is not True or self.implementation in ("auto", "fused"),
            f"encoder compile is true: {self.implementation} is never compiled. Use the "
            "implementation fused, or remove compile.",
        )
        require(
            not self.tf32 or self.dtype == "float32",
            f"encoder tf32 is true with dtype {self.dtype}: it is a way to multiply float32. "
            "Remove it.",
        )

    def _check_buckets(self) -> None:
        if self.buckets is None:
            return
        require(
            self.implementation != "fused" and self.compile is not True,
            "encoder buckets are for the implementation hf: fused packs captions end to end. "
            "Remove buckets, or use hf.",
        )
        require(
            self.kind == "clip" or self.attention_mask == "padding",
            "encoder buckets are for clip and for attention_mask padding: with attention_mask "
            "none every caption has the one padded length. Remove the field.",
        )
        require(
            all(1 <= b <= self.resolved_max_length for b in self.buckets),
            f"encoder buckets {list(self.buckets)} must lie in 1..max_length "
            f"({self.resolved_max_length}).",
        )

    @property
    def resolved_max_length(self) -> int:
        if self.max_length is not None:
            return self.max_length
        return 512 if self.kind == "t5" else 77

    def padded_length(self, added_tokens: int) -> int:
        """Length T5 is run at: max_length plus pads until it fits seq_align beside the video."""
        missing = -(added_tokens + self.resolved_max_length) % self.seq_align
        return self.resolved_max_length + missing

    def fixed_padded_length(self, where: str) -> int | None:
        """The one padded length where the config alone decides it; None: a column does.

        Raises InputError naming `where`, when buckets lead to several lengths.
        """
        if isinstance(self.added_tokens, str):
            return None
        if isinstance(self.added_tokens, int):
            return self.padded_length(self.added_tokens)
        by_length: dict[int, dict[int, list[Bucket]]] = {}
        for tokens, buckets in self.added_tokens.by_tokens().items():
            by_length.setdefault(self.padded_length(tokens), {})[tokens] = buckets
        if len(by_length) > 1:
            lines = [_length_line(length, by_length[length]) for length in sorted(by_length)]
            raise InputError(
                f"{where}.added_tokens: the buckets with seq_align {self.seq_align} lead to "
                f"{len(lines)} padded lengths:\n  " + "\n  ".join(lines) + "\n"
                "Pads are attended, so one dataset has one length: make one dataset per length, "
                "each with the added_tokens named above, or with only the buckets of that length."
            )
        return next(iter(by_length))

    def added_tokens_spec(self) -> int | str | list[int]:
        """`added_tokens` as JSON; buckets as the sorted counts, which are all that matters."""
        if isinstance(self.added_tokens, VideoTokensConfig):
            return list(self.added_tokens.by_tokens())
        return self.added_tokens

    def resolved_buckets(self) -> tuple[int, ...]:
        """Sorted lengths a forward may have when a caption picks its own; ends at max_length."""
        default = DEFAULT_CLIP_BUCKETS if self.kind == "clip" else DEFAULT_T5_BUCKETS
        longest = self.resolved_max_length
        chosen = default if self.buckets is None else self.buckets
        return tuple(sorted({b for b in chosen if b < longest} | {longest}))


def _length_line(length: int, by_tokens: dict[int, list[Bucket]]) -> str:
    """One padded length in an error: how to ask for it, and which buckets need it."""
    buckets = [bucket for of_tokens in by_tokens.values() for bucket in of_tokens]
    named = ", ".join(map(str, buckets[:NAMED_BUCKETS]))
    more = f" and {len(buckets) - NAMED_BUCKETS} more" if len(buckets) > NAMED_BUCKETS else ""
    return f"{length}: added_tokens {next(iter(by_tokens))}, for {named}{more}"


@dataclass(frozen=True)
class OutputConfig:
    """Where the dataset goes and how it is stored."""

    path: str = "out"
    """Folder of the dataset, on a file system every rank sees."""
    samples_per_shard: int | Literal["auto"] = "auto"
    """Samples per shard; auto: 1 GiB over the estimated bytes per sample, at most 4,096."""
    dtype: DType = "bfloat16"
    """dtype of the stored embeddings."""
    codec: Literal["raw"] = "raw"
    """How stored tensors are coded; raw: as they are."""

    def __post_init__(self) -> None:
        require(bool(self.path), "output.path is empty: expected a folder.")
        require(
            "://" not in self.path,
            f"output.path is {self.path!r}: expected a folder that every rank mounts, not a URI.",
        )
        if isinstance(self.samples_per_shard, int):
            require(
                self.samples_per_shard >= 1,
                f"output.samples_per_shard is {self.samples_per_shard}: expected 1 or more.",
            )


MOST_SECONDS = 10**9


@dataclass(frozen=True)
class RuntimeConfig:
    """How the job runs. Nothing here may change a byte of the dataset."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes this rank's GPU when there is one."""
    offload: Literal["auto", "never"] = "auto"
    """auto: layers that do not fit on a GPU stay in host memory (a warning); never: an error."""
    max_failed_samples: int = 100
    """Samples that may fail (status non_finite or error) before the run stops with exit 5."""
    on_environment_change: Literal["warn", "refuse"] = "warn"
    """What to do when units were made with other library versions or another device."""
    plan_timeout_s: float = 600.0
    """How long ranks wait for rank 0's plan before they make the same plan themselves."""
    prefetch_units: int = 1
    """Units that are read and tokenised ahead of the encoder."""
    write_queue_batches: int = 4
    """Encoded batches that may wait for the writer."""
    progress_interval_s: float = 60.0
    """Seconds between progress lines when the output is not a terminal."""
    grace_s: float = 20.0
    """Seconds a rank has after a stop signal to commit its unit; torchrun kills after 30."""

    def __post_init__(self) -> None:
        for name in ("max_failed_samples", "plan_timeout_s", "progress_interval_s", "grace_s"):
            value = getattr(self, name)
            require(
                0 <= value <= MOST_SECONDS,
                f"runtime.{name} is {value}: expected 0 to {MOST_SECONDS}.",
            )
        for name in ("prefetch_units", "write_queue_batches"):
            value = getattr(self, name)
            require(value >= 1, f"runtime.{name} is {value}: expected 1 or more.")
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)
        require(
            known is not None,
            f"runtime.device is {self.device!r}: expected auto, cpu, cuda or cuda:N.",
        )


@dataclass(frozen=True)
class Config:
    """A whole job."""

    captions: CaptionsConfig
    """The caption table."""
    encoders: dict[str, EncoderConfig]
    """Encoders by name; each makes one tensor text_<name>."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """The dataset."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """How the job runs."""

    def __post_init__(self) -> None:
        require(bool(self.encoders), "encoders is empty: name at least one, such as t5 or clip.")
        for name in self.encoders:
            require(
                ENCODER_NAME.match(name) is not None,
                f"encoders.{name}: expected a name of lower-case letters, digits and _.",
            )
            require(
                not name.endswith(RESERVED_ENDINGS),
                f"encoders.{name}: the endings {', '.join(RESERVED_ENDINGS)} are taken by tensors "
                "that stand beside an encoder's. Choose another name.",
            )
