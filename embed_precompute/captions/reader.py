"""Rows of the caption table as Arrow batches, and as samples.

Guarantees: rows come in plan order. Every row is at least one sample, with a status of its own
where there is nothing to encode; the samples of a row depend on that row and the configuration
alone. Text that is not UTF-8 is a status; damage of a file is an InputError naming its row group.
Costs: one open file, one batch and a 1 MiB window per column, for any number of rows. A row group
is decoded at most once as long as rows are read in ascending order; a range that starts inside a
row group decodes that group from its first row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_precompute.captions.files import CaptionFile, open_rows
from embed_precompute.captions.recipes import (
    BOOLEAN,
    DECIMAL,
    FLOAT,
    INTEGER,
    STRING,
    STRINGS,
    CaptionsConfig,
    Problem,
    Recipe,
    make_normalizer,
)
from embed_precompute.errors import ConflictError, InputError, one_line
from embed_precompute.samples import Sample, Status

BATCH_BYTES = 4 << 20
"""Decoded bytes a batch aims at."""
PROBE_ROWS = 16
"""Rows that are read first, to see how wide they are."""
READ_ROWS = 2048
MAX_CAPTION_CHARS = 1 << 20
"""More is no caption: an encoder takes a few hundred tokens, and tokenising takes many times the
text's memory."""


# --- rows --------------------------------------------------------------------------------------


class RowMap:
    """Global row numbers to files: row 0 is the first row of the first file."""

    def __init__(self, files: Sequence[CaptionFile]) -> None:
        self.files = files
        self._starts = np.cumsum([0, *(file.input.rows for file in files)], dtype=np.int64)
        self.num_rows = int(self._starts[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the file, row within it)."""
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return index, row - int(self._starts[index])

    def place(self, row: int) -> str:
        """How messages name a row."""
        index, local = self.locate(row)
        return f"{self.files[index].source}, row {local} (rows count from 0)"


class RowCursor:
    """Batches of `columns` for any range of global rows."""

    def __init__(self, row_map: RowMap, columns: Sequence[str], batch_rows: int) -> None:
        self._map = row_map
        self._columns = list(columns)
        self._batch_rows = batch_rows
        self._row_bytes = 0.0  # decoded bytes per row of the latest batch; 0 before the first
        self._opened: Any = None
        self.close()

    def batches(self, first_row: int, num_rows: int) -> Iterator[tuple[int, Any]]:
        """(global first row, record batch) that cover the rows in order, none across files."""
        row, end = first_row, first_row + num_rows
        while row < end:
            if not 0 <= row - self._batch_start < len(self._batch):
                self._seek(row)
            offset = row - self._batch_start
            piece = self._batch.slice(offset, min(len(self._batch) - offset, end - row))
            yield row, piece
            row += len(piece)

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close(force=True)
        self._opened, self._file_index, self._group = None, -1, -1
        self._stream: Iterator[Any] = iter(())
        self._batch: Any = ()
        self._batch_start = 0
        self._next_row = 0  # global row the stream gives next
        self._stream_end = 0  # global row after the stream's row group

    def _seek(self, row: int) -> None:
        """Make the current batch the one that holds `row`."""
        if not self._next_row <= row < self._stream_end:
            self._open_group(row)
        while self._next_row <= row:
            self._batch, self._batch_start = self._next_of(self._stream), self._next_row
            self._row_bytes = self._batch.nbytes / len(self._batch)
            self._next_row += len(self._batch)

    def _open_group(self, row: int) -> None:
        index, local = self._map.locate(row)
        file = self._map.files[index]
        if index != self._file_index:
            self.close()
            self._opened, self._file_index = open_rows(file), index
        self._group = int(np.searchsorted(file.group_starts, local, side="right")) - 1
        start, end = (int(n) for n in file.group_starts[self._group : self._group + 2])
        self._next_row, self._stream_end = row - local + start, row - local + end
        self._batch = ()
        if self._row_bytes == 0:
            probe = self._next_of(self._stream_group(PROBE_ROWS))
            self._row_bytes = probe.nbytes / len(probe)
        # Decoded bytes decide: the sizes in the footer count a repeated value once.
        fitting = int(BATCH_BYTES / max(1, self._row_bytes))
        self._stream = self._stream_group(max(1, min(self._batch_rows, fitting)))

    def _stream_group(self, batch_rows: int) -> Iterator[Any]:
        options = {"row_groups": [self._group], "columns": self._columns, "use_threads": False}
        batches: Iterator[Any] = self._opened.iter_batches(batch_rows, **options)
        return batches

    def _next_of(self, stream: Iterator[Any]) -> Any:
        try:
            batch = next(stream, None)
        except ConflictError:
            raise
        except Exception as error:  # a library's own errors: damage, or a network's
            raise self._damage(one_line(error)) from error
        if not batch or self._next_row + len(batch) > self._stream_end:
            raise self._damage("it does not have the rows that its footer promises")
        return batch

    def _damage(self, reason: str) -> InputError:
        file = self._map.files[self._file_index]
        first, end = (int(n) for n in file.group_starts[self._group : self._group + 2])
        row = end - (self._stream_end - self._next_row)
        return InputError(
            f"{file.source}: row group {self._group} (rows {first} to {end - 1}) is damaged, "
            f"columns {', '.join(map(repr, self._columns))} cannot be read from row {row} on: "
            f"{reason}. Copy or write the file again; what is already done stays."
        )


# --- values ------------------------------------------------------------------------------------


def column_type(arrow_type: Any) -> str:
    """What recipes and messages call an Arrow type; its own name where captions can't use it."""
    if pa.types.is_list(arrow_type) and pa.types.is_string(arrow_type.value_type):
        return STRINGS
    known = (
        (pa.types.is_string, STRING),
        (pa.types.is_integer, INTEGER),
        (pa.types.is_floating, FLOAT),
        (pa.types.is_boolean, BOOLEAN),
        (pa.types.is_decimal, DECIMAL),
    )
    return next((name for test, name in known if test(arrow_type)), str(arrow_type))


def values(array: Any, column: str) -> list[Any]:
    """Values as Python objects; None is null, a Problem says where a string's UTF-8 breaks."""
    if pa.types.is_float16(array.type):
        array = array.cast(pa.float32())
    try:
        found: list[Any] = array.to_pylist()
        return found
    except UnicodeDecodeError:
        return [_decoded(value, column) for value in array.cast(pa.binary()).to_pylist()]


def _decoded(value: bytes | None, column: str) -> str | Problem | None:
    try:
        return None if value is None else value.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"column {column!r} is not UTF-8 at byte {error.start} ({error.reason})"
        return Problem(Status.INVALID_TEXT, where)


def entries_per_row(array: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Captions of each row of a list column; 0 for an empty or a null list."""
    lengths = pc.list_value_length(array).fill_null(0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)


def ids_of(array: Any, column: str, row_map: RowMap, first_row: int) -> list[str]:
    """A batch's sample ids; InputError naming the row of a null or one that is not UTF-8."""
    if array.null_count:
        raise InputError(
            f"{row_map.place(first_row + first_null(array))}: column {column!r} is null: every "
            "row needs an id. Fill it in, drop the row, or set captions.id_column to null to use "
            "row numbers."
        )
    ids = values(array, column)
    for i, value in enumerate(ids):
        if isinstance(value, Problem):
            raise InputError(
                f"{row_map.place(first_row + i)}: {value.error}: ids must be UTF-8. Repair the "
                "id, or set captions.id_column to another column."
            )
    return list(map(str, ids))


def first_null(array: Any) -> int:
    """Position of the first null of an array that has one."""
    return int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))


# --- samples -----------------------------------------------------------------------------------


class CaptionReader:
    """Samples of any range of rows, cheapest in ascending order; for one thread."""

    def __init__(
        self,
        config: CaptionsConfig,
        row_map: RowMap,
        recipe: Recipe,
        *,
        is_list: bool,
        num_rows: int,
        last_row_samples: int | None,
    ) -> None:
        self.noted: Counter[str] = Counter()
        """What was read and may surprise: captions that are empty, rows where a column of the
        recipe is null, and what `note_unknown` was told."""
        self.first_noted: dict[str, str] = {}
        """Where the first of each of them is, and of the samples of each status but ok."""
        text = row_map.files[0].text
        self._missing = "null" if text is None or text.delimiter is None else "empty"
        """What a caption that is not there is called: CSV has no null."""
        self._config = config
        self._map = row_map
        self._recipe = recipe
        self._normalize = make_normalizer(config.normalize)
        self._num_rows = num_rows
        self._last_row_samples = last_row_samples
        names = [*config.text_columns, config.id_column, *recipe.columns]
        columns = dict.fromkeys(name for name in names if name is not None)
        self._cursor = RowCursor(row_map, list(columns), READ_ROWS)
        self._convert: Callable[[int, Any], Iterator[Sample]]
        if is_list:
            self._convert = self._list_samples
        elif isinstance(config.text_column, str):
            self._convert = self._text_samples
        else:
            self._convert = self._column_samples

    def read(self, first_row: int, num_rows: int) -> list[Sample]:
        """All samples of these rows, in order."""
        if first_row < 0 or first_row + num_rows > self._num_rows:
            raise ValueError(f"rows {first_row}+{num_rows} of {self._num_rows}")
        samples: list[Sample] = []
        for first, batch in self._cursor.batches(first_row, num_rows):
            samples.extend(self._convert(first, batch))
        self.check(samples)
        return samples

    def check(self, samples: Sequence[Sample]) -> None:
        """Note the first sample of each status but ok. InputError if there is to be none."""
        for sample in samples:
            if sample.status is not Status.OK and sample.status.label not in self.first_noted:
                where = f"{self._place(sample.row, sample.sample_id)}: {sample.error}"
                self.first_noted[sample.status.label] = where
        if self._config.on_bad_text == "fail":
            for sample in samples:
                if sample.status is not Status.OK:
                    raise InputError(
                        f"{self._map.place(sample.row)}: {sample.error} (sample "
                        f"{sample.sample_id!r}). Repair the row, or set captions.on_bad_text to "
                        "record to give such samples a status and go on."
                    )

    def close(self) -> None:
        self._cursor.close()

    def _text_samples(self, first: int, batch: Any) -> Iterator[Sample]:
        (column,) = self._config.text_columns
        captions = values(batch.column(column), column)
        for i, (sample_id, row_values) in enumerate(self._fields(first, batch)):
            yield self._sample(sample_id, first + i, captions[i], row_values, column)

    def _column_samples(self, first: int, batch: Any) -> Iterator[Sample]:
        columns = self._config.text_columns
        captions = [values(batch.column(column), column) for column in columns]
        for i, (row_id, row_values) in enumerate(self._fields(first, batch)):
            row = first + i
            most = self._last_row_samples if row == self._num_rows - 1 else None
            for column, texts in list(zip(columns, captions, strict=True))[:most]:
                yield self._sample(f"{row_id}#{column}", row, texts[i], row_values, column)

    def _list_samples(self, first: int, batch: Any) -> Iterator[Sample]:
        (name,) = self._config.text_columns
        column = batch.column(name)
        lengths = entries_per_row(column).tolist()
        nulls = column.is_null().to_pylist()
        captions = iter(values(column.flatten(), name))
        for i, (row_id, row_values) in enumerate(self._fields(first, batch)):
            row = first + i
            entries: list[str | Problem | None] = list(islice(captions, lengths[i]))
            if nulls[i]:
                entries = [None]
            elif not entries:
                entries = [Problem(Status.EMPTY_LIST, f"column {name!r} is an empty list")]
            if row == self._num_rows - 1:
                entries = entries[: self._last_row_samples]
            for k, caption in enumerate(entries):
                if caption is None and not nulls[i]:
                    caption = Problem(Status.NULL_TEXT, f"entry {k} of column {name!r} is null")
                yield self._sample(f"{row_id}#{k}", row, caption, row_values, name)

    def _sample(
        self,
        sample_id: str,
        row: int,
        text: str | Problem | None,
        row_values: Sequence[Any],
        column: str,
    ) -> Sample:
        """The sample of a caption as it is read: normalised, and in its recipe."""
        if text is None:
            text = Problem(Status.NULL_TEXT, f"column {column!r} is {self._missing}")
        if isinstance(text, str) and self._normalize is not None:
            text = self._normalize(text)
        if text == "":
            self._note("empty captions", self._place(row, sample_id))
            if self._config.on_bad_text == "fail":
                text = Problem(Status.INVALID_TEXT, f"column {column!r} is empty")
        if isinstance(text, str):
            text = self._recipe.render(text, row_values)
        if isinstance(text, str) and len(text) > MAX_CAPTION_CHARS:
            long = f"the caption has {len(text)} characters, more than {MAX_CAPTION_CHARS}"
            text = Problem(Status.INVALID_TEXT, long)
        if isinstance(text, Problem):
            return Sample(sample_id, row, None, text.status, text.error)
        return Sample(sample_id, row, text)

    def _fields(self, first: int, batch: Any) -> Iterator[tuple[str, Sequence[Any]]]:
        """The id of each row, and the values that its recipe wants."""
        column = self._config.id_column
        if column is None:
            ids = list(map(str, range(first, first + len(batch))))
        else:
            ids = ids_of(batch.column(column), column, self._map, first)
        return zip(ids, self._recipe_rows(first, batch), strict=True)

    def _recipe_rows(self, first: int, batch: Any) -> Sequence[Sequence[Any]]:
        for name in self._recipe.columns:
            nulls = pc.is_null(batch.column(name), nan_is_null=True).to_numpy(zero_copy_only=False)
            if num_nulls := int(nulls.sum()):
                row = first + int(nulls.argmax())
                self._note(f"rows where {name} is null", self._map.place(row), num_nulls)
        columns = [values(batch.column(name), name) for name in self._recipe.columns]
        return list(zip(*columns, strict=True)) if columns else [()] * len(batch)

    def note_unknown(self, encoder: str, samples: Sequence[Sample], unknown: Sequence[int]) -> None:
        """Count the captions of which an encoder's tokenizer does not know all. `unknown`: for each
        sample, the number of its unknown tokens."""
        found = [sample for sample, count in zip(samples, unknown, strict=True) if count]
        if found:
            place = self._place(found[0].row, found[0].sample_id)
            self._note(f"captions with words unknown to {encoder}", place, len(found))

    def _place(self, row: int, sample_id: str) -> str:
        return f"{self._map.place(row)}, sample {sample_id!r}"

    def _note(self, what: str, place: str, count: int = 1) -> None:
        self.noted[what] += count
        self.first_noted.setdefault(what, place)
