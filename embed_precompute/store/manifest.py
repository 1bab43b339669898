"""Writes and checks the files that describe all units: manifest.parquet, index, manifest.json.

Guarantees: finalize is idempotent and a function of the committed files. It checks each unit
against its record before it adds the unit to the sums. manifest.json is written last, and an
outdated one is removed before any other file is replaced: it never lies beside a manifest.parquet
or an index that it does not describe. Shards and rows parts that no record names are removed.
Costs: one pass over all records, rows parts (without their text) and shard headers; memory holds a
row group of manifest.parquet and 24 bytes per sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from embed_precompute.documents import canonical_json, flatten, to_plain
from embed_precompute.errors import IncompleteError, InputError, StorageError, VerificationError
from embed_precompute.samples import Status
from embed_precompute.steps import Work, counted, steps
from embed_precompute.store.check import (
    CheckedUnit,
    Problems,
    check_digest,
    check_null,
    check_size,
    check_unit,
    in_order,
)
from embed_precompute.store.commit import (
    Sink,
    StagedFile,
    digest_file,
    remove_file,
    remove_leftovers,
    replace_bytes,
)
from embed_precompute.store.index import (
    TABLE,
    Array,
    Counts,
    DatasetIndex,
    EnvironmentCount,
    FileEntry,
    IndexBuilder,
    IndexWriter,
    Manifest,
    id_hash,
    read_manifest,
    tensor_entries,
)
from embed_precompute.store.plan import Plan, plan_path, read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    TokenCounts,
    UnitRecord,
    committed_units,
    document_bytes,
    read_record,
    record_path,
    refuse_linked_folders,
    unit_folders,
    unnamed_files,
)
from embed_precompute.store.rows import (
    READ_ROWS,
    Tensors,
    iter_batches,
    open_parquet,
    parquet_writer,
    rows_schema,
)

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
MANIFEST_ROW_GROUP = 1 << 16


@dataclass(frozen=True)
class Finalized:
    """What `finalize` made and removed."""

    manifest: Manifest
    num_bytes: int
    """Of the whole dataset: shards, rows parts, the null embedding, manifest and index."""
    removed_files: int = 0
    """Shards and rows parts that no record named."""
    removed_bytes: int = 0


def finalize(root: Path) -> Finalized:
    """Writes manifest.parquet, index/*.npy and, last, manifest.json; removes what no record names.

    Raises IncompleteError while a unit or the null embedding has no record, and VerificationError,
    naming the file, if a file does not agree with its record. Files that are right already are left
    alone.
    """
    plan = read_plan(root)
    refuse_linked_folders(root)
    missing = plan.num_units - sum(unit < plan.num_units for unit in committed_units(root))
    null = "" if record_path(root, NULL_UNIT).exists() else " The null embedding is missing too."
    if missing or null:
        raise IncompleteError(
            f"{root}: {missing} of {plan.num_units} units have no record.{null} Run the job again: "
            "it goes on with these."
        )
    try:
        manifest, size = _write_derived(root, plan)
    except VerificationError as error:
        raise VerificationError(
            f"{error} `embed-precompute repair {root}` takes what is damaged out of the way and "
            "opens its unit again."
        ) from error
    if plan_path(root).name == plan.file_name:  # else a job may be writing an extension
        remove_leftovers(root, root / "index", *unit_folders(root))
    num_files = num_bytes = 0
    with Work("finalising: looking for files that no record names"):
        for path in unnamed_files(root):
            with contextlib.suppress(FileNotFoundError):
                num_bytes += path.stat().st_size
                num_files += 1
            remove_file(path)
    if num_files:
        files = counted(num_files, "file")
        log.info("%s: removed %s (%d bytes) that no record names", root, files, num_bytes)
    return Finalized(manifest, size, num_files, num_bytes)


def finished_plan(root: Path) -> Plan:
    """The plan that manifest.json is of. While an extension is not finished, the plan in force is a
    later one. Raises InputError if there is no plan of that identity."""
    plan_id = read_manifest(root).plan_id
    plan = read_plan(root).as_of(plan_id)
    if plan is None:
        raise InputError(
            f"{root}: manifest.json is of plan {plan_id[:16]}, the plan there is another: it was "
            "replaced. Put it back."
        )
    return plan


def _write_derived(root: Path, plan: Plan) -> tuple[Manifest, int]:
    """manifest.json, and the bytes of the dataset without the records."""
    null = check_null(root, plan)
    small = (plan.file_name, "null.json", null.files.shard.name)
    files = {name: digest_file(root / name) for name in small}
    totals = Totals()
    check = functools.partial(check_unit, root, plan)
    with (
        contextlib.closing(in_order(check, range(plan.num_units))) as units,
        IndexWriter(root / "index", tensor_entries(plan.tensors)) as index,
        _SampleTable(root / TABLE, plan.tensors) as table,
    ):
        for unit in steps(units, plan.num_units, "finalising", " units"):
            totals.add(unit.record)
            index.add(unit.columns)
            table.append(unit.rows)
        if totals.samples != plan.num_samples:
            raise VerificationError(
                f"{root}: the units hold {totals.samples} samples, {plan.file_name} says "
                f"{plan.num_samples}."
            )
        with Work("finalising: sorting and digesting the index"):
            derived = {TABLE: table.finish()}
            derived |= {f"index/{name}.npy": staged for name, staged in index.finish().items()}
            files |= {name: staged.digest() for name, staged in derived.items()}
        entries = {name: FileEntry(file.bytes, file.sha256) for name, file in files.items()}
        manifest = totals.manifest(plan, entries)
        payload, path = document_bytes(manifest), root / MANIFEST
        try:
            # This may be a pipe: reading a pipe that has no writer never ends.
            stale = os.path.lexists(path) and not (path.is_file() and path.read_bytes() == payload)
        except OSError as error:
            raise StorageError(f"{path}: reading failed: {error.strerror}.") from error
        if plan_path(root).name != plan.file_name:
            raise IncompleteError(
                f"{root}: another job has extended it meanwhile. Run the same command again."
            )
        if stale:
            remove_file(path)
        for staged in derived.values():
            staged.replace()
        replace_bytes(path, payload)
    return manifest, totals.num_bytes + sum(file.bytes for file in files.values()) + len(payload)


class Totals:
    """Sums over the records of units, in order."""

    def __init__(self) -> None:
        self.samples = self.stored = self.units = self.num_bytes = 0
        self.status: Counter[str] = Counter({status.label: 0 for status in Status})
        self.noted: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self.vectors: Counter[str] = Counter()
        self.environments: Counter[bytes] = Counter()
        self._records = hashlib.sha256()

    def add(self, record: UnitRecord) -> None:
        self.units += 1
        self.samples += record.num_samples
        self.stored += record.num_stored
        self.num_bytes += record.files.shard.bytes + record.files.rows.bytes
        self.status.update(record.status)
        self.noted.update(record.noted)
        self.tokens.update({name: sums.tokens for name, sums in record.encoders.items()})
        self.truncated.update({name: sums.truncated for name, sums in record.encoders.items()})
        self.vectors.update(record.tensors)
        self.environments[canonical_json(record.environment)] += 1
        self._records.update(f"{record.digest}\n".encode())

    def manifest(self, plan: Plan, files: Mapping[str, FileEntry]) -> Manifest:
        """manifest.json of these units; `files` by path below the root."""
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
                noted=dict(self.noted),
                encoders={n: TokenCounts(k, self.truncated[n]) for n, k in self.tokens.items()},
                tensors=dict(self.vectors),
            ),
            environments=[
                EnvironmentCount(json.loads(environment), units)
                for environment, units in sorted(self.environments.items())
            ],
            records_sha256=self._records.hexdigest(),
            files=dict(files),
        )


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
        # One chunk: the file's pages must not depend on the batches in which the rows arrived.
        self._writer.write_table(table.slice(0, num_rows).combine_chunks(), num_rows)
        self._waiting = table.slice(num_rows).to_batches()
        self._num_waiting -= num_rows


# --- checking -------------------------------------------------------------------------------------


class DerivedCheck:
    """Compares manifest.json, manifest.parquet and the index with what the units hold.

    `plan` becomes the plan that manifest.json is of: an earlier one while an extension is not
    finished. `add` the units of that plan, in order. If one is missing or damaged, `stop`: the
    derived files are made again anyway after its repair. Costs: the files are read once, in step
    with the units; 24 bytes per sample in memory.
    """

    def __init__(self, root: Path, plan: Plan | None, problems: Problems, *, full: bool) -> None:
        self.num_bytes = 0
        """Number of bytes whose sha256 was compared."""
        self._root, self.plan, self._problems = root, plan, problems
        self._totals, self._builder = Totals(), IndexBuilder()
        self._manifest: Manifest | None = None
        self._index: DatasetIndex | None = None
        self._positions = {"id_offsets": 1}
        self._batches: Iterator[pa.RecordBatch] | None = None
        self._rows: pa.Table | None = None
        """Rows of manifest.parquet that are read and not compared yet."""
        self._complete = True
        if os.path.lexists(root / MANIFEST):
            with problems.checking(root / MANIFEST):
                self._manifest = read_manifest(root)
                self._open(self._manifest, full)

    def _open(self, manifest: Manifest, full: bool) -> None:
        before = len(self._problems)
        for name, entry in sorted(manifest.files.items()):
            with self._problems.checking(self._root / name):
                if (name.startswith("index/") or name == TABLE) and not full:
                    check_size(self._root / name, entry)
                else:
                    check_digest(self._root / name, entry)
                    self.num_bytes += entry.bytes
        if self.plan is not None:
            self.plan = self.plan.as_of(manifest.plan_id) or self.plan
        plan = self.plan
        if plan is None or manifest.plan_id != plan.plan_id or len(self._problems) > before:
            return
        with self._problems.checking(self._root / "index"):
            self._index = DatasetIndex(self._root)
        if full:
            path, schema = self._root / TABLE, rows_schema(plan.tensors, text=False)
            with self._problems.checking(path):
                file = open_parquet(path, pa.OSFile(str(path)), schema, plan.num_samples)
                self._batches = file.iter_batches(READ_ROWS, use_threads=False)
                self._rows = schema.empty_table()

    def stop(self) -> None:
        """Compares none of the units that follow, nor any sums."""
        self._complete, self._index, self._rows = False, None, None

    def add(self, unit: CheckedUnit) -> None:
        """Compares what the next unit adds."""
        first = self._totals.samples
        self._totals.add(unit.record)
        self._compare_index(self._builder.add(unit.columns), f"of unit {unit.record.unit}")
        if self._rows is None or self._batches is None:
            return
        path, count = self._root / TABLE, unit.rows.num_rows
        with self._problems.checking(path):
            while self._rows.num_rows < count:
                more = pa.Table.from_batches([next(self._batches)])
                self._rows = pa.concat_tables([self._rows, more])
            stored, self._rows = self._rows.slice(0, count), self._rows.slice(count)
            for name in stored.column_names:
                if not stored.column(name).equals(pa.chunked_array([unit.rows.column(name)])):
                    found = f"other values of {name} in rows {first} to {first + count - 1}"
                    expected = f"those of {unit.record.rows_path(self._root)}"
                    self._problems.add(path, found, expected)

    def finish(self, units: Sequence[int]) -> None:
        """Compares what all `units` add up to, and names ids that occur twice in them."""
        pieces = self._builder.last()
        self._compare_index(pieces, "of all ids")
        if self.plan is not None:
            self._name_repeated(self.plan, units, pieces["id_hash"])
            self._compare_sums(self.plan)

    def _compare_index(self, pieces: Mapping[str, Array], whose: str) -> None:
        if self._index is None:
            return
        for name, piece in pieces.items():
            begin = self._positions.get(name, 0)
            self._positions[name] = begin + piece.size
            stored = self._index.arrays[name].reshape(-1)[begin : begin + piece.size]
            if not np.array_equal(stored, piece):
                path = self._root / "index" / f"{name}.npy"
                self._problems.add(path, f"other values {whose}", "those of its files")

    def _name_repeated(self, plan: Plan, units: Sequence[int], hashes: Array) -> None:
        """Names ids that occur twice; reads rows parts again only if two hashes are equal."""
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: dict[str, int] = {}
        for unit in units if suspects else ():
            with self._problems.checking(self._root / "shards"):
                path = read_record(self._root, unit).rows_path(self._root)
                for batch in iter_batches(path, plan.tensors, text=False):
                    for sample_id in batch.column("sample_id").to_pylist():
                        if id_hash(sample_id.encode()) not in suspects:
                            continue
                        if sample_id in seen:
                            found = f"sample id {sample_id!r}, which unit {seen[sample_id]} has too"
                            self._problems.add(path, found, "ids that differ")
                        seen[sample_id] = unit

    def _compare_sums(self, plan: Plan) -> None:
        """Compares plan and manifest.json with the sums over all records."""
        manifest = self._manifest
        if self._complete and self._totals.samples != plan.num_samples:
            found = f"num_samples {plan.num_samples}"
            self._problems.add(self._root / plan.file_name, found, self._totals.samples)
        if manifest is None:
            return
        if self._complete:
            expected = self._totals.manifest(plan, manifest.files)
        else:
            expected = dataclasses.replace(
                manifest, fingerprint=plan.fingerprint, plan_id=plan.plan_id
            )
        stored, wanted = (flatten(to_plain(each)) for each in (manifest, expected))
        for name in sorted((stored.keys() | wanted.keys()) - {"digest"}):
            is_now, should_be = (str(each.get(name, "absent")) for each in (stored, wanted))
            if is_now != should_be:
                path = self._root / MANIFEST
                self._problems.add(path, f"{name} {is_now:.80}", f"{should_be:.80}")
