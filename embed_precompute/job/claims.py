"""How units are dealt out to ranks: an optimisation, which never carries correctness.

Guarantees: whatever torchrun's store says, or if it is gone, a rank ends only when every unit has a
record, and a unit computed twice is published once.
Costs: one round trip to torchrun's TCPStore per unit, and `STORE_TIMEOUT` once if it falls silent;
no collective, no lock, no clock. torch is imported only to reach the store.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Protocol

from embed_precompute.distributed import DistContext
from embed_precompute.store.records import NULL_UNIT

STORE_TIMEOUT = timedelta(seconds=30)
MISSES = 64
"""So many random places in a row where a unit is done already: hardly any are left."""


class CounterStore(Protocol):
    """What claiming needs of torchrun's TCPStore."""

    def add(self, key: str, amount: int, /) -> int: ...

    def first(self, key: str, value: str, /) -> str:
        """The value that was given first for this key, by any rank."""
        ...


def connect_store(dist: DistContext) -> CounterStore | None:
    """torchrun's store, or None when there is none or it cannot be reached: claims do without."""
    if dist.store_host is None or dist.world_size == 1:
        return None
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        store = TCPStore(
            dist.store_host,
            dist.store_port,
            is_master=False,
            wait_for_workers=False,
            timeout=STORE_TIMEOUT,
        )
    except (RuntimeError, ValueError):
        return None
    return _AgentStore(store, STORE_TIMEOUT)


class _AgentStore:
    """TCPStore with every failure turned into ConnectionError, which the claimer meets.

    Its own timeout is for connecting: an answer it awaits for ever, and an agent that is stopped
    (or a machine that hangs) would hold up every rank. So a thread asks, and is left behind.
    """

    def __init__(self, store: Any, timeout: timedelta) -> None:
        self._store = store
        self._timeout = timeout
        self._silent = False

    def add(self, key: str, amount: int, /) -> int:
        return int(self._ask(lambda: self._store.add(key, amount)))

    def first(self, key: str, value: str, /) -> str:
        return str(self._ask(lambda: self._store.compare_set(key, "", value)), "utf-8")

    def _ask(self, question: Callable[[], Any]) -> Any:
        if self._silent:
            raise ConnectionError("torchrun's store does not answer")
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(question())
            except RuntimeError as error:  # torch.distributed.DistError is a RuntimeError
                answers.put(ConnectionError(str(error)))

        threading.Thread(target=ask, name="store", daemon=True).start()
        try:
            answer = answers.get(timeout=self._timeout.total_seconds())
        except queue.Empty:
            self._silent = True
            raise ConnectionError("torchrun's store does not answer") from None
        if isinstance(answer, ConnectionError):
            raise answer
        return answer


class Claims:
    """Deals units to this rank: first each unit to one rank, then whatever still has no record.

    The ranks of a job take neighbouring units, from a place that the job chose at random on. Where
    a unit is done already, by an earlier run or by another job that is under way, they go on from
    another random place; when the places are done, too, they share what is left in order. So two
    jobs on one output seldom take the same unit, and a job alone reads its captions forward.

    `is_done(unit)` looks for the unit's record; `refresh` lists all records anew, before the sweep
    asks for each unit. Iterating yields units to compute; a unit may be computed by two ranks at
    the very end, which is harmless. `swept` tells whether the unit now being computed may also be
    under way elsewhere.
    """

    def __init__(
        self,
        dist: DistContext,
        plan: str,
        num_units: int,
        is_done: Callable[[int], bool],
        store: CounterStore | None = None,
        refresh: Callable[[], None] = lambda: None,
    ) -> None:
        self._dist = dist
        self._num_units = num_units
        self._is_done = is_done
        self._store = store
        self._refresh = refresh
        nonce = f"{dist.run_id}/{dist.restart_count}/{dist.world_size}/{plan[:16]}"
        self._prefix = f"embed_precompute/{nonce}"
        self._key: str | None = None
        # Without a store, the ranks of one job agree on what their launcher tells all of them.
        self._seed = dist.run_id if dist.world_size > 1 else os.urandom(16).hex()
        self.swept = False
        self._met = False

    def move_on(self) -> None:
        """A unit dealt to this rank was done by another job meanwhile: go on from elsewhere."""
        self._met = True

    def __iter__(self) -> Iterator[int]:
        mine: set[int] = set()  # perhaps still under way here: not to be done twice
        try:
            for unit in self._shared(mine):
                mine.add(unit)
                yield unit
        except ConnectionError:
            pass  # the store has gone away: the sweep does the rest
        self.swept = True
        self._refresh()
        start = (self._num_units + 1) * self._dist.rank // self._dist.world_size
        for position in range(self._num_units + 1):
            unit = self._unit("0", (start + position) % (self._num_units + 1))
            if unit not in mine and not self._is_done(unit):
                yield unit

    def _shared(self, mine: set[int]) -> Iterator[int]:
        """Units that no other rank of this job is dealt."""
        if self._store is not None:
            key = f"{self._generation(self._store)}/seed"
            self._seed = self._store.first(key, os.urandom(16).hex())
        misses = 0
        for number in itertools.count():
            last = misses == MISSES
            misses += 1
            for unit in self._stretch("rest" if last else str(number)):
                if unit not in mine and not self._is_done(unit):
                    misses = 0
                    yield unit
                elif unit != NULL_UNIT:
                    self._met = True
                if self._met and not last:
                    self._met = False
                    break
            else:
                return

    def _stretch(self, name: str) -> Iterator[int]:
        """Positions of a stretch, each dealt to one rank: a shared counter, or every W-th."""
        for turn in itertools.count():
            position = self._dist.rank + turn * self._dist.world_size
            if self._store is not None:
                key = f"{self._generation(self._store)}/next/{name}"
                position = self._store.add(key, 1) - 1
            if position > self._num_units:
                return
            yield self._unit(name, position)

    def _unit(self, stretch: str, position: int) -> int:
        """The null embedding, then all units from a place of this job and stretch on, and around.

        The order is one that a reader likes: units in a row are rows of captions in a row.
        """
        if position == 0:
            return NULL_UNIT
        place = hashlib.sha256(f"{self._seed}/{stretch}".encode()).digest()
        return (int.from_bytes(place, "big") + position - 1) % self._num_units

    def _generation(self, store: CounterStore) -> str:
        """The key prefix of this rendezvous: the store outlives a rendezvous and keeps its keys.

        Every rank arrives once, so the arrivals of one rendezvous are one block of `world_size`
        numbers. A rank that died before it arrived shifts the blocks of a later rendezvous of the
        same size; its ranks then share units badly and the sweep makes up for it.
        """
        if self._key is None:
            arrival = store.add(f"{self._prefix}/arrivals", 1) - 1
            self._key = f"{self._prefix}/{arrival // self._dist.world_size}"
        return self._key

    def take_finalize(self) -> bool:
        """True for the first rank that asks, so that not every rank builds the same index."""
        if self._store is None:
            return True
        try:
            return self._store.add(f"{self._generation(self._store)}/finalize", 1) == 1
        except ConnectionError:
            return True
