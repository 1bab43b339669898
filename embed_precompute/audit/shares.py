"""Units checked by several processes: by worker processes, or by the ranks of a torchrun job.

Guarantees: what is found does not depend on how many they are. A unit that nobody has checked,
such as one that a job committed meanwhile, is missing in the answer, and the caller checks it.
Costs: a worker process starts in a second or two. Ranks meet once, in torchrun's store.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from embed_precompute.distributed import DistContext
from embed_precompute.errors import EmbedPrecomputeError, InputError
from embed_precompute.job.claims import connect_store
from embed_precompute.steps import steps, worker_processes
from embed_precompute.store.check import check_unit, describe, in_order
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import committed_units, read_record, record_path

WORTH_BYTES = 16 << 30
"""With fewer bytes than this, threads are as fast as worker processes with their start."""
LONGEST = timedelta(days=30)


def _default_workers(root: Path, dist: DistContext) -> int:
    """A process for each core if the dataset is large and no launcher has started several; else
    one, whose threads use all cores."""
    if dist.world_size > 1:
        return 1
    try:
        committed = committed_units(root)
        first = read_record(root, min(committed))
    except (EmbedPrecomputeError, ValueError):  # damaged, or nothing is committed
        return 1
    large = first.files.shard.bytes * len(committed) >= WORTH_BYTES
    return len(os.sched_getaffinity(0)) if large else 1


def check_shares(
    root: Path, workers: int | None, dist: DistContext, plan: Plan | None
) -> Mapping[int, str]:
    """Unit -> its problem, "" if it is sound, by the full check of all ranks; on other ranks than
    0 only of their own units; a rank that has no plan checks none.

    `workers`: how many processes each rank starts; as many as seem worth it if None. One process
    alone checks nothing here: its caller does. Raises InputError if several ranks have no store of
    torchrun's to meet in.
    """
    workers = _default_workers(root, dist) if workers is None else workers
    if workers == 1 and dist.world_size == 1:
        return {}
    store: Any = connect_store(dist)
    if dist.world_size > 1 and store is None:
        raise InputError(
            f"verify runs on {dist.world_size} processes ({dist.source}) and finds no store of "
            "torchrun to meet in. Start it by torchrun, or as one process with --workers."
        )
    found = {} if plan is None else _check_own(root, workers, dist, plan)
    if store is None:
        return found
    keys = [f"verify/{dist.run_id}/{dist.restart_count}/{r}" for r in range(dist.world_size)]
    store.set(keys[dist.rank], json.dumps(found))
    if dist.is_main:
        store.wait(keys, LONGEST)  # torchrun ends all ranks when one fails
        for key in keys:
            found |= {int(unit): problem for unit, problem in json.loads(store.get(key)).items()}
    return found


def _check_own(root: Path, workers: int, dist: DistContext, plan: Plan) -> dict[int, str]:
    """Unit -> its problem, of this rank's units."""
    units: set[int] = set()
    with contextlib.suppress(EmbedPrecomputeError):  # rank 0 finds it again, and reports it
        units = committed_units(root)
    mine = [
        unit
        for unit in sorted(units)
        if unit < plan.num_units and unit % dist.world_size == dist.rank
    ]
    check = functools.partial(_problem, root, plan)
    with contextlib.ExitStack() as stack:
        if workers > 1:
            pool = worker_processes(workers)
            stack.callback(pool.shutdown, cancel_futures=True)
            problems = pool.map(check, mine)
        else:
            problems = in_order(check, mine)
        title = "verifying" if dist.world_size == 1 else f"verifying, rank {dist.rank}"
        return dict(zip(mine, steps(problems, len(mine), title, " units"), strict=True))


def _problem(root: Path, plan: Plan, unit: int) -> str:
    try:
        check_unit(root, plan, unit, full=True)
        return ""
    except Exception as error:
        return describe(record_path(root, unit), error)
