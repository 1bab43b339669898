"""Copies between host and device that keep neither waiting: page-locked, on a stream of their own.

Guarantees: `Copies.download` returns at once, and its values are those the tensor has at that
place in the device's order of work, whatever a later forward writes there. A buffer on the host is
used again only when nobody holds a view of it any more (torch's allocator of page-locked memory
keeps it, and knows the copies that are under way into it). On a CPU all of this is nothing: no
copy, no wait.
Costs: on a GPU one copy within the device per output (some tens of microseconds), page-locked
memory for every output that is on its way or waits for the writer, rounded up to a power of two,
and as much device memory for those on their way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

import torch

Lines = torch.Tensor | list[torch.Tensor]
"""Embeddings of a batch; [i] is caption i's."""

IN_FLIGHT = 2
"""Forwards that are begun and not waited for: the device has the next when it ends one."""


class Arrival(Protocol):
    """The end of a copy; torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether it is over."""
        ...

    def synchronize(self) -> None:
        """Wait for it."""
        ...


class Pending:
    """The output of a forward that may still be on its way."""

    def __init__(self, values: Lines, arrival: Arrival | None = None) -> None:
        """`values` may be read from `arrival` on; None: now."""
        self._values, self._arrival = values, arrival

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._arrival is None or self._arrival.query()

    def wait(self) -> Lines:
        """The embeddings on the CPU. Raises what the device found wrong since it was asked."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._values


class Waiting(Protocol):
    """What `in_order` needs of a forward that was begun."""

    def ready(self) -> bool:
        """Whether its result is there."""
        ...


W = TypeVar("W", bound=Waiting)


def in_order(begun: Iterable[W]) -> Iterator[W]:
    """`begun`, one by one, each when it is ready or `IN_FLIGHT` are begun: taking the next one of
    `begun` begins a forward, so that it runs while the one before it is handed on."""
    flying: deque[W] = deque()
    for each in begun:
        flying.append(each)
        while flying and (flying[0].ready() or len(flying) >= IN_FLIGHT):
            yield flying.popleft()
    yield from flying


class Side(Protocol):
    """What a device does for `Copies`."""

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """A host tensor of the shape and dtype of `like` that the device can write by itself."""
        ...

    def start(self, source: torch.Tensor, target: torch.Tensor) -> Arrival:
        """Copy after all work that the device was given before, beside what it is given later;
        nobody else writes `source`."""
        ...


class CudaSide:
    """Of one NVIDIA GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def start(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        arrival = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            arrival.record(self._stream)
        source.record_stream(self._stream)  # its memory is not given away before
        return arrival


def side_of(device: torch.device) -> Side | None:
    """None for a CPU, whose tensors are where they are needed."""
    return CudaSide(device) if device.type == "cuda" else None


class Copies:
    """From one encoder's device to the host."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of the downloads."""
        self._dtype = dtype
        self._side = side_of(device)

    def download(
        self, values: torch.Tensor, lengths: list[int] | None = None, *, reused: bool
    ) -> Pending:
        """Take `values` to the host: as they are, or split into `lengths` along the first axis.

        `reused`: a later forward writes in this tensor again.
        """
        if self._side is None:
            return Pending(_split(values.to(self._dtype, copy=reused).contiguous(), lengths))
        # Copied within the device first, so that a later forward need not wait for the bus.
        source = values.to(self._dtype, copy=reused).contiguous()
        target = self._side.empty(source)
        arrival = self._side.start(source, target)
        return Pending(_split(target, lengths), arrival)


def _split(values: torch.Tensor, lengths: list[int] | None) -> Lines:
    return values if lengths is None else list(torch.split(values, lengths))


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without waiting for the work that the device has."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
