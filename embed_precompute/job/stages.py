"""The three stages of one rank: read and tokenise, encode, write; overlapped by bounded queues.

Guarantees: an error in any stage ends all three and is raised by `Stages.run`. A unit is written
whole or dropped. Units are committed one after the other, in the order in which they were encoded.
After a stop request the rank ends within the grace (`runtime.grace_s`).
Costs: a thread each to read, to write and to commit: while one unit is committed the next is
written, so two shards at most are not yet committed. Memory holds the token ids of
`prefetch_units` + 4 units, and encoded batches of `write_queue_mb` megabytes, on a GPU up to
`IN_FLIGHT` more.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
from torch import Tensor

from embed_precompute.encoders.encoder import (
    Embeddings,
    PendingOutput,
    StreamedEncoder,
    TextEncoder,
)
from embed_precompute.errors import IncompleteError
from embed_precompute.job.claims import POLLS, Claims, Committed
from embed_precompute.job.metrics import UnitLog
from embed_precompute.job.prepare import Prepared
from embed_precompute.job.signals import StopRequest
from embed_precompute.job.units import Unit, read_unit
from embed_precompute.job.writer import UnitWriter
from embed_precompute.samples import count_failed
from embed_precompute.store.records import NULL_UNIT, committed_units, read_record

log = logging.getLogger(__name__)
POLL_S = 0.1
COPY_ROWS = 64
"""Copied rows that are handed to the writer at a time."""
READER_JOIN_S = 2.0
COMMIT_SHARE = 0.25
"""Part of the grace that is reserved for a commit, until the time of a real commit is known."""

IN_FLIGHT = 2
"""At most this many forwards are begun before the first of them is waited for: when the GPU ends
one forward, the next is queued already."""

T = TypeVar("T")


class _Channel(Generic[T]):
    """A queue between two stages that ends when any stage stops.

    It is bounded by the sum of the sizes of its items; one item is let in whatever its size.
    """

    def __init__(self, bound: float, halted: threading.Event) -> None:
        self._bound, self._halted = bound, halted
        self._changed = threading.Condition()
        self._items: deque[tuple[T | None, float]] = deque()
        self._size = 0.0

    def put(self, item: T | None, size: float = 1) -> bool:
        """Returns False if the pipeline has stopped and nobody will take the item."""
        with self._changed:
            while self._items and self._size + size > self._bound and not self._halted.is_set():
                self._changed.wait(POLL_S)
            self._items.append((item, size))
            self._size += size
            self._changed.notify_all()
        return not self._halted.is_set()

    def __iter__(self) -> Iterator[T]:
        return (item for item in self.polled() if item is not None)

    def polled(self) -> Iterator[T | None]:
        """Yields the items, and None whenever there is none for `POLL_S` seconds."""
        while not self._halted.is_set():
            with self._changed:
                if not self._items:
                    self._changed.wait(POLL_S)
                found = self._items.popleft() if self._items else None
                self._size -= found[1] if found is not None else 0
                self._changed.notify_all()
            if found is None:
                yield None
            elif found[0] is None:
                return
            else:
                yield found[0]


@dataclass
class _Encoded:
    """A message to the writer: the output of a forward or, if `rows` is None, the end of `unit`."""

    unit: Unit
    rows: np.ndarray | None = None
    outputs: Mapping[str, Embeddings] = field(default_factory=dict)
    """Tensor -> the embeddings of `rows`."""
    finite: Mapping[str, Sequence[bool]] = field(default_factory=dict)
    """Tensor -> whether each embedding is finite, if the device has looked."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers that hold the embeddings."""
        first = (each if isinstance(each, Tensor) else each[0] for each in self.outputs.values())
        return sum(each.untyped_storage().nbytes() for each in first)


@dataclass
class _Forward:
    """A forward that was begun; `encoder` is None in a unit that has nothing to encode."""

    unit: Unit
    is_last: bool
    """The unit has no forward after this one."""
    encoder: str | None = None
    rows: np.ndarray | None = None
    share: float = 0.0
    """Its part of the unit's work."""
    given_up: bool = False
    """The rest of the unit was left in the middle of a window (see `Stages._goes_on`)."""


def overlapped(
    forwards: Iterable[tuple[T, PendingOutput] | None],
) -> Iterator[tuple[T, PendingOutput]]:
    """Yields `forwards` in order.

    The oldest is yielded when it is ready, or when `IN_FLIGHT` forwards have been begun. None
    stands for a wait for the next forward: then all that were begun are yielded.

    Asking `forwards` for the next item begins a forward. So a GPU runs that forward while the
    output of the one before is handed to the writer.
    """
    begun: deque[tuple[T, PendingOutput]] = deque()
    for forward in forwards:
        if forward is not None:
            begun.append(forward)
        while begun and (forward is None or begun[0][1].ready() or len(begun) >= IN_FLIGHT):
            yield begun.popleft()
    yield from begun


class FailureLimit:
    """How many samples may fail, in all units of all ranks and runs."""

    def __init__(self, root: Path, max_failed: int) -> None:
        self._root, self._max_failed = root, max_failed
        self._failed_of: dict[int, int] = {}

    def check(self, unit: Unit) -> None:
        """Raises IncompleteError if too many samples failed, those of `unit` included.

        `unit` is not committed yet. The records are read only if it has failures, and each record
        once.
        """
        failed = sum(row in unit.failures for row in unit.stored_row)
        if not failed:
            return
        for number in committed_units(self._root) - self._failed_of.keys():
            status = read_record(self._root, number).status
            self._failed_of[number] = count_failed(status)
        total = failed + sum(self._failed_of.values())
        if total > self._max_failed:
            row = min(unit.failures)
            _, reason = unit.failures[row]
            sample = unit.samples[unit.stored_row.index(row)]
            raise IncompleteError(
                f"{total} samples failed, more than runtime.max_failed_samples "
                f"({self._max_failed}); the last unit was dropped. First of it: sample "
                f"{sample.sample_id!r}, row {sample.row}: {reason}. Mend the cause, or raise the "
                "limit, and run again."
            )


class Stages:
    """The three stages of one rank and the channels between them."""

    def __init__(
        self,
        prepared: Prepared,
        load: Callable[[str], TextEncoder],
        claims: Claims,
        committed: Committed,
        environment: dict[str, str],
        stop: StopRequest,
        device: str,
        on_encoded: Callable[[int, float], None],
    ) -> None:
        """`load(name)` loads an encoder onto the `device`. `on_encoded(unit, samples)` is called
        after each forward: so many samples are encoded."""
        self._prepared, self._load, self._claims = prepared, load, claims
        self._encoders: dict[str, TextEncoder] = {}
        self._on_encoded = on_encoded
        self._plan = prepared.plan
        self._committed, self._environment, self._stop = committed, environment, stop
        runtime = prepared.config.runtime
        self._failures = FailureLimit(prepared.root, runtime.max_failed_samples)
        self._record_checked = False
        self._halted = threading.Event()
        self._error: BaseException | None = None
        self._units: _Channel[Unit] = _Channel(runtime.prefetch_units, self._halted)
        self._batches: _Channel[_Encoded] = _Channel(1e6 * runtime.write_queue_mb, self._halted)
        self.units = self.samples = 0
        """Numbers of units and samples that this rank wrote, also if another rank was first to
        commit them. The null embedding counts as a unit without samples."""
        self.load_seconds = 0.0
        self.encode_seconds = 0.0
        """Seconds spent in the encoders. During the rest of the run the device waits."""
        self._unit_s = 0.0
        self._commit_s = COMMIT_SHARE * runtime.grace_s
        kind = device.partition(":")[0]
        self._unit_log = UnitLog(prepared.root, prepared.dist.rank, kind)

    def load(self) -> None:
        """Loads the encoders, unless rows are copied: an encoder may then never be needed."""
        if self._prepared.reuse is None:
            for resolved in self._prepared.encoders:
                self._encoder(resolved.name)

    def run(self) -> None:
        """Run until nothing is left to claim."""
        threads = [
            threading.Thread(target=self._guard, args=(stage,), name=stage.__name__, daemon=True)
            for stage in (self._read, self._write)
        ]
        for thread in threads:
            thread.start()
        self._guard(self._encode)
        reader, writer = threads
        writer.join()
        self._halted.set()  # after a stop the reader may wait to hand over a unit
        # If torchrun's agent died, the reader may hang in a call to torchrun's store. Waiting for
        # the reader must not use up the grace.
        reader.join(READER_JOIN_S if self._stop.is_set() else None)
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise self._stop.error()

    def _guard(self, stage: Callable[[], None]) -> None:
        try:
            stage()
        except BaseException as error:
            if self._error is None:
                self._error = error
            self._halted.set()

    def _read(self) -> None:
        plan = self._plan
        reader = self._prepared.table.reader(plan.num_rows, plan.last_row_samples)
        for number in self._claims:
            if number is None:
                self._rest(self._unit_s / POLLS)
            if self._stop.is_set():
                break
            if number is None:
                continue
            unit = read_unit(plan, number, reader, self._prepared.encoders, self._prepared.reuse)
            unit.swept = self._claims.swept
            if not self._units.put(unit):
                return
        self._units.put(None)

    def _rest(self, seconds: float) -> None:
        """Waits while peers compute what is left, at least `POLL_S`; a stop ends the wait."""
        end = time.monotonic() + seconds
        while not self._halted.wait(POLL_S) and not self._stop.is_set():
            if time.monotonic() >= end:
                return

    def _encode(self) -> None:
        for forward, pending in overlapped(self._forwards()):
            unit = forward.unit
            if unit.abandoned:
                continue  # begun before that was known
            encoded = self._wait(forward, pending)
            if encoded.rows is not None and not self._batches.put(encoded, encoded.num_bytes):
                return
            if self._stop.is_set() and not self._fits_grace(unit.began):
                unit.abandoned = True  # this unit alone: earlier ones may wait for the writer
                self._batches.put(_Encoded(unit))
                break
            if not unit.is_null:
                unit.encoded += forward.share
                self._on_encoded(unit.number, len(unit.samples) * unit.encoded)
            unit.abandoned = forward.given_up or self._is_done(unit)
            if forward.is_last and not unit.abandoned:
                self._unit_s = max(self._unit_s, time.monotonic() - unit.began)
            if forward.is_last or unit.abandoned:
                self._batches.put(_Encoded(unit))
        self._batches.put(None)

    def _is_done(self, unit: Unit) -> bool:
        """Whether another rank has committed a unit that both compute."""
        return unit.swept and self._committed(unit.number)

    def _goes_on(self, unit: Unit, share: float, done: float) -> bool:
        """Whether a window of a unit is worth going on with: it may take many minutes. `done` of an
        encoder's `share` of the unit's work was done in it."""
        if not unit.is_null:
            self._on_encoded(unit.number, len(unit.samples) * (unit.encoded + share * done))
        if self._stop.is_set() and not self._fits_grace(unit.began):
            return False
        return not self._halted.is_set() and not self._is_done(unit)

    def _fits_grace(self, began: float) -> bool:
        """Whether a unit that was begun at `began` can be committed before the grace ends."""
        left = max(0.0, began + self._unit_s - time.monotonic())
        return left + self._commit_s < self._stop.seconds_left()

    def _forwards(self) -> Iterator[tuple[_Forward, PendingOutput] | None]:
        """Begins every forward of every unit: the device need not wait where a unit ends."""
        for unit in self._units.polled():
            if unit is None:
                yield None  # the reader is slower: a unit's last forward must not wait for it
                continue
            if self._stop.is_set():
                continue  # this unit was only read ahead
            if self._committed(unit.number):
                continue  # another job has committed this unit meanwhile
            if any(isinstance(each, StreamedEncoder) for each in self._encoders.values()):
                yield None  # nor for a whole window
            unit.began = time.monotonic()
            yield from self._forwards_of(unit)

    def _forwards_of(self, unit: Unit) -> Iterator[tuple[_Forward, PendingOutput]]:
        work = {each.name: each.flops(unit.tokens[each.name]) for each in self._prepared.encoders}
        total = sum(work.values()) or 1.0  # a unit may have nothing to encode
        shares = {name: each / total for name, each in work.items()}
        steps = self._steps(unit, shares)
        following = next(steps, None)
        if following is None:
            yield _Forward(unit, is_last=True), PendingOutput({})
        while following is not None and not unit.abandoned:
            (name, rows, begin), following = following, next(steps, None)
            began = time.monotonic()
            with self._naming(unit, name):
                pending = begin()
            self.encode_seconds += time.monotonic() - began
            if pending is None:
                yield _Forward(unit, is_last=True, given_up=True), PendingOutput({})
                return
            share = shares[name] * len(rows) / len(unit.tokens[name])
            yield _Forward(unit, following is None, name, rows, share), pending

    def _steps(
        self, unit: Unit, shares: Mapping[str, float]
    ) -> Iterator[tuple[str, np.ndarray, Callable[[], PendingOutput | None]]]:
        """Yields (encoder, stored rows, what begins their forward); copied rows need no forward.

        What begins a forward returns None if the unit was given up. `shares`: each encoder's part
        of the unit's work.
        """
        for resolved in self._prepared.encoders:
            name, copies = resolved.name, unit.copies.rows.get(resolved.name, {})
            copied = list(copies)
            for first in range(0, len(copied), COPY_ROWS):
                some = copied[first : first + COPY_ROWS]
                outputs = {
                    suffix: [copies[row][suffix] for row in some] for suffix in copies[some[0]]
                }
                yield name, np.array(some), functools.partial(PendingOutput, outputs)
            rows, captions = unit.to_encode(name)
            if rows:
                left = np.array(rows)
                before = self.load_seconds
                encoder = self._encoder(name)
                unit.began += self.load_seconds - before  # no other unit will wait for that
                batches, to_submit = itertools.tee(resolved.batches(captions, null=unit.is_null))
                share = shares[name] * len(left) / len(unit.tokens[name])
                outputs_of = encoder.submit_all(
                    to_submit, functools.partial(self._goes_on, unit, share)
                )
                for batch in batches:
                    yield name, left[batch.rows], functools.partial(next, outputs_of, None)

    def _encoder(self, name: str) -> TextEncoder:
        """An encoder, which is loaded when it is first asked for."""
        if name not in self._encoders:
            began = time.monotonic()
            log.info("loading encoders.%s", name)
            self._encoders[name] = self._load(name)
            self.load_seconds += time.monotonic() - began
        return self._encoders[name]

    def _wait(self, forward: _Forward, pending: PendingOutput) -> _Encoded:
        if forward.encoder is None:
            return _Encoded(forward.unit)
        began, name = time.monotonic(), forward.encoder
        with self._naming(forward.unit, name):
            outputs = pending.wait()
        self.encode_seconds += time.monotonic() - began
        return _Encoded(
            forward.unit,
            forward.rows,
            {name + suffix: values for suffix, values in outputs.items()},
            {name + suffix: flags for suffix, flags in pending.finite().items()},
        )

    @contextlib.contextmanager
    def _naming(self, unit: Unit, encoder: str) -> Iterator[None]:
        """Says in the log which forward failed."""
        try:
            yield
        except Exception:
            log.error("unit %d, encoder %s: a forward failed", unit.number, encoder)
            raise

    def _write(self) -> None:
        messages = iter(self._batches)
        committing: Future[None] | None = None
        with ThreadPoolExecutor(1, "commit") as pool:
            for message in messages:
                with contextlib.ExitStack() as stack:
                    unit = message.unit
                    writer = UnitWriter(self._prepared.root, self._plan, unit, self._environment)
                    stack.enter_context(writer)
                    current: _Encoded | None = message
                    while current is not None and current.rows is not None:
                        for tensor, values in current.outputs.items():
                            finite = current.finite.get(tensor)
                            writer.write(tensor, current.rows, values, finite)
                        current = next(messages, None)
                    if current is None or unit.abandoned:
                        continue  # stopped, or a peer has committed this unit
                    if committing is not None:
                        committing.result()
                    if self._error is None:
                        commit = functools.partial(self._commit, unit, writer)
                        committing = pool.submit(self._guard, commit)
                        stack.pop_all()  # `_commit` removes the temporary file

    def _commit(self, unit: Unit, writer: UnitWriter) -> None:
        with writer:
            self._failures.check(unit)
            self._check_first_record()
            began = time.monotonic()
            record = writer.commit()
            if not unit.is_null:
                self._commit_s = 1.5 * (time.monotonic() - began)
                self._stop.kept = True
        self.units += 1
        self.samples += 0 if unit.is_null else len(unit.samples)
        encoded = {each.name: unit.to_encode(each.name)[1] for each in self._prepared.encoders}
        self._unit_log.add(
            unit.number,
            samples=len(unit.samples),
            stored=unit.num_stored,
            copied={name: len(rows) for name, rows in unit.copies.rows.items()},
            damaged=unit.copies.num_damaged,
            failed=sum(row in unit.failures for row in unit.stored_row),
            tokens={name: sum(captions.tokens) for name, captions in encoded.items()},
            flops={each.name: each.flops(encoded[each.name]) for each in self._prepared.encoders},
            shard_bytes=record.files.shard.bytes,
        )

    def _check_first_record(self) -> None:
        """Ranks that start together see no record at first. So this rank looks again before its
        first commit: a peer may have committed in another environment."""
        if not self._record_checked and self._committed(NULL_UNIT):
            on_change = self._prepared.config.runtime.on_environment_change
            self._committed.check_environment(self._environment, on_change)
            self._record_checked = True
