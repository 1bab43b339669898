"""A run: prepare, load the encoders, do the units that are left, finalise; resumed by a rerun.

Guarantees: a run returns only when every unit of the plan has a record, and the dataset is
finalised or a peer has begun to finalise it. There is no collective. A rank waits for another only
in `prepare`: at most `runtime.plan_timeout_s` for rank 0's plan.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

from embed_precompute.config.schema import Config
from embed_precompute.distributed import DistContext
from embed_precompute.encoders.device import (
    check_machine,
    environment,
    log_device,
    resolve_device,
    start,
)
from embed_precompute.job.claims import Claims, Committed, connect_store
from embed_precompute.job.prepare import check_sampled_captions, prepare, publish
from embed_precompute.job.progress import Progress, write_provenance
from embed_precompute.job.signals import StopRequest, stop_on_signals
from embed_precompute.job.stages import Stages
from embed_precompute.store.index import Manifest
from embed_precompute.store.manifest import finalize

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What `run` returns: the dataset's folder, its manifest.json, and what this rank did."""

    root: Path
    manifest: Manifest | None
    """The content of manifest.json; None when a peer finalises the dataset."""
    units: int = 0
    samples: int = 0
    seconds: float = 0.0
    """Seconds from the start of loading the first model to this rank's last commit."""
    load_seconds: float = 0.0
    encode_seconds: float = 0.0


def run(config: Config, limit: int | None = None, dist: DistContext | None = None) -> RunResult:
    """Make the dataset of `config`, or finish one that is under way; see `embed-precompute run`."""
    dist = dist or DistContext.detect()
    with stop_on_signals(config.runtime.grace_s, dist) as stop:
        return _run(config, limit, dist, stop)


def _run(config: Config, limit: int | None, dist: DistContext, stop: StopRequest) -> RunResult:
    device = resolve_device(config.runtime.device, dist.local_rank)
    prepared = prepare(config, limit, dist)
    check_machine(config.runtime.device, device, prepared.encoders)
    prepared = publish(prepared)
    log_device(config.runtime.device, device)
    root, plan, runtime = prepared.root, prepared.plan, config.runtime
    committed, current = Committed(root, plan), environment(device, prepared.encoders)
    committed.check_environment(current, runtime.on_environment_change)
    if dist.is_main and not committed.everything():
        check_sampled_captions(prepared, committed.left())
        write_provenance(prepared, current)
    store = connect_store(dist)
    claims = Claims(dist, plan.plan_id, plan.num_units, committed, store, committed.refresh)
    result = RunResult(root, None)
    started = time.monotonic()
    with Progress(root, plan, dist, runtime) as progress:
        log.info(
            "plan %s: %d of %d units are done", plan.plan_id[:16], committed.units, plan.num_units
        )
        if not committed.everything():
            text_encoders = [
                start(each, device, config.output.dtype, runtime.self_check)
                for each in prepared.encoders
            ]
            result.load_seconds = time.monotonic() - started
            progress.start()
            stages = Stages(prepared, text_encoders, claims, committed, current, stop)
            with stop.finishing():
                stages.run()
            result.units, result.samples = stages.units, stages.samples
            result.encode_seconds = stages.encode_seconds
    result.seconds = time.monotonic() - started
    if claims.is_first_to_finalize():
        result.manifest = finalize(root).manifest
    return result
