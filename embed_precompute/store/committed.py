"""A committed unit read back: record, shard and rows part, checked against one another.

Guarantees: what comes out is consistent with the plan, the record, the whole rows part (sha256) and
the shard's header, or a VerificationError names the file that is not. The shard's values are not
read: that is for `verify`.
Costs: two passes over the rows part; of the shard only header, offsets and checksums.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_precompute.errors import VerificationError
from embed_precompute.samples import Status
from embed_precompute.store.commit import StoredFile, digest_file
from embed_precompute.store.index import Array
from embed_precompute.store.records import (
    StoredTensor,
    UnitPaths,
    null_paths,
    read_record,
    unit_paths,
)
from embed_precompute.store.rows import iter_batches
from embed_precompute.store.shards import ShardReader

_LABELS = pa.array([status.label for status in Status])
_VALUES = np.array([status.value for status in Status], np.uint8)


class CommittedUnit:
    """One unit of a plan; opening it checks its record, its rows part and its shard's header."""

    def __init__(
        self, root: Path, plan: Mapping[str, Any], tensors: Sequence[StoredTensor], unit: int
    ) -> None:
        self.paths = unit_paths(root, unit)
        self.record = read_record(root, unit)
        self._tensors = tensors
        first_row = unit * plan["rows_per_unit"]
        num_rows = min(plan["rows_per_unit"], plan["num_rows"] - first_row)
        _require_same(
            self.paths.record,
            self.record | {"encoders": sorted(self.record["encoders"])},
            {
                "fingerprint": plan["fingerprint"],
                "plan": plan["plan"],
                "first_row": first_row,
                "num_rows": num_rows,
                "encoders": sorted(tensor.name for tensor in tensors),
            },
        )
        _check_size(self.paths.shard, self.record["files"]["shard"])
        _check_digest(self.paths.rows, self.record["files"]["rows"])
        self.shard = ShardReader(self.paths.shard, plan["fingerprint"], unit, tensors)
        self._lengths = {tensor.name: self.shard.lengths(tensor.name) for tensor in tensors}
        _require_same(
            self.paths.shard, {"rows": self.shard.num_rows}, {"rows": self.record["num_stored"]}
        )

    def batches(self) -> Iterator[tuple[pa.RecordBatch, dict[str, Array]]]:
        """The rows part without text, and for each batch the columns that go into the index.

        Sums are compared with the record after the last batch.
        """
        seen = _Seen(self.record["first_row"] - 1, [tensor.name for tensor in self._tensors])
        names = [tensor.name for tensor in self._tensors]
        num_rows = self.record["num_samples"]
        for batch in iter_batches(self.paths.rows, names, text=False, num_rows=num_rows):
            yield batch, self._columns(batch, seen)
        for name, sums in seen.encoders.items():
            sums["stored_tokens"] = int(self._lengths[name].sum())
        found = {
            "samples": seen.samples,
            "status": seen.status,
            "encoders": {name: dict(sums) for name, sums in seen.encoders.items()},
            "last row": seen.last_row,
        }
        expected = {
            "samples": self.record["num_samples"],
            "status": self.record["status"],
            "encoders": self.record["encoders"],
            "last row": self.record["first_row"] + self.record["num_rows"] - 1,
        }
        _require_same(self.paths.rows, found, expected)

    def _columns(self, batch: pa.RecordBatch, seen: _Seen) -> dict[str, Array]:
        codes = pc.index_in(batch.column("status"), value_set=_LABELS)
        self._require(codes.null_count == 0, "an unknown status")
        status = _VALUES[codes.to_numpy()]
        ok = status == Status.OK
        shard = batch.column("shard").to_numpy()
        self._require(bool((shard == self.record["unit"]).all()), "samples of another shard")
        rows = np.concatenate(([seen.last_row], batch.column("row").to_numpy()))
        steps = np.diff(rows)
        ordered = bool(((steps == 0) | (steps == 1)).all())
        self._require(ordered and rows[1] >= self.record["first_row"], "rows out of order")
        index = self._filled(batch, "index", ok, -1)
        stored = index[ok]
        fits = bool(((stored >= 0) & (stored < self.shard.num_rows)).all())
        self._require(fits, "an index that is not in the shard")
        columns = {"status": status, "shard": shard, "index": index}
        for name, lengths in self._lengths.items():
            tokens = self._filled(batch, f"{name}_tokens", ok, 0)
            truncated = self._filled(batch, f"{name}_truncated", ok, False)
            length = self._filled(batch, f"{name}_length", ok, 0)
            same = bool((length[ok] == lengths[stored]).all())
            self._require(same, f"{name}_length unlike the shard's")
            checksums = np.zeros(len(ok), np.uint64)
            checksums[ok] = self.shard.checksums(name)[stored]
            columns |= {f"length_{name}": length, f"xxh3_{name}": checksums}
            seen.encoders[name]["tokens"] += int(tokens.sum(dtype=np.int64))
            seen.encoders[name]["truncated"] += int(truncated.sum())
        seen.add(status, int(rows[-1]))
        return columns

    def _filled(self, batch: pa.RecordBatch, name: str, ok: Array, missing: Any) -> Array:
        """A column that is null exactly where the status is not ok, with `missing` there."""
        column = batch.column(name)
        if column.null_count == 0 and ok.all():  # nearly always: half of finalize's time is here
            plain: Array = column.to_numpy(zero_copy_only=False)
            return plain
        valid = column.is_valid().to_numpy(zero_copy_only=False)
        self._require(
            bool((valid == ok).all()), f"{name} null where status is ok, or not elsewhere"
        )
        values: Array = pc.fill_null(column, missing).to_numpy(zero_copy_only=False)
        return values

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise VerificationError(f"{self.paths.rows} has {problem}.")


class _Seen:
    """What the batches so far add up to."""

    def __init__(self, last_row: int, encoders: Sequence[str]) -> None:
        self.samples = 0
        self.last_row = last_row
        self.status = {status.label: 0 for status in Status}
        self.encoders = {name: Counter(tokens=0, truncated=0) for name in encoders}

    def add(self, status: Array, last_row: int) -> None:
        self.samples += len(status)
        self.last_row = last_row
        counts = np.bincount(status, minlength=len(Status))
        for label in Status:
            self.status[label.label] += int(counts[label])


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


def _check_size(path: Path, entry: Mapping[str, Any]) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise VerificationError(
            f"{path} cannot be read, though its unit is committed: {error.strerror}."
        ) from error
    _require_same(path, {"bytes": size}, {"bytes": entry["bytes"]})


def _check_digest(path: Path, entry: Mapping[str, Any]) -> StoredFile:
    _check_size(path, entry)
    try:
        stored = digest_file(path)
    except OSError as error:
        raise VerificationError(f"{path} cannot be read: {error.strerror}.") from error
    _require_same(path, {"sha256": stored.sha256}, {"sha256": entry["sha256"]})
    return stored


def _require_same(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for key, value in expected.items():
        if found[key] != value:
            raise VerificationError(f"{path}: {key} is {found[key]!r}, expected {value!r}.")
