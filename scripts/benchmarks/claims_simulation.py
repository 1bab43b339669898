"""Print how a job of many ranks shares its units when nodes are slow or die; no GPU is needed.

The real `Claims` and `Committed` run, one of each per rank. What they stand on is replaced: the
clock, the shared folder and torchrun's store. Each rank reads ahead, encodes, looks for a record
before a unit and in the middle of it, and commits while it encodes the next unit, as `job/stages`
does. Makespan is the time of the last record; ideal is all work over the speed of the ranks, of a
dead one until its death.

    python scripts/benchmarks/claims_simulation.py [--ranks 1024] [--units 400000]

Ten ranks in a hundred have half the speed, and one dies at a random time. A unit takes `--unit-s`
seconds on a rank of full speed, 10 % more or less. Without a store the ranks are one `srun`.
"""

from __future__ import annotations

import argparse
import copy
import heapq
import itertools
import math
import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest.mock import patch

from embed_precompute.distributed import DistContext
from embed_precompute.job import claims as claiming
from embed_precompute.job.claims import POLLS, Claims, Committed
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import NULL_UNIT

VARIANTS: dict[str, float | None] = {
    "torchrun's store": math.inf,
    "store lost half-way": 0.5,
    "no store": None,
}
"""When the store is lost, as a part of the ideal time; None: there is none."""
SLOW, DEAD = 0.1, 0.01
START_S = 60.0
"""Ranks begin within this time: they load weights from one file system."""
COMMIT_S = 2.0
FORWARDS = 64
"""Forwards in a unit: between two of them a rank looks whether a peer has committed the unit."""
FILES = 3
"""Names in a folder for each unit: shard, rows part, record."""
END = NULL_UNIT - 1


def main() -> None:
    parser = argparse.ArgumentParser(description="How ranks share units, simulated.")
    parser.add_argument("--ranks", type=int, default=1024, help="default 1024")
    parser.add_argument("--units", type=int, default=400_000, help="default 400000")
    parser.add_argument("--unit-s", type=float, default=60.0, help="seconds a unit; default 60")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(
        "| | makespan s | / ideal | until the last rank ends, s | encoded twice | given up |",
        end="",
    )
    print(" store calls/s | most in 1 s | looks/s | most in 1 s | names listed/s | most in 1 s |")
    print("|---" * 12 + "|")
    for name, lost in VARIANTS.items():
        job = Job(arguments.ranks, arguments.units, arguments.unit_s, arguments.seed, lost)
        files = {key: getattr(job.folder, key) for key in ("committed_units", "record_path")}
        with patch.multiple(claiming, **files):
            job.run()
        print(f"| {name} | {' | '.join(job.cells())} |", flush=True)


class Folder:
    """The output folder: when each unit was committed, and what was asked of the file system."""

    def __init__(self, job: Job, num_units: int) -> None:
        self.job = job
        self.at: dict[int, float] = {}
        self.left = {NULL_UNIT, *range(num_units)}
        self.looks, self.names = Counter[int](), Counter[int]()
        """Second -> how many records were looked for, and how many names were listed."""

    def commit(self, unit: int) -> bool:
        """Returns whether the record is new."""
        if unit not in self.left:
            return False
        self.at[unit] = self.job.now
        self.left.remove(unit)
        return True

    def committed_units(self, root: object) -> Listing:
        self.names[int(self.job.now)] += FILES * len(self.at)
        return Listing(self)

    def record_path(self, root: object, unit: int) -> RecordPath:
        return RecordPath(self, unit)


@dataclass
class RecordPath:
    """What `records.record_path` returns."""

    folder: Folder
    unit: int

    def exists(self) -> bool:
        self.folder.looks[int(self.folder.job.now)] += 1
        return self.unit in self.folder.at


class Listing:
    """The set of units that were committed at a moment; a thousand real sets would not fit here."""

    def __init__(self, folder: Folder) -> None:
        self._folder, self._since = folder, folder.job.now
        self._added: set[int] = set()

    def __and__(self, every: set[int]) -> Listing:
        return self

    def __rsub__(self, every: set[int]) -> set[int]:
        return self._folder.left - self._added

    def __contains__(self, unit: int) -> bool:
        return self._folder.at.get(unit, math.inf) <= self._since or unit in self._added

    def add(self, unit: int) -> None:
        self._added.add(unit)


class Store:
    """torchrun's store; it counts calls and raises RuntimeError from the time `lost_at` on."""

    def __init__(self, job: Job, lost_at: float = math.inf) -> None:
        self._job, self._lost_at = job, lost_at
        self._values: Counter[str] = Counter()
        self._texts: dict[str, str] = {}
        self.calls = Counter[int]()
        """Second -> how often it was asked."""

    def add(self, key: str, amount: int, /) -> int:
        self._call()
        self._values[key] += amount
        return self._values[key]

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        self._call()
        if self._texts.get(key, "") == expected:
            self._texts[key] = desired
        return self._texts[key].encode()

    def _call(self) -> None:
        self.calls[int(self._job.now)] += 1
        if self._job.now >= self._lost_at:
            raise RuntimeError("the store is gone")


class Rank:
    """One rank's reader, encoder and writer, as far as time goes."""

    def __init__(
        self, job: Job, claims: Claims, committed: Committed, speed: float, dies: float
    ) -> None:
        self.job, self.claims, self.committed, self.speed = job, claims, committed, speed
        self.dies = dies
        self.units: Iterator[int | None] | None = iter(claims)
        self.ahead: deque[tuple[int, bool]] = deque()
        """Units that were read, and whether they were swept."""
        self.at_hand: int | None = None
        self.begun = self.unit_s = 0.0
        self.rests = False
        self.turn = 0
        """Counts the units that were begun: what was to happen to an earlier one does not."""

    def after(self, seconds: float, what: Callable[[], None]) -> None:
        if self.job.now + seconds < self.dies:
            self.job.at(self.job.now + seconds, what)

    def go_on(self) -> None:
        """Reads ahead, and begins a unit if none is at hand."""
        self.read()
        while self.at_hand is None and self.ahead:
            unit, swept = self.ahead.popleft()
            self.read()
            if not self.committed(unit):
                self.begin(unit, swept)

    def read(self) -> None:
        # One unit waits for the encoder, and the reader has the next in its hands.
        while self.units is not None and not self.rests and len(self.ahead) < 2:
            unit = next(self.units, END)
            if unit == END:
                self.units = None
                self.job.ended = self.job.now
            elif unit is None:
                self.rests = True
                self.after(self.unit_s / POLLS, self.rested)
            else:
                self.ahead.append((unit, self.claims.swept))

    def rested(self) -> None:
        self.rests = False
        self.go_on()

    def begin(self, unit: int, swept: bool) -> None:
        self.at_hand, self.begun, self.turn = unit, self.job.now, self.turn + 1
        if swept:
            self.job.sweepers[unit].append(self)
        seconds = self.job.work[unit] / self.speed
        self.unit_s = max(self.unit_s, seconds)
        turn = self.turn
        self.after(seconds, lambda: self.encoded(turn))

    def encoded(self, turn: int) -> None:
        if turn == self.turn and self.at_hand is not None:
            unit = self.at_hand
            self.after(COMMIT_S, lambda: self.commit(unit))
            self.end()

    def commit(self, unit: int) -> None:
        if not self.job.folder.commit(unit):
            self.job.twice += 1
        for peer in self.job.sweepers.pop(unit, ()):
            if peer.at_hand == unit:
                peer.give_up(unit)

    def give_up(self, unit: int) -> None:
        """A peer has committed the unit at hand: this rank sees it after its next forward."""
        self.job.given_up += 1
        forward = self.job.work[unit] / self.speed / FORWARDS
        self.job.folder.looks[int(self.job.now)] += round((self.job.now - self.begun) / forward)
        self.turn += 1
        self.after(forward, self.end)

    def end(self) -> None:
        self.at_hand = None
        self.job.ended = self.job.now
        self.go_on()


class Job:
    """All ranks, and the events that are to come."""

    def __init__(
        self, ranks: int, units: int, unit_s: float, seed: int, store_lost: float | None
    ) -> None:
        """`store_lost`: after which part of the ideal time; None: there is no store at all."""
        rng = random.Random(seed)
        self.now = 0.0
        self.folder = Folder(self, units)
        self.work = [unit_s * rng.uniform(0.9, 1.1) for _ in range(units)]
        self.work.append(0.0)  # the null embedding, unit -1
        self.sweepers: defaultdict[int, list[Rank]] = defaultdict(list)
        self.twice = self.given_up = 0
        self.ended = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = itertools.count()
        speeds = [0.5 if rng.random() < SLOW else 1.0 for _ in range(ranks)]
        starts = [rng.uniform(0, START_S) for _ in range(ranks)]
        about = sum(self.work) / sum(speeds)
        deaths = {
            rank: rng.uniform(0, about) for rank in rng.sample(range(ranks), round(ranks * DEAD))
        }
        left = sum(self.work)
        for rank, death in deaths.items():
            left -= speeds[rank] * max(0.0, death - starts[rank])
        living = [rank for rank in range(ranks) if rank not in deaths]
        left += sum(speeds[rank] * starts[rank] for rank in living)
        self.ideal = left / sum(speeds[rank] for rank in living)
        lost_at = math.inf if store_lost is None else store_lost * self.ideal
        self.store = None if store_lost is None else Store(self, lost_at)
        self._ranks = [
            (speeds[rank], starts[rank], deaths.get(rank, math.inf)) for rank in range(ranks)
        ]

    def at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._count), what))

    def run(self) -> None:
        """Raises AssertionError if a unit was not committed."""
        units = len(self.work) - 1
        every = Committed(Path(), cast(Plan, SimpleNamespace(num_units=units)))
        for rank, (speed, start, dies) in enumerate(self._ranks):
            committed = copy.copy(every)  # with the same set of all units, which is large
            committed.refresh()
            dist = DistContext(rank, len(self._ranks), run_id="run")
            claims = Claims(dist, "plan", units, committed, self.store, committed.list_left)
            self.at(start, Rank(self, claims, committed, speed, dies).go_on)
        while self._events:
            self.now, _, what = heapq.heappop(self._events)
            what()
        assert not self.folder.left, f"{len(self.folder.left)} units are not committed"

    def cells(self) -> list[str]:
        makespan = max(self.folder.at.values())
        calls = self.store.calls if self.store is not None else Counter[int]()
        looks, names = self.folder.looks, self.folder.names
        return [
            f"{makespan:,.0f}",
            f"{makespan / self.ideal:.4f}",
            f"{self.ended - makespan:,.0f}",
            f"{self.twice:,}",
            f"{self.given_up:,}",
            *(
                f"{figure:,.0f}"
                for per_s in (calls, looks, names)
                for figure in (per_s.total() / makespan, max(per_s.values(), default=0))
            ),
        ]


if __name__ == "__main__":
    main()
