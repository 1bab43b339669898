"""Repair: what verify rejects goes to quarantine, and just those units are open again.

Guarantees: nothing is deleted but files that `finalize` makes again; the root manifest goes first,
so a reader never finds a dataset that is being taken apart; a unit's record goes before its other
files, so a unit is whole or open at every moment. Repairing twice is harmless, and so is a
crash in between. `run` makes open units again, byte for byte where the environment is the same.
A job may run meanwhile: what it makes anew stays.
Costs: a full verification of all units, and `finalize` when no unit had to be opened.
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from embed_precompute.audit.verify import DERIVED, check_derived, check_units
from embed_precompute.errors import EmbedPrecomputeError
from embed_precompute.store.leftovers import move_aside, remove_file
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import (
    UnitPaths,
    committed_units,
    null_paths,
    read_plan,
    read_record,
    refuse_linked_folders,
    unit_paths,
)

MAX_NAMED = 20
PLAN_FILE = "plan.json"


@dataclass
class Repaired:
    """What `repair` found and did."""

    root: Path
    problems: list[str]
    """As verify names them."""
    moved: list[Path] = field(default_factory=list)
    """Files that are in `_quarantine/` now."""
    opened: list[int] = field(default_factory=list)
    """Units that are to be made again."""
    null_opened: bool = False
    plan_opened: bool = False
    finalised: bool = False

    @property
    def complete(self) -> bool:
        """Nothing is left to be made: the dataset can be read."""
        return self.finalised

    def lines(self) -> list[str]:
        """For a person."""
        lines = [f"{self.root}: {len(self.moved):,} files moved to {self.root / '_quarantine'}"]
        if self.opened or self.null_opened:
            units = ", ".join(map(str, self.opened[:MAX_NAMED]))
            if len(self.opened) > MAX_NAMED:
                units += f" and {len(self.opened) - MAX_NAMED:,} more"
            null = " and the null embedding" if self.null_opened else ""
            lines.append(f"  open again: {len(self.opened):,} units ({units or 'none'}){null}")
        if self.plan_opened:
            lines.append(
                "  plan.json has to be made again: `embed-precompute plan CONFIG --write` with the "
                "job's own CONFIG, then repair once more"
            )
        elif self.opened or self.null_opened:
            lines.append("  run the job again: it makes just these")
        elif self.finalised:
            lines.append("  no unit is open; manifest and index are as the units say")
        else:
            lines.append("  not finished: run the job again to go on")
        return lines


def repair(root: Path, *, failed: bool = False) -> Repaired:
    """Quarantine what a full verify rejects; with `failed` also units with failed samples.

    InputError when `root` holds no dataset.
    """
    root = Path(root)
    refuse_linked_folders(root)
    done = Repaired(root, [])
    if foreign := _foreign_plan(root):
        done.problems.append(foreign)
        _open(done, [], [root / PLAN_FILE])
    report = check_units(root)
    derived = check_derived(root)
    done.problems += [*report.problems, *derived.problems]
    done.plan_opened = report.plan_rejected
    units = report.rejected_units | (report.failed_units if failed else set())
    done.opened, done.null_opened = sorted(units), report.null_rejected
    opened = [unit_paths(root, unit) for unit in done.opened]
    if done.null_opened:
        opened.append(null_paths(root))
    # What has a derived file's name but is no file could not be replaced.
    blocked = [root / name for name in DERIVED if _is_no_file(root / name, name == "index")]
    if (root / "index").is_dir():
        blocked += [path for path in (root / "index").iterdir() if _is_no_file(path, False)]
    if done.plan_opened:
        blocked.append(root / PLAN_FILE)
    complete = not report.num_missing and not report.null_missing
    # A finalised dataset whose records are gone must not be taken for a whole one.
    if opened or blocked or (report.finalised and not complete):
        _open(done, opened, blocked)
    if complete and not opened and not done.plan_opened:
        finalize(root)
        done.finalised = True
    return done


def _foreign_plan(root: Path) -> str:
    """A problem line when plan.json is sound, and not one record is of it.

    Then it is plan.json that does not belong here: without it each unit is judged by its own
    record, and none is thrown away for its sake.
    """
    try:
        plan = read_plan(root)["plan"]
    except (EmbedPrecomputeError, OSError):
        return ""  # which is reported as such
    others = set()
    for unit in (None, *sorted(committed_units(root))):
        with contextlib.suppress(EmbedPrecomputeError, OSError):
            others.add(read_record(root, unit)["plan"])
        if plan in others:
            return ""
    if not others:
        return ""
    named = ", ".join(sorted(other[:16] for other in others)[:MAX_NAMED])
    return f"{root / PLAN_FILE}: found plan {plan[:16]}, expected that of its records: {named}"


def _open(done: Repaired, opened: list[UnitPaths], others: list[Path]) -> None:
    """The root manifest, then unit by unit its record before its other files, then the others."""
    manifest = done.root / "manifest.json"
    if manifest not in others and not _is_no_file(manifest, False):
        remove_file(manifest)
    for unit in opened:
        rest = [(path, _identity(path)) for path in (unit.rows, unit.shard)]
        _move(done, unit.record)
        for path, identity in rest:
            # A job that runs beside us may have made the unit again by now: other files, or the
            # same where they were sound.
            if _identity(path) == identity and not os.path.lexists(unit.record):
                _move(done, path)
    for path in others:
        _move(done, path)


def _move(done: Repaired, path: Path) -> None:
    if move_aside(done.root, path):
        done.moved.append(path)


def _identity(path: Path) -> tuple[int, ...] | None:
    """Which file has this name now."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _is_no_file(path: Path, folder: bool) -> bool:
    """Whether something else has the name of a file (or, with `folder`, of a folder)."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode))
