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
import functools
import itertools
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from embed_precompute.audit.derived import MANIFEST, TABLE, Derived
from embed_precompute.audit.findings import Level, Report, describe
from embed_precompute.errors import InputError
from embed_precompute.samples import Status, count_failed
from embed_precompute.store.check import (
    CheckedUnit,
    check_files,
    check_null,
    check_unit,
    in_order,
)
from embed_precompute.store.commit import QUARANTINE, TEMP_PREFIX
from embed_precompute.store.plan import PLAN_FILE, Plan, read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    UnitRecord,
    committed_units,
    index_dtypes,
    list_folder,
    read_null_record,
    read_record,
    record_path,
    require_folder,
    unit_of,
    unnamed_files,
)

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
        from embed_precompute.audit.deep import compare_samples, open_references

        # That a checkpoint is missing must be said now, not after hours in place of the report.
        references = open_references(root, plan, device)
        encode_again = functools.partial(
            compare_samples, report, plan, references,
            num_samples=num_samples, seed=secrets.randbits(32) if seed is None else seed,
        )  # fmt: skip
    _check_null(report, plan)
    with contextlib.ExitStack() as stack:
        _check_units(report, plan, Derived(report, plan, stack))
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


def _check_units(report: Report, plan: Plan | None, derived: Derived) -> None:
    """Checks every committed unit, and what is derived of them all."""
    root = report.root
    committed: list[int] = []
    with report.checking(root / "shards"):
        committed = sorted(committed_units(root))
    report.num_units = len(committed) if plan is None else plan.num_units
    units = [unit for unit in committed if unit < report.num_units or plan is None]
    for unit in committed[len(units) :]:
        path = record_path(root, unit)
        report.problem(path, f"unit {unit}", f"only units below {report.num_units}")
        report.rejected_units.add(unit)
    report.num_missing = report.num_units - len(units)
    if report.num_missing or report.rejected_units or plan is None:
        derived.stop()
    if report.num_missing and report.finalised:
        _name_missing(report, set(units))
    check = functools.partial(_check, root, plan, report.level != "quick")
    with contextlib.closing(in_order(check, units)) as checked:
        for unit, found in zip(units, checked, strict=True):
            if isinstance(found, str):
                report.problems.append(found)
                report.rejected_units.add(unit)
                derived.stop()
                continue
            _count(report, found.record if isinstance(found, CheckedUnit) else found)
            if isinstance(found, CheckedUnit):
                derived.add(found)
    derived.finish(units)


def _check(root: Path, plan: Plan | None, full: bool, unit: int) -> CheckedUnit | UnitRecord | str:
    """A sound unit, or its problem. Without a plan a unit is judged by its own record."""
    try:
        if plan is not None:
            return check_unit(root, plan, unit, full=full)
        record = read_record(root, unit)
        check_files(root, record, full=full)
        return record
    except Exception as error:
        return describe(record_path(root, unit), error)


def _count(report: Report, record: UnitRecord) -> None:
    report.num_samples += record.num_samples
    report.num_bytes += record.files.rows.bytes
    if report.level != "quick":
        report.num_bytes += record.files.shard.bytes
    report.num_ok[record.unit] = record.status[Status.OK.label]
    if count_failed(record.status):
        report.failed_units.add(record.unit)


def _name_missing(report: Report, committed: set[int]) -> None:
    missing = (unit for unit in range(report.num_units) if unit not in committed)
    for unit in itertools.islice(missing, MAX_NAMED_MISSING):
        path = record_path(report.root, unit)
        report.problem(path, "no file", "a record: the dataset is finalised")
    if report.num_missing > MAX_NAMED_MISSING:
        more = report.num_missing - MAX_NAMED_MISSING
        report.problem(report.root / "shards", f"no record for {more} more units", "one for each")


def _note_strays(report: Report, plan: Plan | None) -> None:
    """Notes for files that nobody reads: leftovers, other names, data that no record names."""
    root = report.root
    known = {root / name for name in (*SMALL_FILES, TABLE, "shards", "index", *PROVENANCE)}
    names = index_dtypes(tensor.name for tensor in plan.tensors) if plan is not None else {}
    known |= {root / "index" / f"{name}.npy" for name in names}
    with report.checking(root / "shards"):
        sound = report.null_sound and not (report.rejected_units or report.num_missing)
        unnamed = set(unnamed_files(root, checked=sound))
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
