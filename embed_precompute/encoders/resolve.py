"""Encoders: from a configuration to what is run, and from token batches to embeddings.

Guarantees: `resolve` finds everything that decides an embedding's bytes (weights by digest,
tokenizer by its ids, shapes, dtype, implementation) and refuses a pair of checkpoint and tokenizer
that cannot work, before anything is encoded. `build` gives the encoder that keeps to it.
Costs: importing this is free of torch and transformers; `resolve` loads a tokenizer and reads the
weights once for their digest; only `build` loads a model.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
from collections.abc import Mapping
from typing import Any, cast

from embed_precompute.encoders import shardformer
from embed_precompute.encoders.batching import Shape, shape_of
from embed_precompute.encoders.checkpoint import Checkpoint, locate, open_checkpoint
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.encoders.spec import ResolvedEncoder, TextEncoder
from embed_precompute.encoders.tokenizer import CaptionTokenizer
from embed_precompute.errors import InputError, InternalError

IMPLEMENTATIONS = {
    "fused": "embed_precompute.encoders.fused.encoder",
    "hf": "embed_precompute.encoders.hf",
    "shardformer": "embed_precompute.encoders.shardformer",
}
"""Name of an implementation -> module with `build(resolved, device, output_dtype)`."""

# What transformers takes for a key that config.json leaves out.
DEFAULT_WIDTH = 512
DEFAULT_VOCABULARY = {"t5": 32128, "mt5": 250112, "umt5": 250112}
DEFAULT_CLIP_VOCABULARY = 49408
DEFAULT_CLIP_POSITIONS = 77
DEFAULT_CLIP_EOS = 49407
FUSED_ACTIVATIONS = {"t5": ("relu", "gated-gelu"), "clip": ("quick_gelu", "gelu")}
"""Kind -> activations that the fused layers compute, as config.json names them."""
DEFAULT_ACTIVATION = {
    "t5": "relu",
    "mt5": "gated-gelu",
    "umt5": "gated-gelu",
    "clip": "quick_gelu",
    "clip_text_model": "quick_gelu",
}
COMPILE_FROM_SAMPLES = 20_000
"""Job size from which a minute of compiling is small against what it saves."""
ARGMAX_EOS = 2
"""eos_token_id of CLIP configs older than transformers 4.31: pooled at the highest id instead."""


def settle(config: EncoderConfig, spec: Mapping[str, Any]) -> EncoderConfig:
    """`config` with what it leaves to `auto` as a plan's `spec` of this encoder has it: decided
    once, for all ranks and all later runs, whatever their machines would choose."""
    if config.buckets is not None or config.compile is True:
        return config  # they decide `auto` by themselves, and may contradict the plan
    chosen: dict[str, Any] = {}
    if config.implementation == "auto" and spec.get("implementation") in IMPLEMENTATIONS:
        chosen["implementation"] = spec["implementation"]
    if config.compile == "auto" and isinstance(spec.get("compiled"), bool):
        chosen["compile"] = spec["compiled"]
    return dataclasses.replace(config, **chosen)


def can_run(implementation: str, model_type: str) -> bool:
    """Whether an implementation that a plan names is known here, and has what it needs."""
    if implementation != "shardformer":
        return implementation in IMPLEMENTATIONS
    try:
        shardformer.check_usable("", model_type)
    except InputError:
        return False
    return True


def resolve(
    name: str, config: EncoderConfig, padded_length: int | None = None, *, num_samples: int = 0
) -> ResolvedEncoder:
    """Decide everything about encoder `name`; loads no model.

    `padded_length` is for t5 with attention_mask none: L found from a column of added_tokens; when
    not given it follows from the config. `num_samples` is the size of the job, which decides
    `compile: auto`. Raises InputError naming the field of `encoders.<name>`.
    """
    where = f"encoders.{name}"
    checkpoint = open_checkpoint(
        f"{where}.pretrained", config.pretrained, config.revision, config.kind
    )
    if config.implementation == "shardformer":
        shardformer.check_usable(f"{where}.implementation is shardformer", checkpoint.model_type)
    if config.tokenizer is None:
        tokenizer_where, folder = f"{where}.pretrained", checkpoint.folder
    else:
        tokenizer_where = f"{where}.tokenizer"
        folder = locate(tokenizer_where, config.tokenizer, None)
    tokenizer = CaptionTokenizer(tokenizer_where, folder, config.resolved_max_length)
    _check_vocabulary(tokenizer_where, checkpoint, tokenizer)
    if config.kind == "clip":
        _check_clip(where, tokenizer_where, config, checkpoint, tokenizer)
        width = checkpoint.text_config.get("hidden_size", DEFAULT_WIDTH)
    else:
        width = checkpoint.text_config.get("d_model", DEFAULT_WIDTH)
    implementation = _implementation(where, config, checkpoint)
    if config.kind == "t5" and config.attention_mask == "none":
        length = _padded_length(where, config, padded_length)
        shapes: tuple[Shape, ...] = (_t5_shape(config, length),)
        null_shape = _t5_shape(config, config.padded_length(0))
    else:
        length = None
        if implementation == "fused":
            shapes = ((1, config.stream_tokens),)
        else:
            shapes = _bucket_shapes(where, config, tokenizer)
        null_shape = shape_of(len(tokenizer.filler), shapes)
    return ResolvedEncoder(
        name=name,
        config=config,
        folder=checkpoint.folder,
        tokenizer=tokenizer,
        model_type=checkpoint.model_type,
        weights=checkpoint.weights,
        dim=int(width),
        pooled=config.kind == "clip",
        shapes=shapes,
        null_shape=null_shape,
        padded_length=length,
        implementation=implementation,
        compiled=implementation == "fused" and _compiled(config, num_samples),
    )


def build(
    resolved: ResolvedEncoder, device: str, output_dtype: str, *, may_offload: bool = True
) -> TextEncoder:
    """Load the model onto `device` (cpu, cuda, cuda:N); where it does not fit on a GPU, some of its
    layers stay in host memory, if they may. Raises InputError: damaged checkpoint, no room."""
    module = importlib.import_module(IMPLEMENTATIONS[resolved.implementation])
    built = module.build(resolved, device, output_dtype, may_offload=may_offload)
    return cast(TextEncoder, built)


def _implementation(where: str, config: EncoderConfig, checkpoint: Checkpoint) -> str:
    """What `auto` is. Nothing here looks at the device: it is part of the fingerprint."""
    if config.implementation not in ("auto", "fused"):
        return config.implementation
    known = FUSED_ACTIVATIONS[config.kind]
    key = "hidden_act" if config.kind == "clip" else "feed_forward_proj"
    default = DEFAULT_ACTIVATION[checkpoint.model_type]
    found = checkpoint.text_config.get(key, default)
    if config.implementation == "auto" and config.compile is not True:
        return "fused" if found in known and config.buckets is None else "hf"
    if found not in known:
        raise InputError(
            f"{where}.implementation: {checkpoint.folder / 'config.json'} has {key} "
            f"{found!r}, and fused computes {', '.join(known)}. Use the implementation hf."
        )
    return "fused"


def _compiled(config: EncoderConfig, num_samples: int) -> bool:
    if config.compile != "auto":
        return config.compile
    return num_samples >= COMPILE_FROM_SAMPLES and compiler() is not None


def compiler() -> str | None:
    """The C++ compiler that torch.compile would call, for kernels on a CPU and around those on a
    GPU; None where there is none."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def _padded_length(where: str, config: EncoderConfig, padded_length: int | None) -> int:
    if padded_length is not None:
        return padded_length
    fixed = config.fixed_padded_length(where)
    if fixed is None:
        raise InternalError(
            f"{where}.added_tokens is the column {config.added_tokens!r}: resolve() needs the "
            "padded length that the captions' values give."
        )
    return fixed


def _t5_shape(config: EncoderConfig, length: int) -> Shape:
    return max(1, config.batch_tokens // length), length


def _bucket_shapes(
    where: str, config: EncoderConfig, tokenizer: CaptionTokenizer
) -> tuple[Shape, ...]:
    """A shape per bucket. Every bucket must hold the empty caption, which fills up batches."""
    buckets = config.resolved_buckets()
    if buckets[0] < len(tokenizer.filler):
        raise InputError(
            f"{where}.buckets has {buckets[0]}: the empty caption has {len(tokenizer.filler)} "
            "tokens, so nothing fits it. Remove that bucket."
        )
    if config.kind == "clip":
        return tuple((config.batch_size, bucket) for bucket in buckets)
    return tuple(_t5_shape(config, bucket) for bucket in buckets)


def _check_vocabulary(where: str, checkpoint: Checkpoint, tokenizer: CaptionTokenizer) -> None:
    default = DEFAULT_VOCABULARY.get(checkpoint.model_type, DEFAULT_CLIP_VOCABULARY)
    rows = int(checkpoint.text_config.get("vocab_size", default))
    if tokenizer.max_id >= rows:
        raise InputError(
            f"{where}: the tokenizer has ids up to {tokenizer.max_id}, but the model in "
            f"{checkpoint.folder} has {rows} embeddings. This is another model's tokenizer."
        )


def _check_clip(
    where: str,
    tokenizer_where: str,
    config: EncoderConfig,
    checkpoint: Checkpoint,
    tokenizer: CaptionTokenizer,
) -> None:
    """The caption fits the model's positions, and the model pools at the tokenizer's end token.

    transformers pools at the first token that equals the config's eos_token_id, or, where that is
    2, at the highest id. Where it finds none it silently pools at position 0.
    """
    positions = int(checkpoint.text_config.get("max_position_embeddings", DEFAULT_CLIP_POSITIONS))
    if config.resolved_max_length > positions:
        raise InputError(
            f"{where}.max_length is {config.resolved_max_length}: the model in {checkpoint.folder} "
            f"has {positions} positions. Lower it."
        )
    eos = checkpoint.text_config.get("eos_token_id", DEFAULT_CLIP_EOS)
    pooled_at = tokenizer.max_id if eos == ARGMAX_EOS else eos
    if pooled_at != tokenizer.eos_id:
        rule = "the highest id (eos_token_id is 2)" if eos == ARGMAX_EOS else "eos_token_id"
        raise InputError(
            f"{tokenizer_where}: the tokenizer ends captions with id {tokenizer.eos_id}, but the "
            f"model in {checkpoint.folder} pools at {rule}, {pooled_at}. Use the tokenizer of this "
            "checkpoint, or correct eos_token_id in config.json."
        )
