"""What rank 0 tells people: how far the whole job is, and how the dataset was made.

Guarantees: the bar counts committed samples of *all* ranks, so a restart shows what is really done.
If stderr is not a terminal, a line is logged every `runtime.progress_interval_s` instead. If the
progress cannot be read, the job goes on.
Costs: a thread on rank 0 that lists the shard folders every few seconds and reads each new record
once. Records from before the start are not read: the plan says how many rows their units have.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType

from tqdm import tqdm

from embed_precompute.config.files import to_yaml
from embed_precompute.config.schema import RuntimeConfig
from embed_precompute.distributed import DistContext
from embed_precompute.errors import EmbedPrecomputeError, StorageError
from embed_precompute.job.prepare import Prepared
from embed_precompute.store.commit import replace_bytes
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import committed_units, read_record

log = logging.getLogger(__name__)
TERMINAL_POLL_S = 2.0


class Progress:
    """Use as a context manager. It shows nothing before `start`; only rank 0 shows anything."""

    def __init__(self, root: Path, plan: Plan, dist: DistContext, runtime: RuntimeConfig) -> None:
        self._root, self._plan = root, plan
        self._active = dist.is_main
        self._terminal = sys.stderr.isatty()
        self._interval = TERMINAL_POLL_S if self._terminal else runtime.progress_interval_s
        self._seen: set[int] = set()
        self._samples = 0
        self._tokens = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
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

    def start(self) -> None:
        """Begin to count; what is committed by now is the starting point of every rate."""
        if not self._active:
            return
        self._count_committed()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        started, first_samples, first_tokens = time.monotonic(), self._samples, self._tokens
        # disable=None hides the bar when stderr is not a terminal; lines are logged instead.
        bar = tqdm(
            total=self._plan.num_samples,
            initial=self._samples,
            unit="captions",
            disable=None,
            mininterval=0.5,
        )
        while not self._end.wait(self._interval):
            self._look()
            seconds = time.monotonic() - started
            rate = (self._samples - first_samples) / seconds
            token_rate = (self._tokens - first_tokens) / seconds
            bar.set_postfix_str(f"{token_rate:,.0f} tokens/s", refresh=False)
            bar.update(self._samples - bar.n)
            if not self._terminal:
                log.info("%s", self._line(rate, token_rate))
        self._look()
        bar.update(self._samples - bar.n)
        bar.close()

    def _line(self, rate: float, token_rate: float) -> str:
        left = self._plan.num_samples - self._samples
        eta = f"{left / rate / 60:.1f} min left" if rate > 0 else "no rate yet"
        return (
            f"{self._samples:,} of {self._plan.num_samples:,} captions committed by all ranks, "
            f"{rate:,.1f} captions/s, {token_rate:,.0f} tokens/s, {eta}"
        )

    def _count_committed(self) -> None:
        """Counts the samples at the start: rows of committed units times the plan's samples per
        row."""
        plan = self._plan
        try:
            self._seen = {unit for unit in committed_units(self._root) if unit < plan.num_units}
        except EmbedPrecomputeError as error:
            log.debug("progress not read: %s", error)
        rows = sum(plan.unit_rows(unit)[1] for unit in self._seen)
        self._samples = rows * plan.num_samples // max(1, plan.num_rows)

    def _look(self) -> None:
        try:
            new = committed_units(self._root) - self._seen
            for unit in new:
                record = read_record(self._root, unit)
                self._samples += record.num_samples
                self._tokens += sum(sums.tokens for sums in record.encoders.values())
                self._seen.add(unit)
        except (OSError, EmbedPrecomputeError) as error:
            log.debug("progress not read: %s", error)


def write_provenance(prepared: Prepared, environment: dict[str, str]) -> None:
    """Writes config.yaml and run.json, which are for people: no digest covers them."""
    facts = {
        "command": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "world_size": prepared.dist.world_size,
        "launched_by": prepared.dist.source,
        "python": sys.version.split()[0],
        "environment": environment,
        "reuse": [str(folder) for folder in prepared.reuse.folders] if prepared.reuse else [],
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


def note_copies(root: Path) -> dict[str, int]:
    """How many embeddings all ranks copied and encoded, by the lines of logs/; adds it to run.json.

    The keys are for people, such as `t5 copied`.
    """
    counts: Counter[str] = Counter()
    for path in sorted((root / "logs").glob("metrics-*.jsonl")):
        with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                with contextlib.suppress(ValueError, LookupError, TypeError):  # a crash cut it off
                    line = json.loads(text)
                    for name in line["tokens"] if line["unit"] >= 0 else ():
                        copied = line["copied"].get(name, 0)
                        counts[f"{name} copied"] += copied
                        counts[f"{name} encoded"] += line["stored"] - copied
                    counts["damaged, so encoded"] += line["damaged"]
    with contextlib.suppress(OSError, ValueError, StorageError):
        facts = json.loads((root / "run.json").read_bytes())
        payload = json.dumps({**facts, "copies": counts}, indent=2).encode() + b"\n"
        replace_bytes(root / "run.json", payload)
    return dict(counts)
