"""The caption table: files checked as one, scanned once for the plan, read as samples.

Guarantees: what is wrong with the table as a whole (files, columns, types, ids) is an InputError
before the first sample.
Costs: `open` reads every file once for its digest, and an integer FPS column of parquet to its
first null; `scan` reads the id, integer and, for lists, text columns once and holds 8 bytes a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from embed_precompute.captions.files import (
    CaptionFile,
    InputFile,
    find_files,
    open_rows,
    read_footers,
    refuse_output_inside,
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
from embed_precompute.captions.text_tables import as_one_table, type_alone
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.steps import Work, steps

SCAN_ROWS = 16384
SUSPECTS = 1 << 16
"""Repeated hashes of ids that are compared in one pass, which bounds memory."""
RECIPE = "captions.recipe"
AUTO_IDS = ("id", "sample_id", "path")
"""The columns of which `id_column: auto` takes the first that there is."""

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
    def open(
        cls,
        config: CaptionsConfig,
        integer_columns: Sequence[str] = (),
        output: Path | None = None,
        *,
        digest: bool = True,
    ) -> CaptionTable:
        """Find the files and check them; `integer_columns` are the encoders' added_tokens.

        The table's own `config` names the id column that `auto` stands for. `output`: the folder of
        the dataset, which must not lie among the captions. `digest` as in `read_footers`: a plan
        needs it.
        """
        if output is not None:
            refuse_output_inside(config.path, output)
        recipe = as_one(config.recipe)
        integers = tuple(dict.fromkeys(integer_columns))

        def examine(file: CaptionFile, schema: pa.Schema) -> _Examined:
            id_column = _id_column(config, file, schema.names)
            needs = _needs(config, id_column, recipe, integers)
            return _Examined(file, id_column, needs, _types(file, schema, needs))

        sources = find_files(config.path)
        if sources[0].format == "parquet":
            found = read_footers(sources, examine, digest=digest)
        else:  # the types of a column are known when all files are
            files = read_footers(sources, lambda file, schema: (file, schema.names))
            if not any(names for _, names in files):
                raise _no_rows(config, len(files))
            ids = [_id_column(config, file, names) for file, names in files if names]
            strings = {*config.text_columns, *(name for name in ids if name is not None)}
            found = [examine(*typed) for typed in _typed([file for file, _ in files], strings)]
        first = found[0]
        row_map, types = RowMap([each.file for each in found]), first.types
        for each in found:
            if each.id_column != first.id_column:
                raise InputError(
                    f"{each.file.source} has no column {first.id_column!r}, in which "
                    f"{first.file.source} has its ids (captions.id_column auto): expected one "
                    "column for all files. Name it in captions.id_column, or rename it."
                )
            for need in each.needs:
                if each.types[need.name] != types[need.name]:
                    raise InputError(
                        f"{each.file.source}: column {need.name!r} ({need.setting}) is "
                        f"{each.types[need.name]}, but it is {types[need.name]} in "
                        f"{first.file.source}: the files' schemas disagree. Convert one of "
                        "them, or point captions.path at files that agree."
                    )
        if row_map.num_rows == 0:
            raise _no_rows(config, len(found))
        with Work("looking for nulls in a column of the recipe"):
            bound = recipe.bind(RECIPE, types, lambda column: _holds_null(row_map, column))
        config = replace(config, id_column=first.id_column)
        is_list = types[config.text_columns[0]] == STRINGS
        return cls(config, row_map, bound, is_list, integers)

    @classmethod
    def glance(cls, config: CaptionsConfig) -> CaptionTable | None:
        """The table by the footers of its files alone; None where it is not parquet."""
        is_parquet = find_files(config.path)[0].format == "parquet"
        return cls.open(config, digest=False) if is_parquet else None

    def in_order(self, order: Sequence[int]) -> CaptionTable:
        """This table with its files in another order, or some of them only; `order` holds their
        indexes."""
        files = [self.row_map.files[index] for index in order]
        return CaptionTable(
            self.config, RowMap(files), self.recipe, self.is_list, self.integer_columns
        )

    def refuse_other_types(self, num_files: int) -> None:
        """ConflictError where the files after the first `num_files` change the texts of these.

        A column of CSV or JSON Lines has one type in the whole table: beside `24.5`, `24` is 24.0.
        """
        indexes = [file.text for file in self.row_map.files if file.text is not None]
        own = {*self.config.text_columns, self.config.id_column}
        for name in set(self.recipe.columns) - own if indexes else ():
            alone, now = type_alone(indexes[:num_files], name), indexes[0].types[name]
            if alone not in (now, pa.null()):
                raise ConflictError(
                    f"column {name!r} (captions.recipe) is {now} with the files that were added, "
                    f"and was {alone} without them: captions that are encoded would have another "
                    "text. Write its values as in the earlier files, or make a dataset of its own "
                    "of the added files."
                )

    def scan(self, limit: int | None = None) -> Scan:
        """Check the ids, count samples and added tokens, of the first `limit` samples or all."""
        if limit is not None and limit < 1:
            raise InputError(f"--limit is {limit}: expected 1 or more.")
        id_column = self.config.id_column
        per_row = len(self.config.text_columns)
        listed = self.config.text_columns if self.is_list else ()
        names = [id_column, *listed, *self.integer_columns]
        columns = dict.fromkeys(name for name in names if name is not None)
        most = self.num_rows if limit is None else min(-(-limit // per_row), self.num_rows)
        counts: dict[str, dict[int, int]] = {name: {} for name in self.integer_columns}
        if not columns:
            samples = most * per_row if limit is None else min(limit, most * per_row)
            left = samples - (most - 1) * per_row
            return Scan(most, samples, left if left < per_row else None, counts)
        ids = None if id_column is None else IdCheck(self.row_map, id_column, most)
        num_rows = num_samples = 0
        last_row_samples = None
        cursor = RowCursor(self.row_map, list(columns), SCAN_ROWS)
        batches = cursor.batches(0, most)
        for first, batch in steps(batches, most, "reading ids", " rows", lambda each: len(each[1])):
            left_over = None if limit is None else limit - num_samples
            rows, samples, last_row_samples = self._count(batch, left_over)
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
            with Work("comparing ids"):
                ids.finish()
        return Scan(num_rows, num_samples, last_row_samples, counts)

    def _count(self, batch: Any, left: int | None) -> tuple[int, int, int | None]:
        """(rows, samples, samples of the last row if it is cut) of at most `left` samples."""
        if self.is_list:
            per_row = np.maximum(entries_per_row(batch.column(self.config.text_columns[0])), 1)
        else:
            per_row = np.full(len(batch), len(self.config.text_columns))
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
            opened = open_rows(file)
            schemas.append(opened.schema_arrow.remove_metadata())
            opened.close(force=True)
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


@dataclass(frozen=True)
class _Examined:
    """A file, and what of it the configuration needs."""

    file: CaptionFile
    id_column: str | None
    needs: list[RequiredColumn]
    types: dict[str, str]


def _no_rows(config: CaptionsConfig, num_files: int) -> InputError:
    return InputError(
        f"captions.path {config.path!r} has no rows: {num_files} file(s), all empty. Expected at "
        "least one caption."
    )


def _id_column(config: CaptionsConfig, file: CaptionFile, names: Sequence[str]) -> str | None:
    """The column that `captions.id_column` means in this file."""
    if config.id_column != "auto":
        return config.id_column
    found = next((name for name in AUTO_IDS if name in names), None)
    if found is None:
        hint = _hint(names, *AUTO_IDS, cutoff=0.9)
        raise InputError(
            f"{file.source} has none of the columns {', '.join(AUTO_IDS)} (captions.id_column "
            f"auto).{hint} Its columns: {_listed(names)}. Name the column with the ids in "
            "captions.id_column. Null uses row numbers as ids."
        )
    return found


def _needs(
    config: CaptionsConfig, id_column: str | None, recipe: Recipe, integers: Sequence[str]
) -> list[RequiredColumn]:
    captions = (STRING, STRINGS) if isinstance(config.text_column, str) else (STRING,)
    needs = [RequiredColumn(c, "captions.text_column", captions) for c in config.text_columns]
    if id_column is not None:
        advice = " Null uses row numbers as ids."
        needs.append(RequiredColumn(id_column, "captions.id_column", (STRING, INTEGER), advice))
    needs += recipe.needs(RECIPE)
    return needs + [RequiredColumn(c, "an encoder's added_tokens", (INTEGER,)) for c in integers]


def _typed(files: list[CaptionFile], strings: set[str]) -> list[tuple[CaptionFile, pa.Schema]]:
    """Text files, with one type for each column of the table."""
    indexes = as_one_table([file.text for file in files if file.text is not None], strings)
    pairs = zip(files, indexes, strict=True)
    return [(replace(file, text=index), index.schema) for file, index in pairs]


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
        expected = " or ".join(need.types)
        odd = None if file.text is None else file.text.odd.get(need.name)
        if types[need.name] in need.types and (odd is None or file.source.format != ".jsonl"):
            continue
        if odd is not None:
            row, value = odd
            raise InputError(
                f"{file.source}, row {row} (rows count from 0): column {need.name!r} "
                f"({need.setting}) holds {value!r:.80}: expected {expected} in all rows. Correct "
                f"the value, or name another column in {need.setting}.{need.advice}"
            )
        raise InputError(
            f"{file.source}: column {need.name!r} ({need.setting}) has type {arrow_type}: "
            f"expected {expected}. Convert the column, or name another in "
            f"{need.setting}.{need.advice}"
        )
    return types


def _missing(file: CaptionFile, names: Sequence[str], need: RequiredColumn) -> InputError:
    return InputError(
        f"{file.source} has no column {need.name!r} ({need.setting}).{_hint(names, need.name)} Its "
        f"columns: {_listed(names)}. Set {need.setting} to one of them.{need.advice}"
    )


def _hint(names: Sequence[str], *wanted: str, cutoff: float = 0.6) -> str:
    """What a message adds where none of the wanted columns is among the names."""
    if len(names) == 1 and (found := next((c for c in ";\t|" if c in names[0]), None)):
        return f" Its columns seem to be separated by {found!r}: write it with commas."
    lowered = {name.lower(): name for name in reversed(names)}
    near = [m for w in wanted for m in difflib.get_close_matches(w.lower(), lowered, 1, cutoff)]
    return f" Did you mean {lowered[near[0]]!r}?" if near else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def _holds_null(row_map: RowMap, column: str) -> bool:
    """Whether a column holds a null anywhere; of parquet it is read up to the first."""
    indexes = [file.text for file in row_map.files if file.text is not None]
    if indexes:
        return any(column in index.nullable for index in indexes)
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
