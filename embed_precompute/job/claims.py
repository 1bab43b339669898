"""Which units are committed, and how the others are dealt out to the ranks of a job.

Guarantees: correctness rests on the unit records alone. A rank ends only when every unit has a
record, whatever torchrun's store answers and even if the store is gone. A unit that two ranks
compute is published once. A run refuses an output folder whose units belong to another plan.
Costs: two listings of the shard folders, one at the start and one before the sweep (a rank's last
pass over all units), which ranks with a store share; per unit a `stat` and a round trip to that
store. There is no collective and no lock, and no times are compared.
scripts/benchmarks/claims_simulation.py gives figures.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from embed_precompute.distributed import DistContext
from embed_precompute.documents import differing_fields
from embed_precompute.errors import ConflictError
from embed_precompute.job.reuse import COPIED_FROM
from embed_precompute.steps import Work, counted
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import (
    NULL_UNIT,
    committed_units,
    read_any_record,
    record_path,
)

log = logging.getLogger(__name__)

MOST_BLOCK_UNITS = 32
"""Units are dealt in blocks of neighbours: a row group of captions is then read by few ranks."""
LEAST_BLOCKS = 64
"""A job with this many units or more has at least this many blocks: two jobs on one output then
rarely work in the same block."""
POLLS = 16
"""How often a rank that waits in the sweep looks at what is left, in the time of a unit."""
MORE_HELPERS = 4
RANKS_PER_LIST = 64
MOST_LOOKS = 4096
"""More units than this are listed again, and not looked at one by one."""


class Committed:
    """Which units have a record: found by a listing at the start, later by a `stat` each."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self._root, self._plan = root, plan
        self._all = {NULL_UNIT, *range(plan.num_units)}
        self._units: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """Lists the records again: for many units this is cheaper than a `stat` of each."""
        with Work("listing what is committed"):
            units = committed_units(self._root) & self._all
            if record_path(self._root, NULL_UNIT).exists():
                units.add(NULL_UNIT)
        self._units = units  # in one assignment: another thread reads it

    @property
    def units(self) -> int:
        """How many units are committed; the null embedding is not counted."""
        return len(self._units - {NULL_UNIT})

    def list_left(self) -> set[int]:
        """Lists the records again; returns the units without one, the null embedding among them."""
        self.refresh()
        return self._all - self._units

    def left(self) -> set[int]:
        """The units without a record; the null embedding is not among them."""
        return self._all - self._units - {NULL_UNIT}

    def everything(self) -> bool:
        return self._units == self._all

    def __call__(self, unit: int) -> bool:
        """Whether a unit is committed by now."""
        if unit in self._units:
            return True
        if record_path(self._root, unit).exists():
            self._units.add(unit)
        return unit in self._units

    def check_environment(
        self, environment: dict[str, str], on_change: Literal["warn", "refuse"]
    ) -> None:
        """Compare plan and environment with those of a committed unit, if there is one.

        Raises ConflictError if the unit belongs to another plan, or if it was made in another
        environment and `on_change` is "refuse".
        """
        unit = min(self._units, default=None)
        if unit is None:
            return
        earlier = read_any_record(self._root, unit)
        expected = self._plan.plan_id_of(unit)
        if earlier.plan_id != expected:
            raise ConflictError(
                f"{self._root} holds units of another plan ({earlier.plan_id[:16]}; "
                f"{self._plan.file_name} has {expected[:16]}): plan.json was removed or replaced. "
                "Put it back, or write to a new output.path."
            )
        # Where copied embeddings were made says nothing of this machine.
        before = {key: each for key, each in earlier.environment.items() if key != COPIED_FROM}
        differing = differing_fields(before, environment)
        if not differing:
            return
        message = (
            f"{self._root} was begun in another environment ({'; '.join(differing)}). Equal bytes "
            "are promised within one environment only; the manifest lists all of them."
        )
        if on_change == "refuse":
            raise ConflictError(
                f"{message} Give the old environment back, or set runtime.on_environment_change "
                "warn."
            )
        log.warning("%s", message)


class CounterStore(Protocol):
    """What claiming needs of torch.distributed.TCPStore. `add` and `compare_set` raise RuntimeError
    when the store cannot be reached."""

    def add(self, key: str, amount: int, /) -> int: ...

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...


def connect_store(dist: DistContext) -> CounterStore | None:
    """torchrun's store; None if there is none, or if it cannot be reached."""
    if dist.store_host is None or dist.world_size == 1:
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store: CounterStore = TCPStore(
            dist.store_host, dist.store_port, is_master=False, wait_for_workers=False
        )
    except (RuntimeError, ValueError):
        return None
    return store


class Claims:
    """The units for this rank to compute: its share first, then whatever still has no record.

    The job shuffles the blocks of units. Its ranks take the units of these blocks in turn: by a
    shared counter if torchrun has a store, otherwise every `world_size`-th unit. Two jobs on one
    output have different orders, so they rarely compute the same unit.

    At the end each rank sweeps the units that nobody has committed: their ranks may be slow or
    dead. It takes those for which it is the helper, waits about the time of a unit, and takes what
    is left then of four times as many, until its turn has come for every unit. So a job of many
    ranks does not end with all of them computing the same unit.

    Iterating yields units, and None where the caller should wait for a `POLLS`-th of the time of a
    unit. `is_committed(unit)` looks for the unit's record; `list_left` lists the units without one.
    """

    def __init__(
        self,
        dist: DistContext,
        plan_id: str,
        num_units: int,
        is_committed: Callable[[int], bool],
        store: CounterStore | None = None,
        list_left: Callable[[], Iterable[int]] | None = None,
    ) -> None:
        self._dist, self._num_units = dist, num_units
        self._is_committed = is_committed
        self._list_left = list_left or (lambda: range(NULL_UNIT, num_units))
        self._store = store
        nonce = f"{dist.run_id}/{dist.restart_count}/{dist.world_size}/{plan_id[:16]}"
        self._prefix = f"embed_precompute/{nonce}"
        self._rendezvous_prefix: str | None = None
        self.swept = False
        """Whether the current unit is from the sweep: another rank may be computing it too."""

    def __iter__(self) -> Iterator[int | None]:
        claimed: set[int] = set()  # this rank may still be computing them while it claims more
        try:
            for unit in self._share():
                if not self._is_committed(unit):
                    claimed.add(unit)
                    yield unit
        except RuntimeError:
            self._store = None  # the store is gone: the sweep does the rest
        self.swept = True
        left, helpers = (yield from self._list(claimed)), 1
        while len(left):
            is_helper = self._distance(left) < helpers
            for unit in left[is_helper].tolist():
                if not self._is_committed(unit):
                    claimed.add(unit)
                    yield unit
            left = left[~is_helper]
            if len(left) and helpers == 1:
                units = counted(len(left), "unit")
                log.info("%s left, with other ranks: waiting, then helping", units)
            for _ in range(POLLS):
                while len(left) and self._is_committed(int(left[-1])):
                    left = left[:-1]
                if not len(left):
                    return
                yield None
            helpers *= MORE_HELPERS
            if len(left) > MOST_LOOKS:
                left = yield from self._list(claimed)

    def _list(self, claimed: set[int]) -> Generator[None, None, np.ndarray]:
        """The units without a record, as a listing has them, and without those of this rank. Each
        rank has its own order: ranks that may take the same units then rarely do."""
        try:
            units = yield from self._list_together()
        except RuntimeError:
            self._store, units = None, self._list_left()
        left = np.array(list(set(units) - claimed), np.int64)
        np.random.default_rng().shuffle(left)
        return left

    def _list_together(self) -> Generator[None, None, Iterable[int]]:
        """The units without a record. One in `RANKS_PER_LIST` ranks lists them and puts them into
        the store; the others wait for that, for a unit's time at most. A listing may be old: then
        it has units that are committed now, and never lacks one that is not."""
        if self._store is None:
            return self._list_left()
        prefix = self._prefix_of_rendezvous(self._store)
        turn = self._store.add(f"{prefix}/lists", 1) - 1
        key = f"{prefix}/list/{turn // RANKS_PER_LIST}"
        if turn % RANKS_PER_LIST == 0:
            units = [*self._list_left()]
            self._store.compare_set(key, "", json.dumps(units))
            return units
        for _ in range(POLLS):
            if listed := self._store.compare_set(key, "", "").decode():
                return [int(unit) for unit in json.loads(listed)]
            yield None
        return self._list_left()

    def _distance(self, units: np.ndarray) -> np.ndarray:
        """How many ranks come before this one to sweep each of `units`. The first is told by middle
        digits of a product: the units of a rank that died are all alike in their last digits."""
        first = units * 2654435761 >> 12
        return np.asarray((self._dist.rank - first) % self._dist.world_size)

    def _share(self) -> Iterator[int]:
        """The units dealt to this rank, committed or not; the null embedding is dealt first."""
        # Without a store all ranks use the launcher's run id as the seed: every rank knows the id.
        seed = self._dist.run_id if self._dist.world_size > 1 else os.urandom(16).hex()
        if self._store is not None:
            key = f"{self._prefix_of_rendezvous(self._store)}/seed"
            seed = self._store.compare_set(key, "", os.urandom(16).hex()).decode()
        size = max(1, min(MOST_BLOCK_UNITS, self._num_units // LEAST_BLOCKS))
        blocks = [*range(0, self._num_units, size)]
        random.Random(seed).shuffle(blocks)
        for turn in itertools.count():
            position = self._dist.rank + turn * self._dist.world_size
            if self._store is not None:
                key = f"{self._prefix_of_rendezvous(self._store)}/next"
                position = self._store.add(key, 1) - 1
            if position == 0:
                yield NULL_UNIT
                continue
            block, place = divmod(position - 1, size)
            if block >= len(blocks):
                return
            if blocks[block] + place < self._num_units:  # the file's last block may be shorter
                yield blocks[block] + place

    def _prefix_of_rendezvous(self, store: CounterStore) -> str:
        """The key prefix of this rendezvous. The store outlives a rendezvous and keeps its keys.

        Every rank adds 1 to the counter `arrivals` once. So the ranks of one rendezvous get
        consecutive numbers, and number // world_size is the same for all of them. A rank that died
        before it added 1 shifts the numbers of a later rendezvous of the same size. The ranks of
        that rendezvous may then use two counters and compute units twice; with the sweep, every
        unit is still computed.
        """
        if self._rendezvous_prefix is None:
            arrival = store.add(f"{self._prefix}/arrivals", 1) - 1
            self._rendezvous_prefix = f"{self._prefix}/{arrival // self._dist.world_size}"
        return self._rendezvous_prefix

    def is_first_to_finalize(self) -> bool:
        """True for the first rank that asks, so that not every rank builds the same index. Without
        a store it is True for every rank."""
        if self._store is None:
            return True
        try:
            return self._store.add(f"{self._prefix_of_rendezvous(self._store)}/finalize", 1) == 1
        except RuntimeError:
            return True
