"""What rank 0 tells people: what the job is, how far it is, and how the dataset was made.

Guarantees: what is shown counts the committed captions of *all* ranks, and what this rank has
encoded of its own units that are not committed yet. So a restart shows what is really done. If the
progress cannot be read, the job goes on.
Costs: a thread on rank 0 that lists the shard folders every few seconds. No record is read: the
plan says how many rows a unit has.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from embed_precompute.config.files import to_yaml
from embed_precompute.errors import EmbedPrecomputeError, StorageError
from embed_precompute.job.metrics import read_copies
from embed_precompute.job.prepare import Prepared
from embed_precompute.steps import duration
from embed_precompute.store.commit import replace_bytes
from embed_precompute.store.records import committed_units

log = logging.getLogger(__name__)
POLL_S = 0.5
LIST_EVERY_S = 2.0
LEAST_S = 0.1
RATE_AFTER_S = 3.0


def banner(prepared: Prepared, device: str, units_committed: int) -> list[str]:
    """Three lines for the start of a run: the machine, the encoders, what is left. `device` is its
    name for people."""
    dist, plan = prepared.dist, prepared.plan
    ranks = "1 process" if dist.world_size == 1 else f"{dist.world_size} ranks ({dist.source})"
    encoders = "; ".join(
        f"{each.name}: {each.options.dtype}, {each.decision.implementation}"
        f"{', compiled' if each.decision.compiled else ''}, weights "
        f"{str(each.weights)[:8]}"
        for each in prepared.encoders
    )
    return [
        f"device: {device}, {ranks}",
        f"encoders: {encoders}",
        f"output: {prepared.root}, {units_committed:,} of {plan.num_units:,} units committed, "
        f"{plan.num_samples:,} captions in all, plan {plan.plan_id[:16]}",
    ]


class Progress:
    """Use as a context manager around the encoding; only rank 0 shows anything."""

    def __init__(self, prepared: Prepared, device: str) -> None:
        self._root, self._plan = prepared.root, prepared.plan
        self._active = prepared.dist.is_main
        self._title = f"encoding on {device}"
        if prepared.dist.world_size > 1:
            self._title += f", {prepared.dist.world_size} ranks"
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._interval_s = max(LEAST_S, prepared.config.runtime.progress_interval_s)
        self._seen: set[int] = set()
        self._committed = 0
        self._at_hand: dict[int, float] = {}
        """Unit of this rank -> how many of its samples are encoded."""
        self._first: tuple[float, float] | None = None
        """When this rank had encoded its first batch, and how many captions there were then: the
        time before, such as for loading an encoder late, says nothing of the rate."""
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self._active:
            self._look()  # what is committed by now is the starting point of the rate
            self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()

    def encoded(self, unit: int, samples: float) -> None:
        """`samples` of a unit of this rank are encoded; called by the thread that encodes. What was
        said before never shrinks."""
        self._at_hand[unit] = max(samples, self._at_hand.get(unit, 0.0))

    def captions(self) -> float:
        """Captions of committed units, and those that this rank has encoded besides."""
        at_hand = [n for unit, n in list(self._at_hand.items()) if unit not in self._seen]
        return self._committed + sum(at_hand)

    def _watch(self) -> None:
        said = listed = time.monotonic()
        # disable=None hides the bar when stderr is not a terminal; lines are logged instead.
        bar = tqdm(
            desc=self._title,
            total=self._plan.num_samples,
            initial=int(self.captions()),
            unit=" captions",
            smoothing=0,  # the mean rate: commits of other ranks come in jumps
            dynamic_ncols=True,
            disable=None,
        )
        while not self._end.wait(min(POLL_S, self._interval_s)):
            now = time.monotonic()
            is_first = self._first is None and len(self._at_hand) > 0
            if is_first or now - listed >= LIST_EVERY_S:
                self._look()
                listed = now
            captions = self.captions()
            bar.n = int(captions)
            if is_first:
                self._first = now, captions
                bar.start_t, bar.initial = time.time(), bar.n
            bar.refresh()
            if not self._terminal and now - said >= self._interval_s:
                said = now
                log.info("%s", self._line(captions, self._rate(captions, now)))
        self._look()
        bar.n = int(self.captions())
        bar.close()

    def _rate(self, captions: float, now: float) -> float:
        """Captions a second, at the time `now`; 0 before there are two batches and some seconds."""
        since, captions_then = self._first or (now, captions)
        return (captions - captions_then) / (now - since) if now - since >= RATE_AFTER_S else 0.0

    def _line(self, captions: float, rate: float) -> str:
        left = self._plan.num_samples - captions
        eta = f"{duration(left / rate)} left" if rate > 0 else "no rate yet"
        return (
            f"{self._title}: {captions:,.0f} of {self._plan.num_samples:,} captions "
            f"({self._committed:,} committed by all ranks), {rate:,.1f} captions/s, {eta}"
        )

    def _look(self) -> None:
        """Counts the samples of committed units: their rows times the plan's samples per row."""
        plan = self._plan
        try:
            found = {unit for unit in committed_units(self._root) if unit < plan.num_units}
        except (OSError, EmbedPrecomputeError) as error:
            log.debug("progress not read: %s", error)
            return
        rows = sum(plan.unit_rows(unit)[1] for unit in found)
        for unit in found & self._at_hand.keys():
            del self._at_hand[unit]
        self._seen, self._committed = found, rows * plan.num_samples // max(1, plan.num_rows)


def write_provenance(prepared: Prepared, environment: dict[str, str]) -> None:
    """Writes config.yaml and run.json, which are for people: no digest covers them."""
    reused = map(str, prepared.reuse.folders) if prepared.reuse else ()
    start = {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "world_size": prepared.dist.world_size,
        "launched_by": prepared.dist.source,
    }
    facts = {
        **start,
        "runs": [*_runs_before(prepared.root), start],
        "python": sys.version.split()[0],
        "environment": environment,
        "reuse": list(dict.fromkeys([*reused_before(prepared.root), *reused])),
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


def _runs_before(root: Path) -> list[object]:
    """The starts of the runs so far, by run.json."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # for people only
        return list(json.loads((root / "run.json").read_bytes())["runs"])
    return []


def reused_before(root: Path) -> list[str]:
    """The datasets that the runs so far have copied from, by run.json."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # for people only
        return [str(folder) for folder in json.loads((root / "run.json").read_bytes())["reuse"]]
    return []


def note_copies(root: Path, *, asked: bool) -> dict[str, int]:
    """What `read_copies` says, which is added to run.json; nothing where no run has copied anything
    and this one was not `asked` to."""
    copies = read_copies(root)
    if not asked and not any(copies[what] for what in copies if not what.endswith(" encoded")):
        return {}
    with contextlib.suppress(OSError, ValueError, StorageError):  # for people only
        facts = json.loads((root / "run.json").read_bytes())
        payload = json.dumps({**facts, "copies": copies}, indent=2).encode() + b"\n"
        replace_bytes(root / "run.json", payload)
    return copies
