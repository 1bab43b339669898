"""What the configuration says about an encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from embed_precompute.encoders.video_buckets import Bucket, VideoTokensConfig
from embed_precompute.errors import InputError, require

DType = Literal["bfloat16", "float16", "float32"]
Implementation = Literal["auto", "hf", "fused", "shardformer"]
AttentionMask = Literal["none", "padding"]
MOST_TOKENS = 1 << 26
"""No forward is larger: 67 million tokens or captions; ids alone would be half a gigabyte."""
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
