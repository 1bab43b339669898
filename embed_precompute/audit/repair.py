"""Repair: files that verify rejects go to quarantine, and a run makes just their units again.

Guarantees: nothing is deleted but files that `finalize` makes again. manifest.json is removed
first, so a reader never finds a dataset that is being taken apart. A unit's record is moved before
its damaged files, so at every moment a unit is committed or open (without a record, to be made
again). A shard or rows part stays if its bytes match the digest in its name: a job that runs
meanwhile, or the next one, uses it again. Repairing twice is harmless, and so is a crash in
between. `run` makes open units again, byte for byte in the same environment. README.md goes with
manifest.json, if it is ours.
Costs: a full verification, and `finalize` when no unit had to be opened.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from embed_precompute.audit.card import remove_card
from embed_precompute.audit.verify import verify
from embed_precompute.errors import EmbedPrecomputeError, VerificationError
from embed_precompute.steps import counted
from embed_precompute.store.commit import (
    content_name,
    digest_file,
    move_aside,
    remove_file,
    replace_bytes,
)
from embed_precompute.store.index import TABLE
from embed_precompute.store.manifest import MANIFEST, finalize
from embed_precompute.store.plan import (
    PLAN_FILE,
    damaged_earlier_plans,
    plan_path,
    read_plan,
)
from embed_precompute.store.records import (
    NULL_UNIT,
    RECORD,
    SHARD,
    committed_units,
    document_bytes,
    list_folder,
    read_any_record,
    record_path,
    refuse_linked_folders,
    unit_of,
)
from embed_precompute.store.shards import open_alone

MAX_NAMED = 20


@dataclass
class Repaired:
    """What `repair` found and did."""

    root: Path
    problems: list[str]
    """The problems, as verify names them."""
    moved: list[Path] = field(default_factory=list)
    """Files that are in `_quarantine/` now."""
    opened: list[int] = field(default_factory=list)
    """Units that are to be made again."""
    beyond: list[int] = field(default_factory=list)
    """Units that were moved away and are not made again: the plan does not have them."""
    null_opened: bool = False
    plan_opened: str = ""
    """The name of the plan that is to be made again, if it was moved."""
    complete: bool = False
    """Nothing is left to be made: the dataset is finalised and can be read."""

    def lines(self) -> list[str]:
        """For a person."""
        files = counted(len(self.moved), "file")
        lines = [f"{self.root}: {files} moved to {self.root / '_quarantine'}"]
        if self.beyond:
            lines.append(f"  moved away: {_named(self.beyond)}, beyond the plan's last")
        if self.opened or self.null_opened:
            null = " and the null embedding" if self.null_opened else ""
            lines.append(f"  open again: {_named(self.opened)}{null}")
        if self.plan_opened:
            extend = "" if self.plan_opened == PLAN_FILE else " --extend"
            lines.append(
                f"  {self.plan_opened} has to be made again: `embed-precompute plan CONFIG "
                f"--write{extend}` with the job's own CONFIG, then repair once more"
            )
        elif self.opened or self.null_opened:
            lines.append("  run the job again: it makes just these")
        elif self.complete:
            lines.append("  no unit is open; manifest and index are as the units say")
        else:
            lines.append("  not finished: run the job again to go on")
        return lines


def _named(units: list[int]) -> str:
    named = ", ".join(map(str, units[:MAX_NAMED]))
    if len(units) > MAX_NAMED:
        named += f" and {len(units) - MAX_NAMED:,} more"
    return f"{counted(len(units), 'unit')} ({named or 'none'})"


def repair(root: Path, *, failed: bool = False) -> Repaired:
    """Quarantine what a full verify rejects; with `failed` also units with failed samples.

    Raises InputError if `root` holds no dataset.
    """
    root = Path(root)
    refuse_linked_folders(root)
    done = Repaired(root, [])
    if foreign := _foreign_plan(root):
        done.problems.append(foreign)
        _open(done, [plan_path(root)])
    report = verify(root)
    done.problems += report.problems
    done.null_opened = report.null_rejected
    if report.plan_rejected:
        done.plan_opened = plan_path(root).name
    else:
        for earlier in damaged_earlier_plans(root, read_plan(root)):
            replace_bytes(root / earlier.file_name, document_bytes(earlier))
    rejected = sorted(report.rejected_units | (report.failed_units if failed else set()))
    at = len(rejected) if report.plan_rejected else bisect.bisect_left(rejected, report.num_units)
    done.opened, done.beyond = rejected[:at], rejected[at:]
    # A folder or a pipe with the name of a derived file: `finalize` could not replace it.
    index = root / "index"
    derived = [root / MANIFEST, root / TABLE, *(index / name for name in list_folder(index))]
    blocked = [path for path in derived if os.path.lexists(path) and not path.is_file()]
    if os.path.lexists(index) and not index.is_dir():
        blocked.append(index)
    if done.plan_opened:
        blocked.append(plan_path(root))
    is_whole = not report.num_missing and not report.null_missing
    # A finalised dataset whose records are gone must not be taken for a whole one.
    if rejected or done.null_opened or blocked or (report.finalised and report.num_lost):
        _open(done, blocked)
    if is_whole and not done.opened and not done.null_opened and not done.plan_opened:
        finalize(root)
        done.complete = True
    if not os.path.lexists(root / MANIFEST):
        remove_card(root)  # its counts are those of the dataset before
    return done


def _foreign_plan(root: Path) -> str:
    """A problem line if the plan is sound but no record belongs to it; else "".

    If there is a line, the plan does not belong here: it is moved away, each unit is checked by
    its own record, and no unit is rejected because of the wrong plan.
    """
    others = set()
    try:
        plan = read_plan(root)
        for unit in (NULL_UNIT, *sorted(committed_units(root))):
            with contextlib.suppress(EmbedPrecomputeError):
                others.add(read_any_record(root, unit).plan_id)
            if plan.plan_id_of(unit) in others:
                return ""
    except EmbedPrecomputeError:
        return ""  # which verify reports
    if not others:
        return ""
    named = ", ".join(sorted(other[:16] for other in others)[:MAX_NAMED])
    found = f"plan {plan.plan_id[:16]}"
    return f"{root / plan.file_name}: found {found}, expected that of its records: {named}"


def _open(done: Repaired, blocked: list[Path]) -> None:
    """Remove manifest.json, then move away each unit's record and damaged files and `blocked`."""
    manifest = done.root / MANIFEST
    if manifest not in blocked:
        remove_file(manifest)
    for unit in [*done.opened, *done.beyond, *([NULL_UNIT] if done.null_opened else [])]:
        record = record_path(done.root, unit)
        _move(done, record)
        for name in list_folder(record.parent):
            if unit_of(done.root, record.parent, name) != unit or name.endswith(RECORD):
                continue
            path = record.with_name(name)
            with contextlib.suppress(FileNotFoundError):
                inode = os.lstat(path).st_ino
                # A job that runs meanwhile may have put a sound file in its place.
                if not _is_sound(path) and os.lstat(path).st_ino == inode:
                    _move(done, path)
    for path in blocked:
        _move(done, path)


def _move(done: Repaired, path: Path) -> None:
    if move_aside(done.root, path):
        done.moved.append(path)


def _is_sound(path: Path) -> bool:
    """Whether the bytes of a data file match the digest in its name."""
    name, _, digest_and_ending = path.name.rpartition("-")
    ending = digest_and_ending.partition(".")[2]
    try:
        if path.name.endswith(SHARD):
            shard = open_alone(path)
            digest = "damaged" if shard.first_damaged() else shard.head_sha256()
        else:
            digest = digest_file(path).sha256
    except (OSError, VerificationError):
        return False
    return content_name(f"{name}.{ending}", digest) == path.name
