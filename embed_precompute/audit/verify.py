"""Verify: is every stored byte what the records say, and is every input row accounted for?

Guarantees: if a file has a digest, `full` finds any change, cut, swap or loss of that file. It also
finds every disagreement between plan, records, shards, rows parts, manifest and index. Damage is a
problem line that names the file, never a crash. `verify` writes nothing, `note_result` one file for
people. An unfinished dataset is checked as far as it goes.
Costs: `quick` reads the small files and the shards' heads; `full` reads every byte once, on all
cores. Memory grows by 24 bytes per sample. `deep` is
`full`, then some samples are encoded again.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from embed_precompute.errors import InputError, StorageError
from embed_precompute.samples import Status, count_failed
from embed_precompute.steps import counted, steps
from embed_precompute.store.check import (
    CheckedUnit,
    Problems,
    check_files,
    check_null,
    check_unit,
    describe,
    in_order,
)
from embed_precompute.store.commit import TEMP_PREFIX, replace_bytes
from embed_precompute.store.index import index_dtypes, tensor_entries
from embed_precompute.store.manifest import MANIFEST, DerivedCheck
from embed_precompute.store.plan import (
    PLAN_FILE,
    Plan,
    damaged_earlier_plans,
    plan_path,
    read_plan,
)
from embed_precompute.store.records import (
    NULL_UNIT,
    OWN_NAMES,
    PLAN_NAME,
    UnitRecord,
    committed_units,
    list_folder,
    read_null_record,
    read_record,
    record_path,
    refuse_linked_folders,
    require_folder,
    unit_of,
    unnamed_files,
)

Level = Literal["quick", "full", "deep"]
"""deep: as full, and random samples are encoded again."""
MAX_NAMED_MISSING = MAX_NOTES = 20
MAX_NOTED = 10
RESULT = Path("logs", "verify.json")
"""What the last check said, for the report: outside the digests."""


@dataclass
class Report:
    """What verify found."""

    root: Path
    level: Level
    problems: Problems = field(default_factory=Problems)
    """One line each: the file, what was found, what was expected."""
    notes: list[str] = field(default_factory=list)
    """Files that are not of the dataset; they do no harm."""
    finalised: bool = False
    """There is a manifest.json."""
    extending: bool = False
    """That manifest.json is of the plan before an extension."""
    num_units: int = 0
    num_missing: int = 0
    """Number of units without a record."""
    num_lost: int = 0
    """How many of them are units that manifest.json describes."""
    null_missing: bool = False
    """The null embedding is not made yet."""
    num_samples: int = 0
    num_bytes: int = 0
    """Number of bytes whose digest was compared."""
    deep: str = ""
    """The outcome of encoding samples again."""
    plan_rejected: bool = False
    null_rejected: bool = False
    rejected_units: set[int] = field(default_factory=set)
    """Units that have a record, and a problem in one of their files."""
    failed_units: set[int] = field(default_factory=set)
    """Units without a problem that hold a sample with status non_finite."""
    num_ok: dict[int, int] = field(default_factory=dict)
    """Unit without a problem -> number of its samples whose status is ok."""

    @property
    def complete(self) -> bool:
        """Everything is committed, and manifest.json describes it."""
        left = self.num_missing or self.null_missing
        return self.finalised and not self.extending and not left

    @property
    def null_sound(self) -> bool:
        return not self.null_missing and not self.null_rejected

    def summary(self) -> str:
        """What was checked and the outcome, then notes; several lines."""
        checked = self.num_units - self.num_missing
        state = "finalised" if self.finalised else "not finalised"
        lines = [
            f"{self.root}: {self.level} check, {checked:,} of {self.num_units:,} units, "
            f"{self.num_samples:,} samples, {state}, digests of {self.num_bytes:,} bytes"
        ]
        if self.num_missing or self.null_missing:
            null = ", and no null embedding" if self.null_missing else ""
            units = counted(self.num_missing, "unit")
            lines.append(f"  incomplete: {units} without a record{null}: run the job again")
        elif not self.complete:
            lines.append(f"  not finalised: run `embed-precompute finalize {self.root}`")
        if self.deep:
            lines.append(f"  {self.deep}")
        lines += [f"  note: {note}" for note in self.notes[:MAX_NOTES]]
        if len(self.notes) > MAX_NOTES:
            lines.append(f"  note: and {len(self.notes) - MAX_NOTES:,} more files like these")
        count = len(self.problems)
        where = "" if self.complete else " in what is committed"
        lines.append(f"  {counted(count, 'problem') if count else 'no problems'}{where}")
        if count:
            lines.append(
                f"  `embed-precompute repair {self.root}` moves what is damaged away, and the next "
                "run makes it again"
            )
        return "\n".join(lines)


def verify(
    root: Path,
    level: Level = "full",
    *,
    num_samples: int = 32,
    seed: int | None = None,
    device: str = "auto",
    share: Callable[[Plan], Mapping[int, str]] | None = None,
) -> Report:
    """Check the dataset in `root`. Raises InputError if there is none.

    `num_samples`, `seed` and `device` are for `deep`: how many samples are encoded again, the seed
    that selects them, and the device. Without a seed a random seed is drawn; the report names it.
    `share` has other processes read the shards: it returns the problem of each unit that they have
    checked, "" if it is sound (see `check_shares`).
    """
    if level not in ("quick", "full", "deep"):
        raise InputError(f"level is {level!r}: expected quick, full or deep.")
    root = Path(root)
    require_folder(root)
    ours = (plan_path(root), root / MANIFEST, root / "shards")
    if not any(map(os.path.lexists, ours)):
        raise InputError(f"{root} holds no dataset: no {PLAN_FILE}, {MANIFEST} or shards.")
    report = Report(root, level, finalised=os.path.lexists(root / MANIFEST))
    plan: Plan | None = None
    with report.problems.checking(plan_path(root)):
        plan = read_plan(root)
    report.plan_rejected = plan is None
    encode_again: Callable[..., str] | None = None
    if level == "deep" and plan is not None:
        # Imported here, because the encoders import torch and transformers, which takes time.
        from embed_precompute.audit.deep import compare_samples, open_references

        # A missing checkpoint must be an error now: after hours it would replace the report.
        references = open_references(root, plan, device)
        encode_again = functools.partial(compare_samples, root, plan, references)
    checked: Mapping[int, str] = {}
    if plan is not None and level != "quick" and share is not None:
        checked = share(plan)
    for earlier in damaged_earlier_plans(root, plan) if plan is not None else ():
        expected = f"plan {earlier.plan_id[:16]}, which {plan_path(root).name} extends"
        report.problems.add(root / earlier.file_name, "no file, or a damaged one", expected)
    _check_null(report, plan)
    _check_units(report, plan, checked)
    _note_strays(report, plan)
    if encode_again is not None:
        report.deep = encode_again(
            report.num_ok,
            null=report.null_sound,
            num_samples=num_samples,
            seed=secrets.randbits(32) if seed is None else seed,
            problem=report.problems.add,
        )
    return report


def note_result(report: Report, seconds: float) -> None:
    """Writes what was found to RESULT, which took `seconds`. A folder that cannot be written is no
    error: the result was printed."""
    found = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "level": report.level,
        "complete": report.complete,
        "problems": len(report.problems),
        "first": report.problems[:MAX_NOTED],
        "bytes": report.num_bytes,
        "seconds": round(seconds, 1),
    }
    with contextlib.suppress(StorageError, InputError):
        refuse_linked_folders(report.root)
        replace_bytes(report.root / RESULT, json.dumps(found, indent=2).encode() + b"\n")


def _check_null(report: Report, plan: Plan | None) -> None:
    path = record_path(report.root, NULL_UNIT)
    if not os.path.lexists(path) and not report.finalised:
        report.null_missing = True
        return
    report.null_rejected = True
    with report.problems.checking(path):
        if plan is None:
            check_files(report.root, read_null_record(report.root), full=True)
        else:
            check_null(report.root, plan)
        report.null_rejected = False


def _check_units(report: Report, plan: Plan | None, checked: Mapping[int, str]) -> None:
    """Checks every committed unit, and what finalize made of them all. `checked`: the problem of
    each unit whose bytes other processes have read, "" if it has none."""
    root, problems, full = report.root, report.problems, report.level != "quick"
    derived = DerivedCheck(root, plan, problems, full=full)
    committed: list[int] = []
    with problems.checking(root / "shards"):
        committed = sorted(committed_units(root))
    report.num_units = len(committed) if plan is None else plan.num_units
    units = [unit for unit in committed if unit < report.num_units or plan is None]
    for unit in committed[len(units) :]:
        expected = f"only units below {report.num_units}"
        problems.add(record_path(root, unit), f"unit {unit}", expected)
        report.rejected_units.add(unit)
    report.num_missing = report.num_units - len(units)
    # An extension that is not finished leaves manifest.json as it was: it describes fewer units.
    report.extending = derived.plan is not plan
    num_described = report.num_units if derived.plan is None else derived.plan.num_units
    described = [unit for unit in units if unit < num_described or plan is None]
    report.num_lost = num_described - len(described)
    if report.num_lost or report.rejected_units or plan is None:
        derived.stop()
    if report.num_lost and report.finalised:
        sound = set(units)
        missing = (unit for unit in range(report.num_units) if unit not in sound)
        for unit in itertools.islice(missing, min(report.num_lost, MAX_NAMED_MISSING)):
            problems.add(record_path(root, unit), "no file", "a record: the dataset is finalised")
        if (more := report.num_lost - MAX_NAMED_MISSING) > 0:
            problems.add(root / "shards", f"no record for {more} more units", "one for each")
    check = functools.partial(_check, root, plan, full, checked)
    with contextlib.closing(in_order(check, units)) as results:
        title = "comparing with the index" if checked else "verifying"
        for unit, found in zip(units, steps(results, len(units), title, " units"), strict=True):
            if isinstance(found, str):
                problems.append(found)
                report.rejected_units.add(unit)
                derived.stop()
                continue
            record = found.record if isinstance(found, CheckedUnit) else found
            report.num_samples += record.num_samples
            report.num_bytes += record.files.rows.bytes + record.files.shard.bytes * full
            report.num_ok[unit] = record.status[Status.OK.label]
            if count_failed(record.status):
                report.failed_units.add(unit)
            if isinstance(found, CheckedUnit) and unit < num_described:
                derived.add(found)
    derived.finish(described)
    report.num_bytes += derived.num_bytes


def _check(
    root: Path, plan: Plan | None, full: bool, checked: Mapping[int, str], unit: int
) -> CheckedUnit | UnitRecord | str:
    """A sound unit, or its problem. Without a plan a unit is judged by its own record."""
    if problem := checked.get(unit):
        return problem
    full = full and unit not in checked
    try:
        if plan is not None:
            return check_unit(root, plan, unit, full=full)
        record = read_record(root, unit)
        check_files(root, record, full=full)
        return record
    except Exception as error:
        return describe(record_path(root, unit), error)


def _note_strays(report: Report, plan: Plan | None) -> None:
    """Adds a note for each file that nobody reads: temporary files, files with names that we do not
    use, shards and rows parts that no record names."""
    root = report.root
    names = index_dtypes(tensor_entries(plan.tensors)) if plan is not None else {}
    known = {root / name for name in (*OWN_NAMES, *(f"index/{name}.npy" for name in names))}
    with report.problems.checking(root / "shards"):
        unnamed = set(unnamed_files(root))
        folders = [root, *([root / "index"] if names else []), *sorted(root.glob("shards/*"))]
        for folder in folders:
            for name in list_folder(folder):
                path = folder / name
                if path in unnamed:
                    what = "is named by no record: finalize removes it"
                elif name.startswith(TEMP_PREFIX):
                    what = "is a temporary file, of a run that goes on or died"
                elif folder == root and PLAN_NAME.fullmatch(name):
                    continue  # an extension, or a plan that was extended
                elif path not in known and unit_of(root, folder, name) is None:
                    what = "is not ours"
                else:
                    continue
                report.notes.append(f"{path} {what}")
