"""A run: prepare, load the encoders, do the units that are left, finalise; resumed by a rerun.

Guarantees: a run returns only when every unit of the plan has a record, and the dataset is
finalised or a peer has begun to finalise it. There is no collective. A rank waits for another only
in `prepare`: at most `runtime.plan_timeout_s` for rank 0's plan.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from embed_precompute.config.schema import Config
from embed_precompute.distributed import DistContext
from embed_precompute.encoders.device import (
    check_machine,
    device_name,
    environment,
    resolve_device,
    start,
    warn_of_cpu,
)
from embed_precompute.job.claims import Claims, Committed, connect_store
from embed_precompute.job.prepare import Prepared, check_sampled_captions, prepare, publish
from embed_precompute.job.progress import (
    Progress,
    banner,
    note_copies,
    reused_before,
    write_provenance,
)
from embed_precompute.job.signals import StopRequest, stop_on_signals
from embed_precompute.job.stages import Stages
from embed_precompute.steps import stderr
from embed_precompute.store.manifest import Finalized, finalize

log = logging.getLogger(__name__)


@dataclass
class RunResult:
    """What `run` returns: the dataset's folder, what finalising it gave, and what this rank did."""

    root: Path
    finalized: Finalized | None
    """None when a peer finalises the dataset."""
    was_complete: bool = False
    """Every unit was committed before this run."""
    units: int = 0
    samples: int = 0
    seconds: float = 0.0
    """Seconds from the start of loading the first model to this rank's last commit."""
    load_seconds: float = 0.0
    encode_seconds: float = 0.0
    copies: dict[str, int] = field(default_factory=dict)
    """How many embeddings all ranks of all runs copied and encoded, if any run was to copy; see
    `metrics.read_copies`."""


def run(
    config: Config,
    limit: int | None = None,
    dist: DistContext | None = None,
    *,
    extend: bool = False,
    reuse: Sequence[Path] = (),
) -> RunResult:
    """Make the dataset of `config`, or finish one that is under way; see `embed-precompute run`.

    `limit`: only the first samples. `extend`: caption files that were added become further units.
    `reuse`: finished datasets; embeddings of the same text and encoder are copied from them.
    """
    dist = dist or DistContext.detect()
    with stop_on_signals(config.runtime.grace_s, dist) as stop:
        # Before the captions are read: there may be no such GPU.
        device = resolve_device(config.runtime.device, dist.local_rank)
        return _run(prepare(config, limit, dist, extend=extend, reuse=reuse), device, stop)


def _run(prepared: Prepared, device: str, stop: StopRequest) -> RunResult:
    config, dist = prepared.config, prepared.dist
    runtime = config.runtime
    check_machine(runtime.device, device, prepared.encoders, runtime.weights)
    current = environment(device, prepared.encoders)
    if prepared.reuse is not None:
        prepared.reuse.check_environment(current, runtime.on_environment_change)
    prepared = publish(prepared)
    root, plan = prepared.root, prepared.plan
    committed = Committed(root, plan)
    for line in banner(prepared, f"{device} ({device_name(device)})", committed.units):
        log.info("%s", line)
    warn_of_cpu(config.runtime.device, device)
    committed.check_environment(current, runtime.on_environment_change)
    if prepared.reuse is None and (before := reused_before(root)) and not committed.everything():
        words = " ".join(f"--reuse {folder}" for folder in before)
        log.info("begun with %s; without it the rest is encoded", words)
    if dist.is_main and not committed.everything():
        check_sampled_captions(prepared, committed.left(), device_name(device))
        write_provenance(prepared, current)
    store = connect_store(dist)
    claims = Claims(dist, plan.plan_id, plan.num_units, committed, store, committed.list_left)
    result = RunResult(root, None, was_complete=committed.everything())
    stop.kept = committed.units > 0
    started = time.monotonic()
    if not result.was_complete:
        encoders = {each.name: each for each in prepared.encoders}
        progress = Progress(prepared)
        stages = Stages(
            prepared,
            lambda name: start(
                encoders[name], device, config.output.dtype, runtime.self_check, runtime.weights
            ),
            claims,
            committed,
            current,
            stop,
            device,
            progress.encoded,
        )
        stages.load()
        with progress, stop.finishing():
            stages.run()
        result.load_seconds = stages.load_seconds
        result.units, result.samples = stages.units, stages.samples
        result.encode_seconds = stages.encode_seconds
    result.seconds = time.monotonic() - started
    if claims.is_first_to_finalize():
        stderr.speaks |= store is not None  # rank 0 has nothing more to say
        log.info("finalising")
        result.finalized = finalize(root)
        result.copies = note_copies(root, asked=prepared.reuse is not None)
    return result
