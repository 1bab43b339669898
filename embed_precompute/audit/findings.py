"""What a verification finds: problems, notes and counts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from embed_precompute.errors import EmbedPrecomputeError

Level = Literal["quick", "full", "deep"]
"""deep: as full, and random samples are encoded again."""
MAX_NOTES = 20


@dataclass
class Report:
    """What verify found."""

    root: Path
    level: Level
    problems: list[str] = field(default_factory=list)
    """One line each: the file, what was found, what was expected."""
    notes: list[str] = field(default_factory=list)
    """Files that are not of the dataset; they do no harm."""
    finalised: bool = False
    num_units: int = 0
    num_missing: int = 0
    """Units without a record."""
    null_missing: bool = False
    """The null embedding is not made yet."""
    num_samples: int = 0
    num_bytes: int = 0
    """Bytes whose sha256 was compared."""
    deep: str = ""
    """The outcome of encoding samples again."""
    plan_rejected: bool = False
    null_rejected: bool = False
    rejected_units: set[int] = field(default_factory=set)
    """Units with a record, and a problem in one of their files."""
    failed_units: set[int] = field(default_factory=set)
    """Sound units that hold a sample whose status is a failure of ours."""
    num_ok: dict[int, int] = field(default_factory=dict)
    """Sound units and their samples whose status is ok."""

    @property
    def null_sound(self) -> bool:
        return not self.null_missing and not self.null_rejected

    def summary(self) -> str:
        """What was checked and the outcome, then notes; several lines."""
        checked = self.num_units - self.num_missing
        state = "finalised" if self.finalised else "not finalised"
        lines = [
            f"{self.root}: {self.level} check, {checked:,} of {self.num_units:,} units, "
            f"{self.num_samples:,} samples, {state}, sha256 of {self.num_bytes:,} bytes"
        ]
        if self.num_missing or self.null_missing:
            null = ", and so does the null embedding" if self.null_missing else ""
            lines.append(f"  {self.num_missing:,} units lack a record{null}: run the job again")
        if self.deep:
            lines.append(f"  {self.deep}")
        lines += [f"  note: {note}" for note in self.notes[:MAX_NOTES]]
        if len(self.notes) > MAX_NOTES:
            lines.append(f"  note: and {len(self.notes) - MAX_NOTES:,} more files like these")
        count = len(self.problems)
        lines.append(f"  {count:,} problem{'s' * (count != 1)}" if count else "  no problems")
        return "\n".join(lines)

    def problem(self, path: Path, found: object, expected: object) -> None:
        self.problems.append(f"{path}: found {found}, expected {expected}")

    @contextlib.contextmanager
    def checking(self, path: Path) -> Iterator[None]:
        """Whatever goes wrong inside is a problem with `path`: damage can surface as any error."""
        try:
            yield
        except Exception as error:
            self.problems.append(describe(path, error))


def describe(path: Path, error: Exception) -> str:
    """A problem line for what went wrong with `path`."""
    if isinstance(error, EmbedPrecomputeError):
        return str(error)
    return f"{path}: found {type(error).__name__}: {error}, expected a file that can be checked"
