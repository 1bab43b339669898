"""The rows of committed units, checked and made into columns of the index, many units at a time.

Guarantees: every row agrees with its unit's record and shard (status, shard, row order, index,
lengths, nulls), and the sums with the record. VerificationError names the rows part that does not.
Costs: a few vector operations for some thousand rows, however many units they are of; per unit only
its sums. Memory holds one such group of rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_precompute.errors import VerificationError
from embed_precompute.samples import Status
from embed_precompute.store.heads import Array, ShardHead
from embed_precompute.store.records import UnitPaths
from embed_precompute.store.rows import READ_ROWS

_LABELS = [status.label for status in Status]
_LABEL_ARRAY = pa.array(_LABELS)
_VALUES = np.array([status.value for status in Status], np.uint8)


class OpenUnit(Protocol):
    """A unit whose record, shard head and rows part are sound, each by itself."""

    paths: UnitPaths
    record: dict[str, Any]
    head: ShardHead

    def rows(self) -> Iterator[pa.RecordBatch]: ...


def joined(units: Iterable[OpenUnit]) -> Iterator[tuple[pa.RecordBatch, dict[str, Array]]]:
    """The rows of `units` without text in batches of up to 4,096, each with its index columns.

    A unit's sums are compared with its record before the batch with its last row comes out.
    """
    pieces: list[_Piece] = []
    ended: list[_Sums] = []
    num_rows = 0
    for unit in units:
        sums = _Sums(unit)
        for batch in unit.rows():
            if batch.num_rows == 0:
                continue
            if pieces and num_rows + batch.num_rows > READ_ROWS:
                yield _group(pieces, ended)
                pieces, num_rows = [], 0
            pieces.append((sums, batch))
            num_rows += batch.num_rows
        ended.append(sums)
    if pieces:
        yield _group(pieces, ended)
    for sums in ended:  # units without a row
        sums.compare()


class _Sums:
    """What a unit's rows add up to so far."""

    def __init__(self, unit: OpenUnit) -> None:
        self.unit = unit
        self.names = sorted(unit.record["encoders"])
        self.last_row: int = unit.record["first_row"] - 1
        self.counts = np.zeros(len(Status) + 2 * len(self.names), np.int64)
        """Samples of each status, then for each encoder tokens and truncated captions."""

    def compare(self) -> None:
        """VerificationError where they are not the record's."""
        record = self.unit.record
        counts = self.counts.tolist()
        found = {
            "samples": sum(counts[: len(Status)]),
            "status": dict(zip(_LABELS, counts, strict=False)),
            "encoders": {
                name: {
                    "tokens": counts[len(Status) + 2 * i],
                    "truncated": counts[len(Status) + 2 * i + 1],
                    "stored_tokens": record["encoders"][name]["stored_tokens"],  # `head` has it
                }
                for i, name in enumerate(self.names)
            },
            "last row": self.last_row,
        }
        expected = {
            "samples": record["num_samples"],
            "status": record["status"],
            "encoders": record["encoders"],
            "last row": record["first_row"] + record["num_rows"] - 1,
        }
        for key, value in expected.items():
            if found[key] != value:
                raise VerificationError(
                    f"{self.unit.paths.rows}: {key} is {found[key]!r}, expected {value!r}."
                )


_Piece = tuple[_Sums, pa.RecordBatch]


def _group(pieces: Sequence[_Piece], ended: list[_Sums]) -> tuple[pa.RecordBatch, dict[str, Array]]:
    """One batch of all pieces; compares, and takes from `ended`, the units that end in it."""
    group = _Group(pieces)
    columns = group.columns()
    for sums in ended:
        sums.compare()
    ended.clear()
    return group.batch, columns


class _Group:
    """Rows of one or more units, and which row is of which."""

    def __init__(self, pieces: Sequence[_Piece]) -> None:
        self._sums = [sums for sums, _ in pieces]
        batches = [batch for _, batch in pieces]
        self.batch: pa.RecordBatch = batches[0]
        if len(batches) > 1:
            (self.batch,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
        counts = np.array([batch.num_rows for batch in batches])
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts
        self._owner = np.repeat(np.arange(len(pieces)), counts)

    def columns(self) -> dict[str, Array]:
        status = self._status()
        ok = status == Status.OK
        shard = self.batch.column("shard").to_numpy()
        self._require(shard == self._of_unit("unit"), "samples of another shard")
        self._check_rows()
        heads = [sums.unit.head for sums in self._sums]
        num_stored = np.array([head.num_rows for head in heads])
        index = self._filled("index", ok, -1)
        fits = (index >= 0) & (index < num_stored[self._owner])
        self._require(fits | ~ok, "an index that is not in the shard")
        # Where each stored row of an ok sample is, when those of all units follow one another.
        stored = (index + (np.cumsum(num_stored) - num_stored)[self._owner])[ok]
        columns = {"status": status, "shard": shard, "index": index}
        counts = [self._status_counts(status)]
        for name in self._sums[0].names:
            tokens = self._filled(f"{name}_tokens", ok, 0)
            truncated = self._filled(f"{name}_truncated", ok, False)
            length = self._filled(f"{name}_length", ok, 0)
            expected, checksums = np.zeros(ok.size, np.int64), np.zeros(ok.size, np.uint64)
            expected[ok] = np.concatenate([head.lengths[name] for head in heads])[stored]
            self._require(length == expected, f"{name}_length unlike the shard's")
            checksums[ok] = np.concatenate([head.checksums[name] for head in heads])[stored]
            columns |= {f"length_{name}": length, f"xxh3_{name}": checksums}
            counts += [self._sum(tokens), self._sum(truncated)]
        for sums, more in zip(self._sums, np.hstack(counts), strict=True):
            sums.counts += more
        return columns

    def _status(self) -> Array:
        codes = pc.index_in(self.batch.column("status"), value_set=_LABEL_ARRAY)
        if codes.null_count:
            self._require(codes.is_valid().to_numpy(zero_copy_only=False), "an unknown status")
        status: Array = _VALUES[codes.to_numpy()]
        return status

    def _check_rows(self) -> None:
        """A row has one sample or several, one after another, and none is left out."""
        rows = self.batch.column("row").to_numpy()
        before = np.empty_like(rows)
        before[1:] = rows[:-1]
        before[0] = self._sums[0].last_row
        for k in range(1, len(self._sums)):
            if self._sums[k] is not self._sums[k - 1]:  # else the unit goes on in this piece
                before[self._starts[k]] = self._sums[k].last_row
        steps = rows - before
        ordered = (steps == 0) | (steps == 1)
        self._require(ordered & (rows >= self._of_unit("first_row")), "rows out of order")
        for sums, last in zip(self._sums, rows[self._ends - 1].tolist(), strict=True):
            sums.last_row = last

    def _filled(self, name: str, ok: Array, missing: Any) -> Array:
        """A column that is null exactly where the status is not ok, with `missing` there."""
        column = self.batch.column(name)
        if column.null_count == 0 and ok.all():  # nearly always
            plain: Array = column.to_numpy(zero_copy_only=False)
            return plain
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        self._require(valid == ok, f"{name} null where status is ok, or not elsewhere")
        values: Array = pc.fill_null(column, missing).to_numpy(zero_copy_only=False)
        return values

    def _of_unit(self, key: str) -> Array:
        """A number of each row's unit record."""
        values = np.array([sums.unit.record[key] for sums in self._sums], np.int64)
        return values[self._owner]

    def _status_counts(self, status: Array) -> Array:
        """Samples of each status, [pieces, statuses]."""
        size = len(self._sums) * len(Status)
        cells = np.bincount(self._owner * len(Status) + status, minlength=size)
        counts: Array = cells.reshape(-1, len(Status))
        return counts

    def _sum(self, values: Array) -> Array:
        """Sums over each piece, [pieces, 1]."""
        sums = np.concatenate(([0], np.cumsum(values, dtype=np.int64)))
        of_pieces: Array = sums[self._ends] - sums[self._starts]
        return of_pieces[:, None]

    def _require(self, good: Array, problem: str) -> None:
        if not good.all():
            unit = self._sums[int(self._owner[int(np.argmin(good))])].unit
            raise VerificationError(f"{unit.paths.rows} has {problem}.")
