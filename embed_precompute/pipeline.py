"""The run: read -> tokenise -> encode -> write, overlapped; resumed by running it again.

Guarantees: a unit is committed whole or not at all; an error in any stage stops this rank and is
raised, never swallowed; a run returns only when every unit of the plan has a record, and the
dataset is finalised or a peer has begun to finalise it. There is no collective and no rank waits
for another.
Costs: one reader thread, one writer thread; memory holds the token ids of `prefetch_units` + 3
units and `write_queue_batches` encoded batches.
"""

from __future__ import annotations

import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from embed_precompute import encoders as encoder_registry
from embed_precompute.batching import make_batches
from embed_precompute.config import Config
from embed_precompute.config_file import to_yaml
from embed_precompute.distributed import NULL_UNIT, Claims, DistContext, connect_store
from embed_precompute.encoders import TextEncoder
from embed_precompute.errors import ConflictError, IncompleteError, StorageError
from embed_precompute.isolate import encode_batch
from embed_precompute.plan import Plan, differing_fields
from embed_precompute.preemption import StopRequest, stop_on_signals
from embed_precompute.preflight import (
    Prepared,
    check_room,
    environment,
    prepare,
    publish,
    resolve_device,
)
from embed_precompute.progress import Progress
from embed_precompute.samples import FAILURES
from embed_precompute.store.commit import replace_bytes
from embed_precompute.store.leftovers import remove_dead
from embed_precompute.store.manifest import (
    committed_units,
    finalize,
    null_paths,
    read_record,
    unit_paths,
)
from embed_precompute.units import Unit, UnitWriter, read_unit

log = logging.getLogger(__name__)
POLL_S = 0.1
READER_JOIN_S = 2.0
COMMIT_SHARE = 0.25
"""Share of the grace that is kept for a commit, before one was timed."""


@dataclass
class RunResult:
    """What a finished `run` leaves: the root manifest, and what this rank did."""

    root: Path
    manifest: dict[str, Any] | None
    """The content of manifest.json; None when a peer finalises the dataset."""
    units: int = 0
    samples: int = 0
    seconds: float = 0.0

    @property
    def num_failed(self) -> int:
        if self.manifest is None:
            return 0
        status = self.manifest["counts"]["status"]
        return sum(status[failure.label] for failure in FAILURES)


def run(config: Config, limit: int | None = None, dist: DistContext | None = None) -> RunResult:
    """Make the dataset of `config`, or finish one that is under way; see `embed-precompute run`."""
    dist = dist or DistContext.detect()
    with stop_on_signals(config.runtime.grace_s, dist) as stop:
        return _run(config, limit, dist, stop)


def _run(config: Config, limit: int | None, dist: DistContext, stop: StopRequest) -> RunResult:
    device = resolve_device(config.runtime.device, dist)
    prepared = prepare(config, limit, dist)
    here = environment(device, prepared.encoders)
    prepared = publish(prepared)
    root, plan = prepared.root, prepared.plan
    done = Committed(root, plan)
    check_record(prepared, done.any_unit(), here)
    if dist.is_main and not done.everything():
        check_room(prepared, done.units)
        _write_provenance(prepared, here, dist)
    if dist.local_rank == 0 and (leftovers := remove_dead(root)):
        log.info("%d temporary files of writers that died here are removed", leftovers)
    claims = Claims(
        dist, plan.plan_id, plan.num_units, done, connect_store(dist), refresh=done.refresh
    )
    result = RunResult(root, None)
    started = time.monotonic()
    with Progress(root, plan, dist, config.runtime) as progress:
        log.info("plan %s: %d of %d units are done", plan.plan_id[:16], done.units, plan.num_units)
        if not done.everything():
            text_encoders = _build_encoders(prepared, device)
            progress.start()
            stages = _Stages(prepared, text_encoders, claims, done, here, stop, dist)
            with stop.finishing():
                records = stages.run()
            result.units = len(records)
            result.samples = sum(record.get("num_samples", 0) for record in records)
    result.seconds = time.monotonic() - started
    if claims.take_finalize():
        result.manifest = finalize(root)
    return result


class Committed:
    """Which units have a record: a listing at the start, then one `stat` per question."""

    def __init__(self, root: Path, plan: Plan) -> None:
        self._root = root
        self._all = {NULL_UNIT, *range(plan.num_units)}
        self._units: set[int] = set()
        self.refresh()

    def refresh(self) -> None:
        """List again: cheaper than asking for many units one by one."""
        self._units = committed_units(self._root) & self._all
        if null_paths(self._root).record.exists():
            self._units.add(NULL_UNIT)

    @property
    def units(self) -> int:
        return len(self._units - {NULL_UNIT})

    def any_unit(self) -> int | None:
        return min(self._units, default=None)

    def everything(self) -> bool:
        return self._units == self._all

    def __call__(self, unit: int) -> bool:
        if unit in self._units:
            return True
        paths = null_paths(self._root) if unit == NULL_UNIT else unit_paths(self._root, unit)
        if paths.record.exists():
            self._units.add(unit)
        return unit in self._units


def _build_encoders(prepared: Prepared, device: str) -> list[TextEncoder]:
    """Load every encoder and run one forward of each shape, so that a shape that does not fit in
    memory fails now and not after an hour."""
    dtype = prepared.config.output.dtype
    built = []
    for resolved in prepared.encoders:
        encoder = encoder_registry.build(resolved, device, dtype)
        for shape in sorted({*resolved.shapes, resolved.null_shape}):
            filler = resolved.tokenizer.filler
            for batch in make_batches([filler], (shape,), resolved.tokenizer.pad_id, filler):
                encoder.encode(batch)
        built.append(encoder)
    return built


def _write_provenance(prepared: Prepared, here: dict[str, str], dist: DistContext) -> None:
    """config.yaml and run.json: for people, outside every digest."""
    facts = {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "world_size": dist.world_size,
        "launched_by": dist.source,
        "python": sys.version.split()[0],
        "environment": here,
        "checkpoints": {e.name: str(e.folder.absolute()) for e in prepared.encoders},
    }
    payload = json.dumps(facts, indent=2).encode() + b"\n"
    try:
        yaml = to_yaml(prepared.config).encode(errors="backslashreplace")
        replace_bytes(prepared.root / "config.yaml", yaml)
        replace_bytes(prepared.root / "run.json", payload)
    except StorageError as error:  # for people only: no reason to stop
        log.warning("provenance is not written: %s", error)


def check_record(prepared: Prepared, unit: int | None, here: dict[str, str]) -> None:
    """Compare plan and environment with those of a committed unit, if there is one.

    Another plan is refused; another environment is warned of, or refused if so configured.
    """
    if unit is None:
        return
    root, config, plan = prepared.root, prepared.config, prepared.plan
    earlier = read_record(root, None if unit == NULL_UNIT else unit)
    if earlier["plan"] != plan.plan_id:
        raise ConflictError(
            f"{root} holds units of another plan ({earlier['plan'][:16]}; plan.json has "
            f"{plan.plan_id[:16]}): plan.json was removed or replaced. Put it back, or write to a "
            "new output.path."
        )
    differing = differing_fields(earlier["environment"], here)
    if not differing:
        return
    message = (
        f"{root} was begun in another environment ({'; '.join(differing)}). Equal bytes are "
        "promised within one environment only; the manifest lists all of them."
    )
    if config.runtime.on_environment_change == "refuse":
        raise ConflictError(
            f"{message} Give the old environment back, or set runtime.on_environment_change warn."
        )
    log.warning("%s", message)


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
    """A message to the writer: a batch of `unit`, or its end when `values` is None."""

    unit: Unit
    name: str = ""
    rows: np.ndarray | None = None
    values: torch.Tensor | None = None
    failed: dict[int, str] = field(default_factory=dict)
    abandoned: bool = False


class _Stages:
    """The three stages of one rank and the channels between them."""

    def __init__(
        self,
        prepared: Prepared,
        text_encoders: list[TextEncoder],
        claims: Claims,
        done: Callable[[int], bool],
        here: dict[str, str],
        stop: StopRequest,
        dist: DistContext,
    ) -> None:
        self._prepared, self._encoders, self._claims = prepared, text_encoders, claims
        self._plan: Plan = prepared.plan
        self._done, self._here, self._stop = done, here, stop
        runtime = prepared.config.runtime
        self._max_failed = runtime.max_failed_samples
        self._failed_of: dict[int, int] = {}
        self._record_checked = False
        self._halted = threading.Event()
        self._error: BaseException | None = None
        self._units: _Channel[Unit] = _Channel(runtime.prefetch_units, self._halted)
        self._batches: _Channel[_Encoded] = _Channel(runtime.write_queue_batches, self._halted)
        self._records: list[dict[str, Any]] = []
        self._unit_s = 0.0
        self._commit_s = COMMIT_SHARE * runtime.grace_s
        self._metrics = prepared.root / "logs" / f"metrics-{dist.rank:05d}.jsonl"

    def run(self) -> list[dict[str, Any]]:
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
            began = time.monotonic()
            for encoded in self._encoded_batches(unit):
                if not self._batches.put(encoded):
                    return
                if self._stop.is_set() and not self._fits_grace(began):
                    self._halted.set()
                    return
                if unit.swept and self._done(unit.number):
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
            resolved = encoder.resolved
            shapes = (resolved.null_shape,) if unit.is_null else resolved.shapes
            ids = unit.tokens[resolved.name].ids
            tokenizer = resolved.tokenizer
            for batch in make_batches(ids, shapes, tokenizer.pad_id, tokenizer.filler):
                values, failed = encode_batch(encoder, batch)
                yield _Encoded(unit, resolved.name, batch.rows, values, failed)

    def _write(self) -> None:
        messages = iter(self._batches)
        for message in messages:
            started = time.monotonic()
            with UnitWriter(self._prepared.root, self._plan, message.unit, self._here) as writer:
                current: _Encoded | None = message
                while current is not None and current.values is not None:
                    assert current.rows is not None
                    writer.write(current.name, current.rows, current.values, current.failed)
                    current = next(messages, None)
                if current is None or current.abandoned:
                    continue  # stopped, or a peer has committed this unit
                self._check_failures(message.unit)
                self._check_first_record()
                commit_began = time.monotonic()
                record = writer.commit()
                if not message.unit.is_null:
                    self._commit_s = 1.5 * (time.monotonic() - commit_began)
            self._records.append(record)
            self._log_metrics(message.unit, record, time.monotonic() - started)

    def _check_first_record(self) -> None:
        """Ranks that start together see no record at first: compare with a peer's before we add."""
        if not self._record_checked and self._done(NULL_UNIT):
            check_record(self._prepared, NULL_UNIT, self._here)
            self._record_checked = True

    def _check_failures(self, unit: Unit) -> None:
        """Stop when more samples have failed than allowed, in all units of all ranks and runs.

        The records are read only when a unit has failures, each of them once.
        """
        failed = sum(row in unit.failures for row in unit.stored_row)
        if not failed:
            return
        for number in committed_units(self._prepared.root) - self._failed_of.keys():
            status = read_record(self._prepared.root, number)["status"]
            self._failed_of[number] = sum(status[failure.label] for failure in FAILURES)
        total = failed + sum(self._failed_of.values())
        if total > self._max_failed:
            row, (_, reason) = next(iter(unit.failures.items()))
            sample = unit.samples[unit.stored_row.index(row)]
            raise IncompleteError(
                f"{total} samples failed, more than runtime.max_failed_samples "
                f"({self._max_failed}); the last unit was dropped. First of it: sample "
                f"{sample.sample_id!r}, row {sample.row}: {reason}. Mend the cause, or raise the "
                "limit, and run again."
            )

    def _log_metrics(self, unit: Unit, record: dict[str, Any], seconds: float) -> None:
        line = {
            "time": round(time.time(), 3),
            "unit": unit.number,
            "samples": len(unit.samples),
            "stored": unit.num_stored,
            "tokens": {name: sum(map(len, t.ids)) for name, t in unit.tokens.items()},
            "shard_bytes": record["files"]["shard"]["bytes"],
            "seconds": round(seconds, 4),
        }
        try:
            self._metrics.parent.mkdir(parents=True, exist_ok=True)
            with self._metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # figures for people: the dataset does not need them
            log.warning("%s: not written: %s", self._metrics, error.strerror)
