"""Claims and the environment, without any process group."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest

from embed_precompute.distributed import DistContext
from embed_precompute.errors import InputError
from embed_precompute.job.claims import Claims, _AgentStore
from embed_precompute.store.records import NULL_UNIT

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "abc",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SRUN = {
    "SLURM_PROCID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_JOB_ID": "77",
}


class Counters:
    """torchrun's store, in memory; `broken` after a number of calls."""

    def __init__(self, broken_after: int | None = None, seed: str | None = None) -> None:
        self.values: dict[str, int] = {}
        self.texts: dict[str, str] = {}
        self.seed = seed
        self.calls = 0
        self.broken_after = broken_after

    def add(self, key: str, amount: int, /) -> int:
        self.calls += 1
        if self.broken_after is not None and self.calls > self.broken_after:
            raise ConnectionError("gone")
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def first(self, key: str, value: str, /) -> str:
        return self.texts.setdefault(key, self.seed or value)


def test_detects_torchrun_before_slurm() -> None:
    dist = DistContext.detect({**SRUN, **TORCHRUN})
    assert (dist.rank, dist.world_size, dist.local_rank, dist.local_world_size) == (3, 8, 1, 2)
    assert (dist.source, dist.store_host, dist.store_port) == ("torchrun", "localhost", 29500)


def test_detects_srun() -> None:
    dist = DistContext.detect(SRUN)
    assert (dist.rank, dist.world_size, dist.local_rank, dist.local_world_size) == (2, 4, 0, 2)
    assert (dist.source, dist.store_host) == ("slurm", None)


def test_a_slurm_array_of_steps_is_one_row_of_ranks() -> None:
    array = {
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_ARRAY_TASK_MIN": "3",
        "SLURM_ARRAY_TASK_STEP": "2",
        "SLURM_ARRAY_TASK_COUNT": "5",
    }
    dist = DistContext.detect({**SRUN, **array})
    assert (dist.rank, dist.world_size) == (2 * 4 + 2, 20)


def test_a_batch_script_without_srun_is_alone() -> None:
    assert DistContext.detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == DistContext()
    assert DistContext.detect({}) == DistContext()


def test_a_wrong_environment_is_named() -> None:
    with pytest.raises(InputError, match="WORLD_SIZE is 'x'"):
        DistContext.detect({"RANK": "0", "WORLD_SIZE": "x"})
    with pytest.raises(InputError, match="rank 9 of 8"):
        DistContext.detect({**TORCHRUN, "RANK": "9"})


def drain(ranks: list[Claims], done: set[int], order: list[int]) -> list[list[int]]:
    """Step the ranks as `order` says (round robin at the end); each unit is done when taken."""
    taken: list[list[int]] = [[] for _ in ranks]
    iterators = [iter(rank) for rank in ranks]
    live = set(range(len(ranks)))
    turns = [*order, *(list(range(len(ranks))) * 1000)]
    for turn in turns:
        if turn not in live:
            continue
        unit = next(iterators[turn], None)
        if unit is None:
            live.discard(turn)
        else:
            taken[turn].append(unit)
            done.add(unit)
        if not live:
            break
    return taken


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("with_store", [True, False])
@pytest.mark.parametrize("num_units", [0, 1, 5, 40])
def test_every_unit_is_dealt_once(world_size: int, with_store: bool, num_units: int) -> None:
    done: set[int] = set()
    store = Counters() if with_store else None
    ranks = [
        Claims(DistContext(rank=r, world_size=world_size), "p", num_units, done.__contains__, store)
        for r in range(world_size)
    ]
    taken = drain(ranks, done, [])
    assert sorted(itertools.chain(*taken)) == list(range(NULL_UNIT, num_units))


@pytest.mark.parametrize("with_store", [True, False])
def test_one_rank_alone_finishes_what_dead_ranks_leave(with_store: bool) -> None:
    done: set[int] = set()
    store = Counters() if with_store else None
    ranks = [
        Claims(DistContext(rank=r, world_size=3), "p", 12, done.__contains__, store)
        for r in range(3)
    ]
    dead = iter(ranks[0])
    next(dead)  # claims a unit, and dies before it commits
    alone = list_units(ranks[1], done)
    assert sorted(alone) == list(range(NULL_UNIT, 12))
    assert ranks[1].swept


def list_units(claims: Claims, done: set[int]) -> list[int]:
    units = []
    for unit in claims:
        units.append(unit)
        done.add(unit)
    return units


@pytest.mark.parametrize("broken_after", range(6))
def test_a_store_that_goes_away_costs_nothing_but_order(broken_after: int) -> None:
    done: set[int] = set()
    claims = Claims(
        DistContext(rank=1, world_size=2), "p", 9, done.__contains__, Counters(broken_after)
    )
    assert sorted(list_units(claims, done)) == list(range(NULL_UNIT, 9))
    assert claims.take_finalize(), "without a store every rank may finalise"


class SilentStore:
    """TCPStore whose agent is stopped after some answers: torch awaits the next one for ever."""

    def __init__(self, answers: int) -> None:
        self.counters = Counters()
        self.answers = answers
        self.over = threading.Event()

    def add(self, key: str, amount: int) -> int:
        self.answers -= 1
        if self.answers < 0:
            self.over.wait(60)
            raise RuntimeError("the test is over")
        return self.counters.add(key, amount)

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        return self.counters.first(key, value).encode()


@pytest.mark.parametrize("answers", [0, 1, 4])
def test_a_store_that_falls_silent_holds_nobody_up(answers: int) -> None:
    done: set[int] = set()
    silent = SilentStore(answers)
    store = _AgentStore(silent, timedelta(seconds=0.2))
    dist = DistContext(rank=1, world_size=2)
    claims = Claims(dist, "p", 9, done.__contains__, store)
    began = time.monotonic()
    assert sorted(list_units(claims, done)) == list(range(NULL_UNIT, 9))
    assert claims.take_finalize()
    assert time.monotonic() - began < 30
    silent.over.set()


def test_a_new_rendezvous_on_the_same_store_starts_a_new_count() -> None:
    store = Counters()
    for _ in range(3):  # same run id, same restart count: only the rendezvous is new
        done: set[int] = set()
        ranks = [
            Claims(DistContext(rank=r, world_size=2, run_id="j"), "p", 8, done.__contains__, store)
            for r in range(2)
        ]
        taken = drain(ranks, done, [0, 1])
        assert sorted(itertools.chain(*taken)) == list(range(NULL_UNIT, 8))
        assert all(len(units) >= 4 for units in taken)
        assert [rank.take_finalize() for rank in ranks] == [True, False]


def test_finished_units_are_skipped() -> None:
    done = {NULL_UNIT, 0, 2}
    claims = Claims(DistContext(), "p", 4, done.__contains__, Counters())
    assert sorted(list_units(claims, done)) == [1, 3]


@pytest.mark.parametrize("with_store", [True, False])
def test_a_rank_does_not_sweep_what_it_still_has_under_way(with_store: bool) -> None:
    """Units are claimed ahead of their commit: none of them is done while this rank claims."""
    store = Counters() if with_store else None
    claims = Claims(DistContext(), "p", 5, lambda unit: False, store)
    units = list(claims)
    assert units[0] == NULL_UNIT
    assert sorted(units) == [NULL_UNIT, 0, 1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [(1, 1), (1, 3), (2, 2), (3, 3)])
@pytest.mark.parametrize("delay", [0, 1, 40, 150])
def test_two_jobs_on_one_output_seldom_take_the_same_unit(
    ranks: tuple[int, int], delay: int
) -> None:
    """Each rank is dealt a unit, encodes it for a while, then asks for the next."""
    shares = []
    for trial in range(6):
        begun, num_units = _two_jobs(ranks, delay, random.Random(f"{ranks} {delay} {trial}"))
        assert set(begun) == set(range(NULL_UNIT, num_units))
        tail = 2 * sum(ranks)  # one that is encoded and one that is read ahead
        shares.append(max(0, len(begun) - num_units - 1 - tail) / num_units)
    assert sum(shares) / len(shares) <= 0.05, shares


def _two_jobs(
    ranks: tuple[int, int], delay: int, rng: random.Random, num_units: int = 300
) -> tuple[list[int], int]:
    """Every unit that a rank began, in the order of a clock that goes from event to event."""
    done: set[int] = set()
    begun: list[int] = []
    events: list[tuple[float, int, int]] = []  # (time, rank, unit that ends then)
    claims: list[Claims] = []
    dealt: list[Iterator[int]] = []
    ahead: list[list[int]] = []
    for job, world in enumerate(ranks):
        store = Counters(seed=rng.randbytes(8).hex())
        for rank in range(world):
            dist = DistContext(rank=rank, world_size=world)
            events.append((job * delay + rng.random() * 0.1, len(claims), NULL_UNIT - 1))
            claims.append(Claims(dist, "p", num_units, done.__contains__, store))
            dealt.append(iter(claims[-1]))
            ahead.append([])
    while events:
        events.sort()
        now, rank, ended = events.pop(0)
        if ended in done:
            claims[rank].move_on()
        done.add(ended)
        while True:
            while len(ahead[rank]) < 2 and (unit := next(dealt[rank], None)) is not None:
                ahead[rank].append(unit)
            if not ahead[rank]:
                break
            unit = ahead[rank].pop(0)
            if unit not in done:
                begun.append(unit)
                events.append((now + rng.uniform(0.9, 1.1), rank, unit))
                break
            claims[rank].move_on()
    return begun, num_units
