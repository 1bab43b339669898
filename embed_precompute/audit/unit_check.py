"""What `verify` is made of: the report it fills, and the check of one unit.

Guarantees: a check adds problem lines and never raises, whatever the damage. The content of a file
is looked at only when its size and digest are right, so one damage gives few lines.
Costs: one unit at a time, in batches of rows; a shard is mapped, not loaded.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embed_precompute.errors import EmbedPrecomputeError, VerificationError
from embed_precompute.samples import INPUT_FACTS, Status, count_failed
from embed_precompute.store.commit import digest_file
from embed_precompute.store.committed import CommittedUnit
from embed_precompute.store.index import Array, DatasetIndex, id_hash
from embed_precompute.store.records import read_record, unit_paths
from embed_precompute.store.rows import (
    READ_ROWS,
    iter_batches,
    read_samples,
    rows_at_once,
    rows_digest,
    rows_schema,
)
from embed_precompute.store.shards import ShardReader, StoredTensor

Level = Literal["quick", "full", "deep"]
"""deep: as full, and random samples are encoded again (`reencode`)."""
MAX_NOTES = 20


@dataclass
class Report:
    """What verify found."""

    root: Path
    level: Level
    problems: list[str] = field(default_factory=list)
    """One line each: the file, what was found, what was expected."""
    notes: list[str] = field(default_factory=list)
    """Files that are not of the dataset; they do no harm."""
    finalised: bool = False
    num_units: int = 0
    num_missing: int = 0
    """Units without a record."""
    null_missing: bool = False
    """The null embedding is not made yet."""
    num_samples: int = 0
    num_bytes: int = 0
    """Bytes whose sha256 was compared."""
    deep: str = ""
    """What encoding again gave."""
    plan_rejected: bool = False
    null_rejected: bool = False
    rejected_units: set[int] = field(default_factory=set)
    """Units with a record, and a problem in one of their files."""
    failed_units: set[int] = field(default_factory=set)
    """Sound units that hold a sample whose status is a failure of ours."""
    num_ok: dict[int, int] = field(default_factory=dict)
    """Sound units and their samples whose status is ok."""

    @property
    def null_sound(self) -> bool:
        return not self.null_missing and not self.null_rejected

    def summary(self) -> str:
        """What was checked and the outcome, then notes; several lines."""
        checked = self.num_units - self.num_missing
        state = "finalised" if self.finalised else "not finalised"
        lines = [
            f"{self.root}: {self.level} check, {checked:,} of {self.num_units:,} units, "
            f"{self.num_samples:,} samples, {state}, sha256 of {self.num_bytes:,} bytes"
        ]
        if self.num_missing or self.null_missing:
            null = ", and so does the null embedding" if self.null_missing else ""
            lines.append(f"  {self.num_missing:,} units lack a record{null}: run the job again")
        if self.deep:
            lines.append(f"  {self.deep}")
        lines += [f"  note: {note}" for note in self.notes[:MAX_NOTES]]
        if len(self.notes) > MAX_NOTES:
            lines.append(f"  note: and {len(self.notes) - MAX_NOTES:,} more files like these")
        count = len(self.problems)
        lines.append(f"  {count:,} problem{'s' * (count != 1)}" if count else "  no problems")
        return "\n".join(lines)

    def problem(self, path: Path, found: object, expected: object) -> None:
        self.problems.append(f"{path}: found {found}, expected {expected}")

    @contextlib.contextmanager
    def checking(self, path: Path) -> Iterator[None]:
        """Whatever goes wrong inside is a problem with `path`: damage can surface as any error."""
        try:
            yield
        except EmbedPrecomputeError as error:
            self.problems.append(str(error))
        except Exception as error:
            self.problem(path, f"{type(error).__name__}: {error}", "a file that can be checked")

    def is_file(self, path: Path) -> bool:
        """Whether `path` is a regular file: anything else may block whoever opens it."""
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            self.problem(path, error.strerror, "a file")
            return False
        if not stat.S_ISREG(mode):
            self.problem(path, f"no regular file (mode {mode:o})", "a file")
            return False
        return True

    def same_file(self, path: Path, entry: Mapping[str, Any], *, digest: bool) -> bool:
        """Whether a file has the size, and with `digest` the sha256, that `entry` states."""
        if not self.is_file(path):
            return False
        with self.checking(path):
            size = path.stat().st_size
            if size != entry["bytes"]:
                self.problem(path, f"{size} bytes", f"{entry['bytes']} bytes")
                return False
            if digest:
                found = digest_file(path)
                self.num_bytes += found.bytes
                if found.sha256 != entry["sha256"]:
                    self.problem(path, f"sha256 {found.sha256}", f"sha256 {entry['sha256']}")
                    return False
            return True
        return False


class SampleTable:
    """manifest.parquet, read once from its first row to its last."""

    def __init__(self, path: Path, encoders: Sequence[str], num_samples: int) -> None:
        self.path = path
        self._schema = rows_schema(encoders, text=False)
        self._source = pa.OSFile(str(path))
        self._file = pq.ParquetFile(
            self._source,
            page_checksum_verification=True,
            pre_buffer=False,
            buffer_size=1 << 20,
        )
        if not self._file.schema_arrow.equals(self._schema):
            raise VerificationError(
                f"{path} has columns {self._file.schema_arrow.names}: expected "
                f"{self._schema.names}, with the types of the format."
            )
        if self._file.metadata.num_rows != num_samples:
            raise VerificationError(
                f"{path} has {self._file.metadata.num_rows} rows: expected {num_samples}."
            )
        rows = rows_at_once(path, self._source, self._schema.names, READ_ROWS)
        self._batches = self._file.iter_batches(rows, use_threads=False)
        self._batch: pa.RecordBatch = next(self._batches)
        self._first = 0

    def close(self) -> None:
        self._file.close()
        self._source.close()

    def rows(self, first: int, count: int) -> pa.Table:
        """`count` rows from row `first`, which may not be before that of the last call."""
        pieces = []
        while count:
            if first >= self._first + self._batch.num_rows:
                self._first += self._batch.num_rows
                self._batch = next(self._batches)
                continue
            piece = self._batch.slice(first - self._first, count)
            pieces.append(piece)
            first += piece.num_rows
            count -= piece.num_rows
        return pa.Table.from_batches(pieces, self._schema)


class UnitCheck:
    """Checks unit after unit of a plan, in order, against whatever sound files there are."""

    def __init__(
        self,
        report: Report,
        plan: dict[str, Any] | None,
        tensors: Sequence[StoredTensor],
        index: DatasetIndex | None,
        table: SampleTable | None,
    ) -> None:
        self._report, self._plan, self._tensors = report, plan, tensors
        self._names = [tensor.name for tensor in tensors]
        self._index, self._table = index, table
        self._full = report.level != "quick"
        self.id_hashes: list[Array] = []
        """Hashes of all ids, where no index could be asked whether they are unique."""

    def check(self, unit: int) -> dict[str, Any] | None:
        """Check unit `unit`; give its record if it can be read."""
        report, before = self._report, len(self._report.problems)
        record = self._check(unit)
        if len(report.problems) > before:
            report.rejected_units.add(unit)
        elif record is not None:
            report.num_ok[unit] = record["status"][Status.OK.label]
            if count_failed(record["status"]):
                report.failed_units.add(unit)
        return record

    def _check(self, unit: int) -> dict[str, Any] | None:
        report, paths = self._report, unit_paths(self._report.root, unit)
        record: dict[str, Any] | None = None
        if not report.is_file(paths.record):
            return None
        with report.checking(paths.record):
            record = read_record(report.root, unit)
        if record is None:
            return None
        sound = [
            report.same_file(path, record["files"][name], digest=self._full)
            for name, path in (("shard", paths.shard), ("rows", paths.rows))
        ]
        report.num_samples += record["num_samples"]
        if self._plan is not None and all(sound):
            with report.checking(paths.record):
                self._content(CommittedUnit(report.root, self._plan, self._tensors, unit), unit)
        return record

    def _content(self, unit: CommittedUnit, number: int) -> None:
        assert self._plan is not None
        record, path = unit.record, unit.paths.record
        one_each = self._plan["num_samples"] == self._plan["num_rows"]
        if one_each and record["num_samples"] != record["num_rows"]:
            self._report.problem(
                path,
                f"{record['num_samples']} samples",
                f"one for each of {record['num_rows']} rows",
            )
        if self._index is not None:
            found = self._index.shards[number].tolist()[1:]
            expected = [record["num_samples"], record["num_stored"]]
            if found != expected:
                where = self._report.root / "index" / "shards.npy"
                self._report.problem(
                    where, f"{found} for unit {number}", f"its record's {expected}"
                )
                return
        if self._full:
            check_rows(self._report, unit.shard, self._tensors)
            self._texts(unit)
            self._samples(unit, number)

    def _texts(self, unit: CommittedUnit) -> None:
        """The encoded texts against their digests, and texts and errors against the status."""
        path = unit.paths.rows
        num_rows = unit.record["num_samples"]
        samples = read_samples(path, self._names, num_rows)
        found, expected = rows_digest(samples), unit.record["rows_sha256"]
        if found != expected:
            self._report.problem(path, f"rows_sha256 {found}", expected)
        facts = {status.label for status in INPUT_FACTS}
        columns = ("sample_id", "text", "text_sha256", "status", "error")
        for batch in iter_batches(path, self._names, num_rows=num_rows):
            for entry in zip(*(batch.column(c).to_pylist() for c in columns), strict=True):
                sample_id, text, digest, status, error = entry
                wanted = None if text is None else hashlib.sha256(text.encode()).hexdigest()
                ok = status == Status.OK.label
                if digest != wanted:
                    what = f"text_sha256 {digest} for sample {sample_id!r}"
                    self._report.problem(path, what, wanted)
                elif (ok and (text is None or error is not None)) or (
                    status in facts and text is not None
                ):
                    what = f"text {text!r:.40} and error {error!r:.40} for sample {sample_id!r}"
                    self._report.problem(path, what, f"those of a sample whose status is {status}")

    def _samples(self, unit: CommittedUnit, number: int) -> None:
        """Every sample against the unit's record and shard, the index and manifest.parquet."""
        first = 0 if self._index is None else int(self._index.shards[number, 0])
        for batch, columns in unit.batches():
            ids: list[str] = batch.column("sample_id").to_pylist()
            if self._index is None:
                hashes = map(id_hash, map(str.encode, ids))
                self.id_hashes.append(np.fromiter(hashes, np.uint64, len(ids)))
                continue
            self._compare_index(self._index, first, columns)
            self._compare_ids(self._index, first, ids, unit.paths.rows)
            if self._table is not None:
                rows = self._table.rows(first, len(ids))
                for name in rows.column_names:
                    if not rows.column(name).equals(pa.chunked_array([batch.column(name)])):
                        where = f"other values of {name} in rows {first} to {first + len(ids) - 1}"
                        self._report.problem(self._table.path, where, f"those of {unit.paths.rows}")
            first += len(ids)

    def _compare_index(self, index: DatasetIndex, first: int, columns: Mapping[str, Array]) -> None:
        arrays = {"status": index.status, "shard": index.shard, "index": index.index}
        arrays |= {f"length_{name}": array for name, array in index.lengths.items()}
        arrays |= {f"xxh3_{name}": array for name, array in index.checksums.items()}
        expected = dict(columns)
        found = {name: arrays[name][first : first + len(columns[name])] for name in columns}
        ok = np.flatnonzero(columns["status"] == Status.OK) + first
        begin = int(np.searchsorted(index.ok, np.int64(first)))
        expected["ok"], found["ok"] = ok, index.ok[begin : begin + len(ok)]
        for name, values in expected.items():
            if not np.array_equal(found[name], values):
                last = first + len(columns["status"]) - 1
                path = self._report.root / "index" / f"{name}.npy"
                self._report.problem(
                    path, f"other values for samples {first} to {last}", "those of their shard"
                )

    def _compare_ids(self, index: DatasetIndex, first: int, ids: list[str], path: Path) -> None:
        """That each id is stored, and found again as this sample: so no two ids are equal."""
        for sample, sample_id in enumerate(ids, first):
            stored, found = index.sample_id(sample), index.find(sample_id)
            if stored != sample_id:
                where = self._report.root / "index" / "ids.npy"
                self._report.problem(where, f"id {stored!r} of sample {sample}", repr(sample_id))
            elif found is not None and found != sample:
                what = f"sample id {sample_id!r} twice, as samples {found} and {sample}"
                self._report.problem(path, what, "ids that differ")
            elif found is None:
                where = self._report.root / "index" / "id_hash.npy"
                self._report.problem(
                    where, f"no way to sample id {sample_id!r}", f"sample {sample}"
                )


def check_rows(report: Report, shard: ShardReader, tensors: Sequence[StoredTensor]) -> None:
    """Every stored row against its checksum in the shard; one line for each tensor."""
    for tensor in tensors:
        name = tensor.name
        bad = [row for row in range(shard.num_rows) if not shard.check_row(name, row)]
        if bad:
            what = f"{len(bad)} rows of text_{name} unlike their checksum, the first is {bad[0]}"
            report.problem(shard.path, what, f"{shard.num_rows} sound rows")


def repeated_ids(
    report: Report, units: Sequence[int], encoders: Sequence[str], hashes: Sequence[Array]
) -> None:
    """Ids that occur twice, by the hashes of all; reads the rows parts again only on suspicion."""
    if not hashes:
        return
    ordered = np.sort(np.concatenate(hashes))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: dict[str, int] = {}
    for unit in units if suspects else ():
        path = unit_paths(report.root, unit).rows
        with report.checking(path):
            for batch in iter_batches(path, encoders, text=False):
                for sample_id in batch.column("sample_id").to_pylist():
                    if id_hash(sample_id.encode()) not in suspects:
                        continue
                    if sample_id in seen:
                        what = f"sample id {sample_id!r}, which unit {seen[sample_id]} has too"
                        report.problem(path, what, "ids that differ")
                    seen[sample_id] = unit
