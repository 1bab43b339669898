"""The three stages of one rank: read and tokenise, encode, write; overlapped by bounded queues.

Guarantees: an error in any stage ends all three and is raised by `Stages.run`. A unit is written
whole or dropped. A stop request is met within the grace.
Costs: one reader thread, one writer thread. Memory holds the token ids of `prefetch_units` + 3
units and `write_queue_batches` encoded batches, on a GPU up to `IN_FLIGHT` more. Between two units
a GPU is idle until the first batch of the next one is made.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import numpy as np

from embed_precompute.encoders.encoder import Embeddings, PendingOutput, TextEncoder
from embed_precompute.job.claims import Claims
from embed_precompute.job.prepare import Prepared
from embed_precompute.job.resume import FailureLimit, check_record
from embed_precompute.job.signals import StopRequest
from embed_precompute.job.units import Unit, read_unit
from embed_precompute.job.writer import UnitWriter
from embed_precompute.store.records import NULL_UNIT, Record

log = logging.getLogger(__name__)
POLL_S = 0.1
READER_JOIN_S = 2.0
COMMIT_SHARE = 0.25
"""Share of the grace that is kept for a commit, before one was timed."""

IN_FLIGHT = 2
"""Forwards that are begun and not waited for: a GPU has the next one when it ends one."""

T = TypeVar("T")


@dataclass
class _Channel(Generic[T]):
    """A bounded queue between two stages that ends when any stage stops."""

    size: int
    halted: threading.Event
    items: queue.Queue[T | None] = field(init=False)

    def __post_init__(self) -> None:
        self.items = queue.Queue(self.size)

    def put(self, item: T | None) -> bool:
        """False when the pipeline has stopped and nobody will take the item."""
        while not self.halted.is_set():
            try:
                self.items.put(item, timeout=POLL_S)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Iterator[T]:
        while not self.halted.is_set():
            try:
                item = self.items.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item


@dataclass
class _Encoded:
    """A message to the writer: a forward of `unit`, or its end where `rows` is None."""

    unit: Unit
    rows: np.ndarray | None = None
    outputs: Mapping[str, Embeddings] = field(default_factory=dict)
    """Tensor -> the embeddings of `rows`."""
    abandoned: bool = False


@dataclass(frozen=True)
class _Forward:
    """A forward that is begun."""

    rows: np.ndarray
    pending: PendingOutput

    def ready(self) -> bool:
        return self.pending.ready()


class _Begun(Protocol):
    def ready(self) -> bool: ...


F = TypeVar("F", bound=_Begun)


def in_order(forwards: Iterable[F]) -> Iterator[F]:
    """`forwards` one by one, each when it is ready or `IN_FLIGHT` of them are begun.

    Taking the next one begins it, so it runs on a GPU while the one before is handed on.
    """
    begun: deque[F] = deque()
    for forward in forwards:
        begun.append(forward)
        while begun and (begun[0].ready() or len(begun) >= IN_FLIGHT):
            yield begun.popleft()
    yield from begun


class Stages:
    """The three stages of one rank and the channels between them."""

    def __init__(
        self,
        prepared: Prepared,
        text_encoders: list[TextEncoder],
        claims: Claims,
        is_committed: Callable[[int], bool],
        environment: dict[str, str],
        stop: StopRequest,
        rank: int,
    ) -> None:
        self._prepared, self._encoders, self._claims = prepared, text_encoders, claims
        self._plan = prepared.plan
        self._is_committed, self._environment, self._stop = is_committed, environment, stop
        runtime = prepared.config.runtime
        self._failures = FailureLimit(prepared.root, runtime.max_failed_samples)
        self._record_checked = False
        self._halted = threading.Event()
        self._error: BaseException | None = None
        self._units: _Channel[Unit] = _Channel(runtime.prefetch_units, self._halted)
        self._batches: _Channel[_Encoded] = _Channel(runtime.write_queue_batches, self._halted)
        self._records: list[Record] = []
        self.encode_seconds = 0.0
        """Spent in the encoders; the rest of a run's time the device waits."""
        self._unit_s = 0.0
        self._commit_s = COMMIT_SHARE * runtime.grace_s
        self._metrics = prepared.root / "logs" / f"metrics-{rank:05d}.jsonl"

    def run(self) -> list[Record]:
        """Run until nothing is left to claim; give the records this rank committed."""
        threads = [
            threading.Thread(target=self._guard, args=(stage,), name=stage.__name__, daemon=True)
            for stage in (self._read, self._write)
        ]
        for thread in threads:
            thread.start()
        self._guard(self._encode)
        reader, writer = threads
        writer.join()
        # A reader that waits for a store whose agent died must not use up the grace.
        reader.join(READER_JOIN_S if self._stop.is_set() else None)
        if self._error is not None:
            raise self._error
        if self._stop.is_set():
            raise self._stop.error()
        return self._records

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
            if self._stop.is_set():
                break
            unit = read_unit(plan, number, reader, self._prepared.encoders)
            unit.swept = self._claims.swept
            if not self._units.put(unit):
                return
        self._units.put(None)

    def _encode(self) -> None:
        for unit in self._units:
            if self._stop.is_set():
                continue  # it was only read ahead
            if self._is_committed(unit.number):
                continue  # by another job meanwhile
            began = time.monotonic()
            for encoded in self._encoded_batches(unit):
                if not self._batches.put(encoded):
                    return
                if self._stop.is_set() and not self._fits_grace(began):
                    self._halted.set()
                    return
                if unit.swept and self._is_committed(unit.number):
                    break
            else:
                self._batches.put(_Encoded(unit))
                self._unit_s = max(self._unit_s, time.monotonic() - began)
                continue
            self._batches.put(_Encoded(unit, abandoned=True))
        self._batches.put(None)

    def _fits_grace(self, began: float) -> bool:
        """Whether a unit begun then can be committed before this process is ended."""
        left = max(0.0, began + self._unit_s - time.monotonic())
        return left + self._commit_s < self._stop.seconds_left()

    def _encoded_batches(self, unit: Unit) -> Iterator[_Encoded]:
        for encoder in self._encoders:
            name = encoder.resolved.name
            try:
                for forward in in_order(self._forwards(encoder, unit)):
                    began = time.monotonic()
                    outputs = forward.pending.wait()
                    self.encode_seconds += time.monotonic() - began
                    named = {name + suffix: values for suffix, values in outputs.items()}
                    yield _Encoded(unit, forward.rows, named)
            except Exception:
                log.error("unit %d, encoder %s: a forward failed", unit.number, name)
                raise

    def _forwards(self, encoder: TextEncoder, unit: Unit) -> Iterator[_Forward]:
        resolved = encoder.resolved
        for batch in resolved.batches(unit.tokens[resolved.name], null=unit.is_null):
            began = time.monotonic()
            pending = encoder.submit(batch)
            self.encode_seconds += time.monotonic() - began
            yield _Forward(batch.rows, pending)

    def _write(self) -> None:
        messages = iter(self._batches)
        for message in messages:
            started = time.monotonic()
            with UnitWriter(
                self._prepared.root, self._plan, message.unit, self._environment
            ) as writer:
                current: _Encoded | None = message
                while current is not None and current.rows is not None:
                    for tensor, values in current.outputs.items():
                        writer.write(tensor, current.rows, values)
                    current = next(messages, None)
                if current is None or current.abandoned:
                    continue  # stopped, or a peer has committed this unit
                self._failures.check(message.unit)
                self._check_first_record()
                commit_began = time.monotonic()
                record = writer.commit()
                if not message.unit.is_null:
                    self._commit_s = 1.5 * (time.monotonic() - commit_began)
            self._records.append(record)
            self._log_metrics(message.unit, record, time.monotonic() - started)

    def _check_first_record(self) -> None:
        """Ranks that start together see no record at first: compare with a peer's before we add."""
        if not self._record_checked and self._is_committed(NULL_UNIT):
            check_record(self._prepared, NULL_UNIT, self._environment)
            self._record_checked = True

    def _log_metrics(self, unit: Unit, record: Record, seconds: float) -> None:
        line = {
            "time": round(time.time(), 3),
            "unit": unit.number,
            "samples": len(unit.samples),
            "stored": unit.num_stored,
            "tokens": {name: sum(each.tokens) for name, each in unit.tokens.items()},
            "shard_bytes": record.files.shard.bytes,
            "seconds": round(seconds, 4),
        }
        try:
            self._metrics.parent.mkdir(parents=True, exist_ok=True)
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # figures for people: the dataset does not need them
            log.warning("%s: not written: %s", self._metrics, error.strerror)
