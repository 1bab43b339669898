"""Copies between host and device for which neither waits: page-locked, on their own CUDA stream.

Guarantees: `Downloader.start` returns at once, and what arrives is what the tensor held when the
device came to that point of its work; a later forward may overwrite it. A host buffer is used
again only when nobody holds a view of it any more: torch's allocator of page-locked memory keeps
it, and knows the copies that are under way into it. On a CPU nothing is copied and nobody waits.
Costs: on a GPU one copy within the device per output (some tens of microseconds), page-locked
memory for every output that is on its way or waits for the writer, rounded up to a power of two,
and as much device memory for those on their way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Embeddings = torch.Tensor | list[torch.Tensor]
"""What a forward made of a batch; [i] is what is stored of its caption i."""


class PendingOutput:
    """The output of a forward that may still be on its way."""

    def __init__(
        self, outputs: Mapping[str, Embeddings], events: Sequence[torch.cuda.Event] = ()
    ) -> None:
        """`outputs` may be read when all `events` are over."""
        self._outputs, self._events = outputs, events

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        events: Any = self._events  # torch's events have untyped methods
        return all(event.query() for event in events)

    def wait(self) -> Mapping[str, Embeddings]:
        """The embeddings on the CPU, by suffix. Raises what the device has found wrong since."""
        for event in self._events:
            event.synchronize()
        return self._outputs


class CopyEngine:
    """Copies from one NVIDIA GPU while it computes."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """A host tensor of the shape and dtype of `like` that the GPU can write by itself."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Copy after all work that the GPU was given before, and at the same time as what it is
        given later. Gives the end of the copy. Nobody else writes `source`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event.record(self._stream)
        source.record_stream(self._stream)  # its memory is not given away before
        return event


def copy_engine(device: torch.device) -> CopyEngine | None:
    """None for a CPU, whose tensors are where they are needed."""
    return CopyEngine(device) if device.type == "cuda" else None


class Downloader:
    """Takes the outputs of one encoder to the host."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """`dtype`: of what arrives."""
        self._dtype = dtype
        self._engine = copy_engine(device)

    def start(
        self,
        outputs: Mapping[str, torch.Tensor],
        cut: Callable[[str, torch.Tensor], Embeddings],
        *,
        reused: bool,
    ) -> PendingOutput:
        """Copy every output, and `cut` (suffix, copy) it into what is stored.

        `reused`: a later forward writes in these tensors again.
        """
        arrived: dict[str, Embeddings] = {}
        events = []
        for suffix, values in outputs.items():
            # Copied within the device first, so that a later forward need not wait for the bus.
            source = values.to(self._dtype, copy=reused).contiguous()
            if self._engine is None:
                arrived[suffix] = cut(suffix, source)
                continue
            target = self._engine.host_buffer(source)
            events.append(self._engine.copy(source, target))
            arrived[suffix] = cut(suffix, target)
        return PendingOutput(arrived, events)


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`, without waiting for the work that the device has."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
