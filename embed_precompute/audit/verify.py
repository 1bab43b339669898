"""Verify: is every stored byte what the records say, and is every input row accounted for?

Guarantees: `full` finds every changed, missing, cut or swapped file under the digests, and every
disagreement between plan, records, shards, rows parts, manifest and index; damage is a problem
line that names the file, never a crash. Nothing is written. An unfinished dataset is checked as far
as it goes.
Costs: `quick` reads the small files and the shards' headers; `full` reads every shard twice (its
sha256, then each row's checksum), on all cores. Memory grows by 24 bytes per sample. `deep` is
`full`, then encodes some samples again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from embed_precompute.audit.findings import Level, Report, describe
from embed_precompute.documents import flatten, to_plain
from embed_precompute.errors import InputError
from embed_precompute.samples import Status, count_failed
from embed_precompute.store.check import (
    CheckedUnit,
    check_digest,
    check_files,
    check_null,
    check_size,
    check_unit,
    in_order,
)
from embed_precompute.store.commit import QUARANTINE, TEMP_PREFIX, StoredFile
from embed_precompute.store.index import Array, DatasetIndex, IndexBuilder, id_hash
from embed_precompute.store.manifest import Totals
from embed_precompute.store.plan import PLAN_FILE, Plan, read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    Manifest,
    UnitRecord,
    committed_units,
    index_dtypes,
    list_folder,
    read_manifest,
    read_null_record,
    read_record,
    record_path,
    require_folder,
    unit_of,
    unnamed_files,
)
from embed_precompute.store.rows import READ_ROWS, iter_batches, open_parquet, rows_schema

MANIFEST, TABLE = "manifest.json", "manifest.parquet"
SMALL_FILES = (PLAN_FILE, "null.json", MANIFEST)
PROVENANCE = ("config.yaml", "run.json", "logs", QUARANTINE)
MAX_NAMED_MISSING = 20


def verify(
    root: Path,
    level: Level = "full",
    *,
    num_samples: int = 32,
    seed: int | None = None,
    device: str = "auto",
) -> Report:
    """Check the dataset in `root`; InputError when there is none.

    The last three are for `deep`: how many samples are encoded again, which (a seed that is not
    given is drawn, and stands in the report), and where.
    """
    if level not in ("quick", "full", "deep"):
        raise InputError(f"level is {level!r}: expected quick, full or deep.")
    root = Path(root)
    require_folder(root)
    if not any(os.path.lexists(root / name) for name in (PLAN_FILE, MANIFEST, "shards")):
        raise InputError(f"{root} holds no dataset: no {PLAN_FILE}, {MANIFEST} or shards.")
    report = Report(root, level, finalised=os.path.lexists(root / MANIFEST))
    plan: Plan | None = None
    with report.checking(root / PLAN_FILE):
        plan = read_plan(root)
    report.plan_rejected = plan is None
    encode_again: Callable[[], None] | None = None
    if level == "deep" and plan is not None:
        # Not above: the encoders bring torch's whole weight, and transformers.
        from embed_precompute.audit.reencode import get_ready, reencode

        # A checkpoint that is not at hand must not come out after hours, in place of the report.
        ready = get_ready(root, plan, device)
        encode_again = functools.partial(
            reencode, report, plan, ready,
            num_samples=num_samples, seed=secrets.randbits(32) if seed is None else seed,
        )  # fmt: skip
    _check_null(report, plan)
    with contextlib.ExitStack() as stack:
        derived = _Derived(report, plan, stack)
        totals = _check_units(report, plan, derived)
        derived.finish(totals)
    _note_strays(report, plan)
    if encode_again is not None:
        encode_again()
    return report


def _check_null(report: Report, plan: Plan | None) -> None:
    path = record_path(report.root, NULL_UNIT)
    if not os.path.lexists(path) and not report.finalised:
        report.null_missing = True
        return
    report.null_rejected = True
    with report.checking(path):
        if plan is None:
            check_files(report.root, read_null_record(report.root), full=True)
        else:
            check_null(report.root, plan)
        report.null_rejected = False


# --- units ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Checked:
    """A unit's record and content, or its problem."""

    record: UnitRecord | None = None
    content: CheckedUnit | None = None
    """None without a plan: then a unit is judged by its own record."""
    problem: str = ""


def _check_units(report: Report, plan: Plan | None, derived: _Derived) -> Totals | None:
    """Checks every committed unit; gives their sums if all units are there and sound."""
    root, full = report.root, report.level != "quick"
    committed: list[int] = []
    with report.checking(root / "shards"):
        committed = sorted(committed_units(root))
    report.num_units = len(committed) if plan is None else plan.num_units
    foreign = [unit for unit in committed if plan is not None and unit >= plan.num_units]
    for unit in foreign:
        path = record_path(root, unit)
        report.problem(path, f"unit {unit}", f"only units below {report.num_units}")
    report.rejected_units.update(foreign)
    units = committed[: len(committed) - len(foreign)]
    _name_missing(report, units)
    totals, builder = Totals(), IndexBuilder()
    check = functools.partial(_check, root, plan, full)
    with contextlib.closing(in_order(check, units)) as checked:
        for unit, found in zip(units, checked, strict=True):
            if found.record is None:
                report.problems.append(found.problem)
                report.rejected_units.add(unit)
                derived.stop()
                continue
            _count(report, found.record)
            totals.add(found.record)
            if found.content is not None:
                derived.compare(unit, found.content, builder.add(found.content.columns))
    ids = builder.last()
    _name_repeated(report, units, plan, ids["id_hash"])
    derived.compare_ids(ids)
    complete = plan is not None and not report.rejected_units and not report.num_missing
    return totals if complete else None


def _check(root: Path, plan: Plan | None, full: bool, unit: int) -> _Checked:
    try:
        if plan is not None:
            content = check_unit(root, plan, unit, full=full)
            return _Checked(content.record, content)
        record = read_record(root, unit)
        check_files(root, record, full=full)
        return _Checked(record)
    except Exception as error:
        return _Checked(problem=describe(record_path(root, unit), error))


def _count(report: Report, record: UnitRecord) -> None:
    report.num_samples += record.num_samples
    report.num_bytes += record.files.rows.bytes
    if report.level != "quick":
        report.num_bytes += record.files.shard.bytes
    report.num_ok[record.unit] = record.status[Status.OK.label]
    if count_failed(record.status):
        report.failed_units.add(record.unit)


def _name_missing(report: Report, units: Sequence[int]) -> None:
    """Counts the units without a record; each of the first is a problem of a finalised dataset."""
    report.num_missing = report.num_units - len(units)
    if not report.num_missing or not report.finalised:
        return
    committed = set(units)
    missing = (unit for unit in range(report.num_units) if unit not in committed)
    for unit in itertools.islice(missing, MAX_NAMED_MISSING):
        path = record_path(report.root, unit)
        report.problem(path, "no file", "a record: the dataset is finalised")
    if report.num_missing > MAX_NAMED_MISSING:
        more = report.num_missing - MAX_NAMED_MISSING
        report.problem(report.root / "shards", f"no record for {more} more units", "one for each")


def _name_repeated(report: Report, units: Sequence[int], plan: Plan | None, hashes: Array) -> None:
    """Ids that occur twice, by their sorted hashes; rows parts are read again on suspicion only."""
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if not suspects or plan is None:
        return
    seen: dict[str, int] = {}
    for unit in units:
        with report.checking(record_path(report.root, unit)):
            path = read_record(report.root, unit).rows_path(report.root)
            for batch in iter_batches(path, plan.tensors, text=False):
                for sample_id in batch.column("sample_id").to_pylist():
                    if id_hash(sample_id.encode()) not in suspects:
                        continue
                    if sample_id in seen:
                        found = f"sample id {sample_id!r}, which unit {seen[sample_id]} has too"
                        report.problem(path, found, "ids that differ")
                    seen[sample_id] = unit


# --- manifest and index ---------------------------------------------------------------------------


class _Derived:
    """manifest.json and the files it lists: by digest, then against the units, one after another.

    Where a unit is missing or damaged the comparison with units ends: repair makes these files
    again after it.
    """

    def __init__(self, report: Report, plan: Plan | None, stack: contextlib.ExitStack) -> None:
        self._report, self._plan, self._root = report, plan, report.root
        self._manifest: Manifest | None = None
        self._index: DatasetIndex | None = None
        self._positions: dict[str, int] = {}
        self._table: _Table | None = None
        if report.finalised:
            with report.checking(self._root / MANIFEST):
                self._open(read_manifest(self._root), stack)

    def _open(self, manifest: Manifest, stack: contextlib.ExitStack) -> None:
        report, problems = self._report, len(self._report.problems)
        self._manifest = manifest
        for name, entry in sorted(manifest.files.items()):
            path = self._root / name
            with report.checking(path):
                file = StoredFile(path.name, entry.bytes, entry.sha256)
                small = not name.startswith("index/") and name != TABLE
                if small or report.level != "quick":
                    check_digest(path, file)
                    report.num_bytes += file.bytes
                else:
                    check_size(path, file)
        plan = self._plan
        if plan is None or manifest.plan_id != plan.plan_id or len(report.problems) > problems:
            return
        with report.checking(self._root / "index"):
            self._index = DatasetIndex(self._root)
            self._positions = dict.fromkeys(self._index.arrays, 0)
            self._positions["id_offsets"] = 1
        if report.level != "quick":
            with report.checking(self._root / TABLE):
                self._table = _Table(self._root / TABLE, plan, stack)

    def stop(self) -> None:
        self._index = self._table = None

    def compare(self, unit: int, content: CheckedUnit, pieces: dict[str, Array]) -> None:
        """The next unit; `pieces` is what it adds to the index."""
        self._compare_index(pieces, f"of unit {unit}")
        if self._table is None:
            return
        with self._report.checking(self._table.path):
            first, stored = self._table.next(content.rows.num_rows)
            for name in stored.column_names:
                if not stored.column(name).equals(pa.chunked_array([content.rows.column(name)])):
                    rows = f"rows {first} to {first + stored.num_rows - 1}"
                    found = f"other values of {name} in {rows}"
                    expected = f"those of {content.record.rows_path(self._root)}"
                    self._report.problem(self._table.path, found, expected)

    def compare_ids(self, pieces: dict[str, Array]) -> None:
        """What the index has after all units."""
        self._compare_index(pieces, "of all ids")

    def _compare_index(self, pieces: dict[str, Array], whose: str) -> None:
        if self._index is None:
            return
        for name, piece in pieces.items():
            begin = self._positions[name]
            self._positions[name] += piece.size
            stored = self._index.arrays[name].reshape(-1)[begin : begin + piece.size]
            if not np.array_equal(stored, piece):
                path = self._root / "index" / f"{name}.npy"
                self._report.problem(path, f"other values {whose}", "those of its files")

    def finish(self, totals: Totals | None) -> None:
        """The sums of all units against plan.json and manifest.json."""
        plan, manifest = self._plan, self._manifest
        if plan is None:
            return
        if totals is not None and totals.samples != plan.num_samples:
            path = self._root / PLAN_FILE
            self._report.problem(path, f"num_samples {plan.num_samples}", totals.samples)
        if manifest is None:
            return
        expected = dataclasses.replace(
            manifest, fingerprint=plan.fingerprint, plan_id=plan.plan_id, spec=plan.spec
        )
        if totals is not None:
            expected = totals.manifest(plan, manifest.files)
        found, wanted = (flatten(to_plain(each)) for each in (manifest, expected))
        for name in sorted(found.keys() | wanted.keys()):
            is_now, should_be = (str(each.get(name, "absent")) for each in (found, wanted))
            if is_now != should_be and name != "digest":
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
        """The next `count` rows, and the number of the first."""
        while self._waiting.num_rows < count:
            more = pa.Table.from_batches([next(self._batches)])
            self._waiting = pa.concat_tables([self._waiting, more])
        first, rows = self._first, self._waiting.slice(0, count)
        self._first, self._waiting = first + count, self._waiting.slice(count)
        return first, rows


# --- stray files ----------------------------------------------------------------------------------


def _note_strays(report: Report, plan: Plan | None) -> None:
    """Notes for files that nobody reads: leftovers, other names, data that no record names."""
    root = report.root
    known = {root / name for name in (*SMALL_FILES, TABLE, "shards", "index", *PROVENANCE)}
    names = index_dtypes(tensor.name for tensor in plan.tensors) if plan is not None else {}
    known |= {root / "index" / f"{name}.npy" for name in names}
    with report.checking(root / "shards"):
        unnamed = set(unnamed_files(root))
        folders = [root, *([root / "index"] if names else []), *sorted(root.glob("shards/*"))]
        for folder in folders:
            for name in list_folder(folder):
                path = folder / name
                if path in unnamed:
                    what = "is named by no record: finalize removes it"
                elif name.startswith(TEMP_PREFIX):
                    what = "is a temporary file, of a run that goes on or died"
                elif path not in known and unit_of(root, folder, name) is None:
                    what = "is not ours"
                else:
                    continue
                report.notes.append(f"{path} {what}")
