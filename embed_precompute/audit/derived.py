"""The check of what finalize makes of the units: manifest.json, manifest.parquet and the index.

Costs: the derived files are read once, in step with the units; 24 bytes per sample in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa

from embed_precompute.audit.findings import Report
from embed_precompute.documents import flatten, to_plain
from embed_precompute.store.check import CheckedUnit, check_digest, check_size
from embed_precompute.store.commit import StoredFile
from embed_precompute.store.index import Array, DatasetIndex, IndexBuilder, id_hash
from embed_precompute.store.manifest import Totals
from embed_precompute.store.plan import PLAN_FILE, Plan
from embed_precompute.store.records import Manifest, read_manifest, read_record
from embed_precompute.store.rows import READ_ROWS, iter_batches, open_parquet, rows_schema

MANIFEST, TABLE = "manifest.json", "manifest.parquet"


class Derived:
    """Compares the derived files with what their digests and the units say they hold.

    `add` the units in order. Where one is missing or damaged, `stop`: repair makes the derived
    files again after it.
    """

    def __init__(self, report: Report, plan: Plan | None, stack: contextlib.ExitStack) -> None:
        self._report, self._plan, self._root = report, plan, report.root
        self._totals, self._builder = Totals(), IndexBuilder()
        self._manifest: Manifest | None = None
        self._index: DatasetIndex | None = None
        self._positions = {"id_offsets": 1}
        self._table: _Table | None = None
        self._complete = True
        if report.finalised:
            with report.checking(self._root / MANIFEST):
                self._open(read_manifest(self._root), stack)

    def _open(self, manifest: Manifest, stack: contextlib.ExitStack) -> None:
        report, problems = self._report, len(self._report.problems)
        self._manifest = manifest
        for name, entry in sorted(manifest.files.items()):
            with report.checking(self._root / name):
                file = StoredFile(name, entry.bytes, entry.sha256)
                large = name.startswith("index/") or name == TABLE
                if large and report.level == "quick":
                    check_size(self._root / name, file)
                else:
                    check_digest(self._root / name, file)
                    report.num_bytes += file.bytes
        plan = self._plan
        if plan is None or manifest.plan_id != plan.plan_id or len(report.problems) > problems:
            return
        with report.checking(self._root / "index"):
            self._index = DatasetIndex(self._root)
        if report.level != "quick":
            with report.checking(self._root / TABLE):
                self._table = _Table(self._root / TABLE, plan, stack)

    def stop(self) -> None:
        """From here on there is nothing to compare with."""
        self._complete, self._index, self._table = False, None, None

    def add(self, unit: CheckedUnit) -> None:
        """Compares what the next unit adds."""
        self._totals.add(unit.record)
        self._compare_index(self._builder.add(unit.columns), f"of unit {unit.record.unit}")
        if self._table is None:
            return
        with self._report.checking(self._table.path):
            first, stored = self._table.next(unit.rows.num_rows)
            for name in stored.column_names:
                if not stored.column(name).equals(pa.chunked_array([unit.rows.column(name)])):
                    last = first + stored.num_rows - 1
                    found = f"other values of {name} in rows {first} to {last}"
                    rows = unit.record.rows_path(self._root)
                    self._report.problem(self._table.path, found, f"those of {rows}")

    def finish(self, units: list[int]) -> None:
        """Compares what all units add up to, and names ids that occur twice in them."""
        pieces = self._builder.last()
        self._compare_index(pieces, "of all ids")
        if self._plan is not None:
            self._name_repeated(self._plan, units, pieces["id_hash"])
            self._compare_sums(self._plan)

    def _compare_index(self, pieces: dict[str, Array], whose: str) -> None:
        if self._index is None:
            return
        for name, piece in pieces.items():
            begin = self._positions.get(name, 0)
            self._positions[name] = begin + piece.size
            stored = self._index.arrays[name].reshape(-1)[begin : begin + piece.size]
            if not np.array_equal(stored, piece):
                path = self._root / "index" / f"{name}.npy"
                self._report.problem(path, f"other values {whose}", "those of its files")

    def _name_repeated(self, plan: Plan, units: list[int], hashes: Array) -> None:
        """The rows parts are read again only where two hashes are equal."""
        suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
        seen: dict[str, int] = {}
        for unit in units if suspects else ():
            with self._report.checking(self._root / "shards"):
                path = read_record(self._root, unit).rows_path(self._root)
                for batch in iter_batches(path, plan.tensors, text=False):
                    for sample_id in batch.column("sample_id").to_pylist():
                        if id_hash(sample_id.encode()) not in suspects:
                            continue
                        if sample_id in seen:
                            found = f"sample id {sample_id!r}, which unit {seen[sample_id]} has too"
                            self._report.problem(path, found, "ids that differ")
                        seen[sample_id] = unit

    def _compare_sums(self, plan: Plan) -> None:
        """plan.json and manifest.json against the sums over all records."""
        if self._complete and self._totals.samples != plan.num_samples:
            path = self._root / PLAN_FILE
            self._report.problem(path, f"num_samples {plan.num_samples}", self._totals.samples)
        manifest = self._manifest
        if manifest is None:
            return
        if self._complete:
            expected = self._totals.manifest(plan, manifest.files)
        else:
            expected = dataclasses.replace(
                manifest, fingerprint=plan.fingerprint, plan_id=plan.plan_id
            )
        found, wanted = (flatten(to_plain(each)) for each in (manifest, expected))
        for name in sorted((found.keys() | wanted.keys()) - {"digest"}):
            is_now, should_be = (str(each.get(name, "absent")) for each in (found, wanted))
            if is_now != should_be:
                path = self._root / MANIFEST
                self._report.problem(path, f"{name} {is_now:.80}", f"{should_be:.80}")


class _Table:
    """manifest.parquet, read once from its first row to its last."""

    def __init__(self, path: Path, plan: Plan, stack: contextlib.ExitStack) -> None:
        self.path = path
        source = stack.enter_context(pa.OSFile(str(path)))
        schema = rows_schema(plan.tensors, text=False)
        file = stack.enter_context(open_parquet(path, source, schema, plan.num_samples))
        self._batches = file.iter_batches(READ_ROWS, use_threads=False)
        self._waiting: pa.Table = schema.empty_table()
        self._first = 0

    def next(self, count: int) -> tuple[int, pa.Table]:
        """The number of the next row, and the next `count` rows."""
        while self._waiting.num_rows < count:
            more = pa.Table.from_batches([next(self._batches)])
            self._waiting = pa.concat_tables([self._waiting, more])
        first, rows = self._first, self._waiting.slice(0, count)
        self._first, self._waiting = first + count, self._waiting.slice(count)
        return first, rows
