"""A data loader that can stop after any step and go on with other ranks, workers or batch sizes.

The order of an epoch is one list of all samples, a function of seed and epoch (`EpochOrder`). A
step of W ranks with batches of B samples takes the next W x B positions of that list; rank r takes
every W-th of them, starting at the r-th. So one number says what all ranks have seen: how many
positions are `consumed`. A saved state holds this number with seed and epoch. It does not hold
world size, batch size or number of workers; a job that loads it deals out the rest of the list in
its own way, and no sample is missed or seen twice.

Only batches that the training loop received are counted, not those that workers have prepared.
Torch's global random generator is not used.

At the end of an epoch M < W x B positions may be left. `ends` says what becomes of them:
  pad     Every rank gets ceil(M / W) samples; up to W - 1 samples from the start of the epoch's
          list are given a second time. All ranks have equal steps and equal batches.
  drop    The M samples are left out of this epoch. All batches are full.
  uneven  Every sample is given once. In the last step some ranks get a smaller batch, or none where
          M < W, so these ranks have one step less: only for loops without collectives.
When the world size or batch size changes within an epoch, this holds for the rest of it.

With a batch sampler of the user's (`GivenBatches`) the order is its own. A state then counts the
batches of a rank, which are skipped when the sampler is iterated again, and compared.

Save the state between two steps, on rank 0, with the model. The ranks must be in lockstep: after
equally many steps they have equal states (with `uneven`, rank 0 makes the most steps).

Imports torch and numpy, no transformers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import isqrt
from typing import Any, Literal, get_args

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from embed_precompute.distributed import DistContext
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.train.dataset import collate_embeddings

Ends = Literal["pad", "drop", "uneven"]
ORDER_VERSION = 1
ROUNDS = 16
"""With 12 rounds the orders of 6 and 7 samples are not yet equally likely; with 16 they are."""
REMEDY = "Open the dataset of the saved state, or start again without load_state_dict."
DIFFERS = {
    "fingerprint": "What a caption becomes differs: the encoders or their settings.",
    "samples_digest": "The samples or their order differ, or the seed of a JoinedDataset.",
}
"""What differs where the two datasets differ in this."""
BLOCK = 4096
"""Positions of the order computed at once: a numpy call costs as much as 900 positions."""


Array = np.ndarray[Any, np.dtype[Any]]


class EpochOrder:
    """The order of one epoch: a permutation that is computed position by position, never stored.

    It maps the positions 0 to n - 1 one-to-one to the samples 0 to n - 1 and depends on n, seed and
    epoch alone, not on the random numbers of any library: a position saved today names the same
    sample under a later numpy or torch. A change of this code needs a new ORDER_VERSION, which
    every saved state holds. For n up to 7, where it can be counted, all n! orders are about equally
    likely; for large n, neighbours in the order are unrelated in the dataset.

    It takes no memory and no time to start. A sample costs about 0.15 us on one CPU core in blocks
    of some thousand positions: 15 s for an epoch of 100 million samples, divided over the ranks. A
    stored permutation of them would take 3 s to make and 0.8 GB on every rank.

    The permutation is a Feistel network over a grid of rows x columns >= n cells (Black and Rogaway
    2002, "Ciphers with arbitrary finite domains"). Each round shifts one coordinate by a hash of
    the other. A result that is not below n goes through the network again until it is.
    """

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self._num_samples = np.uint64(num_samples)
        rows = isqrt(max(num_samples - 1, 0)) + 1
        rows += rows % 2  # only a shift along an even coordinate can be an odd permutation
        self._sizes = (np.uint64(rows), np.uint64(-(-num_samples // rows)))
        names = [f"order {ORDER_VERSION}/{seed}/{epoch}/{k}" for k in range(ROUNDS)]
        self._keys = [np.uint64(xxhash.xxh3_64_intdigest(name.encode())) for name in names]

    def at(self, positions: Array) -> Array:
        """The sample of each position, int64; positions are 0 to n - 1."""
        found = self._network(positions.astype(np.uint64))
        (outside,) = np.nonzero(found >= self._num_samples)
        while outside.size:
            found[outside] = self._network(found[outside])
            outside = outside[found[outside] >= self._num_samples]
        return found.astype(np.int64)

    def _network(self, values: Array) -> Array:
        """A permutation of the numbers below rows x columns."""
        columns = self._sizes[1]
        cell = [values // columns, values % columns]
        for k, key in enumerate(self._keys):
            moved, other = k % 2, 1 - k % 2
            size = self._sizes[moved]
            # The hash's upper half scaled to [0, size): both factors are below 2**32.
            by = ((_mixed(cell[other] + key) >> np.uint64(32)) * size) >> np.uint64(32)
            moved_to = cell[moved] + by
            cell[moved] = np.where(moved_to >= size, moved_to - size, moved_to)
        permuted: Array = cell[0] * columns + cell[1]
        return permuted


def _mixed(values: Array) -> Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


@dataclass(frozen=True)
class Position:
    """How far the training is: `consumed` positions of the order of `epoch` have been used."""

    epoch: int = 0
    consumed: int = 0


@dataclass(frozen=True)
class _Place:
    """Which rank this is, and whether that was found out or given."""

    rank: int
    world_size: int
    detected: bool

    @classmethod
    def of(cls, rank: int | None, world_size: int | None) -> _Place:
        if (rank is None) is not (world_size is None):
            raise InputError(f"rank {rank} of world_size {world_size}: give both, or neither.")
        if rank is None or world_size is None:
            dist = DistContext.of_training()
            return cls(dist.rank, dist.world_size, detected=True)
        if not 0 <= rank < world_size:
            raise InputError(f"rank {rank} of {world_size}: expected a rank below world_size.")
        return cls(operator.index(rank), operator.index(world_size), detected=False)

    def check(self) -> None:
        """InputError where a process group that was made since says something else."""
        dist = DistContext.of_training() if self.detected else DistContext()
        if dist.source == "group" and (dist.rank, dist.world_size) != (self.rank, self.world_size):
            raise InputError(
                f"the loader was made for rank {self.rank} of {self.world_size}, but the process "
                f"group says {dist.rank} of {dist.world_size}. Make the loader after "
                "torch.distributed.init_process_group, or give it rank and world_size."
            )


class ResumableSampler(Sampler[list[int]]):
    """Batches of sample indexes for one rank, from `position` to the end of its epoch.

    For `DataLoader(batch_sampler=...)`. Each batch moves `position`; the last one moves it to the
    next epoch, so `set_epoch` is not needed. A plain DataLoader with workers asks for batches ahead
    of the training loop, so `position` is then ahead too. EmbeddingLoader counts the batches that
    the loop received; torchdata's StatefulDataLoader keeps a state for each batch. Only one
    iteration at a time may run.

    `rank` and `world_size` are by default those of torch's process group, and without one those of
    the launcher. With sequence, tensor or pipeline parallelism give those of the data-parallel
    group.

    Raises InputError for an empty dataset, for numbers out of range, and for `ends` drop where no
    batch would be full.
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
        self._place = _Place.of(rank, world_size)
        self.rank, self.world_size = self._place.rank, self._place.world_size
        self.num_samples, self.batch_size = map(operator.index, (num_samples, batch_size))
        if not hasattr(seed, "__index__"):
            raise InputError(f"seed is {seed!r}: expected an integer.")
        self.seed, self.shuffle, self.ends = operator.index(seed), bool(shuffle), ends
        self.position = Position()
        if self.num_samples < 1:
            raise InputError("the dataset has no samples: expected at least one.")
        if self.batch_size < 1:
            raise InputError(f"batch_size is {batch_size}: expected 1 or more.")
        if ends not in get_args(Ends):
            raise InputError(f"ends is {ends!r}: expected one of {', '.join(get_args(Ends))}.")
        if len(self) == 0 and ends == "drop":
            raise InputError(
                f"{num_samples} samples make no full step of {self.world_size} ranks x "
                f"{batch_size}, "
                "and ends is 'drop': every epoch would be empty. Use smaller batches or 'pad'."
            )

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return self.batches_left(0)

    def batches_left(self, consumed: int) -> int:
        """Batches of this rank in the rest of an epoch of which `consumed` positions are used."""
        return -(-self._samples_left(consumed) // self.batch_size)

    def _samples_left(self, consumed: int) -> int:
        left = self.num_samples - consumed
        if self.ends == "drop":
            return self._steps_left(consumed) * self.batch_size
        if self.ends == "pad":
            return -(-left // self.world_size)
        return max(0, -(-(left - self.rank) // self.world_size))

    def _steps_left(self, consumed: int) -> int:
        """Steps of the job in the rest of the epoch; with `uneven` a rank may have one less."""
        left, step = self.num_samples - consumed, self.batch_size * self.world_size
        return left // step if self.ends == "drop" else -(-left // step)

    def after(self, start: Position, steps: int) -> Position:
        """The position `steps` steps after `start`. After the last step the epoch is used up, also
        where `drop` leaves samples out."""
        consumed = start.consumed + steps * self.batch_size * self.world_size
        if steps >= self._steps_left(start.consumed):
            consumed = self.num_samples
        return Position(start.epoch, consumed)

    def __iter__(self) -> Iterator[list[int]]:
        self._place.check()
        start, steps, order = self.position, 0, None
        if self.shuffle:
            order = EpochOrder(self.num_samples, self.seed, start.epoch)
        left, first = self._samples_left(start.consumed), start.consumed + self.rank
        block = -(-BLOCK // self.batch_size) * self.batch_size
        for begin in range(0, left, block):
            own = np.arange(begin, min(begin + block, left), dtype=np.int64)
            positions = (first + own * self.world_size) % self.num_samples  # `pad` wraps
            indexes = (positions if order is None else order.at(positions)).tolist()
            for at in range(0, len(indexes), self.batch_size):
                steps += 1
                self.position = self.after(start, steps)
                yield indexes[at : at + self.batch_size]
        self.position = Position(start.epoch + 1)

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of `epoch`; nothing happens where `position` is in that epoch already."""
        if (begin := _begin_of(epoch)).epoch != self.position.epoch:
            self.position = begin

    def state_dict(self, position: Position | None = None) -> dict[str, Any]:
        """A position (by default the sampler's) and the order, for JSON; equal on all ranks."""
        found = asdict(position or self.position)
        order = {"version": ORDER_VERSION, "seed": self.seed, "shuffle": self.shuffle}
        return {**order, **found, "num_samples": self.num_samples}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set position, seed and shuffle to those of a state; rank, world and batch size stay.

        Raises InputError for anything that is no state, ConflictError for a state of a dataset of
        another length. Then nothing has changed.
        """
        saved = _check_head(state_dict, self.num_samples)
        position = Position(_entry(state_dict, "epoch", int), _entry(state_dict, "consumed", int))
        if position.epoch < 0 or not 0 <= position.consumed <= saved:
            raise InputError(f"no state of a loader: {position} of {saved} samples.")
        seed, shuffle = _entry(state_dict, "seed", int), _entry(state_dict, "shuffle", bool)
        self.seed, self.shuffle, self.position = seed, shuffle, position


class GivenBatches(Sampler[list[Any]]):
    """A user's batch sampler from `position` to the end of its epoch; `consumed` counts batches.

    The sampler gives the batches of this rank, and has to give the same ones whenever it is
    iterated in the same epoch. `set_epoch` is called before, on it or on its `sampler`. To go on
    within an epoch it is iterated anew, and the batches that were consumed are skipped, unread. A
    digest of them is compared: ConflictError where the sampler gives others than it gave before,
    because it has another seed, world size or table, or draws from a random generator.
    """

    seed = 0
    """The order is the sampler's; the random numbers of workers follow from the step."""

    def __init__(self, batches: Iterable[Sequence[Any]], num_samples: int, place: _Place) -> None:
        if isinstance(batches, Iterator):
            raise InputError(
                f"batch_sampler is a {type(batches).__name__}, which can be iterated only once: "
                "expected an object that every epoch iterates anew, as torch's BatchSampler."
            )
        self._batches, self._place = batches, place
        self.num_samples, self.rank, self.world_size = num_samples, place.rank, place.world_size
        self.position = Position()
        self._digests: dict[int, str] = {}
        """Of the first n batches of the epoch of `position`, for n that may be asked for."""

    def __len__(self) -> int:
        """Batches of this rank in an epoch: what the user's sampler says."""
        return len(self._batches)  # type: ignore[arg-type]

    def batches_left(self, consumed: int) -> int:
        return max(0, len(self) - consumed)

    def after(self, start: Position, steps: int) -> Position:
        """The position `steps` batches after `start`, which training has reached."""
        consumed = start.consumed + steps
        self._digests = {n: digest for n, digest in self._digests.items() if n >= consumed}
        return Position(start.epoch, consumed)

    def __iter__(self) -> Iterator[list[Any]]:
        self._place.check()
        start, digest, skipped = self.position, "", 0
        expected = self._digests.get(start.consumed, "")  # empty: another rank saved the state
        self._digests = {start.consumed: expected}
        told: Any = self._batches
        while told is not None and not hasattr(told, "set_epoch"):
            told = getattr(told, "sampler", None)
        if told is not None:
            told.set_epoch(start.epoch)
        batches = map(list, self._batches)
        for batch in islice(batches, start.consumed):
            digest, skipped = _chained(digest, batch), skipped + 1
        if skipped < start.consumed or (expected and digest != expected):
            raise ConflictError(
                f"the batch sampler gives other batches in epoch {start.epoch} than the "
                f"{start.consumed} that were trained, or fewer. Give it the seed, world size and "
                "table of the saved state, or go to the next epoch with set_epoch."
            )
        count = start.consumed
        for count, batch in enumerate(batches, start.consumed + 1):
            digest = self._digests[count] = _chained(digest, batch)
            self.position = Position(start.epoch, count)
            yield batch
        if not count:
            raise InputError(f"the batch sampler gives no batch in epoch {start.epoch}.")
        self.position = Position(start.epoch + 1)

    def state_dict(self, position: Position) -> dict[str, Any]:
        """How many batches this rank was given, for JSON. Rank 0's is that of the job."""
        return {
            **{"version": ORDER_VERSION, "num_samples": self.num_samples},
            **{"epoch": position.epoch, "batches": position.consumed},
            **{"rank": self.rank, "world_size": self.world_size},
            "seen": self._digests.get(position.consumed, ""),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As ResumableSampler's; ConflictError for a state of another world size too."""
        _check_head(state_dict, self.num_samples)
        position = Position(_entry(state_dict, "epoch", int), _entry(state_dict, "batches", int))
        if position.epoch < 0 or position.consumed < 0:
            raise InputError(f"no state of a loader: {position}.")
        world_size, own = _entry(state_dict, "world_size", int), self.world_size
        if position.consumed and world_size != own:
            raise ConflictError(
                f"the state is of {world_size} ranks, and there are {own}: a batch sampler's "
                "batches are those of one number of ranks. Go on with that many, or go to the next "
                "epoch with set_epoch."
            )
        rank, seen = _entry(state_dict, "rank", int), _entry(state_dict, "seen", str)
        self.position = position
        # Another rank's batches are others: only the rank that saved the state can compare.
        self._digests = {position.consumed: seen if rank == self.rank else ""}


class EmbeddingLoader:
    """This rank's batches of a map-style dataset; it can stop and go on at every step.

    Iterating gives the rest of the current epoch: after a `break` the remaining batches, otherwise
    the whole next epoch. A state saved after the last batch of an epoch, inside its loop, still
    belongs to that epoch: when it is loaded, the loop over that epoch has no batches.

        loader = EmbeddingLoader(dataset, batch_size=8, num_workers=2)
        if saved: loader.load_state_dict(saved["loader"])
        for epoch in range(loader.epoch, epochs):
            for batch in loader:
                ...  # train; now and then save {"model": ..., "loader": loader.state_dict()}

    `shuffle` (True unless given), `seed` (0 unless given), `rank` and `world_size` are those of
    ResumableSampler, `ends` (`pad` unless given) is described in the module's docstring, and
    `options` go to torch's DataLoader. A `batch_sampler` gives the batches of this rank instead, as
    GivenBatches says: it shuffles and deals out on its own, so batch_size, shuffle, seed and ends
    are refused with it. A dataset with `set_epoch` is told each epoch; where it has none, the
    datasets are told that it holds as attributes, alone or in a list. By default workers live for
    all epochs, and memory is pinned where there is CUDA. A batch that raised an error is not
    counted: the next iteration starts with it.

    A state says which samples it is about, and another dataset refuses it (ConflictError). They are
    known by `fingerprint` and `samples_digest`, which an EmbeddingDataset has; a wrapper is asked
    for them first, then its `dataset` attribute, where that has as many samples or the wrapper has
    `indices`, as torch's Subset. For a dataset without them only the length could be compared, so
    loading a state is refused, unless `allow_unknown_dataset` is True.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = None,
        *,
        batch_sampler: Iterable[Sequence[Any]] | None = None,
        shuffle: bool | None = None,
        seed: int | None = None,
        ends: Ends | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = collate_embeddings,
        num_workers: int = 0,
        allow_unknown_dataset: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InputError(
                f"{type(dataset).__name__} has no numbered samples: expected a map-style dataset, "
                "with __len__ and __getitem__, such as EmbeddingDataset."
            )
        if not options.get("in_order", True):
            raise InputError("in_order is False: batches out of order can't be counted.")
        for name, instead in (("drop_last", "ends='drop'"), ("sampler", "batch_sampler=")):
            if options.pop(name, None) not in (None, False):
                raise InputError(f"{name} is DataLoader's: give EmbeddingLoader {instead} instead.")
        self.dataset = dataset
        self._identity = _identity_of(dataset)
        self._allow_unknown = allow_unknown_dataset
        self._sampler: ResumableSampler | GivenBatches
        if batch_sampler is not None:
            own = {"batch_size": batch_size, "shuffle": shuffle, "seed": seed, "ends": ends}
            if given := [name for name, value in own.items() if value is not None]:
                raise InputError(
                    f"batch_sampler says which samples a batch has: leave out {', '.join(given)}."
                )
            place = _Place.of(rank, world_size)
            self._sampler = GivenBatches(batch_sampler, len(dataset), place)
        elif batch_size is None:
            raise InputError("neither batch_size nor batch_sampler is given: expected one of them.")
        else:
            order: Any = {
                "shuffle": shuffle is None or shuffle,
                "seed": 0 if seed is None else seed,
                "ends": ends or "pad",
            }
            ranks: Any = {"rank": rank, "world_size": world_size}
            self._sampler = ResumableSampler(len(dataset), batch_size, **order, **ranks)
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
        self._position = Position()  # of the training loop; the sampler's is that of the workers
        self._iteration = object()

    def __repr__(self) -> str:
        position, sampler = self._position, self._sampler
        unit = "batches" if isinstance(sampler, GivenBatches) else "samples"
        return (
            f"EmbeddingLoader({self.dataset!r}, rank {sampler.rank} of {sampler.world_size}, after "
            f"{position.consumed:,} {unit} of epoch {position.epoch})"
        )

    @property
    def epoch(self) -> int:
        """The epoch of the next batch; after the last batch, inside its loop, still that epoch."""
        return self._position.epoch

    def __len__(self) -> int:
        """Batches of this rank in a whole epoch."""
        return len(self._sampler)

    @property
    def batches_left(self) -> int:
        """Batches of this rank in the rest of the epoch."""
        return self._sampler.batches_left(self._position.consumed)

    def __iter__(self) -> Iterator[Any]:
        self._iteration = object()
        self._sampler.position = start = self._position
        _tell_epoch(self.dataset, start.epoch)
        # DataLoader draws the seed of its workers from this generator, and otherwise from torch's
        # global one: then a resumed job would draw another dropout than one that never stopped.
        seeds = (self._sampler.seed, start.epoch, start.consumed, self._sampler.rank)
        self._generator.manual_seed(xxhash.xxh3_64_intdigest(repr(seeds).encode()))
        return self._received(iter(self._loader), start, self._iteration)

    def _received(
        self, batches: Iterator[Any], start: Position, iteration: object
    ) -> Iterator[Any]:
        steps = 0
        while True:
            if iteration is not self._iteration:
                raise InputError(
                    "this iteration has ended: the loader began another one, or its epoch or state "
                    "was set. A loader has one position: iterate over it again, or make two."
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
        """Go to the start of `epoch`; nothing happens where the loader is in that epoch already.

        Epochs follow each other without it; it is for loops written for torch's DistributedSampler.
        """
        if (begin := _begin_of(epoch)).epoch != self._position.epoch:
            self._begin_at(begin)

    def state_dict(self) -> dict[str, Any]:
        """How far the training loop is, for JSON; equal on all ranks after equally many steps.

        With a batch sampler it is this rank's: save that of rank 0, and load it on all.
        """
        return {**self._sampler.state_dict(self._position), **self._identity}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state that was saved with any world size, batch size and workers.

        With a batch sampler the world size has to be the same, and so its batches: rank 0 compares.

        Seed and shuffle become those of the state. Raises InputError for anything that is no state
        and for a dataset that nothing identifies, ConflictError for a state of another dataset.
        Then nothing has changed.
        """
        known = any(self._identity.values())
        for key, own in self._identity.items():
            saved = _entry(state_dict, key, (str, type(None)))
            if known and saved != own:
                raise ConflictError(
                    f"the state is of another dataset: its {key} is {saved}, that of this dataset "
                    f"{own}. {DIFFERS[key]} {REMEDY}"
                )
        if not known and not self._allow_unknown:
            raise InputError(
                f"{type(self.dataset).__name__} has neither `fingerprint` and `samples_digest` nor "
                "a `dataset` of its length with them: nothing says whether the state is of these "
                "samples. Give it these attributes, or make the loader with "
                "allow_unknown_dataset=True."
            )
        given = isinstance(self._sampler, GivenBatches)
        if "version" in state_dict and ("batches" in state_dict) is not given:
            raise ConflictError(
                f"the state is of a loader with{'out' if given else ''} a batch_sampler, and this "
                f"one has {'one' if given else 'none'}: make the loader as it was."
            )
        self._sampler.load_state_dict(state_dict)
        self._begin_at(self._sampler.position)

    def _begin_at(self, position: Position) -> None:
        self._position = position
        self._iteration = object()  # ends an iteration that is under way


def _identity_of(dataset: Any) -> dict[str, str | None]:
    """`fingerprint` and `samples_digest` of a dataset or of the one that it wraps; else None.

    Where a wrapper has `indices`, as torch's Subset, the digest covers them, because they say which
    samples it has. A wrapper of another length without them has samples that nobody knows.
    """
    keys = ("fingerprint", "samples_digest")
    found = {key: getattr(dataset, key, None) for key in keys}
    inner = getattr(dataset, "dataset", None)
    if any(found.values()) or inner is None:
        return found
    known = _identity_of(inner)
    if not any(known.values()):
        return found
    indices = getattr(dataset, "indices", None)
    if indices is None:
        return known if len(dataset) == len(inner) else found
    digest = xxhash.xxh3_128_hexdigest(np.asarray(indices, np.int64).tobytes())
    subset = f"{known['samples_digest']} {digest}"
    return {**known, "samples_digest": xxhash.xxh3_128_hexdigest(subset.encode())}


def _chained(digest: str, batch: Sequence[Any]) -> str:
    """The digest of some batches and the one after them."""
    text = f"{digest} {' '.join(map(str, batch))}"
    return xxhash.xxh3_64_hexdigest(text.encode())


def _begin_of(epoch: int) -> Position:
    if epoch < 0:
        raise InputError(f"epoch is {epoch}: expected 0 or more.")
    return Position(operator.index(epoch))


def _tell_epoch(dataset: Any, epoch: int) -> None:
    """Call `set_epoch` of a dataset; where it has none, of the datasets that it holds."""
    left, seen = [dataset], set()
    while left:
        told = left.pop()
        if hasattr(told, "set_epoch"):
            told.set_epoch(epoch)
        elif told is not None and id(told) not in seen:
            seen.add(id(told))
            left.append(getattr(told, "dataset", None))  # of any class, as in most wrappers
            for held in getattr(told, "__dict__", {}).values():
                several = held.values() if isinstance(held, dict) else held
                several = several if isinstance(held, (dict, list, tuple)) else [held]
                # The first says what the others are: there may be millions of them.
                left += several if isinstance(next(iter(several), None), Dataset) else []


def _check_head(state: Mapping[str, Any], num_samples: int) -> int:
    """The number of samples of a state, which has to be that of this dataset."""
    version = _entry(state, "version", int)
    if version != ORDER_VERSION:
        raise InputError(
            f"the state has version {version}: expected {ORDER_VERSION}. The release that saved it "
            "has another order of samples: use that release until the end of the epoch."
        )
    saved: int = _entry(state, "num_samples", int)
    if saved != num_samples:
        raise ConflictError(
            f"the state is of a dataset of {saved} samples, this one has {num_samples}. {REMEDY}"
        )
    return saved


def _entry(state: Mapping[str, Any], key: str, kind: Any) -> Any:
    """state[key], checked to be of this kind; a bool is no int."""
    if not isinstance(state, Mapping) or key not in state:
        found = ", ".join(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise InputError(f"no state of a loader: no {key!r} in ({found}).")
    value = state[key]
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"no state of a loader: its {key!r} is {value!r}.")
    return value
