"""The dataset as a whole: finalize turns committed units into manifest, index and root manifest.

Guarantees: finalize is idempotent and a function of the committed files; it checks every unit
against its record before it counts it. manifest.json is written last, and never stands next to
files it does not describe. What no record names is removed.
Costs: one pass over all records, rows parts (without their text), and shard headers; memory holds a
row group of manifest.parquet and 24 bytes per sample.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from embed_precompute.documents import canonical_json
from embed_precompute.errors import IncompleteError, StorageError, VerificationError
from embed_precompute.samples import Status
from embed_precompute.store.check import check_null, check_unit, in_order
from embed_precompute.store.commit import (
    Sink,
    StagedFile,
    digest_file,
    remove_file,
    remove_leftovers,
    replace_bytes,
)
from embed_precompute.store.index import IndexWriter
from embed_precompute.store.plan import PLAN_FILE, Plan, read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    Counts,
    EnvironmentCount,
    FileEntry,
    Manifest,
    TokenCounts,
    UnitRecord,
    committed_units,
    document_bytes,
    record_path,
    refuse_linked_folders,
    tensor_entries,
    unit_folders,
    unnamed_files,
)
from embed_precompute.store.rows import Tensors, parquet_writer, rows_schema

log = logging.getLogger(__name__)
MANIFEST_ROW_GROUP = 1 << 16


@dataclass(frozen=True)
class Finalized:
    """What `finalize` made and removed."""

    manifest: Manifest
    removed_files: int = 0
    """Shards and rows parts that no record named."""
    removed_bytes: int = 0


def finalize(root: Path) -> Finalized:
    """Writes manifest.parquet, index/*.npy and, last, manifest.json; removes what no record names.

    IncompleteError while a unit or the null embedding has no record; VerificationError naming the
    file when one is not what its record says. Files that are right already are left alone.
    """
    plan = read_plan(root)
    refuse_linked_folders(root)
    _require_complete(root, plan.num_units)
    try:
        manifest = _write_derived(root, plan)
    except VerificationError as error:
        raise VerificationError(
            f"{error} `embed-precompute repair {root}` takes what is damaged out of the way and "
            "opens its unit again."
        ) from error
    remove_leftovers(root, root / "index", *unit_folders(root))
    finalized = Finalized(manifest, *_remove_unnamed(root))
    if finalized.removed_files:
        log.info(
            "%s: removed %d files (%d bytes) that no record names",
            root, finalized.removed_files, finalized.removed_bytes,
        )  # fmt: skip
    return finalized


def _require_complete(root: Path, num_units: int) -> None:
    missing = num_units - sum(unit < num_units for unit in committed_units(root))
    null = "" if record_path(root, NULL_UNIT).exists() else " The null embedding is missing too."
    if missing or null:
        raise IncompleteError(
            f"{root}: {missing} of {num_units} units have no record.{null} Run the job again: it "
            "goes on with these."
        )


def _write_derived(root: Path, plan: Plan) -> Manifest:
    null = check_null(root, plan)
    files = {name: digest_file(root / name) for name in (PLAN_FILE, "null.json")}
    files[null.files.shard.name] = null.files.shard
    totals = Totals()
    check = functools.partial(check_unit, root, plan)
    with (
        contextlib.closing(in_order(check, range(plan.num_units))) as units,
        IndexWriter(root / "index", [tensor.name for tensor in plan.tensors]) as index,
        _SampleTable(root / "manifest.parquet", plan.tensors) as table,
    ):
        for unit in units:
            totals.add(unit.record)
            index.add(unit.columns)
            table.append(unit.rows)
        if totals.samples != plan.num_samples:
            raise VerificationError(
                f"{root}: the units hold {totals.samples} samples, plan.json says "
                f"{plan.num_samples}."
            )
        derived = {"manifest.parquet": table.finish()}
        derived |= {f"index/{name}.npy": staged for name, staged in index.finish().items()}
        files |= {name: staged.digest() for name, staged in derived.items()}
        entries = {name: FileEntry(file.bytes, file.sha256) for name, file in files.items()}
        manifest = totals.manifest(plan, entries)
        _replace_derived(root, list(derived.values()), document_bytes(manifest))
    return manifest


class Totals:
    """Sums over the records of units, in order."""

    def __init__(self) -> None:
        self.samples = self.stored = self.units = 0
        self.status: Counter[str] = Counter({status.label: 0 for status in Status})
        self.tokens: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self.vectors: Counter[str] = Counter()
        self.environments: Counter[bytes] = Counter()
        self._records = hashlib.sha256()

    def add(self, record: UnitRecord) -> None:
        self.units += 1
        self.samples += record.num_samples
        self.stored += record.num_stored
        self.status.update(record.status)
        self.tokens.update({name: sums.tokens for name, sums in record.encoders.items()})
        self.truncated.update({name: sums.truncated for name, sums in record.encoders.items()})
        self.vectors.update(record.tensors)
        self.environments[canonical_json(record.environment)] += 1
        self._records.update(f"{record.digest}\n".encode())

    def manifest(self, plan: Plan, files: Mapping[str, FileEntry]) -> Manifest:
        """manifest.json of these units; `files` by path below the root."""
        encoders = {name: TokenCounts(n, self.truncated[name]) for name, n in self.tokens.items()}
        return Manifest(
            fingerprint=plan.fingerprint,
            plan_id=plan.plan_id,
            spec=plan.spec,
            tensors=tensor_entries(plan.tensors),
            counts=Counts(
                rows=plan.num_rows,
                samples=self.samples,
                units=self.units,
                stored=self.stored,
                status=dict(self.status),
                encoders=encoders,
                tensors=dict(self.vectors),
            ),
            environments=[
                EnvironmentCount(json.loads(environment), units)
                for environment, units in sorted(self.environments.items())
            ],
            records_sha256=self._records.hexdigest(),
            files=dict(files),
        )


def _replace_derived(root: Path, derived: Sequence[StagedFile], payload: bytes) -> None:
    """The derived files, then manifest.json: it never stands next to files it does not describe."""
    path = root / "manifest.json"
    try:
        # What is no file may be a pipe, which nobody writes to.
        stale = os.path.lexists(path) and not (path.is_file() and path.read_bytes() == payload)
    except OSError as error:
        raise StorageError(f"{path}: reading failed: {error.strerror}.") from error
    if stale:
        remove_file(path)
    for staged in derived:
        staged.replace()
    replace_bytes(path, payload)


def _remove_unnamed(root: Path) -> tuple[int, int]:
    """Removes shards and rows parts that no record names; (files, bytes)."""
    files = size = 0
    for path in unnamed_files(root, checked=True):
        with contextlib.suppress(FileNotFoundError):
            size += path.stat().st_size
            files += 1
        remove_file(path)
    return files, size


class _SampleTable:
    """manifest.parquet: every sample, streamed in row groups of exactly 65,536."""

    def __init__(self, target: Path, tensors: Tensors) -> None:
        self._staged = StagedFile(target)
        self._schema = rows_schema(tensors, text=False)
        try:
            self._writer = parquet_writer(Sink(self._staged), self._schema)
        except BaseException:
            self._staged.discard()
            raise
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0

    def __enter__(self) -> _SampleTable:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(StorageError):  # pyarrow insists on a footer, which nobody needs
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
