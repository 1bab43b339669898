"""The caption table: files checked as one, scanned once for the plan, read as samples.

Guarantees: whatever is wrong with the table as a whole (files, columns, types, ids) is an
InputError before the first sample; from then on every row is at least one sample, with a status of
its own when there is nothing to encode, and the samples of a row depend on that row and the
configuration alone (of an integer FPS column: also on whether it holds a null anywhere, see
`recipes`).
Costs: `open` reads footers only (and one column where its null counts are missing and matter);
`scan` reads the id, integer and, for lists, text columns once and holds 8 bytes a row; a reader
holds one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import numpy as np

from embed_precompute.captions.columns import (
    INTEGER,
    STRING,
    STRINGS,
    Need,
    Problem,
    check_agreement,
    check_columns,
    entries_per_row,
    first_null,
    strings,
    values,
)
from embed_precompute.captions.files import Footer, InputFile, Source, find_files, read_footers
from embed_precompute.captions.ids import IdCheck, id_strings
from embed_precompute.captions.recipes import (
    PlainRecipe,
    Recipe,
    make_normalizer,
    make_recipe,
    opensora_fps_column,
    recipe_needs,
)
from embed_precompute.captions.rows import (
    MAX_PAGE_BYTES,
    CaptionFile,
    RowCursor,
    RowMap,
    chunks_of,
    starts_of,
)
from embed_precompute.captions.settings import CaptionsConfig
from embed_precompute.errors import InputError
from embed_precompute.parquet.chunks import Chunk
from embed_precompute.samples import Sample, Status

MAX_CAPTION_CHARS = 1 << 20
"""More is no caption: an encoder takes a few hundred tokens, and tokenising takes many times the
text's memory."""
PAGE_ROWS = 1024
"""A writer looks at a page's size every so many rows: captions so wide that a page would have more
than MAX_PAGE_BYTES are no captions."""
READ_ROWS = 2048
SCAN_ROWS = 16384
MAX_ADDED_TOKENS = 1 << 16
"""Distinct values of an added_tokens column; buckets are few, so more means the wrong column."""


@dataclass(frozen=True)
class Scan:
    """What one pass over the table found; a limit makes it a smaller table."""

    num_rows: int
    num_samples: int
    last_row_samples: int | None
    """Samples taken of the last row when a limit cuts its list short; else None."""
    added_tokens: dict[str, dict[int, int]]
    """Integer column -> {value: rows}."""


@dataclass(frozen=True)
class _FileFacts:
    file: CaptionFile
    families: dict[str, str]
    has_nulls: bool | None
    """Whether the FPS column holds a null; None where the footer does not say."""


class CaptionTable:
    """All files of `captions.path` as one table."""

    def __init__(
        self,
        config: CaptionsConfig,
        row_map: RowMap,
        recipe: Recipe,
        is_list: bool,
        integer_columns: tuple[str, ...],
    ) -> None:
        self.config = config
        self.row_map = row_map
        self.recipe = recipe
        self.normalize = make_normalizer(config.normalize)
        self.is_list = is_list
        self.integer_columns = integer_columns
        self.files: tuple[InputFile, ...] = tuple(file.input for file in row_map.files)
        self.num_rows = row_map.num_rows

    @classmethod
    def open(cls, config: CaptionsConfig, integer_columns: Sequence[str] = ()) -> CaptionTable:
        """Find the files and check them; `integer_columns` are the encoders' added_tokens."""
        integers = tuple(dict.fromkeys(integer_columns))
        needs = _needs(config, integers)
        fps_column = opensora_fps_column(config.recipe)
        facts = read_footers(find_files(config.path), lambda f: _examine(f, needs, fps_column))
        families = [fact.families for fact in facts]
        check_agreement([fact.file.source for fact in facts], families, needs)
        row_map = RowMap([fact.file for fact in facts])
        if row_map.num_rows == 0:
            raise InputError(
                f"captions.path {config.path!r} has no rows: {len(facts)} parquet file(s), all "
                "empty. Expected at least one caption."
            )
        has_nulls = fps_column is not None and families[0][fps_column] == INTEGER
        has_nulls = has_nulls and _any_null(facts, str(fps_column))
        recipe = make_recipe(config.recipe, families[0], has_nulls)
        is_list = families[0][config.text_column] == STRINGS
        return cls(config, row_map, recipe, is_list, integers)

    def resolved_recipe(self) -> dict[str, object]:
        """The recipe as JSON, with what the columns decided: a part of the fingerprint."""
        return self.recipe.resolved()

    def scan(self, limit: int | None = None) -> Scan:
        """Check the ids, count samples and added tokens, of the first `limit` samples or all."""
        if limit is not None and limit < 1:
            raise InputError(f"--limit is {limit}: expected 1 or more.")
        id_column = self.config.id_column
        text_columns = [self.config.text_column] if self.is_list else []
        columns = dict.fromkeys(
            [*([id_column] if id_column is not None else []), *text_columns, *self.integer_columns]
        )
        most = self.num_rows if limit is None else min(limit, self.num_rows)
        counts: dict[str, dict[int, int]] = {name: {} for name in self.integer_columns}
        if not columns:
            return Scan(most, most, None, counts)
        ids = None if id_column is None else IdCheck(self.row_map, id_column, most)
        num_rows = num_samples = 0
        last_row_samples = None
        cursor = RowCursor(self.row_map, list(columns), SCAN_ROWS)
        for first, batch in cursor.batches(0, most):
            left = None if limit is None else limit - num_samples
            rows, samples, last_row_samples = self._count(batch, left)
            num_rows += rows
            num_samples += samples
            if ids is not None:
                ids.add(first, batch.column(id_column).slice(0, rows))
            for name in self.integer_columns:
                self._tally(counts[name], first, batch.column(name).slice(0, rows), name)
            if num_samples == limit:
                break
        cursor.close()
        if ids is not None:
            ids.finish()
        return Scan(num_rows, num_samples, last_row_samples, counts)

    def _count(self, batch: Any, left: int | None) -> tuple[int, int, int | None]:
        """(rows, samples, samples of the last row if it is cut) of at most `left` samples."""
        if not self.is_list:
            return len(batch), len(batch), None
        per_row = np.maximum(entries_per_row(batch.column(self.config.text_column)), 1)
        ends = np.cumsum(per_row)
        if left is None or ends[-1] <= left:
            return len(batch), int(ends[-1]), None
        rows = int(np.searchsorted(ends, left)) + 1
        cut = int(per_row[rows - 1] - (ends[rows - 1] - left))
        return rows, left, cut if cut < per_row[rows - 1] else None

    def _tally(self, counts: dict[int, int], first: int, array: Any, column: str) -> None:
        numbers = integers(array, column, self.row_map, first)
        found, rows = np.unique(np.asarray(numbers, object), return_counts=True)
        for value, count in zip(found.tolist(), rows.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + count
        if len(counts) > MAX_ADDED_TOKENS:
            raise InputError(
                f"column {column!r} (added_tokens) has more than {MAX_ADDED_TOKENS} different "
                f"values by {self.row_map.place(first)}: expected the tokens of a few video "
                "buckets. Name the column that holds them."
            )

    def reader(
        self, num_rows: int | None = None, last_row_samples: int | None = None
    ) -> CaptionReader:
        """A new cursor over the first `num_rows` rows, as `scan` cut them."""
        rows = self.num_rows if num_rows is None else num_rows
        if not 0 <= rows <= self.num_rows:
            raise ValueError(f"{rows} rows of a table of {self.num_rows}")
        return CaptionReader(self, rows, last_row_samples)


class CaptionReader:
    """Samples of any range of rows, cheapest in ascending order; for one thread."""

    def __init__(self, table: CaptionTable, num_rows: int, last_row_samples: int | None) -> None:
        self._table = table
        self._config = table.config
        self._num_rows = num_rows
        self._last_row_samples = last_row_samples
        names = [self._config.text_column, self._config.id_column]
        columns = dict.fromkeys([*filter(None, names), *table.recipe.columns])
        self._cursor = RowCursor(table.row_map, list(columns), READ_ROWS)
        self._as_it_is = isinstance(table.recipe, PlainRecipe) and table.normalize is None
        self._convert: Callable[[int, Any], Iterator[Sample]]
        self._convert = self._list_samples if table.is_list else self._text_samples

    def read(self, first_row: int, num_rows: int) -> list[Sample]:
        """All samples of these rows, in order."""
        if first_row < 0 or first_row + num_rows > self._num_rows:
            raise ValueError(f"rows {first_row}+{num_rows} of {self._num_rows}")
        samples: list[Sample] = []
        for first, batch in self._cursor.batches(first_row, num_rows):
            samples.extend(self._convert(first, batch))
        if self._config.on_bad_text == "fail":
            self._refuse_bad(samples)
        return samples

    def close(self) -> None:
        self._cursor.close()

    def _text_samples(self, first: int, batch: Any) -> Iterator[Sample]:
        column = batch.column(self._config.text_column)
        captions = strings(column, self._config.text_column)
        ids, rows = self._ids(first, batch), range(first, first + len(batch))
        whole = self._as_it_is and set(map(type, captions)) == {str}
        if whole and max(len(str(caption)) for caption in captions) <= MAX_CAPTION_CHARS:
            return map(Sample, ids, rows, cast("list[str]", captions))
        return map(self._sample, ids, rows, captions, self._recipe_rows(batch))

    def _list_samples(self, first: int, batch: Any) -> Iterator[Sample]:
        name = self._config.text_column
        column = batch.column(name)
        lengths = entries_per_row(column).tolist()
        nulls = column.is_null().to_pylist()
        captions = iter(strings(column.flatten(), name))
        fields = zip(self._ids(first, batch), self._recipe_rows(batch), strict=True)
        for i, (row_id, row_values) in enumerate(fields):
            row = first + i
            entries: list[str | Problem | None] = list(islice(captions, lengths[i]))
            if nulls[i]:
                entries = [None]
            elif not entries:
                entries = [Problem(Status.EMPTY_LIST, f"column {name!r} is an empty list")]
            if row == self._num_rows - 1:
                entries = entries[: self._last_row_samples]
            for k, caption in enumerate(entries):
                sample_id = f"{row_id}#{k}"
                if self._as_it_is and type(caption) is str and len(caption) <= MAX_CAPTION_CHARS:
                    yield Sample(sample_id, row, caption)
                else:
                    yield self._sample(sample_id, row, caption, row_values)

    def _sample(
        self,
        sample_id: str,
        row: int,
        caption: str | Problem | None,
        row_values: Sequence[Any],
    ) -> Sample:
        text: str | Problem
        if caption is None:
            null = f"column {self._config.text_column!r} is null"
            text = Problem(Status.NULL_TEXT, null)
        elif isinstance(caption, Problem):
            text = caption
        else:
            if self._table.normalize is not None:
                caption = self._table.normalize(caption)
            text = self._table.recipe.render(caption, row_values)
            if isinstance(text, str) and len(text) > MAX_CAPTION_CHARS:
                long = f"the caption has {len(text)} characters, more than {MAX_CAPTION_CHARS}"
                text = Problem(Status.INVALID_TEXT, long)
        if isinstance(text, Problem):
            return Sample(sample_id, row, None, text.status, text.error)
        return Sample(sample_id, row, text)

    def _ids(self, first: int, batch: Any) -> list[str]:
        column = self._config.id_column
        if column is None:
            return list(map(str, range(first, first + len(batch))))
        return id_strings(batch.column(column), column, self._table.row_map, first)

    def _recipe_rows(self, batch: Any) -> Sequence[Sequence[Any]]:
        columns = [values(batch.column(name), name) for name in self._table.recipe.columns]
        return list(zip(*columns, strict=True)) if columns else [()] * len(batch)

    def _refuse_bad(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if sample.status is not Status.OK:
                raise InputError(
                    f"{self._table.row_map.place(sample.row)}: {sample.error} (sample "
                    f"{sample.sample_id!r}). Repair the row, or set captions.on_bad_text to record "
                    "to give such samples a status and go on."
                )


def integers(array: Any, column: str, row_map: RowMap, first_row: int) -> list[int]:
    """A batch of an added_tokens column; InputError naming the row of a null or negative number."""
    if array.null_count:
        place = row_map.place(first_row + first_null(array))
        raise InputError(
            f"{place}: column {column!r} (added_tokens) is null: expected the tokens that the "
            "video adds. Fill it in or drop the row."
        )
    numbers: list[int] = array.to_numpy(zero_copy_only=False).tolist()
    if numbers and min(numbers) < 0:
        row = first_row + next(i for i, number in enumerate(numbers) if number < 0)
        raise InputError(
            f"{row_map.place(row)}: column {column!r} (added_tokens) is below 0: expected the "
            "tokens that the video adds. Correct it."
        )
    return numbers


def _needs(config: CaptionsConfig, integer_columns: Sequence[str]) -> list[Need]:
    needs = [Need(config.text_column, "captions.text_column", (STRING, STRINGS))]
    if config.id_column is not None:
        hint = " Null uses row numbers as ids."
        needs.append(Need(config.id_column, "captions.id_column", (STRING, INTEGER), hint))
    needs += recipe_needs(config.recipe)
    needs += [Need(name, "an encoder's added_tokens", (INTEGER,)) for name in integer_columns]
    return needs


def _examine(footer: Footer, needs: Sequence[Need], fps_column: str | None) -> _FileFacts:
    """What is kept of a file: the footer itself may be megabytes."""
    families = check_columns(footer, needs)
    metadata = footer.metadata
    num_rows = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    starts = starts_of(num_rows)
    if int(starts[-1]) != footer.input.rows or min(num_rows, default=0) < 0:
        raise InputError(
            f"{footer.source} has a damaged parquet footer: its row groups have {starts[-1]} rows, "
            f"the file {footer.input.rows}. Copy or write it again."
        )
    groups = chunks_of(footer.source, footer.thrift, [need.column for need in needs], len(num_rows))
    _refuse_wide(footer.source, groups, num_rows)
    has_nulls = None
    if fps_column is not None and families[fps_column] == INTEGER:
        has_nulls = _footer_nulls(groups, fps_column)
    return _FileFacts(CaptionFile(footer.source, footer.input, starts), families, has_nulls)


def _refuse_wide(
    source: Source, groups: Sequence[Sequence[Chunk]], num_rows: Sequence[int]
) -> None:
    """Before anything is planned, by what the footer claims; a cursor looks at the pages."""
    for number, (chunks, rows) in enumerate(zip(groups, num_rows, strict=True)):
        for chunk in chunks:
            if chunk.num_bytes * min(PAGE_ROWS, rows) // max(1, rows) > MAX_PAGE_BYTES:
                raise InputError(
                    f"{source}: column {chunk.leaf.path!r} of row group {number} has "
                    f"{chunk.num_bytes} bytes in {rows} rows: expected at most {MAX_PAGE_BYTES} "
                    f"in {PAGE_ROWS}. Name the column of the captions, or write the file without "
                    "such values."
                )


def _footer_nulls(groups: Sequence[Sequence[Chunk]], column: str) -> bool | None:
    """Whether the column holds a null, by the statistics; None if a row group has none."""
    chunks = [chunk for group in groups for chunk in group]
    counts = [chunk.null_count for chunk in chunks if chunk.leaf.path == column]
    if any(counts):
        return True
    return None if None in counts else False


def _any_null(facts: Sequence[_FileFacts], column: str) -> bool:
    """Over all files; a file whose footer does not say is read, up to its first null."""
    if any(fact.has_nulls for fact in facts):
        return True
    for fact in facts:
        if fact.has_nulls is None:
            cursor = RowCursor(RowMap([fact.file]), [column], SCAN_ROWS)
            batches = cursor.batches(0, fact.file.input.rows)
            found = any(batch.column(0).null_count for _, batch in batches)
            cursor.close()
            if found:
                return True
    return False
