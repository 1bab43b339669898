"""`HFEmbedder`: a frozen text encoder as an `nn.Module`, called as Open-Sora calls its own.

Guarantees: in fp32 the output is bit for bit that of Open-Sora's text embedder, for the same
library versions, batch, attention implementation and tokenizer class. Captions are padded to
`max_length`, and further for `seq_align`, without an attention mask. The output is T5's last hidden
state or CLIP's pooled output. Every weight comes from the checkpoint. Weights are safetensors only.
Costs: the weights, in float32 unless a dtype is given. Each call is one forward, without gradients,
in which every caption takes at least max_length positions.

The tokenizer is the checkpoint's *fast* one (`HFEmbedder.tokenizer`; printed with the module), as
in a precompute job; Open-Sora takes the slow classes. Fast and slow tokenizers differ on a few
captions. To use a slow tokenizer, assign it to `tokenizer` (transformers 4 only: 5 has no slow
ones).

Follows opensora/models/text/conditioner.py of hpcaitech/Open-Sora. Different here: the kind of
model is an argument (Open-Sora guesses it from the checkpoint's name), and mT5 and umT5 load in
their own classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from embed_precompute.encoders.checkpoint import open_checkpoint
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.loading import Source, load_model
from embed_precompute.encoders.shardformer import shardformer_t5
from embed_precompute.encoders.tokenizer import load_tokenizer
from embed_precompute.errors import InputError

MODULES = {
    "T5EncoderModel": ("t5", "last_hidden_state"),
    "CLIPTextModel": ("clip", "pooler_output"),
}
"""Open-Sora's class name -> our family, and the name of the model output that Open-Sora takes."""
WHERE = "HFEmbedder.from_pretrained"


class HFEmbedder(nn.Module):
    """Captions to embeddings: [B, L, D] of T5, [B, C] of CLIP."""

    def __init__(
        self,
        from_pretrained: str,
        max_length: int | None = None,
        hf_module: Literal["T5EncoderModel", "CLIPTextModel"] = "T5EncoderModel",
        shardformer: bool = False,
        **hf_kwargs: Any,
    ) -> None:
        """Load the encoder and its tokenizer from a folder or hub id.

        `max_length`: tokens per caption, special tokens included; 512 for T5 and 77 for CLIP when
        not given. `hf_kwargs`: `torch_dtype` or `dtype` (float32 when not given), `device_map`,
        `attn_implementation`, `revision` and all else that transformers' from_pretrained takes.
        Raises InputError: no such checkpoint, another kind of model, damaged or pickled weights, no
        fast tokenizer; with `shardformer` also what `shardformer_t5` raises.
        """
        super().__init__()
        if hf_module not in MODULES:
            raise InputError(
                f"HFEmbedder.hf_module is {hf_module!r}: expected {' or '.join(MODULES)}."
            )
        kind, self.output_key = MODULES[hf_module]
        family = FAMILIES[kind]
        make: Any = family.options
        options = make(kind=kind, pretrained=from_pretrained)
        self.max_length = options.max_length if max_length is None else max_length
        if shardformer and "shardformer" not in family.implementations:
            raise InputError("HFEmbedder.shardformer is for T5EncoderModel only. Remove it.")
        revision = hf_kwargs.pop("revision", None)
        dtype = _dtype_of(hf_kwargs)
        checkpoint = open_checkpoint(
            f"{WHERE} with hf_module {hf_module!r}",
            from_pretrained,
            revision,
            kind,
            family.models,
            dtype=str(dtype).removeprefix("torch."),
            online=True,
        )
        self.tokenizer = load_tokenizer(WHERE, checkpoint.folder, family.special_tokens)
        model = load_model(Source(checkpoint, family, options), dtype, **hf_kwargs)
        positions = model.config.max_position_embeddings if kind == "clip" else None
        if self.max_length < 1:
            raise InputError(f"HFEmbedder.max_length is {self.max_length}: expected 1 or more.")
        if positions is not None and self.max_length > positions:
            raise InputError(
                f"HFEmbedder.max_length is {self.max_length}: this model has {positions} "
                "positions. Lower it."
            )
        self._may_pad = positions is None
        self.hf_module: Any = shardformer_t5(model) if shardformer else model

    def forward(
        self, text: str | Sequence[str], added_tokens: int = 0, seq_align: int = 1
    ) -> torch.Tensor:
        """Embeddings of captions, on the model's device and in its dtype.

        T5: [B, L, D]. L is the smallest length, at least max_length, for which `added_tokens` + L
        is a multiple of `seq_align`. CLIP: [B, C]. Raises InputError if `seq_align` would make
        CLIP's captions longer: CLIP has no more positions.
        """
        captions = [text] if isinstance(text, str) else list(text)
        for k, caption in enumerate(captions):
            if not isinstance(caption, str):
                raise InputError(f"HFEmbedder: caption {k} is {caption!r}: expected a string.")
        if not captions:
            raise InputError("HFEmbedder: text is an empty list. Give at least one caption.")
        if added_tokens < 0 or seq_align < 1:
            raise InputError(
                f"HFEmbedder: added_tokens is {added_tokens} and seq_align {seq_align}: expected 0 "
                "or more and 1 or more."
            )
        input_ids: torch.Tensor = self.tokenizer(
            captions,
            truncation=True,
            max_length=self.max_length,
            padding="max_length",
            return_tensors="pt",
        )["input_ids"]
        missing = -(added_tokens + input_ids.shape[1]) % seq_align
        if missing and not self._may_pad:
            raise InputError(
                f"HFEmbedder: seq_align {seq_align} with added_tokens {added_tokens} would pad "
                f"CLIP from {input_ids.shape[1]} tokens to {input_ids.shape[1] + missing}: it is "
                "for T5. Call the CLIP embedder with the text alone."
            )
        if missing:
            pad_id = self.tokenizer.pad_token_id
            input_ids = nn.functional.pad(input_ids, (0, missing), value=pad_id)
        output = self.hf_module(
            input_ids=input_ids.to(self.hf_module.device),
            attention_mask=None,
            output_hidden_states=False,
        )
        embeddings: torch.Tensor = output[self.output_key]
        return embeddings

    def extra_repr(self) -> str:
        """What print(module) adds to the model: above all, which tokenizer is in use."""
        fast = "fast" if getattr(self.tokenizer, "is_fast", False) else "slow"
        return (
            f"tokenizer={type(self.tokenizer).__name__} ({fast}), max_length={self.max_length}, "
            f"output_key={self.output_key}"
        )


def _dtype_of(hf_kwargs: dict[str, Any]) -> Any:
    """Take the dtype out of `hf_kwargs`, under transformers' old name or its new one."""
    given = [hf_kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in hf_kwargs]
    if len(given) == 2:
        raise InputError("HFEmbedder was given both dtype and torch_dtype. Give one of them.")
    if not hf_kwargs.pop("use_safetensors", True):
        raise InputError("HFEmbedder reads safetensors only. Remove use_safetensors=False.")
    # transformers 5 would take the checkpoint's dtype; 4, which Open-Sora runs on, takes float32.
    return given[0] if given else torch.float32
