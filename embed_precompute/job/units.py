"""One unit of work: its captions, read and tokenised, and what need not be encoded again."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from embed_precompute.captions.reader import CaptionReader
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.encoders.tokenizer import Tokenized
from embed_precompute.job.reuse import Copies, Reuse
from embed_precompute.samples import Sample, Status
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import NULL_UNIT

log = logging.getLogger(__name__)


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
        first_row, num_rows, samples = 0, 0, [Sample("", 0, "")]
    else:
        first_row, num_rows = plan.unit_rows(number)
        samples = reader.read(first_row, num_rows)
    texts = list(dict.fromkeys(sample.text for sample in samples if sample.text is not None))
    tokens = {each.name: each.opened.tokenizer.encode(texts) for each in encoders}
    if failed := _without_vectors(texts, tokens):
        samples = [
            replace(sample, text=None, status=Status.INVALID_TEXT, error=failed[sample.text])
            if sample.text in failed
            else sample
            for sample in samples
        ]
        reader.check(samples)
        kept = [row for row, text in enumerate(texts) if text not in failed]
        texts = [texts[row] for row in kept]
        tokens = {name: captions.select(kept) for name, captions in tokens.items()}
    noted = dict(reader.noted - before)
    for what in sorted(reader.first_noted.keys() - named):  # later ones are counted only
        log.info("%s: the first of the %s that this rank reads", reader.first_noted[what], what)
    row_of = {text: row for row, text in enumerate(texts)}
    stored_row = [None if sample.text is None else row_of[sample.text] for sample in samples]
    lengths = {
        tensor: encoder.stored_lengths(output, tokens[encoder.name], null=number == NULL_UNIT)
        for encoder in encoders
        for tensor, output in encoder.tensors().items()
    }
    unit = Unit(number, first_row, num_rows, samples, stored_row, tokens, lengths, noted=noted)
    if reuse is not None:
        unit.copies = reuse.find(texts, lengths, null=unit.is_null)
    return unit


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
