"""What earlier runs and other ranks have committed, and whether this run may add to it.

Guarantees: records of another plan are refused, and another environment is warned of or refused,
before the first commit.
Costs: one listing of the shard folders, then a `stat` per question; one record is parsed.
"""

from __future__ import annotations

import logging
from pathlib import Path

from embed_precompute.documents import differing_fields
from embed_precompute.errors import ConflictError, IncompleteError
from embed_precompute.job.prepare import Prepared
from embed_precompute.job.units import Unit
from embed_precompute.samples import count_failed
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import (
    NULL_UNIT,
    committed_units,
    read_any_record,
    read_record,
    record_path,
)

log = logging.getLogger(__name__)


class Committed:
    """Which units have a record: a listing at the start, then one `stat` per question."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self._root = root
        self._all = {NULL_UNIT, *range(plan.num_units)}
        self._units: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Lists again, which is cheaper than to ask for many units one by one."""
        self._units = committed_units(self._root) & self._all
        if record_path(self._root, NULL_UNIT).exists():
            self._units.add(NULL_UNIT)

    @property
    def units(self) -> int:
        """How many units are committed; the null embedding is not counted."""
        return len(self._units - {NULL_UNIT})

    def left(self) -> set[int]:
        """The units without a record; the null embedding is not among them."""
        return self._all - self._units - {NULL_UNIT}

    def any_unit(self) -> int | None:
        """A committed unit, or NULL_UNIT, or None."""
        return min(self._units, default=None)

    def everything(self) -> bool:
        return self._units == self._all

    def __call__(self, unit: int) -> bool:
        """Whether a unit is committed by now."""
        if unit in self._units:
            return True
        if record_path(self._root, unit).exists():
            self._units.add(unit)
        return unit in self._units


class FailureLimit:
    """How many samples may fail, in all units of all ranks and runs."""

    def __init__(self, root: Path, max_failed: int) -> None:
        self._root, self._max_failed = root, max_failed
        self._failed_of: dict[int, int] = {}

    def check(self, unit: Unit) -> None:
        """Raises IncompleteError when `unit`, not yet committed, makes them too many.

        The records are read only when a unit has failures, each of them once.
        """
        failed = sum(row in unit.failures for row in unit.stored_row)
        if not failed:
            return
        for number in committed_units(self._root) - self._failed_of.keys():
            status = read_record(self._root, number).status
            self._failed_of[number] = count_failed(status)
        total = failed + sum(self._failed_of.values())
        if total > self._max_failed:
            row = min(unit.failures)
            _, reason = unit.failures[row]
            sample = unit.samples[unit.stored_row.index(row)]
            raise IncompleteError(
                f"{total} samples failed, more than runtime.max_failed_samples "
                f"({self._max_failed}); the last unit was dropped. First of it: sample "
                f"{sample.sample_id!r}, row {sample.row}: {reason}. Mend the cause, or raise the "
                "limit, and run again."
            )


def check_record(prepared: Prepared, unit: int | None, environment: dict[str, str]) -> None:
    """Compares plan and environment with those of a committed unit, if there is one.

    Another plan is refused; another environment is warned of, or refused if so configured.
    """
    if unit is None:
        return
    root, config, plan = prepared.root, prepared.config, prepared.plan
    earlier = read_any_record(root, unit)
    if earlier.plan_id != plan.plan_id:
        raise ConflictError(
            f"{root} holds units of another plan ({earlier.plan_id[:16]}; plan.json has "
            f"{plan.plan_id[:16]}): plan.json was removed or replaced. Put it back, or write to a "
            "new output.path."
        )
    differing = differing_fields(earlier.environment, environment)
    if not differing:
        return
    message = (
        f"{root} was begun in another environment ({'; '.join(differing)}). Equal bytes are "
        "promised within one environment only; the manifest lists all of them."
    )
    if config.runtime.on_environment_change == "refuse":
        raise ConflictError(
            f"{message} Give the old environment back, or set runtime.on_environment_change warn."
        )
    log.warning("%s", message)
