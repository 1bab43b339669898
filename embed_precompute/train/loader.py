"""A data loader whose place in the data is a few numbers: stop anywhere, go on on any world.

Guarantees: the order of an epoch is one list of all samples, a function of seed and epoch
(`epoch_order`). A step of W ranks with batches of B takes the next W x B positions of it; rank r
has those at r, r + W, r + 2W, ... of them. So what has been seen is one number, the positions
`consumed` by all ranks together; the state holds it with seed and epoch, and neither world size,
number of workers nor batch size. Whoever loads it deals out the rest of the epoch, from `consumed`
on, as an epoch of its own: each sample comes before or after, in the same global order. The count
is of batches the *consumer* was given, not of those that workers have ready. The state is a dict of
numbers and strings, for JSON. Torch's global random generator is not touched.

The end of an epoch, where M < W x B positions are left (`ends`):
  pad     every rank gets ceil(M / W) samples; up to W - 1 positions from the beginning of the
          epoch's order are given a second time. All ranks have the same number of steps, and in a
          step the same number of samples.
  drop    the M samples are left out of this epoch: all batches are full.
  uneven  every sample once: in the last step some ranks have one sample less, or no batch at all
          where M < W (their epoch has a step less: only for loops without collectives).
With another world or batch size in the middle of an epoch this holds for what is left then.

The ranks are assumed in lockstep: state is saved between two steps, by rank 0 beside the model.
After k steps it is the same on every rank that had k (rank 0 has the most).
Costs: in the main process 0.15 us per sample for `epoch_order`, in blocks (0.6 ms for 4,096); what
torch's DataLoader costs, which this is a thin layer over. Imports torch and numpy, no transformers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from embed_precompute.distributed import DistContext
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.train.dataset import collate_embeddings
from embed_precompute.train.epoch_order import ORDER_VERSION, EpochOrder

Ends = Literal["pad", "drop", "uneven"]
BLOCK = 4096
"""Positions whose samples are computed at once: numpy's calls cost as much as 900 positions."""


@dataclass(frozen=True)
class Position:
    """A place in the data: `consumed` positions of the order of `epoch` are behind it."""

    epoch: int = 0
    consumed: int = 0


class ResumableSampler(Sampler[list[int]]):
    """Batches of sample indexes for one rank, from `position` to the end of its epoch.

    For `DataLoader(batch_sampler=...)`. Iterating moves `position` with every batch that is dealt,
    and at the end to the next epoch, so epochs follow each other without `set_epoch`. A plain
    DataLoader with workers fetches ahead of its consumer, and `position` with it: EmbeddingLoader
    counts what was received; torchdata's StatefulDataLoader keeps the state of each batch. One
    iteration at a time.

    `rank` and `world_size`: by default those of torch's process group, else of the launcher. With
    sequence, tensor or pipeline parallelism give those of the data-parallel group.

    Raises InputError for no samples, numbers out of range, and `drop` where not one batch is full.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        ends: Ends = "pad",
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        self._detected = rank is None and world_size is None
        if rank is None or world_size is None:
            if not self._detected:
                raise InputError(f"rank {rank} of world_size {world_size}: give both, or neither.")
            dist = DistContext.of_training()
            rank, world_size = dist.rank, dist.world_size
        self.num_samples, self.batch_size = map(operator.index, (num_samples, batch_size))
        self.rank, self.world_size = operator.index(rank), operator.index(world_size)
        self.seed, self.shuffle, self.ends = operator.index(seed), bool(shuffle), ends
        self.position = Position()
        if self.num_samples < 1:
            raise InputError("the dataset has no samples: expected at least one.")
        if self.batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: expected 1 or more.")
        if not 0 <= self.rank < self.world_size:
            raise InputError(f"rank {rank} of {world_size}: expected a rank below world_size.")
        if ends not in get_args(Ends):
            raise InputError(f"ends is {ends!r}: expected one of {', '.join(get_args(Ends))}.")
        if len(self) == 0 and ends == "drop":
            raise InputError(
                f"{num_samples} samples make no full step of {world_size} ranks x {batch_size}, "
                "and ends is 'drop': every epoch would be empty. Use smaller batches or 'pad'."
            )

    def __len__(self) -> int:
        """Batches that this rank has in a whole epoch."""
        return self.batches_left(0)

    def batches_left(self, consumed: int) -> int:
        """Batches that this rank has in what is left of an epoch."""
        return -(-self._samples_left(consumed) // self.batch_size)

    def _samples_left(self, consumed: int) -> int:
        left = self.num_samples - consumed
        if self.ends == "drop":
            return self._steps_left(consumed) * self.batch_size
        if self.ends == "pad":
            return -(-left // self.world_size)
        return max(0, -(-(left - self.rank) // self.world_size))

    def _steps_left(self, consumed: int) -> int:
        """Steps of all ranks together; `uneven` may give this rank one less."""
        left, step = self.num_samples - consumed, self.batch_size * self.world_size
        return left // step if self.ends == "drop" else -(-left // step)

    def after(self, start: Position, steps: int) -> Position:
        """Where `steps` steps from `start` lead; what `drop` leaves out is behind the last step."""
        consumed = start.consumed + steps * self.batch_size * self.world_size
        if steps >= self._steps_left(start.consumed):
            consumed = self.num_samples
        return Position(start.epoch, consumed)

    def __iter__(self) -> Iterator[list[int]]:
        self._check_ranks()
        start, steps, order = self.position, 0, None
        if self.shuffle:
            order = EpochOrder(self.num_samples, self.seed, start.epoch)
        left, first = self._samples_left(start.consumed), start.consumed + self.rank
        block = -(-BLOCK // self.batch_size) * self.batch_size
        for begin in range(0, left, block):
            turns = np.arange(begin, min(begin + block, left), dtype=np.int64)
            positions = (first + turns * self.world_size) % self.num_samples  # `pad` begins again
            indexes = (positions if order is None else order.at(positions)).tolist()
            for at in range(0, len(indexes), self.batch_size):
                steps += 1
                self.position = self.after(start, steps)
                yield indexes[at : at + self.batch_size]
        self.position = Position(start.epoch + 1)

    def _check_ranks(self) -> None:
        """A process group that came after this sampler: without it all ranks read the same."""
        if not self._detected:
            return
        dist = DistContext.of_training()
        if dist.source == "group" and (dist.rank, dist.world_size) != (self.rank, self.world_size):
            raise InputError(
                f"made for rank {self.rank} of {self.world_size}, but the process group says "
                f"{dist.rank} of {dist.world_size}. Make it after torch.distributed."
                "init_process_group, or give rank and world_size."
            )

    def set_epoch(self, epoch: int) -> None:
        """To the beginning of `epoch`; the epoch that it is in already goes on where it is."""
        if epoch < 0:
            raise InputError(f"epoch is {epoch}: expected 0 or more.")
        if epoch != self.position.epoch:
            self.position = Position(operator.index(epoch))

    def state_dict(self) -> dict[str, Any]:
        """Where it is and in what order: JSON, and the same on every rank."""
        return self.state_at(self.position)

    def state_at(self, position: Position) -> dict[str, Any]:
        """The state of a job that is at `position`."""
        return {
            "version": ORDER_VERSION,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": position.epoch,
            "consumed": position.consumed,
            "num_samples": self.num_samples,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state: its order (seed, shuffle) and place, here with this world size.

        Raises InputError for what is no state, ConflictError for another number of samples; then
        nothing has changed.
        """
        seed, shuffle, position = _read_state(state_dict, self.num_samples)
        self.seed, self.shuffle, self.position = seed, shuffle, position


class EmbeddingLoader:
    """Batches of a map-style dataset for this rank, resumable at every step.

    Iterating goes on from where the loader is, to the end of its epoch; the next iteration is the
    next epoch (after a `break`, the rest of the same one). At the end of an epoch, before its loop
    has ended, a state says so: resumed from it, the loop over that epoch has no batches.

        loader = EmbeddingLoader(dataset, batch_size=8, num_workers=2)
        if saved: loader.load_state_dict(saved["loader"])
        for epoch in range(loader.epoch, epochs):
            for batch in loader:
                ...  # and, at times, save {"model": ..., "loader": loader.state_dict()}

    `shuffle`, `seed`, `ends`, `rank` and `world_size` are as in ResumableSampler and the module's
    docstring; `options` go to torch's DataLoader as they are. By default workers stay between
    epochs, and memory is pinned where there is CUDA. An error in a batch does not count it: the
    next iteration begins with that batch.

    `dataset` may have `fingerprint` and `samples_digest`, as EmbeddingDataset has; a state is then
    refused (ConflictError) by a dataset where they differ, and always by one of another length.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        ends: Ends = "pad",
        rank: int | None = None,
        world_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = collate_embeddings,
        num_workers: int = 0,
        **options: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(
                f"{type(dataset).__name__} has no positions to go on from: expected a map-style "
                "dataset, with __len__ and __getitem__, such as EmbeddingDataset."
            )
        if not options.get("in_order", True):
            raise InputError("in_order is False: batches that overtake each other can't be counted")
        self.dataset = dataset
        self._sampler = ResumableSampler(
            len(dataset),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            ends=ends,
            rank=rank,
            world_size=world_size,
        )
        self._generator = torch.Generator()
        options.setdefault("generator", self._generator)
        options.setdefault("persistent_workers", num_workers > 0)
        options.setdefault("pin_memory", torch.cuda.is_available())
        self._loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            collate_fn=collate_fn,
            num_workers=num_workers,
            **options,
        )
        self._position = Position()  # what the consumer has; the sampler's is what workers have
        self._iteration = object()

    @property
    def epoch(self) -> int:
        """The epoch that the next batch is of, or whose end has been reached."""
        return self._position.epoch

    def __len__(self) -> int:
        """Batches that this rank has in a whole epoch."""
        return len(self._sampler)

    @property
    def batches_left(self) -> int:
        """Batches that this rank has in the rest of the epoch."""
        return self._sampler.batches_left(self._position.consumed)

    def __iter__(self) -> Iterator[Any]:
        self._iteration = object()
        self._sampler.position = start = self._position
        # Of the workers' own random numbers; otherwise they are taken from torch's global
        # generator, and a resumed job has other dropouts than one that was never stopped.
        place = (self._sampler.seed, start.epoch, start.consumed, self._sampler.rank)
        self._generator.manual_seed(xxhash.xxh3_64_intdigest(repr(place).encode()))
        return self._received(iter(self._loader), start, self._iteration)

    def _received(
        self, batches: Iterator[Any], start: Position, iteration: object
    ) -> Iterator[Any]:
        steps = 0
        while True:
            if iteration is not self._iteration:
                raise InputError(
                    "this iteration has ended: the loader has begun another one, or its epoch or "
                    "state was set. A loader is in one place at a time: iterate anew, or make two."
                )
            try:
                batch = next(batches)
            except StopIteration:
                break
            steps += 1
            self._position = self._sampler.after(start, steps)
            yield batch
        self._position = Position(start.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """To the beginning of `epoch`; the epoch that it is in already goes on where it is.

        Not needed: epochs follow each other. It suits loops that were written for torch's
        DistributedSampler.
        """
        self._sampler.position = self._position
        self._sampler.set_epoch(epoch)
        if self._sampler.position != self._position:
            self._begin_at(self._sampler.position)

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer is: a dict for JSON, the same on every rank after the same steps."""
        return {**self._sampler.state_at(self._position), **_identity(self.dataset)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state of any world size, batch size and number of workers.

        The order (seed, shuffle) is the state's. Raises InputError for what is no state,
        ConflictError for a state of another dataset; then nothing has changed.
        """
        for key, here in _identity(self.dataset).items():
            there = _entry(state_dict, key, (str, type(None)))
            if there != here:
                raise ConflictError(
                    f"the state is of another dataset: its {key} is {there}, that of the dataset "
                    f"here {here}. Open the dataset the state was saved with, or begin anew "
                    "without load_state_dict."
                )
        self._sampler.load_state_dict(state_dict)
        self._begin_at(self._sampler.position)

    def _begin_at(self, position: Position) -> None:
        self._position = position
        self._iteration = object()  # what iterates now is at another place


def _identity(dataset: Dataset[Any]) -> dict[str, str | None]:
    """What tells datasets apart, as far as this one says it."""
    return {key: getattr(dataset, key, None) for key in ("fingerprint", "samples_digest")}


def _entry(state: Mapping[str, Any], key: str, kind: Any) -> Any:
    """state[key], which is of this kind; no bool for an int."""
    if not isinstance(state, Mapping) or key not in state:
        found = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise InputError(f"no state of a loader: no {key!r} in ({found}).")
    value = state[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"no state of a loader: its {key!r} is {value!r}.")
    return value


def _read_state(state: Mapping[str, Any], num_samples: int) -> tuple[int, bool, Position]:
    """Seed, shuffle and position of a state for a dataset of `num_samples`."""
    version = _entry(state, "version", int)
    if version != ORDER_VERSION:
        raise InputError(
            f"the state has version {version}: expected {ORDER_VERSION}. It was saved by another "
            "release, whose order of samples differs: go on with that one until the epoch ends."
        )
    there = _entry(state, "num_samples", int)
    if there != num_samples:
        raise ConflictError(
            f"the state is of another dataset: it has {there} samples, the one here {num_samples}. "
            "Open the dataset the state was saved with, or begin anew without load_state_dict."
        )
    position = Position(_entry(state, "epoch", int), _entry(state, "consumed", int))
    if position.epoch < 0 or not 0 <= position.consumed <= num_samples:
        raise InputError(f"no state of a loader: {position} of {num_samples} samples.")
    return _entry(state, "seed", int), _entry(state, "shuffle", bool), position
