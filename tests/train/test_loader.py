"""EmbeddingLoader, its sampler and the order of an epoch: each sample once, whatever happens.

Killed and resumed with other ranks and workers: F18 in tests/faults.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from math import factorial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import write_dataset
from torch import distributed
from torch.utils.data import (
    BatchSampler,
    ChainDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Subset,
)

from embed_precompute import EmbeddingDataset, EmbeddingLoader
from embed_precompute.distributed import DistContext
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.train.loader import ORDER_VERSION, EpochOrder, ResumableSampler

ENDS: tuple[Any, ...] = ("pad", "drop", "uneven")


class Numbers(Dataset[int]):
    """Sample i is i: a loader's batch is the sampler's. One sample may be unreadable."""

    def __init__(self, num_samples: int, bad: int | None = None) -> None:
        self.num_samples, self.bad = num_samples, bad

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, i: int) -> int:
        if i == self.bad:
            raise OSError("unreadable")
        return i


def loader_of(dataset: Dataset[Any] | int, batch_size: int = 2, **options: Any) -> EmbeddingLoader:
    if isinstance(dataset, int):
        dataset = Numbers(dataset)
    options = {"rank": 0, "world_size": 1, "collate_fn": list, **options}
    options.setdefault("allow_unknown_dataset", True)
    return EmbeddingLoader(dataset, batch_size, **options)


def order_of(num_samples: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return EpochOrder(num_samples, seed, epoch).at(np.arange(num_samples)).tolist()


def samplers(
    num_samples: int, world_size: int, batch_size: int, ends: Any, state: Any = None
) -> list[ResumableSampler]:
    made = [
        ResumableSampler(num_samples, batch_size, ends=ends, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for sampler in made if state is not None else ():
        sampler.load_state_dict(state)
    return made


def interleaved(batches: list[list[list[int]]]) -> list[int]:
    """The samples of batches[rank][step] in the order of their positions."""
    steps = itertools.zip_longest(*batches, fillvalue=[])
    turns = (turn for step in steps for turn in itertools.zip_longest(*step))
    return [sample for turn in turns for sample in turn if sample is not None]


# --- the order of an epoch ------------------------------------------------------------------------


def test_order_is_stable() -> None:
    """States saved by any release mean these samples: a change needs a new ORDER_VERSION."""
    assert ORDER_VERSION == 1
    assert order_of(10) == [0, 3, 5, 4, 2, 1, 7, 8, 6, 9]
    assert order_of(10, epoch=1) == [7, 0, 4, 9, 1, 5, 3, 2, 6, 8]
    assert order_of(10, seed=1) == [9, 8, 7, 5, 2, 6, 0, 1, 4, 3]
    assert order_of(1000, 7, 3)[:6] == [560, 747, 255, 787, 784, 786]
    found = EpochOrder(10**8 + 7, -5, 2).at(np.array([0, 1, 10**8 + 6]))
    assert found.tolist() == [13246896, 74499461, 54475029]
    found = EpochOrder(2**40 + 1, 0, 0).at(np.array([0, 1, 2**40]))
    assert found.tolist() == [425814838604, 865868586549, 648609607429]


@pytest.mark.parametrize("num_samples", [*range(1, 40), 255, 256, 257, 1009])
def test_order_is_one_to_one(num_samples: int) -> None:
    for seed, epoch in ((0, 0), (-3, 1), (2**70, 10**6)):
        found = order_of(num_samples, seed, epoch)
        assert sorted(found) == list(range(num_samples))
    order = EpochOrder(num_samples, 0, 0)
    alone = [order.at(np.array([k])).item() for k in range(num_samples)]
    assert alone == order_of(num_samples), "a position does not depend on its block"


def test_every_order_is_equally_likely() -> None:
    num_samples, trials = 4, 1200
    seen = Counter(tuple(order_of(num_samples, epoch=epoch)) for epoch in range(trials))
    orders = factorial(num_samples)
    expected = trials / orders
    absent = (orders - len(seen)) * expected
    chi_square = absent + sum((count - expected) ** 2 / expected for count in seen.values())
    assert chi_square < orders - 1 + 5 * (2 * (orders - 1)) ** 0.5


def test_neighbours_are_of_random_shards() -> None:
    num_samples, per_shard = 200_000, 1_000
    first, second = (np.array(order_of(num_samples, epoch=epoch)) for epoch in (0, 1))
    shards = first // per_shard
    same, expected = int((shards[1:] == shards[:-1]).sum()), per_shard - 1
    assert abs(same - expected) < 5 * expected**0.5
    assert int((first == second).sum()) < 10, "1 is expected where epochs are unrelated"
    assert abs(np.abs(np.diff(first)).mean() / num_samples - 1 / 3) < 0.005


# --- who gets what --------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 5000])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_every_sample_once(world_size: int, batch_size: int, ends: Any) -> None:
    for num_samples in (1, 2, 3, 5, 6, 7, 8, 16, 23, 24, 25, 100):
        step = world_size * batch_size
        if ends == "drop" and num_samples < step:
            continue
        made = samplers(num_samples, world_size, batch_size, ends)
        batches = [list(sampler) for sampler in made]
        assert [len(each) for each in batches] == [len(sampler) for sampler in made]
        assert all(0 < len(batch) <= batch_size for each in batches for batch in each)
        order, dealt = order_of(num_samples), interleaved(batches)
        shapes = {tuple(len(batch) for batch in each) for each in batches}
        if ends == "uneven":
            assert dealt == order
            steps = [len(each) for each in batches]
            assert max(steps) - min(steps) <= (num_samples % step in range(1, world_size))
        elif ends == "drop":
            assert dealt == order[: num_samples // step * step]
            assert shapes == {(batch_size,) * (num_samples // step)}
        else:
            assert dealt == (order * world_size)[: -(-num_samples // world_size) * world_size]
            assert len(shapes) == 1


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("before", [(1, 3), (2, 2), (3, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("after", [(1, 2), (2, 3), (3, 2), (4, 1)], ids=str)
def test_resumed_on_another_world(ends: Any, before: Any, after: Any) -> None:
    for num_samples in (12, 19, 24):
        order = order_of(num_samples)
        most, least = (len(samplers(num_samples, *before, ends)[rank]) for rank in (0, -1))
        for steps in range(most + 1):
            first = samplers(num_samples, *before, ends)
            dealt = interleaved([list(itertools.islice(each, steps)) for each in first])
            states = [json.dumps(each.state_dict()) for each in first]
            state = json.loads(states[0])  # rank 0 has most steps
            assert steps > least or len(set(states)) == 1
            second = samplers(num_samples, *after, ends, state)
            left = [each.batches_left(state["consumed"]) for each in second]
            rest = [list(each) for each in second]
            assert [len(each) for each in rest] == left
            dealt += interleaved(rest)
            full, world_size = after[0] * after[1], after[0]
            if state["consumed"] == num_samples:
                assert not any(rest)
            elif ends == "drop":
                dropped = (num_samples - state["consumed"]) % full
                assert dealt == order[: num_samples - dropped]
            elif ends == "uneven":
                assert dealt == order
            else:
                more = (state["consumed"] - num_samples) % world_size
                assert dealt == order + order[:more]
            assert {each.position.epoch for each in second} == {1}


def test_bad_arguments() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_samples": 0}, "no samples"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"rank": -1}, "rank -1 of 2"),
        ({"rank": None}, "give both, or neither"),
        ({"ends": "stop"}, "one of pad, drop, uneven"),
        ({"ends": "drop", "batch_size": 3}, "5 samples make no full step of 2 ranks x 3"),
    ]
    sound = {"num_samples": 5, "batch_size": 2, "rank": 0, "world_size": 2}
    for options, message in cases:
        with pytest.raises(InputError, match=message):
            ResumableSampler(**{**sound, **options})


# --- ranks of a training job ----------------------------------------------------------------------


def test_launcher_then_process_group(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    early = EmbeddingLoader(Numbers(12), 2, collate_fn=list)
    assert (early._sampler.rank, early._sampler.world_size) == (1, 3)
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        assert DistContext.of_training() == DistContext(source="group")
        with pytest.raises(InputError, match=r"rank 1 of 3, .* says 0 of 1"):
            next(iter(early))
        late = EmbeddingLoader(Numbers(12), 2, collate_fn=list)
        assert interleaved([list(late)]) == order_of(12)
        given = EmbeddingLoader(Numbers(12), 2, rank=1, world_size=3, collate_fn=list)
        assert next(iter(given)) == order_of(12)[1:6:3]
    finally:
        distributed.destroy_process_group()


# --- the loader -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader") / "out"
    write_dataset(folder, [f"caption {i}" for i in range(13)])
    return folder


def ids(num_samples: int, seed: int = 0, epoch: int = 0) -> list[str]:
    return [f"s{i}" for i in order_of(num_samples, seed, epoch)]


def test_batches_are_collated_embeddings(root: Path) -> None:
    loader = EmbeddingLoader(EmbeddingDataset(root), 4)
    batches = list(loader)
    assert len(batches) == len(loader) == 4
    assert [each for batch in batches for each in batch["id"]] == ids(13)
    assert batches[0]["text_t5"].shape == (4, 3, 4)
    assert batches[0]["text_t5_mask"].all()


def test_a_state_is_json_and_says_which_data(root: Path) -> None:
    dataset = EmbeddingDataset(root)
    loader = loader_of(dataset, 4, seed=5, collate_fn=len)
    next(iter(loader))
    order = {"version": ORDER_VERSION, "seed": 5, "shuffle": True, "epoch": 0, "consumed": 4}
    data = {"fingerprint": dataset.fingerprint, "samples_digest": dataset.samples_digest}
    found = json.loads(json.dumps(loader.state_dict()))
    assert found == {**order, **data, "num_samples": 13}


def test_a_rank_without_a_sample_has_its_epochs_too() -> None:
    idle = loader_of(2, rank=4, world_size=5, ends="uneven")
    assert (len(idle), list(idle), idle.epoch) == (0, [], 1)


def test_epochs_follow_each_other() -> None:
    loader = loader_of(7)
    for epoch in range(3):
        assert loader.epoch == epoch
        assert interleaved([list(loader)]) == order_of(7, epoch=epoch)
    loader.set_epoch(1)
    assert interleaved([list(loader)]) == order_of(7, epoch=1)
    with pytest.raises(InputError, match="epoch is -1"):
        loader.set_epoch(-1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_break_loses_nothing(num_workers: int) -> None:
    """The same workers stay, and what they had ready is dropped."""
    loader = loader_of(23, num_workers=num_workers)
    seen: list[int] = []
    for stop in (2, 1, 5):
        for batch in itertools.islice(loader, stop):
            seen += batch
        loader.set_epoch(0)  # as loops for DistributedSampler do: it goes on
        assert loader.state_dict()["consumed"] == len(seen)
        assert loader.batches_left == len(loader) - len(seen) // 2
    assert seen + interleaved([list(loader)]) == order_of(23)
    assert interleaved([list(loader)]) == order_of(23, epoch=1)


@pytest.mark.parametrize("ends", ENDS)
def test_resumed_at_the_end_of_an_epoch(ends: Any) -> None:
    loader = loader_of(7, 3, ends=ends)
    iterator = iter(loader)
    for _ in range(len(loader)):
        next(iterator)
    at_end = loader.state_dict()
    assert (at_end["epoch"], at_end["consumed"]) == (0, 7)
    assert next(iterator, None) is None
    assert loader.state_dict() == {**at_end, "epoch": 1, "consumed": 0}
    resumed = loader_of(7, 1, ends=ends)  # smaller batches do not find what was dropped
    resumed.load_state_dict(at_end)
    assert (resumed.epoch, resumed.batches_left, list(resumed)) == (0, 0, [])
    assert resumed.epoch == 1
    assert interleaved([list(resumed)]) == order_of(7, epoch=1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_place_at_a_time(num_workers: int) -> None:
    loader = loader_of(11, num_workers=num_workers)
    order = order_of(11)
    first, second = iter(loader), iter(loader)
    with pytest.raises(InputError, match="iterate over it again, or make two"):
        next(first)
    assert next(second) == order[:2]
    saved = loader.state_dict()
    assert next(second) == order[2:4]
    loader.set_epoch(0)
    assert next(second) == order[4:6]
    loader.load_state_dict(saved)
    with pytest.raises(InputError, match="state was set"):
        next(second)
    assert interleaved([list(loader)]) == order[2:]
    third = iter(loader)
    next(third)
    loader.set_epoch(4)
    with pytest.raises(InputError, match="epoch or state was set"):
        next(third)
    assert interleaved([list(loader)]) == order_of(11, epoch=4)


def test_the_order_is_the_states() -> None:
    first = loader_of(9, seed=3, shuffle=True)
    seen = next(iter(first))
    second = loader_of(9, seed=4, shuffle=False)
    second.load_state_dict(first.state_dict())
    assert seen + interleaved([list(second)]) == order_of(9, seed=3)
    assert second.state_dict()["seed"] == 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_unreadable_batch_does_not_count(num_workers: int) -> None:
    order = order_of(10)
    dataset = Numbers(10, bad=order[5])
    loader = loader_of(dataset, num_workers=num_workers, persistent_workers=False)
    seen: list[int] = []
    iterator = iter(loader)
    with pytest.raises(OSError, match="unreadable"):
        seen.extend(itertools.chain.from_iterable(iterator))
    assert (seen, loader.state_dict()["consumed"]) == (order[:4], 4)
    assert next(iterator, None) is None, "it does not go on after the batch"
    dataset.bad = None
    assert seen + interleaved([list(loader)]) == order


class Drawing(Numbers):
    """A sample is a random number of the process that reads it."""

    def __getitem__(self, i: int) -> int:
        return int(torch.randint(1 << 40, ()))


def test_torchs_generator_is_left_alone() -> None:
    """A resumed job begins an iteration more than one that was never stopped."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = [list(loader_of(Drawing(6), num_workers=1, rank=r, world_size=2)) for r in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    list(loader_of(6))
    assert torch.equal(torch.get_rng_state(), before)


# --- refused --------------------------------------------------------------------------------------


def test_another_dataset_is_refused(root: Path, tmp_path: Path) -> None:
    texts: list[Any] = [f"caption {i}" for i in range(13)]
    write_dataset(tmp_path / "spec", texts, normalize=["nfc"])
    write_dataset(tmp_path / "failed", [*texts, "nan"])
    write_dataset(tmp_path / "other-failed", ["nan", *texts])
    write_dataset(tmp_path / "more", [*texts, "one more"])
    write_dataset(tmp_path / "same", texts)

    def made(*folders: str | Path) -> EmbeddingLoader:
        return loader_of(EmbeddingDataset([tmp_path / folder for folder in folders]))

    state = made(root).state_dict()
    made("same").load_state_dict(state)
    failed, digest = made("failed").state_dict(), "samples_digest is"
    assert failed["num_samples"] == 13
    for other, given, said in (
        (made("spec"), state, r"fingerprint is [0-9a-f]{64}, that of this dataset \w+"),
        (made("more"), state, digest),
        (made("other-failed"), failed, digest),
        (made(root), loader_of(13).state_dict(), "fingerprint is None"),
        (loader_of(13), loader_of(12).state_dict(), "a dataset of 12 samples, this one has 13"),
    ):
        with pytest.raises(ConflictError, match=said):
            other.load_state_dict(given)


class Wrapper(Numbers):
    """What users do: a class of their own around a dataset."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(len(dataset))
        self.dataset = dataset


def test_a_wrapped_dataset_is_known_by_what_it_wraps(root: Path, tmp_path: Path) -> None:
    """The state of another dataset of equal length passed for the wrapper's own."""
    write_dataset(tmp_path, [f"other {i}" for i in range(13)], normalize=["nfc"])
    own, other = EmbeddingDataset(root), EmbeddingDataset(tmp_path)
    state = loader_of(own).state_dict()
    assert loader_of(Wrapper(Wrapper(own))).state_dict() == state
    loader_of(Wrapper(own)).load_state_dict(state)
    with pytest.raises(ConflictError, match="another dataset: its fingerprint"):
        loader_of(Wrapper(other)).load_state_dict(state)
    some = loader_of(Subset(own, [1, 2])).state_dict()
    loader_of(Wrapper(Subset(own, [1, 2]))).load_state_dict(some)
    for indices in ([2, 1], [3, 4]):
        with pytest.raises(
            ConflictError, match=r"another dataset: its samples_digest.*The samples "
        ):
            loader_of(Subset(own, indices)).load_state_dict(some)
    shorter = Wrapper(own)
    shorter.num_samples = 7  # it filters; which samples it has, nobody knows
    with pytest.raises(InputError, match=r"Wrapper has neither.*`dataset` of its length"):
        loader_of(shorter, allow_unknown_dataset=False).load_state_dict(state)
    assert loader_of(shorter).state_dict()["fingerprint"] is None


def test_an_unknown_dataset_is_refused_unless_asked_for() -> None:
    state = loader_of(13).state_dict()
    strict = loader_of(13, allow_unknown_dataset=False)
    with pytest.raises(InputError, match=r"Numbers has neither.*allow_unknown_dataset=True"):
        strict.load_state_dict(state)
    assert strict.state_dict() == state, "saving one is allowed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2: expected 1"),
        ({"consumed": 14}, "consumed=14"),
        ({"consumed": 1.5}, "'consumed' is 1.5"),
        ({"epoch": True}, "'epoch' is True"),
        ({"epoch": -1}, "epoch=-1"),
        ({"seed": "0"}, "'seed' is '0'"),
        ({"shuffle": 1}, "'shuffle' is 1"),
        ({"fingerprint": 7}, "'fingerprint' is 7"),
        ({"num_samples": None}, "'num_samples' is None"),
    ],
    ids=str,
)
def test_a_bad_state_changes_nothing(change: dict[str, Any], message: str) -> None:
    loader = loader_of(13)
    iterator = iter(loader)
    next(iterator)
    state, key = loader.state_dict(), next(iter(change))
    bad: list[Any] = [({**state, **change}, message)]
    bad += [({k: v for k, v in state.items() if k != key}, f"no '{key}' in")]
    bad += [(other, "no state of a loader") for other in ([], None, {"_num_yielded": 3})]
    for wrong, said in bad:
        with pytest.raises(InputError, match=said):
            loader.load_state_dict(wrong)
    assert loader.state_dict() == state
    assert next(iterator) == order_of(13)[2:4]


def test_what_it_cannot_load() -> None:
    with pytest.raises(InputError, match="ChainDataset has no numbered samples"):
        loader_of(ChainDataset([]))
    with pytest.raises(InputError, match="no samples"):
        loader_of(0)
    with pytest.raises(InputError, match="in_order is False"):
        loader_of(3, in_order=False)
    for options, said in (
        ({"drop_last": True}, "drop_last is DataLoader's: give EmbeddingLoader ends='drop'"),
        ({"sampler": RandomSampler(Numbers(3))}, "give EmbeddingLoader batch_sampler="),
        ({"seed": "a"}, "seed is 'a': expected an integer"),
    ):
        with pytest.raises(InputError, match=said):
            loader_of(3, **options)


def test_a_loader_says_where_it_is(root: Path) -> None:
    loader = EmbeddingLoader(EmbeddingDataset(root), 4)
    next(iter(loader))
    assert repr(loader).startswith(f"EmbeddingLoader(EmbeddingDataset({root}: 13 samples")
    assert repr(loader).endswith(", rank 0 of 1, after 4 samples of epoch 0)")
    assert repr(given(Buckets(4))).endswith(", rank 0 of 1, after 0 batches of epoch 0)")


# --- a batch sampler of the user's ----------------------------------------------------------------


class Buckets:
    """What video trainers have: batches of one shape, dealt out to ranks, shuffled by epoch."""

    def __init__(self, num_samples: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples, self.seed, self.epoch = num_samples, seed, -1
        self.rank, self.world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_samples // 2 // self.world_size

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.num_samples // 2)
        for k in order[self.rank :: self.world_size][: len(self)].tolist():
            yield 2 * k, 2 * k + 1


def given(sampler: Any, num_samples: int = 20, **options: Any) -> EmbeddingLoader:
    options = {"collate_fn": list, "allow_unknown_dataset": True, **options}
    return EmbeddingLoader(Numbers(num_samples), batch_sampler=sampler, **options)


def expected_of(sampler: Buckets, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return [list(batch) for batch in sampler]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_batch_sampler_goes_on_at_every_step(num_workers: int, rank: int) -> None:
    """Rank 0 saves the state, and every rank loads it."""
    ranks: dict[str, Any] = {"rank": rank, "world_size": 2}
    wanted = [expected_of(Buckets(20, 3, **ranks), epoch) for epoch in range(2)]
    saving = given(Buckets(20, 3, 0, 2), rank=0, world_size=2)
    options = {**ranks, "num_workers": num_workers, "persistent_workers": False}
    for epoch in range(2):
        iterator = iter(saving)
        for steps in range(6):
            state = json.loads(json.dumps(saving.state_dict()))
            assert (state["epoch"], state["batches"]) == (epoch, steps)
            resumed = given(Buckets(20, 3, **ranks), **options)
            resumed.load_state_dict(state)
            assert (resumed.epoch, resumed.batches_left) == (epoch, 5 - steps)
            assert list(resumed) == wanted[epoch][steps:]
            assert resumed.epoch == epoch + 1
            next(iterator, None)
    assert next(iter(resumed)) == expected_of(Buckets(20, 3, **ranks), 2)[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_break_loses_no_given_batch(num_workers: int) -> None:
    loader = given(Buckets(20), num_workers=num_workers)
    seen: list[list[int]] = []
    for stop in (2, 1, 3):
        seen += itertools.islice(loader, stop)
        assert (loader.batches_left, len(loader)) == (10 - len(seen), 10)
    saved = loader.state_dict()
    assert seen + list(loader) == expected_of(Buckets(20), 0)
    loader.set_epoch(4)
    assert list(loader) == expected_of(Buckets(20), 4)
    loader.load_state_dict(saved)
    assert seen + list(loader) == expected_of(Buckets(20), 0)


def test_torchs_samplers_shuffle_anew_in_each_epoch() -> None:
    """A BatchSampler has no set_epoch: that of the sampler in it is called."""
    inner = DistributedSampler(Numbers(20), num_replicas=2, rank=1)
    loader = given(BatchSampler(inner, 4, drop_last=False), rank=1, world_size=2)
    first, second = list(loader), list(loader)
    assert first != second
    loader.set_epoch(0)
    assert list(loader) == first


def test_other_batches_than_before_are_refused() -> None:
    loader = given(Buckets(20, 3))
    list(itertools.islice(loader, 4))
    state, said = loader.state_dict(), "gives other batches in epoch 0 than the 4 that were trained"
    for other in (Buckets(20, 4), Buckets(6, 3), Buckets(20, 3, 1, 2)):
        resumed = given(other)
        resumed.load_state_dict(state)
        with pytest.raises(ConflictError, match=said):
            list(resumed)
        resumed.set_epoch(1)
        assert list(resumed) == expected_of(other, 1)
    unseeded = given(BatchSampler(RandomSampler(Numbers(20)), 4, drop_last=False))
    list(itertools.islice(unseeded, 2))
    with pytest.raises(ConflictError, match="other batches in epoch 0 than the 2"):
        list(unseeded)
    two = given(Buckets(20, 3), rank=0, world_size=2)
    with pytest.raises(ConflictError, match=r"of 1 ranks, and there are 2: .*set_epoch"):
        two.load_state_dict(state)
    with pytest.raises(ConflictError, match="a dataset of 20 samples, this one has 19"):
        given(Buckets(20), 19).load_state_dict(state)


def test_states_of_both_kinds_are_kept_apart() -> None:
    own, batches = loader_of(20), given(Buckets(20))
    with pytest.raises(ConflictError, match="a loader without a batch_sampler, and this one has o"):
        batches.load_state_dict(own.state_dict())
    with pytest.raises(ConflictError, match="a loader with a batch_sampler, and this one has none"):
        own.load_state_dict(batches.state_dict())
    for change in ({"batches": -1}, {"seen": None}, {"world_size": "2"}):
        with pytest.raises(InputError, match="no state of a loader"):
            batches.load_state_dict({**batches.state_dict(), **change})


def test_what_a_batch_sampler_cannot_go_with() -> None:
    for options, said in (
        ({"batch_size": 2, "shuffle": True}, "leave out batch_size, shuffle"),
        ({"ends": "pad", "seed": 0}, "leave out seed, ends"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
    ):
        with pytest.raises(InputError, match=said):
            given(Buckets(20), **options)
    with pytest.raises(InputError, match="batch_sampler is a generator, which can be iterated onl"):
        given([k] for k in range(3))
    with pytest.raises(InputError, match="the batch sampler gives no batch in epoch 0"):
        list(given(Buckets(1)))
    with pytest.raises(InputError, match="neither batch_size nor batch_sampler"):
        EmbeddingLoader(Numbers(3))


# --- with other loaders ---------------------------------------------------------------------------


def test_the_sampler_in_a_plain_data_loader() -> None:
    sampler = ResumableSampler(9, 2, rank=0, world_size=1)
    plain: DataLoader[Any] = DataLoader(Numbers(9), batch_sampler=sampler, collate_fn=list)
    assert len(plain) == 5
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert interleaved([list(plain)]) == order_of(9, epoch=epoch)
    in_order = ResumableSampler(5, 2, shuffle=False, rank=0, world_size=1)
    assert [list(in_order) for _ in range(2)] == [[[0, 1], [2, 3], [4]]] * 2
    assert in_order.position.epoch == 2
