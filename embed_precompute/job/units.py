"""One unit of work: its captions, read and tokenised, and what need not be encoded again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from embed_precompute.captions.reader import CaptionReader
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.encoders.tokenizer import Tokenized
from embed_precompute.job.reuse import Copies, Reuse
from embed_precompute.samples import Sample, Status
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import NULL_UNIT
from embed_precompute.store.rows import SampleColumns

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass
class Unit:
    """A unit that is read and tokenised, ready to encode."""

    number: int
    first_row: int
    num_rows: int
    samples: list[Sample]
    stored_row: list[int | None]
    """For each sample, the stored row that holds its embedding; equal texts share one."""
    tokens: dict[str, Tokenized]
    """For each encoder, the captions of the stored rows, tokenised."""
    lengths: dict[str, list[int]]
    """For each tensor, the number of vectors of each stored row."""
    copies: Copies = field(default_factory=Copies)
    """The embeddings that another dataset has."""
    swept: bool = False
    """True in the sweep (see `Claims`): another rank may be computing the same unit."""
    encoded: float = 0.0
    """The part of its work that is done."""
    noted: dict[str, int] = field(default_factory=dict)
    """What of its rows may surprise: see `CaptionReader.noted`."""
    began: float = 0.0
    """When its first forward was begun, on the clock time.monotonic."""
    abandoned: bool = False
    """True if another rank committed the unit meanwhile: what was encoded is dropped."""
    failures: dict[int, tuple[Status, str]] = field(default_factory=dict)
    """Stored row that is dropped because its embedding holds inf or nan -> its status and error."""

    @property
    def num_stored(self) -> int:
        return len({row for row in self.stored_row if row is not None})

    @property
    def is_null(self) -> bool:
        return self.number == NULL_UNIT

    def to_encode(self, encoder: str) -> tuple[list[int], Tokenized]:
        """The stored rows that this encoder has to encode, for nobody has them, and their
        captions."""
        copied, captions = self.copies.rows.get(encoder, {}), self.tokens[encoder]
        rows = [row for row in range(self.num_stored) if row not in copied]
        return rows, captions.select(rows) if copied else captions

    def columns(self, kept: Sequence[int]) -> SampleColumns:
        """What became of each sample; only the stored rows `kept` have an embedding."""
        index = {row: i for i, row in enumerate(kept)}
        places = [None if row is None else index.get(row) for row in self.stored_row]
        rows = [None if place is None else kept[place] for place in places]

        def column(of_rows: Sequence[T]) -> list[T | None]:
            return [None if row is None else of_rows[row] for row in rows]

        status = [sample.status for sample in self.samples]
        errors = [sample.error for sample in self.samples]
        for i, row in enumerate(self.stored_row if self.failures else ()):
            if row in self.failures:
                status[i], errors[i] = self.failures[row]
        return SampleColumns(
            sample_id=[sample.sample_id for sample in self.samples],
            row=[sample.row for sample in self.samples],
            status=status,
            error=errors,
            index=places,
            tokens={name: column(each.tokens) for name, each in self.tokens.items()},
            truncated={name: column(each.truncated) for name, each in self.tokens.items()},
            lengths={name: column(lengths) for name, lengths in self.lengths.items()},
            text=[sample.text for sample in self.samples],
        )


def read_unit(
    plan: Plan,
    number: int,
    reader: CaptionReader,
    encoders: Sequence[ResolvedEncoder],
    reuse: Reuse | None = None,
) -> Unit:
    """Read and tokenise unit `number`; `NULL_UNIT` holds the empty caption alone.

    `reuse`: the datasets that have some of its embeddings.
    """
    before, named = Counter(reader.noted), set(reader.first_noted)
    if number == NULL_UNIT:
        unit = null_unit(encoders)
    else:
        first_row, num_rows = plan.unit_rows(number)
        samples = reader.read(first_row, num_rows)
        unit = make_unit(number, first_row, num_rows, samples, encoders)
        if unit.samples is not samples:
            reader.check(unit.samples)
        rows = [row for row in unit.stored_row if row is not None]
        encoded = [sample for sample in unit.samples if sample.text is not None]
        for name, captions in unit.tokens.items():
            if any(captions.unknown):
                reader.note_unknown(name, encoded, [captions.unknown[row] for row in rows])
    unit.noted = dict(reader.noted - before)
    for what in sorted(reader.first_noted.keys() - named):  # later ones are counted only
        log.info("%s: the first of the %s that this rank reads", reader.first_noted[what], what)
    if reuse is not None:
        texts = dict.fromkeys(sample.text for sample in unit.samples if sample.text is not None)
        unit.copies = reuse.find(list(texts), unit.lengths, null=unit.is_null)
    return unit


def null_unit(encoders: Sequence[ResolvedEncoder]) -> Unit:
    """The unit of the null embedding."""
    return make_unit(NULL_UNIT, 0, 0, [Sample("", 0, "")], encoders)


def make_unit(
    number: int,
    first_row: int,
    num_rows: int,
    samples: list[Sample],
    encoders: Sequence[ResolvedEncoder],
) -> Unit:
    """The unit of these samples, tokenised; a sample of which nothing would be stored is invalid,
    and the unit then has a list of samples of its own."""
    texts = list(dict.fromkeys(sample.text for sample in samples if sample.text is not None))
    tokens = {each.name: each.opened.tokenizer.encode(texts) for each in encoders}
    if failed := _without_vectors(texts, tokens):
        samples = [
            replace(sample, text=None, status=Status.INVALID_TEXT, error=failed[sample.text])
            if sample.text in failed
            else sample
            for sample in samples
        ]
        kept = [row for row, text in enumerate(texts) if text not in failed]
        texts = [texts[row] for row in kept]
        tokens = {name: captions.select(kept) for name, captions in tokens.items()}
    row_of = {text: row for row, text in enumerate(texts)}
    stored_row = [None if sample.text is None else row_of[sample.text] for sample in samples]
    lengths = {
        tensor: encoder.stored_lengths(output, tokens[encoder.name], null=number == NULL_UNIT)
        for encoder in encoders
        for tensor, output in encoder.tensors().items()
    }
    return Unit(number, first_row, num_rows, samples, stored_row, tokens, lengths)


def _without_vectors(
    texts: Sequence[str], tokens: Mapping[str, Tokenized]
) -> dict[str | None, str]:
    """The texts that have tokens, none of which an encoder would store -> why."""
    return {
        text: f"encoders.{name} stores no position of it: its tokens merge with the template's "
        "before it, which are cropped"
        for name, captions in tokens.items()
        for text, num_ids, stored in zip(texts, captions.num_ids, captions.stored, strict=True)
        if num_ids and not stored
    }
