"""The check of committed units, which finalize and verify share.

Guarantees: if `check_unit` returns a unit, its plan, record, rows part and shard agree. Otherwise a
VerificationError names the first file that does not agree. `full` also reads every stored row, for
its checksum, and every text, for its digest.
Costs: for each unit, its record, its rows part (in memory) and the head of its shard are read;
`full` reads the whole shard, once. `in_order` uses all cores: reading and pyarrow let other Python
threads run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_precompute.errors import EmbedPrecomputeError, VerificationError
from embed_precompute.samples import INPUT_FACTS, Status
from embed_precompute.store.commit import NAME_DIGITS, StoredFile, digest_file, read_file
from embed_precompute.store.index import Array, FileEntry, UnitColumns, id_hash
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import (
    NullRecord,
    Record,
    StoredShard,
    TokenCounts,
    UnitRecord,
    read_null_record,
    read_record,
    record_path,
)
from embed_precompute.store.rows import (
    Tensors,
    digested_row,
    encoder_names,
    iter_batches,
    rows_schema,
    text_sha256,
)
from embed_precompute.store.shards import ShardReader, open_alone

MAX_THREADS = 16
_LABELS = pa.array([status.label for status in sorted(Status)])
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class CheckedUnit:
    """A committed unit whose files agree."""

    record: UnitRecord
    rows: pa.RecordBatch
    """The rows part without text."""
    columns: UnitColumns
    """What the unit adds to the index."""


class Problems(list[str]):
    """What is wrong with a dataset: one line each, with the file, what was found and expected."""

    def add(self, path: Path, found: object, expected: object) -> None:
        self.append(f"{path}: found {found}, expected {expected}")

    @contextlib.contextmanager
    def checking(self, path: Path) -> Iterator[None]:
        """Any error inside becomes a problem with `path`: damage can surface as any error."""
        try:
            yield
        except Exception as error:
            self.append(describe(path, error))


def describe(path: Path, error: Exception) -> str:
    """A problem line for what went wrong with `path`."""
    if isinstance(error, EmbedPrecomputeError):
        return str(error)
    return f"{path}: found {type(error).__name__}: {error}, expected a file that can be checked"


def check_unit(root: Path, plan: Plan, unit: int, *, full: bool = False) -> CheckedUnit:
    """Checks a unit and returns it.

    Raises IncompleteError if the unit has no record, VerificationError if its files do not agree.
    """
    record = read_record(root, unit)
    _check_plan(root, plan, record)
    path, file = record.rows_path(root), record.files.rows
    check_size(path, file)
    try:
        payload = read_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    _require_same(path, "sha256", hashlib.sha256(payload).hexdigest(), file.sha256)
    # The shard is checked first: if it is damaged, the error names it and not the rows part.
    shard = _open_shard(root, plan, record, num_rows=record.num_stored)
    if full:
        _check_checksums(shard)
    rows, columns = _check_rows(path, plan.tensors, record, shard, payload)
    if full:
        _check_texts(path, plan.tensors, record, payload)
    return CheckedUnit(record, rows, columns)


def check_null(root: Path, plan: Plan) -> NullRecord:
    """Returns the null embedding's record; its shard is checked as with `full`."""
    record = read_null_record(root)
    _check_plan(root, plan, record)
    _check_checksums(_open_shard(root, plan, record, num_rows=1))
    return record


def check_files(root: Path, record: Record, *, full: bool) -> None:
    """Checks the sizes (`full`: and the digests) of a record's files, without a plan."""
    if isinstance(record, UnitRecord):
        (check_digest if full else check_size)(record.rows_path(root), record.files.rows)
    (check_shard if full else check_size)(record.shard_path(root), record.files.shard)


def in_order(function: Callable[[_T], _R], arguments: Iterable[_T]) -> Generator[_R, None, None]:
    """Yields `function` of each argument, in order.

    Threads work ahead; closing the iterator ends them.
    """
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)))
    waiting: deque[Future[_R]] = deque()
    pool = ThreadPoolExecutor(threads, "check")
    try:
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _check_plan(root: Path, plan: Plan, record: Record) -> None:
    expected: dict[str, Any] = {
        "fingerprint": plan.fingerprint,
        "plan_id": plan.plan_id,
        "encoders": encoder_names(plan.tensors),
        "tensors": [tensor.name for tensor in plan.tensors],
    }
    if isinstance(record, UnitRecord):
        expected["first_row"], expected["num_rows"] = plan.unit_rows(record.unit)
        if plan.num_samples == plan.num_rows:  # else rows hold lists of captions
            expected["num_samples"] = expected["num_rows"]
    path = record_path(root, record.number)
    for key, value in expected.items():
        found = getattr(record, key)
        _require_same(path, key, sorted(found) if isinstance(found, dict) else found, value)


def _open_shard(root: Path, plan: Plan, record: Record, num_rows: int) -> ShardReader:
    """Opens a shard. Its size, its digest and its number of vectors must be those that its record
    says, and its number of rows `num_rows`."""
    path = record.shard_path(root)
    check_size(path, record.files.shard)
    shard = ShardReader(path, plan.fingerprint, record.number, plan.tensors)
    _require_same(path, "head_sha256", shard.head_sha256(), record.files.shard.head_sha256)
    _require_same(path, "stored rows", shard.num_rows, num_rows)
    vectors = {t.name: int(shard.lengths(t.name).sum()) for t in plan.tensors}
    _require_same(path, "vectors", vectors, record.tensors)
    return shard


def check_size(path: Path, file: StoredFile | StoredShard | FileEntry) -> None:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise _unreadable(path, error) from error
    _require_same(path, "bytes", size, file.bytes)


def check_digest(path: Path, file: StoredFile | FileEntry) -> None:
    """Checks the size, then the sha256."""
    check_size(path, file)
    try:
        found = digest_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    _require_same(path, "sha256", found.sha256, file.sha256)


def check_shard(path: Path, file: StoredShard) -> None:
    """Checks every byte of a shard, without a plan."""
    check_size(path, file)
    shard = open_alone(path)
    _require_same(path, "head_sha256", shard.head_sha256(), file.head_sha256)
    _check_checksums(shard)


def _check_checksums(shard: ShardReader) -> None:
    damaged = shard.first_damaged()
    if damaged is not None:
        name, row = damaged
        raise VerificationError(
            f"{shard.path} is damaged: row {row} of text_{name} does not have its checksum."
        )


def _check_texts(path: Path, tensors: Tensors, record: UnitRecord, payload: bytes) -> None:
    """Texts must match their digests. An ok sample has a text and no error; a sample with a status
    of `INPUT_FACTS` has no text."""
    facts = {status.label for status in INPUT_FACTS}
    names = ("sample_id", "text", "text_sha256", "status", "error")
    sha = hashlib.sha256()
    for batch in iter_batches(path, tensors, payload=payload):
        try:
            columns = [batch.column(name).to_pylist() for name in names]
        except UnicodeDecodeError as error:
            raise VerificationError(f"{path} is damaged: {error}.") from error
        for sample_id, text, digest, status, reason in zip(*columns, strict=True):
            where = f"of sample {sample_id!r}"
            _require_same(path, f"text_sha256 {where}", digest, text_sha256(text))
            ok = status == Status.OK.label
            if (ok and (text is None or reason is not None)) or (
                status in facts and text is not None
            ):
                raise VerificationError(
                    f"{path}: the status {where} is {status}, with the text {text!r:.40} and the "
                    f"error {reason!r:.40}."
                )
            sha.update(digested_row(sample_id, text))
    _require_same(path, "rows_sha256", sha.hexdigest(), record.rows_sha256)


def _check_rows(
    path: Path, tensors: Tensors, record: UnitRecord, shard: ShardReader, payload: bytes
) -> tuple[pa.RecordBatch, UnitColumns]:
    """The rows without text, checked against record and shard, and what they add to the index."""
    batches = iter_batches(path, tensors, text=False, num_rows=record.num_samples, payload=payload)
    table = pa.Table.from_batches(batches, rows_schema(tensors, text=False))
    rows: pa.RecordBatch = table.combine_chunks().to_batches()[0]

    def require(good: Any, problem: str) -> None:
        if not np.all(good):
            raise VerificationError(f"{path} has {problem}.")

    codes = pc.index_in(rows.column("status"), value_set=_LABELS)
    require(codes.null_count == 0, "an unknown status")
    status: Array = codes.to_numpy().astype(np.uint8)  # the statuses are numbered from 0 on
    ok = status == Status.OK

    def filled(name: str, missing: Any) -> Array:
        """A column with `missing` for its nulls, which must be where the status is not ok."""
        column = rows.column(name)
        if column.null_count or not ok.all():  # seldom
            valid = column.is_valid().to_numpy(zero_copy_only=False)
            require(valid == ok, f"{name} null where status is ok, or not elsewhere")
            column = pc.fill_null(column, missing)
        values: Array = column.to_numpy(zero_copy_only=False)
        return values

    require(rows.column("shard").to_numpy() == record.unit, "samples of another shard")
    # An input row has one sample or more, one after another, and no input row is left out.
    numbers = rows.column("row").to_numpy()
    before = np.concatenate(([record.first_row - 1], numbers[:-1]))
    ordered = (numbers == before) | (numbers == before + 1)
    require(ordered & (numbers >= record.first_row), "rows out of order")
    _require_same(path, "last row", int(numbers[-1]), record.first_row + record.num_rows - 1)
    index = filled("index", -1)
    require(~ok | ((index >= 0) & (index < shard.num_rows)), "an index that is not in the shard")
    lengths, checksums = {}, {}
    for name in (tensor.name for tensor in tensors):
        expected, sums = np.zeros(ok.size, np.int64), np.zeros(ok.size, np.uint64)
        expected[ok] = shard.lengths(name)[index[ok]]
        sums[ok] = shard.checksums(name)[index[ok]]
        lengths[name], checksums[name] = filled(f"{name}_length", 0), sums
        require(lengths[name] == expected, f"{name}_length unlike the shard's")
    found = {each.label: int((status == each).sum()) for each in Status}
    _require_same(path, "status", found, record.status)
    tokens = {name: filled(f"{name}_tokens", 0) for name in encoder_names(tensors)}
    encoders = {
        name: TokenCounts(
            int(counts.sum(dtype=np.int64)), int(filled(f"{name}_truncated", False).sum())
        )
        for name, counts in tokens.items()
    }
    _require_same(path, "encoders", encoders, record.encoders)
    ids = rows.column("sample_id").cast(pa.binary()).to_pylist()
    hashes = np.fromiter(map(id_hash, ids), np.uint64, len(ids))
    digest = int(record.files.shard.head_sha256[:NAME_DIGITS], 16)
    columns = UnitColumns(
        *(record.unit, shard.num_rows, digest, ids, hashes),
        *(status, index, tokens, lengths, checksums),
    )
    return rows, columns


def _require_same(path: Path, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise VerificationError(f"{path}: {what} is {found!r}, expected {expected!r}.")


def _unreadable(path: Path, error: OSError) -> VerificationError:
    return VerificationError(
        f"{path} cannot be read ({error.strerror}), though a record or manifest.json names it."
    )
