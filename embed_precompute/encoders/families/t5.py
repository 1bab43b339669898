"""T5 encoders: T5 v1.0 and v1.1, mT5 and umT5; a vector for each token.

Pads are treated in one of two ways. `attention_mask: none` is Open-Sora's way: captions are padded
to one length, every position attends to the pads, and all positions are stored. So another padded
length gives another embedding. `attention_mask: padding`: only real tokens are attended, and they
are stored. `keep` stores other positions than these.
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
    mask_of_pads,
)
from embed_precompute.encoders.tokenizer import CaptionTokenizer, Shape
from embed_precompute.encoders.video_buckets import Bucket, VideoTokensConfig
from embed_precompute.errors import InputError, InternalError, require

if TYPE_CHECKING:
    import torch

    from embed_precompute.encoders.fused.stream import Forward

BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384)
FUSED_ACTIVATIONS = ("relu", "gated-gelu")
NAMED_BUCKETS = 4
"""Number of video buckets that an error names per padded length; a table has hundreds."""


@dataclass(frozen=True, kw_only=True)
class T5Options(EncoderConfig):
    """A T5 encoder; its last_hidden_state, a vector per token."""

    kind: Literal["t5"] = "t5"
    max_length: int = 512
    attention_mask: Literal["none", "padding"] = "none"
    """What the encoder sees. none: pads are attended, as in Open-Sora. padding: only real tokens
    are."""
    keep: Literal["real", "real+1", "all"] | None = None
    """Which positions are stored. real: the caption's tokens. real+1: the first pad too, where
    there is one (Chroma). all: every position up to the padded length. null: all with
    attention_mask none, real with padding."""
    seq_align: int = 1
    """Only for attention_mask none: pad until (added_tokens + length) is a multiple of this."""
    added_tokens: int | VideoTokensConfig | str = 0
    """How many tokens the video adds: a number, an integer column's name, or video buckets."""
    batch_tokens: int = 16384
    """Tokens of one forward: a forward of length L has batch_tokens / L captions, at least 1."""
    buckets: tuple[int, ...] | None = None
    """Only for hf with attention_mask padding: lengths below max_length that a forward may have."""
    stream_tokens: int = 4096
    """Only for fused with attention_mask padding: tokens in one forward of packed captions."""
    implementation: Literal["auto", "hf", "fused", "shardformer"] = "auto"
    """hf: transformers, the reference. fused: our own layers. shardformer: ColossalAI's jit-fused
    layers. auto: fused if it has the model's activation and no buckets are given, else hf."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("seq_align", "batch_tokens", "stream_tokens")
        require(
            not isinstance(self.added_tokens, int) or self.added_tokens >= 0,
            f"added_tokens is {self.added_tokens}: below 0.",
        )
        require(
            self.is_padded or self.stream_tokens >= self.max_length,
            f"stream_tokens is {self.stream_tokens}: expected at least max_length "
            f"({self.max_length}), so that every caption fits.",
        )
        aligned = self.seq_align != 1 or self.added_tokens != 0
        require(
            self.attention_mask == "none" or not aligned,
            "seq_align and added_tokens belong to attention_mask none, where pads are encoded. "
            "Under a mask no embedding depends on the padded length: remove both fields.",
        )
        require(
            self.kept != "real+1" or not aligned,
            "seq_align and added_tokens are for keep all or real: with keep real+1 a caption of "
            "max_length tokens has no pad. Remove both fields.",
        )
        require(
            not self.compile or self.kept != "real+1" or self.is_padded,
            "compile is not for keep real+1 with attention_mask padding. Remove compile.",
        )
        require(
            self.buckets is None or not self.is_padded,
            "buckets are for attention_mask padding with keep real or real+1: otherwise every "
            "caption has the one padded length. Remove the field.",
        )
        self.require_buckets(self.buckets)

    @property
    def kept(self) -> Literal["real", "real+1", "all"]:
        """`keep`, or what null means."""
        return self.keep or ("all" if self.attention_mask == "none" else "real")

    @property
    def stored_pads(self) -> int:
        return int(self.kept == "real+1")

    @property
    def is_padded(self) -> bool:
        """Every caption runs at the one padded length: its pads are attended, or all are stored."""
        return self.attention_mask == "none" or self.kept == "all"

    def padded_length(self, added_tokens: int) -> int:
        """Length that T5 runs at: max_length, padded until added_tokens + length is a multiple of
        seq_align."""
        return self.max_length + -(added_tokens + self.max_length) % self.seq_align

    @property
    def positions(self) -> int:
        return self.padded_length(self.added_tokens if isinstance(self.added_tokens, int) else 0)

    @property
    def integer_column(self) -> str | None:
        return self.added_tokens if isinstance(self.added_tokens, str) else None

    def spec(self) -> dict[str, Any]:
        added = self.added_tokens
        return {
            "attention_mask": self.attention_mask,
            "keep": self.kept,
            "seq_align": self.seq_align,
            # Only the sorted token counts of the buckets change bytes.
            "added_tokens": list(added.by_tokens())
            if isinstance(added, VideoTokensConfig)
            else added,
        }


class T5(Family[T5Options]):
    options = T5Options
    models = MappingProxyType(
        {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
    )
    one_graph = True
    implementations = ("hf", "fused", "shardformer")
    encoder_prefixes = ("encoder.",)
    second_names = MappingProxyType({"shared.weight": "encoder.embed_tokens.weight"})
    config_keys = (
        *("num_layers", "num_heads", "d_kv", "layer_norm_epsilon", "dense_act_fn", "is_gated_act"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
    )

    def outputs(self, options: T5Options, checkpoint: Checkpoint | None) -> tuple[Output, ...]:
        width = self.sizes(checkpoint).width if checkpoint else options.width or 0
        return (Output("", "token", width, options.kept),)

    def sizes(self, checkpoint: Checkpoint) -> Sizes:
        config = checkpoint.text_config
        inner = config.num_heads * config.d_kv
        matrices = 3 if config.feed_forward_proj.startswith("gated") else 2
        return Sizes(
            layers=config.num_layers,
            width=config.d_model,
            heads=config.num_heads,
            inner=inner,
            hidden=config.d_ff,
            linear_weights=config.d_model * (4 * inner + matrices * config.d_ff),
            vocabulary=config.vocab_size,
        )

    def decide(self, opened: OpenEncoder[T5Options], facts: Facts) -> Decision:
        options, activation = opened.options, opened.checkpoint.text_config.feed_forward_proj
        reason = None
        if options.buckets is not None:
            reason = "buckets are given, and fused packs captions end to end."
        elif activation not in FUSED_ACTIVATIONS:
            reason = (
                f"{opened.checkpoint.folder / 'config.json'} has feed_forward_proj "
                f"{activation!r}, and fused computes {', '.join(FUSED_ACTIVATIONS)}."
            )
        elif options.attention_mask == "padding" and options.kept == "all":
            reason = "keep is all, and fused does not compute all pads under a mask."
        implementation = choose_implementation(opened, self, facts, reason)

        def batch_of(length: int) -> int:
            return max(1, options.batch_tokens // length)

        def shape(length: int) -> Shape:
            return batch_of(length), length

        if options.is_padded:
            length = self._padded_length(opened, facts)
            null_shape = shape(options.padded_length(0))
            return Decision(implementation, options.compile, length, (shape(length),), null_shape)
        if implementation == "fused":
            stream = (1, options.stream_tokens)
            return Decision(implementation, options.compile, None, (stream,), stream)
        return in_buckets(opened, implementation, options.buckets, BUCKETS, batch_of)

    def keeps_float32(self, weight: str, dtype: str) -> bool:
        return dtype == "float16" and ".wo." in weight  # wo overflows in float16

    def forward(
        self, model: Any, options: T5Options, input_ids: torch.Tensor, lengths: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        masked = options.attention_mask == "padding"
        mask = mask_of_pads(input_ids, lengths, model.dtype) if masked else None
        return {"": model(input_ids=input_ids, attention_mask=mask).last_hidden_state}

    def fused_layers(
        self,
        model: Any,
        options: T5Options,
        longest: int,
        tokenizer: CaptionTokenizer,
        *,
        compiled: bool,
    ) -> Forward:
        from embed_precompute.encoders.fused import layers

        if compiled and model.device.type == "cuda":
            from embed_precompute.encoders.fused import graph  # needs torch 2.5

            return graph.GraphLayers(graph.T5Graph(model, longest))
        return layers.T5Layers(model, longest, compiled=compiled)

    def reference(
        self, checkpoint: Path, tokenizer: Path, options: T5Options, device: str
    ) -> Reference:
        import torch
        import transformers

        tokenize = transformers.AutoTokenizer.from_pretrained(tokenizer)
        config = transformers.AutoConfig.from_pretrained(checkpoint)
        model_class = getattr(transformers, self.models[config.model_type])
        model = model_class.from_pretrained(checkpoint, **in_dtype(options.dtype)).to(device).eval()

        def encode(text: str, padded_length: int | None) -> dict[str, torch.Tensor]:
            inputs = tokenize(
                text, truncation=True, max_length=options.max_length, return_tensors="pt"
            )
            ids, mask = inputs.input_ids, inputs.attention_mask
            real = ids.shape[1]
            if padded_length is None:
                padded_length = min(real + (options.kept == "real+1"), options.max_length)
            pads = torch.full((1, padded_length - real), tokenize.pad_token_id)
            ids, mask = torch.cat([ids, pads], 1), torch.cat([mask, torch.zeros_like(pads)], 1)
            seen = None if options.attention_mask == "none" else mask.to(device)
            with torch.no_grad():
                states = model(ids.to(device), attention_mask=seen).last_hidden_state[0]
            return {"": states[: {"real": real, "real+1": real + 1, "all": None}[options.kept]]}

        return encode

    def _padded_length(self, opened: OpenEncoder[T5Options], facts: Facts) -> int:
        """The one padded length, from the options; if added_tokens names a column, from the
        column's values or, if they were not counted, from the plan. Raises InputError that lists
        the lengths if there are several."""
        options, added = opened.options, opened.options.added_tokens
        if isinstance(added, int):
            return options.padded_length(added)
        if isinstance(added, VideoTokensConfig):
            return length_of_buckets(f"{opened.where}.added_tokens", options, added)
        if facts.added_tokens is None and facts.stored is not None:
            stored = facts.stored.get("padded_length")
            # If the plan has another kind of encoder here, any length will do: `check_same` then
            # reports that the specs differ.
            return stored if isinstance(stored, int) else options.padded_length(0)
        if facts.added_tokens is None:
            raise InternalError(
                f"{opened.where}.added_tokens is the column {added!r}: the padded length follows "
                "from its values, and they were not counted."
            )
        rows: dict[int, int] = {}
        for value, count in facts.added_tokens.items():
            length = options.padded_length(value)
            rows[length] = rows.get(length, 0) + count
        if len(rows) > 1:
            listed = ", ".join(f"{length} ({rows[length]} rows)" for length in sorted(rows))
            raise InputError(
                f"{opened.where}: column {added!r} with seq_align {options.seq_align} leads to "
                f"{len(rows)} padded lengths: {listed}. Pads are attended, so one dataset has one "
                "length: split the captions and make one dataset per length."
            )
        return next(iter(rows), options.padded_length(0))


def length_of_buckets(where: str, options: T5Options, video: VideoTokensConfig) -> int:
    """The one padded length that the trainer's buckets lead to. Raises InputError that lists the
    lengths if there are several."""
    by_length: dict[int, dict[int, list[Bucket]]] = {}
    for tokens, buckets in video.by_tokens().items():
        by_length.setdefault(options.padded_length(tokens), {})[tokens] = buckets
    if len(by_length) == 1:
        return next(iter(by_length))
    lines = []
    for length, by_tokens in sorted(by_length.items()):
        every = [bucket for buckets in by_tokens.values() for bucket in buckets]
        named = ", ".join(map(str, every[:NAMED_BUCKETS]))
        more = f" and {len(every) - NAMED_BUCKETS} more" if len(every) > NAMED_BUCKETS else ""
        lines.append(f"{length}: added_tokens {next(iter(by_tokens))}, for {named}{more}")
    raise InputError(
        f"{where}: the buckets with seq_align {options.seq_align} lead to "
        f"{len(lines)} padded lengths:\n  " + "\n  ".join(lines) + "\n"
        "Pads are attended, so one dataset has one length: make one dataset per length, each with "
        "the added_tokens named above, or with only the buckets of that length."
    )
