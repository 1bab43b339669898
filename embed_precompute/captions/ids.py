"""The check that every id is there, is UTF-8 and is unique.

Guarantees: a duplicate is found for certain (equal ids have equal hashes) and never alleged (rows
whose hashes meet are compared by the stored id in a second pass).
Costs: 8 bytes a row: one array of 64-bit hashes, sorted in place. The second pass runs only when
two hashes are equal and holds at most `SUSPECTS` of them at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from embed_precompute.captions.columns import (
    INTEGER,
    Problem,
    as_bytes,
    family,
    first_null,
    strings,
)
from embed_precompute.captions.rows import RowCursor, RowMap
from embed_precompute.errors import InputError

SUSPECTS = 1 << 16
SLAB_ROWS = 1 << 20

Hashes = np.ndarray[Any, np.dtype[np.uint64]]


def id_strings(array: Any, column: str, row_map: RowMap, first_row: int) -> list[str]:
    """A batch's ids as sample ids; InputError naming the row of a null or one that is not UTF-8."""
    _refuse_null(array, column, row_map, first_row)
    if family(array.type) == INTEGER:
        return list(map(str, array.to_numpy(zero_copy_only=False).tolist()))
    ids = strings(array, column)
    for i, value in enumerate(ids):
        if isinstance(value, Problem):
            raise InputError(
                f"{row_map.place(first_row + i)}: {value.error}: ids must be UTF-8. Repair the "
                "id, or set captions.id_column to another column."
            )
    return ids  # type: ignore[return-value]


def _refuse_null(array: Any, column: str, row_map: RowMap, first_row: int) -> None:
    if array.null_count:
        raise InputError(
            f"{row_map.place(first_row + first_null(array))}: column {column!r} is null: every "
            "row needs an id. Fill it in, drop the row, or set captions.id_column to null to use "
            "row numbers."
        )


class IdCheck:
    """Feed every batch of ids in row order, then `finish`."""

    def __init__(self, row_map: RowMap, column: str, num_rows: int) -> None:
        self._map = row_map
        self._column = column
        self._hashes: Hashes = np.empty(num_rows, np.uint64)
        self._num_rows = 0

    def add(self, first_row: int, array: Any) -> None:
        _refuse_null(array, self._column, self._map, first_row)
        if family(array.type) != INTEGER:
            try:
                array.validate(full=True)
            except pa.ArrowInvalid:
                id_strings(array, self._column, self._map, first_row)
        end = self._num_rows + len(array)
        self._hashes[self._num_rows : end] = _hash(array)
        self._num_rows = end

    def finish(self) -> None:
        hashes = self._hashes[: self._num_rows]
        hashes.sort()
        num_repeats = sum(int(equal.sum()) for _, equal in _equal_neighbours(hashes))
        for suspects in _repeated(hashes):
            self._compare(suspects, num_repeats)

    def _compare(self, suspects: Hashes, num_repeats: int) -> None:
        """Raise at the first row whose id, not only its hash, was there before."""
        cursor = RowCursor(self._map, [self._column], 16384)
        seen: dict[str, int] = {}
        for first, batch in cursor.batches(0, self._num_rows):
            array = batch.column(0)
            hashes = _hash(array)
            nearest = np.minimum(np.searchsorted(suspects, hashes), len(suspects) - 1)
            rows = np.flatnonzero(suspects[nearest] == hashes)
            if len(rows) == 0:
                continue
            ids = id_strings(array.take(pa.array(rows)), self._column, self._map, first)
            for row, sample_id in zip((first + rows).tolist(), ids, strict=True):
                if sample_id in seen:
                    raise self._duplicate(sample_id, seen[sample_id], row, num_repeats)
                seen[sample_id] = row
        cursor.close()

    def _duplicate(self, sample_id: str, first: int, again: int, num_repeats: int) -> InputError:
        return InputError(
            f"{self._map.place(again)}: column {self._column!r} repeats id {sample_id!r} of "
            f"{self._map.place(first)}; {num_repeats} rows in all repeat an id. Ids must be "
            "unique: make them so, or set captions.id_column to null to use row numbers."
        )


def _hash(array: Any) -> Hashes:
    """An integer is its own hash; a string's is XXH3-64 of its bytes."""
    if family(array.type) == INTEGER:
        wide = np.uint64 if pa.types.is_unsigned_integer(array.type) else np.int64
        return array.to_numpy(zero_copy_only=False).astype(wide).view(np.uint64)  # type: ignore[no-any-return]
    digests = map(xxhash.xxh3_64_intdigest, as_bytes(array))  # type: ignore[arg-type]
    return np.fromiter(digests, np.uint64, len(array))


def _equal_neighbours(hashes: Hashes) -> Iterator[tuple[int, np.ndarray[Any, np.dtype[np.bool_]]]]:
    """(start, whether hashes[start + i] equals its left neighbour), slab by slab."""
    for start in range(1, len(hashes), SLAB_ROWS):
        end = min(len(hashes), start + SLAB_ROWS)
        yield start, hashes[start:end] == hashes[start - 1 : end - 1]


def _repeated(hashes: Hashes) -> Iterator[Hashes]:
    """Sorted distinct values that occur more than once, at most `SUSPECTS` at a time."""
    for start, equal in _equal_neighbours(hashes):
        values = np.unique(hashes[start : start + len(equal)][equal])
        for i in range(0, len(values), SUSPECTS):
            yield values[i : i + SUSPECTS]
