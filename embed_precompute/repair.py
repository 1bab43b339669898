"""Repair: what verify rejects goes to quarantine, and just those units are open again.

Guarantees: nothing is deleted but files that `finalize` makes again; the root manifest goes first,
so a reader never finds a dataset that is being taken apart; a unit's record goes before its other
files, so a unit is whole or open at every moment. Repairing twice is harmless, and so is a
crash in between. `run` makes open units again, byte for byte where the environment is the same.
Costs: a full verification of all units, and `finalize` when no unit had to be opened.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from embed_precompute.store.leftovers import move_aside, remove_file
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import UnitPaths, null_paths, unit_paths
from embed_precompute.verify import DERIVED, check_derived, check_units

MAX_NAMED = 20


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
        if self.plan_opened:
            lines.append(
                "  plan.json has to be made again: `embed-precompute plan CONFIG --write` with the "
                "job's own CONFIG, then repair once more"
            )
        elif self.opened or self.null_opened:
            units = ", ".join(map(str, self.opened[:MAX_NAMED]))
            if len(self.opened) > MAX_NAMED:
                units += f" and {len(self.opened) - MAX_NAMED:,} more"
            null = " and the null embedding" if self.null_opened else ""
            lines.append(f"  open again: {len(self.opened):,} units ({units or 'none'}){null}")
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
    report = check_units(root)
    derived = check_derived(root)
    done = Repaired(root, [*report.problems, *derived.problems])
    if report.plan_rejected:
        done.plan_opened = True
        _open(done, [], [root / "plan.json"])
        return done
    units = report.rejected_units | (report.failed_units if failed else set())
    done.opened, done.null_opened = sorted(units), report.null_rejected
    opened = [unit_paths(root, unit) for unit in done.opened]
    if done.null_opened:
        opened.append(null_paths(root))
    # What has a derived file's name but is no file could not be replaced.
    blocked = [root / name for name in DERIVED if _is_no_file(root / name, name == "index")]
    if (root / "index").is_dir():
        blocked += [path for path in (root / "index").iterdir() if _is_no_file(path, False)]
    if opened or blocked:
        _open(done, opened, blocked)
    complete = not report.num_missing and not report.null_missing
    if complete and not opened:
        finalize(root)
        done.finalised = True
    return done


def _open(done: Repaired, opened: list[UnitPaths], others: list[Path]) -> None:
    """Root manifest, records, then the other files: in this order."""
    manifest = done.root / "manifest.json"
    if manifest not in others and not _is_no_file(manifest, False):
        remove_file(manifest)
    paths = [*(paths.record for paths in opened), *others]
    paths += [path for unit in opened for path in (unit.rows, unit.shard)]
    done.moved += [path for path in paths if move_aside(done.root, path)]


def _is_no_file(path: Path, folder: bool) -> bool:
    """Whether something else has the name of a file (or, with `folder`, of a folder)."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return False
    return not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode))
