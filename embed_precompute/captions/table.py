"""The caption table: files checked as one, scanned once for the plan, read as samples.

Guarantees: what is wrong with the table as a whole (files, columns, types, ids) is an InputError
before the first sample.
Costs: `open` reads every file once for its digest, and an integer FPS column to its first null;
`scan` reads the id, integer and, for lists, text columns once and holds 8 bytes a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from embed_precompute.captions.files import (
    CaptionFile,
    InputFile,
    find_files,
    open_parquet,
    read_footers,
)
from embed_precompute.captions.reader import (
    READ_ROWS,
    CaptionReader,
    RowCursor,
    RowMap,
    column_type,
    entries_per_row,
    first_null,
    ids_of,
)
from embed_precompute.captions.recipes import (
    INTEGER,
    STRING,
    STRINGS,
    CaptionsConfig,
    Recipe,
    RequiredColumn,
    as_one,
)
from embed_precompute.errors import InputError

SCAN_ROWS = 16384
SUSPECTS = 1 << 16
"""Repeated hashes of ids that are compared in one pass, which bounds memory."""
RECIPE = "captions.recipe"

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


@dataclass(frozen=True)
class Scan:
    """What one pass over the table found; a limit makes it a smaller table."""

    num_rows: int
    num_samples: int
    last_row_samples: int | None
    """Samples of the last row that count where a limit cuts its list short; else None."""
    added_tokens: dict[str, dict[int, int]]
    """Integer column -> {value: rows}."""


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
        """Bound to the table's columns."""
        self.is_list = is_list
        self.integer_columns = integer_columns
        self.files: tuple[InputFile, ...] = tuple(file.input for file in row_map.files)
        self.num_rows = row_map.num_rows

    @classmethod
    def open(cls, config: CaptionsConfig, integer_columns: Sequence[str] = ()) -> CaptionTable:
        """Find the files and check them; `integer_columns` are the encoders' added_tokens."""
        recipe = as_one(config.recipe)
        needs = [RequiredColumn(config.text_column, "captions.text_column", (STRING, STRINGS))]
        if config.id_column is not None:
            advice = " Null uses row numbers as ids."
            id_types = (STRING, INTEGER)
            needs.append(RequiredColumn(config.id_column, "captions.id_column", id_types, advice))
        needs += recipe.needs(RECIPE)
        integers = tuple(dict.fromkeys(integer_columns))
        needs += [RequiredColumn(c, "an encoder's added_tokens", (INTEGER,)) for c in integers]
        found = read_footers(
            find_files(config.path), lambda file, schema: (file, _types(file, schema, needs))
        )
        row_map, types = RowMap([file for file, _ in found]), found[0][1]
        for file, others in found:
            for need in needs:
                if others[need.name] != types[need.name]:
                    raise InputError(
                        f"{file.source}: column {need.name!r} ({need.setting}) is "
                        f"{others[need.name]}, but it is {types[need.name]} in "
                        f"{row_map.files[0].source}: the files' schemas disagree. Convert one of "
                        "them, or point captions.path at files that agree."
                    )
        if row_map.num_rows == 0:
            raise InputError(
                f"captions.path {config.path!r} has no rows: {len(found)} parquet file(s), all "
                "empty. Expected at least one caption."
            )
        bound = recipe.bind(RECIPE, types, lambda column: _holds_null(row_map, column))
        return cls(config, row_map, bound, types[config.text_column] == STRINGS, integers)

    def in_order(self, order: Sequence[int]) -> CaptionTable:
        """This table with its files in another order, or some of them only; `order` holds their
        indexes."""
        files = [self.row_map.files[index] for index in order]
        return CaptionTable(
            self.config, RowMap(files), self.recipe, self.is_list, self.integer_columns
        )

    def scan(self, limit: int | None = None) -> Scan:
        """Check the ids, count samples and added tokens, of the first `limit` samples or all."""
        if limit is not None and limit < 1:
            raise InputError(f"--limit is {limit}: expected 1 or more.")
        id_column = self.config.id_column
        text_column = self.config.text_column if self.is_list else None
        names = [id_column, text_column, *self.integer_columns]
        columns = dict.fromkeys(name for name in names if name is not None)
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
        """Count the values of an added_tokens column."""
        numbers = array.to_numpy(zero_copy_only=False)
        bad = first_null(array) if array.null_count else int(np.argmax(numbers < 0))
        if array.null_count or numbers[bad] < 0:
            found = "null" if array.null_count else "below 0"
            raise InputError(
                f"{self.row_map.place(first + bad)}: column {column!r} (added_tokens) is {found}: "
                "expected the tokens that the video adds. Correct it or drop the row."
            )
        for value, count in zip(*np.unique(numbers, return_counts=True), strict=True):
            counts[int(value)] = counts.get(int(value), 0) + int(count)

    def schema(self) -> pa.Schema:
        """All columns of all files, in the order they are first met, with types that fit all."""
        schemas = []
        for file in self.row_map.files:
            parquet = open_parquet(file)
            schemas.append(parquet.schema_arrow.remove_metadata())
            parquet.close(force=True)
        try:
            unified = pa.unify_schemas(schemas, promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(
                f"the columns of {self.config.path} do not make one table: {error} Rename, "
                "convert or drop the column."
            ) from error
        return pa.schema([pa.field(field.name, field.type) for field in unified])

    def rows(self, columns: Sequence[str]) -> RowCursor:
        """A new cursor over the rows themselves; a file may lack some of the columns."""
        return RowCursor(self.row_map, columns, READ_ROWS)

    def reader(
        self, num_rows: int | None = None, last_row_samples: int | None = None
    ) -> CaptionReader:
        """A new reader of the first `num_rows` rows, as `scan` cut them."""
        return CaptionReader(
            self.config,
            self.row_map,
            self.recipe,
            is_list=self.is_list,
            num_rows=self.num_rows if num_rows is None else num_rows,
            last_row_samples=last_row_samples,
        )


# --- columns -----------------------------------------------------------------------------------


def _types(file: CaptionFile, schema: pa.Schema, needs: Sequence[RequiredColumn]) -> dict[str, str]:
    """The type of each required column. Raises InputError naming file, column and setting."""
    types: dict[str, str] = {}
    for need in needs:
        positions = schema.get_all_field_indices(need.name)
        if not positions:
            raise _missing(file, schema.names, need)
        if len(positions) > 1:
            raise InputError(
                f"{file.source} has {len(positions)} columns named {need.name!r} "
                f"({need.setting}): expected one. Rename the others."
            )
        arrow_type = schema.field(positions[0]).type
        types[need.name] = column_type(arrow_type)
        if types[need.name] not in need.types:
            raise InputError(
                f"{file.source}: column {need.name!r} ({need.setting}) has type {arrow_type}: "
                f"expected {' or '.join(need.types)}. Convert the column, or name another in "
                f"{need.setting}.{need.advice}"
            )
    return types


def _missing(file: CaptionFile, names: Sequence[str], need: RequiredColumn) -> InputError:
    lowered = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(need.name.lower(), lowered, n=1)
    hint = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return InputError(
        f"{file.source} has no column {need.name!r} ({need.setting}).{hint} Its columns: "
        f"{shown}. Set {need.setting} to one of them.{need.advice}"
    )


def _holds_null(row_map: RowMap, column: str) -> bool:
    """Whether a column holds a null anywhere; it is read up to the first."""
    cursor = RowCursor(row_map, [column], SCAN_ROWS)
    try:
        return any(batch.column(0).null_count for _, batch in cursor.batches(0, row_map.num_rows))
    finally:
        cursor.close()


# --- ids ---------------------------------------------------------------------------------------


class IdCheck:
    """Every id is there, is UTF-8 and is unique. Feed every batch in row order, then `finish`.

    Equal ids have equal hashes, so no duplicate is missed. Rows of equal hashes are read again and
    their ids compared, so none is reported that is not there.
    """

    def __init__(self, row_map: RowMap, column: str, num_rows: int) -> None:
        self._map = row_map
        self._column = column
        self._hashes: Hashes = np.empty(num_rows, np.uint64)
        self._num_rows = 0

    def add(self, first_row: int, array: Any) -> None:
        try:
            array.validate(full=True)
            is_sound = array.null_count == 0
        except pa.ArrowInvalid:
            is_sound = False
        if not is_sound:
            ids_of(array, self._column, self._map, first_row)  # raises, naming the row
        end = self._num_rows + len(array)
        self._hashes[self._num_rows : end] = _hashed(array)
        self._num_rows = end

    def finish(self) -> None:
        hashes = self._hashes[: self._num_rows]
        hashes.sort()
        repeats = hashes[1:][hashes[1:] == hashes[:-1]]
        suspects = np.unique(repeats)
        for i in range(0, len(suspects), SUSPECTS):
            self._compare(suspects[i : i + SUSPECTS], len(repeats))

    def _compare(self, suspects: Hashes, num_repeats: int) -> None:
        """Raise at the first row whose id, not only its hash, was there before."""
        cursor = RowCursor(self._map, [self._column], SCAN_ROWS)
        seen: dict[str, int] = {}
        for first, batch in cursor.batches(0, self._num_rows):
            array = batch.column(0)
            rows = np.flatnonzero(np.isin(_hashed(array), suspects))
            ids = ids_of(array.take(pa.array(rows)), self._column, self._map, first)
            for row, sample_id in zip((first + rows).tolist(), ids, strict=True):
                if sample_id in seen:
                    raise InputError(
                        f"{self._map.place(row)}: column {self._column!r} repeats id "
                        f"{sample_id!r} of {self._map.place(seen[sample_id])}; {num_repeats} rows "
                        "in all repeat an id. Ids must be unique: make them so, or set "
                        "captions.id_column to null to use row numbers."
                    )
                seen[sample_id] = row
        cursor.close()


def _hashed(array: Any) -> Hashes:
    """An integer is its own hash; a string's is XXH3-64 of its bytes."""
    if pa.types.is_integer(array.type):
        wide = np.uint64 if pa.types.is_unsigned_integer(array.type) else np.int64
        return array.to_numpy(zero_copy_only=False).astype(wide).view(np.uint64)  # type: ignore[no-any-return]
    stored = array.cast(pa.binary()).to_numpy(zero_copy_only=False).tolist()
    return np.fromiter(map(xxhash.xxh3_64_intdigest, stored), np.uint64, len(array))
