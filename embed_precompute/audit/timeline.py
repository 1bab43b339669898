"""When which rank was at work, by the lines of metrics in logs/.

Guarantees: a line that a crash cut off, or that an older release wrote without some key, is left
out where that key is needed, and only there.
Costs: an object for each line, which is one for each unit; no time of samples is known.
"""

from __future__ import annotations

import calendar
import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embed_precompute.job.metrics import UnitLines, span_of

COLUMNS = 160
"""Pieces that the time of a run is cut into."""
LEAST_GAP_S = 5.0
"""A shorter gap between two units of a rank is no rest."""

Row = list[float | None]


@dataclass(frozen=True)
class Work:
    """What a rank did from one commit to the next."""

    rank: int
    unit: int
    begin: float
    end: float
    samples: int
    host: str
    flops: Mapping[str, float] | None = field(hash=False)
    """Operations by encoder; None in the lines of older releases."""

    @property
    def seconds(self) -> float:
        return self.end - self.begin


@dataclass(frozen=True)
class Rest:
    """A time in which a rank wrote nothing while another was at work."""

    rank: int
    begin: float
    end: float


class Timeline:
    """All that the ranks of all runs did."""

    def __init__(self, work: Sequence[Work], starts: Sequence[tuple[float, int]] = ()) -> None:
        """`work` is sorted by rank and time, and not empty. `starts`: when each run began, and with
        how many ranks, in order."""
        self.work, self._starts = work, starts
        self.begin, self.end = min(w.begin for w in work), max(w.end for w in work)
        self.by_rank: dict[int, list[Work]] = defaultdict(list)
        for each in work:
            self.by_rank[each.rank].append(each)

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def rates(self, amount: Callable[[Work], float]) -> dict[int, Row]:
        """For each rank and each of COLUMNS pieces of the time, `amount` a second of the piece's
        part in which the rank was at work; None where it is at rest. A unit's amount is spread
        evenly over its seconds."""
        edges = np.linspace(self.begin, self.end, COLUMNS + 1)
        width = (self.seconds / COLUMNS) or 1.0
        rows: dict[int, Row] = {}
        for rank, mine in self.by_rank.items():
            # Two jobs on one output may share a rank's file: their times overlap.
            times = np.maximum.accumulate([t for w in mine for t in (w.begin, w.end)])
            busy = _spread(edges, times, [w.seconds for w in mine])
            done = _spread(edges, times, [amount(w) for w in mine])
            rows[rank] = [
                float(d / min(b, width)) if b > 0.02 * width else None
                for d, b in zip(done, busy, strict=True)
            ]
        return rows

    @functools.cached_property
    def pauses(self) -> list[tuple[float, float]]:
        """(begin, end) of each time of LEAST_GAP_S or more in which no rank was at work: no job
        ran, for a rank's unit counts from the one before or from the rank's start."""
        found, until = [], self.begin
        for begin, end in sorted((w.begin, w.end) for w in self.work):
            if begin - until >= LEAST_GAP_S:
                found.append((until, begin))
            until = max(until, end)
        return found

    def rests(self) -> list[Rest]:
        """Every gap of LEAST_GAP_S or more of each rank, the longest first; at the end, too.
        Pauses are left out, and runs that did not have the rank."""
        found = []
        for rank, mine in self.by_rank.items():
            away = [*self.pauses, *self._runs_without(rank), (self.end, self.end)]
            spans = [*((w.begin, w.end) for w in mine), *away]
            until = self.begin
            for begin, end in sorted(spans):
                if begin - until >= LEAST_GAP_S:
                    found.append(Rest(rank, until, begin))
                until = max(until, end)
        return sorted(found, key=lambda rest: (rest.begin - rest.end, rest.rank, rest.begin))

    def _runs_without(self, rank: int) -> list[tuple[float, float]]:
        """(begin, end) of the runs that had fewer ranks; one ends where the next begins."""
        ends = [*(begin for begin, _ in self._starts[1:]), self.end]
        return [
            (begin, end)
            for (begin, world_size), end in zip(self._starts, ends, strict=False)
            if world_size <= rank and begin < end
        ]


def _spread(edges: np.ndarray, times: np.ndarray, amounts: Sequence[float]) -> np.ndarray:
    """How much falls between neighbouring `edges`; `times` has two entries for each amount."""
    before = np.concatenate(([0.0], np.cumsum(amounts)))
    grown = np.column_stack((before[:-1], before[1:])).reshape(-1)
    return np.diff(np.interp(edges, times, grown, left=0.0))


def read_timeline(root: Path, run: Mapping[str, Any] | None = None) -> Timeline | None:
    """By the files in logs/, and the starts in `run`, which run.json holds; None if no line says
    when and what."""
    work = []
    for rank, line in UnitLines(root).new():
        with contextlib.suppress(LookupError, TypeError, ValueError, AttributeError):
            begin, end = span_of(line)
            unit, flops = int(line["unit"]), line.get("flops")
            if flops is not None:
                flops = {str(name): value + 0.0 for name, value in flops.items()}
            samples = int(line["samples"]) if unit >= 0 else 0
            work.append(Work(rank, unit, begin, end, samples, str(line.get("host", "")), flops))
    work.sort(key=lambda each: (each.rank, each.end))
    return Timeline(work, _starts((run or {}).get("runs"))) if work else None


def _starts(runs: Any) -> list[tuple[float, int]]:
    """(when, with how many ranks) of each run of run.json, where anything may stand."""
    found = []
    for each in runs if isinstance(runs, list) else ():
        with contextlib.suppress(LookupError, TypeError, ValueError):
            began = calendar.timegm(time.strptime(each["started"], "%Y-%m-%dT%H:%M:%SZ"))
            found.append((float(began), int(each["world_size"])))
    return sorted(found)
