"""The run: read -> tokenise -> encode -> write, overlapped; resumed by running it again.

Guarantees: a unit is committed whole or not at all; an error in any stage stops this rank and is
raised, never swallowed; a run returns only when every unit of the plan has a record, and the
dataset is finalised or a peer has begun to finalise it. There is no collective and no rank waits
for another.
Costs: what `stages` costs, and a listing of the shard folders at the start.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from embed_precompute.config.files import to_yaml
from embed_precompute.config.schema import Config
from embed_precompute.distributed import DistContext
from embed_precompute.encoders.device import (
    check_machine,
    environment,
    log_device,
    resolve_device,
    start,
)
from embed_precompute.errors import StorageError
from embed_precompute.job.claims import Claims, connect_store
from embed_precompute.job.prepare import Prepared, check_first_captions, prepare, publish
from embed_precompute.job.progress import Progress
from embed_precompute.job.resume import Committed, check_record
from embed_precompute.job.signals import StopRequest, stop_on_signals
from embed_precompute.job.stages import Stages
from embed_precompute.samples import count_failed
from embed_precompute.store.commit import remove_dead, replace_bytes
from embed_precompute.store.index import Manifest
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import UnitRecord

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What a finished `run` leaves: the root manifest, and what this rank did."""

    root: Path
    manifest: Manifest | None
    """The content of manifest.json; None when a peer finalises the dataset."""
    units: int = 0
    samples: int = 0
    seconds: float = 0.0
    """From the first model to be loaded to the last unit's record."""
    load_seconds: float = 0.0
    encode_seconds: float = 0.0

    @property
    def num_failed(self) -> int:
        if self.manifest is None:
            return 0
        return count_failed(self.manifest.counts.status)


def run(config: Config, limit: int | None = None, dist: DistContext | None = None) -> RunResult:
    """Make the dataset of `config`, or finish one that is under way; see `embed-precompute run`."""
    dist = dist or DistContext.detect()
    with stop_on_signals(config.runtime.grace_s, dist) as stop:
        return _run(config, limit, dist, stop)


def _run(config: Config, limit: int | None, dist: DistContext, stop: StopRequest) -> RunResult:
    device = resolve_device(config.runtime.device, dist.local_rank)
    prepared = prepare(config, limit, dist)
    check_machine(config.runtime.device, device, prepared.encoders)
    here = environment(device, prepared.encoders)
    prepared = publish(prepared)
    log_device(config.runtime.device, device)
    root, plan = prepared.root, prepared.plan
    done = Committed(root, plan)
    check_record(prepared, done.any_unit(), here)
    # Before free space is looked at: a job that was killed may have left a shard for each rank.
    if dist.local_rank == 0 and (leftovers := remove_dead(root)):
        log.info("%d temporary files of writers that died here are removed", leftovers)
    if dist.is_main and not done.everything():
        check_first_captions(prepared, done.left())
        _write_provenance(prepared, here, dist)
    claims = Claims(
        dist, plan.plan_id, plan.num_units, done, connect_store(dist), refresh=done.refresh
    )
    result = RunResult(root, None)
    started = time.monotonic()
    with Progress(root, plan, dist, config.runtime) as progress:
        log.info("plan %s: %d of %d units are done", plan.plan_id[:16], done.units, plan.num_units)
        if not done.everything():
            dtype, check = config.output.dtype, config.runtime.self_check
            text_encoders = [start(each, device, dtype, check) for each in prepared.encoders]
            result.load_seconds = time.monotonic() - started
            progress.start()
            stages = Stages(prepared, text_encoders, claims, done, here, stop, dist.rank)
            with stop.finishing():
                records = stages.run()
            result.units = len(records)
            result.samples = sum(r.num_samples for r in records if isinstance(r, UnitRecord))
            result.encode_seconds = stages.encode_seconds
    result.seconds = time.monotonic() - started
    if claims.is_first_to_finalize():
        result.manifest = finalize(root).manifest
    return result


def _write_provenance(prepared: Prepared, here: dict[str, str], dist: DistContext) -> None:
    """config.yaml and run.json: for people, outside every digest."""
    facts = {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "world_size": dist.world_size,
        "launched_by": dist.source,
        "python": sys.version.split()[0],
        "environment": here,
        "checkpoints": {
            e.name: str(e.opened.checkpoint.folder.absolute()) for e in prepared.encoders
        },
    }
    payload = json.dumps(facts, indent=2).encode() + b"\n"
    try:
        yaml = to_yaml(prepared.config).encode(errors="backslashreplace")
        replace_bytes(prepared.root / "config.yaml", yaml)
        replace_bytes(prepared.root / "run.json", payload)
    except StorageError as error:  # for people only: no reason to stop
        log.warning("provenance is not written: %s", error)
