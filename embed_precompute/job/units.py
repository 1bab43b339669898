"""One unit of work: its captions, read and tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from embed_precompute.captions.reader import CaptionReader
from embed_precompute.encoders.spec import ResolvedEncoder
from embed_precompute.samples import Sample, Status
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import NULL_UNIT


@dataclass
class EncodedTokens:
    """One encoder's view of a unit's stored rows."""

    ids: list[np.ndarray]
    """Per stored row its token ids, [tokens] int32, special tokens included, no pads."""
    lengths: list[int]
    """Vectors stored per row: the padded length, the real tokens, or 1 for a pooled encoder."""
    truncated: list[bool]


@dataclass
class Unit:
    """A unit that is read and tokenised, ready to encode."""

    number: int
    first_row: int
    num_rows: int
    samples: list[Sample]
    stored_row: list[int | None]
    """Per sample the row that holds its embedding; equal texts share one."""
    tokens: dict[str, EncodedTokens]
    swept: bool = False
    """Another rank may be at the same unit."""
    failures: dict[int, tuple[Status, str]] = field(default_factory=dict)
    """Stored rows that must not be stored, and why."""

    @property
    def num_stored(self) -> int:
        return len({row for row in self.stored_row if row is not None})

    @property
    def is_null(self) -> bool:
        return self.number == NULL_UNIT


def read_unit(
    plan: Plan, number: int, reader: CaptionReader, encoders: Sequence[ResolvedEncoder]
) -> Unit:
    """Read and tokenise unit `number`; `NULL_UNIT` is the encoding of the empty caption."""
    if number == NULL_UNIT:
        first_row, num_rows, samples = 0, 0, [Sample("", 0, "")]
    else:
        first_row, num_rows = plan.unit_rows(number)
        samples = reader.read(first_row, num_rows)
    row_of: dict[str, int] = {}
    stored_row = [
        None if sample.text is None else row_of.setdefault(sample.text, len(row_of))
        for sample in samples
    ]
    texts = list(row_of)
    tokens: dict[str, EncodedTokens] = {}
    for encoder in encoders:
        tokenized = encoder.tokenizer.encode(texts)
        lengths = [_stored_length(encoder, number, len(ids)) for ids in tokenized.ids]
        tokens[encoder.name] = EncodedTokens(tokenized.ids, lengths, tokenized.truncated)
    return Unit(number, first_row, num_rows, samples, stored_row, tokens)


def _stored_length(encoder: ResolvedEncoder, number: int, num_tokens: int) -> int:
    if encoder.pooled:
        return 1
    if encoder.padded_length is None:
        return num_tokens
    return encoder.null_shape[1] if number == NULL_UNIT else encoder.padded_length
