"""Committed units read back: record, shard and rows part, checked against one another.

Guarantees: what comes out is consistent with the plan, the record, the whole rows part (sha256) and
the shard's header, or a VerificationError names the file that is not. The shard's values are not
read: that is for `verify`.
Costs: one pass over a small rows part, two over a large one; of the shard header, offsets and
checksums. `open_units` reads and decodes some hundred small units ahead, so that neither a network
file system's round trips nor pyarrow, which takes most of the time, are waited for one by one.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from embed_precompute.errors import StorageError, VerificationError
from embed_precompute.store.commit import StoredFile, digest_file
from embed_precompute.store.heads import Array, ShardHead
from embed_precompute.store.joined import joined
from embed_precompute.store.records import (
    StoredTensor,
    UnitPaths,
    checked_record,
    no_record,
    null_paths,
    read_record,
    unit_paths,
)
from embed_precompute.store.rows import READ_ROWS, iter_batches
from embed_precompute.store.sealed import (
    MAX_RECORD_BYTES,
    FileStart,
    parse_sealed,
    read_start,
)
from embed_precompute.store.shards import ShardReader

SMALL_PART_BYTES = 1 << 20
"""A rows part up to this size is read once, for its digest and its rows."""
HEAD_BYTES = 1 << 14
"""What is read of a shard at first: header, offsets and checksums of some hundred rows."""
READERS = 4
DECODERS = 2
UNITS_PER_TASK = 64


@dataclass(frozen=True)
class _Files:
    """The bytes of a unit's files that tell what is in it, or why they cannot be had."""

    paths: UnitPaths
    record: FileStart | OSError
    rows: FileStart | OSError
    rows_sha256: str
    """Of what `rows` has."""
    shard: FileStart | OSError

    @classmethod
    def read(cls, root: Path, unit: int) -> _Files:
        paths = unit_paths(root, unit)
        rows = _start(paths.rows, SMALL_PART_BYTES)
        return cls(
            paths,
            _start(paths.record, MAX_RECORD_BYTES),
            rows,
            hashlib.sha256(rows.payload).hexdigest() if isinstance(rows, FileStart) else "",
            _start(paths.shard, HEAD_BYTES),
        )


def _start(path: Path, limit: int) -> FileStart | OSError:
    try:
        return read_start(path, limit)
    except OSError as error:
        return error


class CommittedUnit:
    """One unit of a plan; opening it checks its record, its rows part and its shard's header."""

    def __init__(
        self,
        root: Path,
        plan: Mapping[str, Any],
        tensors: Sequence[StoredTensor],
        unit: int,
        files: _Files | None = None,
    ) -> None:
        files = _Files.read(root, unit) if files is None else files
        self.paths = files.paths
        self.record = record = _record(files, unit)
        self._tensors = tensors
        self._names = [tensor.name for tensor in tensors]
        first_row = unit * plan["rows_per_unit"]
        expected = {
            "fingerprint": plan["fingerprint"],
            "plan": plan["plan"],
            "first_row": first_row,
            "num_rows": min(plan["rows_per_unit"], plan["num_rows"] - first_row),
        }
        _require_same(self.paths.record, record, expected)
        encoders = {"encoders": sorted(record["encoders"])}
        _require_same(self.paths.record, encoders, {"encoders": self._names})
        self._part = _small_part(files, record["files"]["rows"])
        self._decoded: list[pa.RecordBatch] | None = None
        self.head = ShardHead(
            self.paths.shard,
            _readable(self.paths.shard, files.shard),
            plan["fingerprint"],
            unit,
            tensors,
            record,
        )

    @cached_property
    def shard(self) -> ShardReader:
        """The shard with its values, mapped."""
        record = self.record
        return ShardReader(self.paths.shard, record["fingerprint"], record["unit"], self._tensors)

    def batches(self) -> Iterator[tuple[pa.RecordBatch, dict[str, Array]]]:
        """The rows part without text, and for each batch the columns that go into the index.

        Sums are compared with the record after the last batch.
        """
        return joined([self])

    def rows(self) -> Iterator[pa.RecordBatch]:
        """The rows part without text, whatever it says."""
        if self._decoded is not None:
            return iter(self._decoded)
        return iter_batches(
            self.paths.rows,
            self._names,
            text=False,
            num_rows=self.record["num_samples"],
            payload=self._part,
        )

    def decode(self) -> None:
        """Decodes the rows if they are few, so that `rows` costs nothing more."""
        if self._part is not None and self.record["num_samples"] <= READ_ROWS:
            self._decoded = list(self.rows())
            self._part = None


def open_units(
    root: Path, plan: Mapping[str, Any], tensors: Sequence[StoredTensor]
) -> Generator[CommittedUnit, None, None]:
    """Every unit of a plan, in order. Close the iterator: its threads end then.

    Some threads read files ahead and wait for the file system, others decode rows, in pyarrow; both
    let Python run meanwhile, so what is Python stays in this thread.
    """
    per_task = max(1, min(UNITS_PER_TASK, READ_ROWS // max(1, plan["rows_per_unit"])))
    numbers = range(plan["num_units"])
    tasks = [numbers[first : first + per_task] for first in range(0, len(numbers), per_task)]
    with _pool("read-units", READERS) as readers, _pool("decode-units", DECODERS) as decoders:

        def read(task: range) -> Future[list[_Files]]:
            return readers.submit(lambda: [_Files.read(root, unit) for unit in task])

        def opened() -> Iterator[Future[list[CommittedUnit]]]:
            for task, files in zip(tasks, _ahead(map(read, tasks), 2 * READERS), strict=True):
                units = [
                    CommittedUnit(root, plan, tensors, unit, found)
                    for unit, found in zip(task, files, strict=True)
                ]
                yield decoders.submit(_decoded, units)

        for units in _ahead(opened(), 2 * DECODERS):
            yield from units


def _decoded(units: list[CommittedUnit]) -> list[CommittedUnit]:
    for unit in units:
        unit.decode()
    return units


_T = TypeVar("_T")


def _ahead(futures: Iterator[Future[_T]], count: int) -> Iterator[_T]:
    """The results in order, with `count` more under way."""
    pending: deque[Future[_T]] = deque()
    for future in futures:
        pending.append(future)
        if len(pending) > count:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def _pool(name: str, threads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that do not begin what nobody waits for any more."""
    pool = ThreadPoolExecutor(threads, name)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def check_null(root: Path, plan: Mapping[str, Any], tensors: Sequence[StoredTensor]) -> StoredFile:
    """The null embedding's shard, checked whole against null.json."""
    paths: UnitPaths = null_paths(root)
    record = read_record(root, None)
    expected = {key: plan[key] for key in ("fingerprint", "plan")}
    _require_same(paths.record, record, expected)
    stored = _check_digest(paths.shard, record["files"]["shard"])
    reader = ShardReader(paths.shard, plan["fingerprint"], None, tensors)
    found = {tensor.name: reader.lengths(tensor.name).tolist() for tensor in tensors}
    lengths = {name: [sums["length"]] for name, sums in record["encoders"].items()}
    _require_same(paths.shard, {"lengths": found}, {"lengths": lengths})
    return stored


def _record(files: _Files, unit: int) -> dict[str, Any]:
    path = files.paths.record
    if isinstance(files.record, FileNotFoundError):
        raise no_record(path)
    if isinstance(files.record, OSError):
        raise StorageError(f"{path}: reading failed: {files.record.strerror}.")
    return checked_record(files.paths, unit, parse_sealed(path, files.record, "unit"))


def _small_part(files: _Files, entry: Mapping[str, Any]) -> bytes | None:
    """A rows part that is small, or None for a large one; its digest is right in either case."""
    path = files.paths.rows
    start = _readable(path, files.rows)
    _require_same(path, {"bytes": start.size}, {"bytes": entry["bytes"]})
    if start.size > start.limit:
        _check_digest(path, entry)
        return None
    _require_same(path, {"sha256": files.rows_sha256}, {"sha256": entry["sha256"]})
    return start.payload


def _check_digest(path: Path, entry: Mapping[str, Any]) -> StoredFile:
    try:
        _require_same(path, {"bytes": path.stat().st_size}, {"bytes": entry["bytes"]})
        stored = digest_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    _require_same(path, {"sha256": stored.sha256}, {"sha256": entry["sha256"]})
    return stored


def _readable(path: Path, found: FileStart | OSError) -> FileStart:
    if isinstance(found, OSError):
        raise _unreadable(path, found) from found
    return found


def _unreadable(path: Path, error: OSError) -> VerificationError:
    return VerificationError(
        f"{path} cannot be read, though its unit is committed: {error.strerror}."
    )


def _require_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if found[key] != value:
            raise VerificationError(f"{path}: {key} is {found[key]!r}, expected {value!r}.")
