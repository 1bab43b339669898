"""The dataset as an export reads it: its samples unit by unit, and the caption rows they are from.

Guarantees: samples come in input order; the caption files are those of the plan, or a ConflictError
names what differs; a caption that is not the one that was encoded is a ConflictError that names its
row, so a table can never be joined to another table's embeddings.
Costs: one unit's rows part and one batch of caption rows in memory; footers of all caption files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import yaml

from embed_precompute.captions.files import Footer, find_files, read_footers
from embed_precompute.captions.reader import (
    CaptionFile,
    RowCursor,
    RowMap,
    column_type,
    entries_per_row,
    strings,
)
from embed_precompute.captions.recipes import STRINGS, Problem, make_normalizer
from embed_precompute.documents import MAX_NAMED_DIFFERENCES
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.samples import Status
from embed_precompute.store.check import CheckedUnit, check_unit
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.plan import InputFile, Plan, changed_files, read_plan
from embed_precompute.store.rows import read_samples

READ_ROWS = 2048


@dataclass(frozen=True)
class Entry:
    """One row of the exported table."""

    number: int
    """The sample's number in the dataset, over all samples in input order."""
    sample_id: str
    row: int
    """Input row."""
    caption: int
    """Which caption of its row: 0, or the place in the row's list."""
    stored: int | None
    """Row of the unit's shard; None: no embedding."""
    text: str | None
    """The encoded text."""


@dataclass(frozen=True)
class Subset:
    """Which samples are exported."""

    keep_failed: bool = False
    """Samples that are not ok too, as entries without an embedding."""
    limit: int | None = None
    """Only the first samples that would be exported."""
    ids: frozenset[str] | None = None


class Source:
    """A finished dataset. IncompleteError when it is not finalised."""

    def __init__(self, root: Path, subset: Subset) -> None:
        self.root = root
        self.plan = read_plan(root)
        self.index = DatasetIndex(root)
        if self.index.manifest.plan_id != self.plan.plan_id:
            raise ConflictError(f"{root}: manifest.json and plan.json are of different datasets.")
        self.not_ok: Counter[str] = Counter()
        """Samples met that are not ok, by status."""
        self._subset = subset
        self._check_subset()

    def _check_subset(self) -> None:
        limit, ids = self._subset.limit, self._subset.ids
        if limit is not None and limit < 1:
            raise InputError(f"limit is {limit}: expected 1 or more.")
        absent = sorted(each for each in ids or () if self.index.find(each) is None)
        if absent:
            named = ", ".join(map(repr, absent[:MAX_NAMED_DIFFERENCES]))
            raise InputError(
                f"{len(absent):,} of the {len(ids or ()):,} ids asked for are not in {self.root}: "
                f"{named}{', ...' if len(absent) > MAX_NAMED_DIFFERENCES else ''}."
            )

    def _unit_numbers(self) -> Sequence[int]:
        """The units that hold samples of the subset, in order."""
        if self._subset.ids is None:
            return range(self.plan.num_units)
        found = (self.index.find(sample_id) for sample_id in self._subset.ids)
        return sorted({int(self.index.shard[sample]) for sample in found if sample is not None})

    @property
    def most_entries(self) -> int:
        """An upper bound of how many samples are exported."""
        most = self.index.num_samples if self._subset.keep_failed else len(self.index.ok)
        num_ids = None if self._subset.ids is None else len(self._subset.ids)
        return min(n for n in (most, self._subset.limit, num_ids) if n is not None)

    def sequence_lengths(self, name: str) -> dict[int, int]:
        """Vectors stored of encoder `name` -> samples that are ok."""
        lengths, counts = np.unique(
            self.index.lengths[name][np.asarray(self.index.ok)], return_counts=True
        )
        return dict(zip(lengths.tolist(), counts.tolist(), strict=True))

    def units(self) -> Iterator[tuple[CheckedUnit, list[Entry]]]:
        """Every unit that has something to export, with its entries."""
        num_left = self._subset.limit
        for number in self._unit_numbers():
            if num_left == 0:
                return
            unit = check_unit(self.root, self.plan, number)
            entries = self._entries(unit, int(self.index.shards[number, 0]))
            entries = [e for e in entries if e.stored is not None or self._subset.keep_failed]
            entries = entries[:num_left]
            if num_left is not None:
                num_left -= len(entries)
            if entries:
                yield unit, entries

    def _entries(self, unit: CheckedUnit, first: int) -> list[Entry]:
        """The samples of a unit that the subset names, whatever their status."""
        entries: list[Entry] = []
        row, caption = -1, 0
        path = unit.record.rows_path(self.root)
        for number, sample in enumerate(read_samples(path, self.plan.tensors), first):
            caption = caption + 1 if sample.row == row else 0
            row = sample.row
            if self._subset.ids is not None and sample.sample_id not in self._subset.ids:
                continue
            if sample.status is not Status.OK:
                self.not_ok[sample.status.label] += 1
            entries.append(Entry(number, sample.sample_id, row, caption, sample.index, sample.text))
        return entries


class CaptionRows:
    """The caption table of a plan with all its columns, checked to be the one that was encoded."""

    def __init__(self, plan: Plan, path: str) -> None:
        found = read_footers(find_files(path), _examine)
        files = [file for file, _ in found]
        inputs = [InputFile(**asdict(file.input)) for file in files]
        if lines := changed_files(plan.inputs.files, inputs):
            raise ConflictError(
                f"{path} is not the caption table of this dataset:\n  "
                + "\n  ".join(lines[:MAX_NAMED_DIFFERENCES])
                + "\nName the files that were encoded with --captions."
            )
        self.schema = _unify(path, files, [schema for _, schema in found])
        self.text_column = plan.inputs.text_column
        self.id_column = plan.inputs.id_column
        self.is_list = column_type(self.schema.field(self.text_column).type) == STRINGS
        captions = plan.spec["captions"]
        self._recipe = captions["recipe"]["kind"]
        self._normalize = make_normalizer(captions["normalize"])
        self._map = RowMap(files)
        self._cursor = RowCursor(self._map, self.schema.names, READ_ROWS)

    def batches(
        self, first_row: int, num_rows: int, entries: Sequence[Entry]
    ) -> Iterator[tuple[pa.RecordBatch, list[Entry], list[str]]]:
        """(the input's columns, entries, captions), one row per entry, for a unit's rows."""
        waiting = 0
        for first, batch in self._cursor.batches(first_row, num_rows):
            here: list[Entry] = []
            while waiting < len(entries) and entries[waiting].row < first + batch.num_rows:
                here.append(entries[waiting])
                waiting += 1
            if here:
                picked = pa.array([entry.row - first for entry in here])
                texts = self._captions(batch, first, here)
                yield self._conform(batch.take(picked), here[0].row), here, texts

    def place(self, row: int) -> str:
        """How messages name an input row."""
        return self._map.place(row)

    def _conform(self, batch: pa.RecordBatch, row: int) -> pa.RecordBatch:
        """The batch with the columns and types of all files together."""
        columns = []
        for field in self.schema:
            if field.name not in batch.schema.names:
                columns.append(pa.nulls(batch.num_rows, field.type))
                continue
            column = batch.column(field.name).cast(field.type)
            try:
                if field.name != self.text_column:
                    column.validate(full=True)
            except pa.ArrowInvalid as error:
                raise InputError(
                    f"{self.place(row)} or one after it: column {field.name!r} cannot be "
                    f"exported: {error}. Repair or drop the column."
                ) from error
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _captions(self, batch: pa.RecordBatch, first: int, entries: Sequence[Entry]) -> list[str]:
        """The caption of each entry, normalised as it was for encoding, before the recipe."""
        column = batch.column(self.text_column)
        if self.is_list:
            starts = np.concatenate(([0], np.cumsum(entries_per_row(column))))
            flat = strings(column.flatten(), self.text_column)
            found = [
                flat[int(starts[e.row - first]) + e.caption] if e.text is not None else None
                for e in entries
            ]
        else:
            values = strings(column, self.text_column)
            found = [values[e.row - first] for e in entries]
        return [self._caption(e, value) for e, value in zip(entries, found, strict=True)]

    def _caption(self, entry: Entry, value: str | Problem | None) -> str:
        if entry.text is None:  # null or not text: the trainer must still get a string
            return ""
        caption = value if isinstance(value, str) else None
        if caption is not None and self._normalize is not None:
            caption = self._normalize(caption)
        same = caption is not None and (
            caption == entry.text
            or (self._recipe == "opensora" and entry.text.startswith(caption))
            or self._recipe == "template"
        )
        if not same or caption is None:
            raise ConflictError(
                f"{self.place(entry.row)}: the caption is {value!r:.60}, but sample "
                f"{entry.sample_id!r} was encoded from {entry.text!r:.60}. Name the files that "
                "were encoded with --captions."
            )
        return caption


def captions_path(root: Path) -> str:
    """captions.path of the run that made the dataset, from its config.yaml."""
    try:
        loaded = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
        return str(loaded["captions"]["path"])
    except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise InputError(
            f"{root / 'config.yaml'} does not say where the captions are ({error}): name them with "
            "--captions PATH, as captions.path was when the dataset was made."
        ) from error


def _examine(footer: Footer) -> tuple[CaptionFile, pa.Schema]:
    return CaptionFile(footer.source, footer.input, footer.group_starts()), footer.schema


def _unify(path: str, files: Sequence[CaptionFile], schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The columns of all files, in the order they are first met."""
    for file, schema in zip(files, schemas, strict=True):
        repeated = [name for name, n in Counter(schema.names).items() if n > 1]
        if repeated:
            raise InputError(f"{file.source} has several columns named {repeated}: rename them.")
    try:
        plain = [schema.remove_metadata() for schema in schemas]
        unified = pa.unify_schemas(plain, promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(
            f"the files of {path} disagree on a column's type: {error}. Convert one of them, or "
            "drop the column."
        ) from error
    fields = [pa.field(field.name, field.type) for field in unified]  # no field metadata either
    return pa.schema(fields)
