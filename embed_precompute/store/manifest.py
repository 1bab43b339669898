"""The dataset as a whole: finalize turns committed units into manifest, index and root manifest.

Guarantees: finalize is idempotent and a function of the committed files; it checks every unit
against its record before it counts; manifest.json is written last, and never stands beside files it
does not describe. With it, this module offers all the rest of a dataset's bookkeeping by one name.
Costs: one pass over all records, rows parts (without their text), and shard headers; memory holds a
row group of manifest.parquet and about a million id hashes, whatever the number of rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from embed_precompute.documents import canonical_json
from embed_precompute.errors import IncompleteError, StorageError, VerificationError
from embed_precompute.samples import Status
from embed_precompute.store.commit import (
    Sink,
    StagedFile,
    StoredFile,
    digest_file,
    replace_bytes,
)
from embed_precompute.store.committed import CommittedUnit, check_null, open_units
from embed_precompute.store.index import IndexWriter
from embed_precompute.store.joined import joined
from embed_precompute.store.leftovers import remove_file, remove_leftovers
from embed_precompute.store.records import (
    UnitPaths,
    committed_units,
    null_paths,
    read_plan,
    read_record,
    refuse_linked_folders,
    stored_tensors,
    unit_paths,
)
from embed_precompute.store.rows import (
    StoredSample,
    is_sound_orphan,
    iter_batches,
    parquet_writer,
    read_samples,
    rows_digest,
    rows_part_bytes,
    rows_schema,
)
from embed_precompute.store.sealed import FORMAT_VERSION, seal
from embed_precompute.store.shards import StoredTensor

__all__ = [
    "StoredSample",
    "UnitPaths",
    "committed_units",
    "finalize",
    "is_sound_orphan",
    "iter_batches",
    "null_paths",
    "read_plan",
    "read_record",
    "read_samples",
    "rows_digest",
    "rows_part_bytes",
    "rows_schema",
    "stored_tensors",
    "unit_paths",
]

MANIFEST_ROW_GROUP = 1 << 16


def finalize(root: Path) -> dict[str, Any]:
    """Writes manifest.parquet, index/*.npy and, last, manifest.json; returns what that holds.

    IncompleteError while a unit or the null embedding has no record; VerificationError naming the
    file when one is not what its record says. Files that are right already are left alone.
    """
    try:
        return _finalize(root)
    except VerificationError as error:
        raise VerificationError(
            f"{error} `embed-precompute repair {root}` takes what is damaged out of the way and "
            "opens its unit again."
        ) from error


def _finalize(root: Path) -> dict[str, Any]:
    plan = read_plan(root)
    refuse_linked_folders(root)
    tensors = stored_tensors(plan["spec"])
    _require_complete(root, plan["num_units"])
    null = check_null(root, plan, tensors)
    files = {name: digest_file(root / name) for name in ("plan.json", "null.json")}
    files["null.safetensors"] = null
    names = [tensor.name for tensor in tensors]
    totals = _Totals(names)
    with (
        contextlib.closing(open_units(root, plan, tensors)) as units,
        IndexWriter(root / "index", names) as index,
        _SampleTable(root / "manifest.parquet", names) as table,
    ):
        for batch, columns in joined(_counted(units, index, totals)):
            index.append(columns, batch.column("sample_id").cast(pa.binary()).to_pylist())
            table.append(batch)
        if totals.samples != plan["num_samples"]:
            raise VerificationError(
                f"{root}: the units hold {totals.samples} samples, plan.json says "
                f"{plan['num_samples']}."
            )
        derived = {"manifest.parquet": table.finish()}
        derived |= {f"index/{name}.npy": staged for name, staged in index.finish().items()}
        files |= {name: staged.digest() for name, staged in derived.items()}
        payload = seal(_root_manifest(plan, tensors, totals, files))
        _replace_derived(root, derived, payload)
    remove_leftovers(root, root / "index", *(root / "shards").iterdir())
    manifest: dict[str, Any] = json.loads(payload)
    return manifest


def _counted(
    units: Iterable[CommittedUnit], index: IndexWriter, totals: _Totals
) -> Iterator[CommittedUnit]:
    """`units`, each noted as it passes."""
    for unit in units:
        index.add_unit(unit.record["num_samples"], unit.record["num_stored"])
        totals.add(unit.record)
        yield unit


def _require_complete(root: Path, num_units: int) -> None:
    missing = num_units - sum(unit < num_units for unit in committed_units(root))
    null = "" if null_paths(root).record.exists() else " The null embedding is missing too."
    if missing or null:
        raise IncompleteError(
            f"{root}: {missing} of {num_units} units have no record.{null} Run the job again: it "
            "goes on with these."
        )


class _Totals:
    """Sums over the units' records."""

    def __init__(self, encoders: Sequence[str]) -> None:
        self.samples = self.stored = 0
        self.status: Counter[str] = Counter({status.label: 0 for status in Status})
        self.encoders: dict[str, Counter[str]] = {name: Counter() for name in encoders}
        self.environments: Counter[bytes] = Counter()
        self._last_environment: dict[str, str] | None = None
        self._environment = b""
        self.records = hashlib.sha256()

    def add(self, record: dict[str, Any]) -> None:
        self.samples += record["num_samples"]
        self.stored += record["num_stored"]
        for label, count in record["status"].items():
            self.status[label] += count
        for name, sums in record["encoders"].items():
            encoder = self.encoders[name]
            for key, count in sums.items():
                encoder[key] += count
        if record["environment"] != self._last_environment:
            self._last_environment = record["environment"]
            self._environment = canonical_json(record["environment"])
        self.environments[self._environment] += 1
        self.records.update(f"{record['digest']}\n".encode())


def _root_manifest(
    plan: dict[str, Any],
    tensors: Sequence[StoredTensor],
    totals: _Totals,
    files: dict[str, StoredFile],
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "kind": "dataset",
        "fingerprint": plan["fingerprint"],
        "plan": plan["plan"],
        "spec": plan["spec"],
        "encoders": {
            t.name: {
                "tensor": f"text_{t.name}",
                "pooled": t.pooled,
                "dim": t.dim,
                "dtype": t.dtype,
            }
            for t in tensors
        },
        "counts": {
            "rows": plan["num_rows"],
            "samples": totals.samples,
            "units": plan["num_units"],
            "stored": totals.stored,
            "status": dict(totals.status),
            "encoders": {name: dict(sums) for name, sums in totals.encoders.items()},
        },
        "environments": [
            {"environment": json.loads(environment), "units": units}
            for environment, units in sorted(totals.environments.items())
        ],
        "records_sha256": totals.records.hexdigest(),
        "files": {name: {"bytes": f.bytes, "sha256": f.sha256} for name, f in files.items()},
    }


def _replace_derived(root: Path, derived: dict[str, StagedFile], payload: bytes) -> None:
    """The derived files, then manifest.json: it never stands beside files it does not describe."""
    path = root / "manifest.json"
    try:
        # What is no file may be a pipe, which nobody writes to.
        stale = os.path.lexists(path) and not (path.is_file() and path.read_bytes() == payload)
    except OSError as error:
        raise StorageError(f"{path}: reading failed: {error.strerror}.") from error
    if stale:
        remove_file(path)
    for staged in derived.values():
        staged.replace()
    replace_bytes(path, payload)


class _SampleTable:
    """manifest.parquet: every sample, streamed in row groups of exactly 65,536."""

    def __init__(self, target: Path, encoders: Sequence[str]) -> None:
        self._staged = StagedFile(target)
        self._schema = rows_schema(encoders, text=False)
        try:
            self._writer = parquet_writer(Sink(self._staged), self._schema)
        except BaseException:
            self._staged.discard()
            raise
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0

    def __enter__(self) -> _SampleTable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(StorageError):  # pyarrow insists on a footer, here for nobody
            self._writer.close()
        self._staged.discard()

    def append(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        self._num_waiting += batch.num_rows
        while self._num_waiting >= MANIFEST_ROW_GROUP:
            self._write(MANIFEST_ROW_GROUP)

    def finish(self) -> StagedFile:
        if self._num_waiting:
            self._write(self._num_waiting)
        self._writer.close()
        return self._staged

    def _write(self, num_rows: int) -> None:
        table = pa.Table.from_batches(self._waiting, self._schema)
        # One chunk: how the rows came in batches must not show in the file's pages.
        self._writer.write_table(table.slice(0, num_rows).combine_chunks(), num_rows)
        self._waiting = table.slice(num_rows).to_batches()
        self._num_waiting -= num_rows
