"""Claims, without any process group: every unit is dealt, whatever the store does."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from handmade import make_plan, write_null, write_plan

from embed_precompute.distributed import DistContext
from embed_precompute.errors import ConflictError
from embed_precompute.job import claims
from embed_precompute.job.claims import Claims, Committed
from embed_precompute.store.records import NULL_UNIT

END = NULL_UNIT - 1


class Counters:
    """torchrun's store, in memory; `broken` after a number of calls."""

    def __init__(self, broken_after: int | None = None) -> None:
        self.values: dict[str, int] = {}
        self.texts: dict[str, str] = {}
        self.calls = 0
        self.broken_after = broken_after

    def add(self, key: str, amount: int, /) -> int:
        self.calls += 1
        if self.broken_after is not None and self.calls > self.broken_after:
            raise RuntimeError("gone")
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes:
        found = self.texts.get(key, "")
        if found == expected:
            self.texts[key] = found = desired
        return found.encode()


def ranks_of(
    world_size: int, num_units: int, done: set[int], store: Counters | None
) -> list[Claims]:
    dists = [DistContext(rank, world_size, run_id="j") for rank in range(world_size)]
    return [Claims(dist, "p", num_units, done.__contains__, store) for dist in dists]


def drain(ranks: list[Claims], done: set[int]) -> list[list[int]]:
    """The units that each rank takes, one after another in turn; each is done when taken."""
    taken: list[list[int]] = [[] for _ in ranks]
    live = [*zip(map(iter, ranks), taken, strict=True)]
    while live:
        for iterator, units in live.copy():
            unit = next(iterator, END)
            if unit == END:
                live.remove((iterator, units))
            elif unit is not None:
                units.append(unit)
                done.add(unit)
    return taken


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("with_store", [True, False])
@pytest.mark.parametrize("num_units", [0, 1, 5, 40])
def test_every_unit_is_dealt_once(world_size: int, with_store: bool, num_units: int) -> None:
    done: set[int] = set()
    taken = drain(ranks_of(world_size, num_units, done, Counters() if with_store else None), done)
    assert sorted(itertools.chain(*taken)) == list(range(NULL_UNIT, num_units))


@pytest.mark.parametrize("with_store", [True, False])
def test_one_rank_alone_finishes_what_dead_ranks_leave(with_store: bool) -> None:
    done: set[int] = set()
    dead, alive, _ = ranks_of(3, 12, done, Counters() if with_store else None)
    next(iter(dead))  # claims a unit, and dies before it commits
    assert sorted(*drain([alive], done)) == list(range(NULL_UNIT, 12))
    assert alive.swept


@pytest.mark.parametrize("broken_after", range(6))
def test_a_store_that_goes_away_costs_nothing_but_order(broken_after: int) -> None:
    done: set[int] = set()
    claims = ranks_of(2, 9, done, Counters(broken_after=broken_after))[1]
    assert sorted(*drain([claims], done)) == list(range(NULL_UNIT, 9))
    assert claims.is_first_to_finalize(), "without a store every rank may finalise"


def test_a_new_rendezvous_on_the_same_store_starts_a_new_count() -> None:
    store = Counters()
    for _ in range(3):  # same run id, same restart count: only the rendezvous is new
        done: set[int] = set()
        ranks = ranks_of(2, 8, done, store)
        taken = drain(ranks, done)
        assert sorted(itertools.chain(*taken)) == list(range(NULL_UNIT, 8))
        assert all(len(units) >= 4 for units in taken)
        assert [rank.is_first_to_finalize() for rank in ranks] == [True, False]


def test_finished_units_are_skipped() -> None:
    done = {NULL_UNIT, 0, 2}
    assert sorted(*drain(ranks_of(1, 4, done, Counters()), done)) == [1, 3]


@pytest.mark.parametrize("with_store", [True, False])
def test_a_rank_does_not_sweep_what_it_still_has_under_way(with_store: bool) -> None:
    """Units are claimed ahead of their commit: none of them is done while this rank claims."""
    store = Counters() if with_store else None
    claims = Claims(DistContext(), "p", 5, lambda unit: False, store)
    first, *others = claims
    assert (first, sorted(others)) == (NULL_UNIT, [0, 1, 2, 3, 4])


def test_not_all_ranks_sweep_the_unit_of_a_dead_rank() -> None:
    """One of a thousand idle ranks takes it beside the rank to which it was dealt, then three more,
    in the end all. When it is committed those that wait end."""
    done = set(range(NULL_UNIT, 8)) - {3}
    waiting = [iter(rank) for rank in ranks_of(1024, 8, done, None)]
    takers = []
    for _ in range(5):
        takers.append(0)
        for _ in range(claims.POLLS):
            taken = [next(rank) for rank in waiting]
            takers[-1] += sum(unit == 3 for unit in taken)
            waiting = [rank for rank, unit in zip(waiting, taken, strict=True) if unit is None]
    assert takers == [1 + 1, 4 - 1, 16 - 4, 64 - 16, 256 - 64]
    done.add(3)
    assert {next(rank, END) for rank in waiting} == {END}


@pytest.mark.parametrize("lister_dies", [False, True])
def test_ranks_with_a_store_share_a_listing(lister_dies: bool) -> None:
    """One of them lists the records; if it dies over that, the others wait a while and list."""
    done, listings, taken = {NULL_UNIT, *range(9)}, 0, 0
    store = Counters()

    def list_left() -> list[int]:
        nonlocal listings
        listings += 1
        return [9]

    dists = [DistContext(rank, 50, run_id="j") for rank in range(50)]
    ranks = [iter(Claims(dist, "p", 10, done.__contains__, store, list_left)) for dist in dists]
    assert next(ranks.pop(0)) == 9  # and dies
    if lister_dies:
        assert store.add(f"{claims_prefix(store)}/lists", 1) == 1
    for _ in range(3 * claims.POLLS):
        taken += sum(next(rank, END) == 9 for rank in ranks)
    assert taken >= 1
    assert listings == (49 if lister_dies else 1)


def claims_prefix(store: Counters) -> str:
    """The keys of the ranks' rendezvous."""
    return next(key for key in store.values if key.endswith("/next")).removesuffix("/next")


def test_ranks_share_what_a_dead_rank_left() -> None:
    """Every rank comes to the sweep at the same time, and no unit is taken twice."""
    done: set[int] = set()
    ranks = ranks_of(64, 6400, done, None)
    alive = [iter(claims) for claims in ranks[1:]]
    dealt = [unit for rank in alive for unit in itertools.islice(rank, 100)]
    assert len(set(dealt)) == 63 * 100
    done.update(unit for unit in dealt if unit is not None)
    swept = [list(itertools.takewhile(lambda unit: unit is not None, rank)) for rank in alive]
    once = [*itertools.chain(*swept)]
    assert len(set(once)) == len(once) >= 95, "but for those whose helper is the dead rank itself"
    assert max(map(len, swept)) <= 6, "a few of them each"


def test_what_is_committed_stays_known_while_it_is_listed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer checks the environment while the reader lists the records for its sweep."""
    plan = make_plan(num_rows=4, samples_per_shard=2)
    write_plan(tmp_path, plan)
    write_null(tmp_path, plan)
    committed = Committed(tmp_path, plan)
    original = claims.record_path

    def checked(root: Path, unit: int) -> Path:
        with pytest.raises(ConflictError, match="another environment"):
            committed.check_environment({"torch": "other"}, "refuse")
        return original(root, unit)

    monkeypatch.setattr(claims, "record_path", checked)
    committed.refresh()
    assert committed.left() == {0, 1}
