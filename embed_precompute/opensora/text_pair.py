"""The two tensors Open-Sora trains from: text_t5 [L, D] of one length, and text_clip [C].

Guarantees: a dataset whose encoders do not give that pair is refused, with what would do; a masked
dataset is padded by a rule that the caller names, never silently.
Costs: torch only; padding is one copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch

from embed_precompute.errors import InputError
from embed_precompute.store.records import stored_tensors

PadMasked = Literal["refuse", "zeros", "repeat_last"]


class TextPair:
    """The two encoders Open-Sora wants of a dataset: one sequence, one pooled.

    Open-Sora stacks a batch with `default_collate`, so all sequences must have one length: with
    attention_mask none they have; with `padding` only real tokens are stored, and `pad_masked` says
    what follows them up to max_length: refuse (InputError), zeros, or repeat_last, the last row
    again and again, as Open-Sora's trainer lengthens its null embedding.
    """

    def __init__(
        self, spec: Mapping[str, Any], t5: str, clip: str, pad_masked: PadMasked = "refuse"
    ) -> None:
        self.t5, self.clip, self.pad_masked = t5, clip, pad_masked
        tensors = {tensor.name: tensor for tensor in stored_tensors(spec)}
        for name, per in ((t5, "token"), (clip, "caption")):
            if name not in tensors or tensors[name].per != per:
                wanted = "text_clip" if per == "caption" else "text_t5"
                fitting = [tensor.name for tensor in tensors.values() if tensor.per == per]
                raise InputError(
                    f"Open-Sora needs {wanted}, a vector per {per}, of encoder "
                    f"{name!r}: the dataset has {sorted(tensors)}, of which "
                    f"{fitting or 'none'} would do. Name it, or precompute with both encoders."
                )
        encoder = spec["encoders"][tensors[t5].encoder]
        self.masked = encoder.get("attention_mask") == "padding"
        self.max_length: int | None = encoder.get("max_length")
        if pad_masked not in ("refuse", "zeros", "repeat_last"):
            raise InputError(f"pad_masked is {pad_masked!r}: expected refuse, zeros, repeat_last.")
        if self.masked and pad_masked == "refuse":
            raise InputError(
                f"encoder {t5!r} has attention_mask padding: its embeddings have the length of "
                "their captions, and Open-Sora stacks only equal lengths. Precompute with "
                "attention_mask none, which is Open-Sora's own recipe, or choose pad_masked zeros "
                "or repeat_last, which is not what its model was trained with."
            )

    def sequence(self, values: torch.Tensor) -> torch.Tensor:
        """text_t5 [L, D] as Open-Sora gets it: [max_length, D] where the dataset is masked."""
        if not self.masked or self.max_length is None:
            return values
        return pad_to(values, self.max_length, self.pad_masked)


def pad_to(values: torch.Tensor, length: int, rule: str) -> torch.Tensor:
    """[L, D] lengthened to [length, D] with zeros, or with its last row (repeat_last)."""
    missing = length - values.shape[0]
    if missing < 0:
        raise InputError(
            f"an embedding has {values.shape[0]} vectors, more than {length}: never cut."
        )
    tail = values.new_zeros((missing, values.shape[1]))
    if rule == "repeat_last":
        tail = values[-1:].expand(missing, -1)
    return torch.cat([values, tail])
