"""What rank 0 tells people: what the job is, how far it is, and how the dataset was made.

Guarantees: what is shown counts the committed captions of *all* ranks, and what this rank has
encoded of its own units that are not committed yet. So a restart shows what is really done; its
rate is that of this run alone. If the progress cannot be read, the job goes on.
Costs: a thread on rank 0 that lists the shard folders every few seconds, and reads what is new in
logs/metrics-NNNNN.jsonl. No record is read: the plan says how many rows a unit has.
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

from embed_precompute import steps
from embed_precompute.config.files import to_yaml
from embed_precompute.errors import EmbedPrecomputeError, StorageError
from embed_precompute.job.metrics import UnitLines, UnitSums, read_copies
from embed_precompute.job.prepare import Prepared
from embed_precompute.job.tracker import Tracker
from embed_precompute.steps import byte_size, duration, on_terminal
from embed_precompute.store.commit import UNLIMITED, free_space, replace_bytes
from embed_precompute.store.records import committed_units

log = logging.getLogger(__name__)
POLL_S = 0.5
LIST_EVERY_S = 2.0
LISTING_SHARE = 20
"""A listing is followed by a pause of so many times its duration."""
LEAST_S = 0.1
RATE_AFTER_S = 3.0
BAR_FORMAT = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} captions [{elapsed}{postfix}]"


def banner(prepared: Prepared, device: str, units_committed: int) -> list[str]:
    """Three lines for the start of a run: the machine, the encoders, what is left. `device` is its
    name for people."""
    dist, plan = prepared.dist, prepared.plan
    ranks = "1 process" if dist.world_size == 1 else f"{dist.world_size} ranks ({dist.source})"
    encoders = "; ".join(
        f"{each.name}: {each.options.dtype}, {each.decision.implementation}"
        f"{', compiled' if each.decision.compiled else ''}, weights "
        f"{str(plan.spec['encoders'][each.name]['weights'])[:8]}"
        for each in prepared.encoders
    )
    return [
        f"device: {device}, {ranks}",
        f"encoders: {encoders}",
        f"output: {prepared.root}, {units_committed:,} of {plan.num_units:,} units committed, "
        f"{plan.num_samples:,} captions in all, plan {plan.plan_id[:16]}",
    ]


class Rate:
    """The mean rate of something that comes in jumps, such as units.

    It is taken up to the last jump: until the next one there is only waiting. A wait that is longer
    than any before counts, so that a job that hangs slows down.
    """

    def __init__(self, now: float, value: float) -> None:
        self._began, self._first = now, value
        self._changed_at, self._value, self._longest = now, value, 0.0

    def seen(self, now: float, value: float) -> None:
        """What there is at the time `now`."""
        if value != self._value:
            self._longest = max(self._longest, now - self._changed_at)
            self._changed_at, self._value = now, value

    def seconds(self, now: float) -> float:
        """The time that the rate is taken over."""
        return max(self._changed_at, now - self._longest) - self._began

    def per_second(self, now: float) -> float:
        """0 before the first jump, and in the first seconds."""
        seconds = self.seconds(now)
        return (self._value - self._first) / seconds if seconds >= RATE_AFTER_S else 0.0


class Progress:
    """Use as a context manager around the encoding; only rank 0 shows anything."""

    def __init__(self, prepared: Prepared) -> None:
        self._root, self._plan = prepared.root, prepared.plan
        self._dist, runtime = prepared.dist, prepared.config.runtime
        self._terminal = on_terminal()
        self._interval_s = max(LEAST_S, runtime.progress_interval_s)
        self._tracker_kind = runtime.tracker
        self._seen: set[int] = set()
        self._committed = 0
        self._at_hand: dict[int, float] = {}
        """Unit of this rank -> how many of its samples are encoded."""
        self._captions_rate: Rate | None = None
        """From this rank's first batch on: the time before, such as for loading an encoder late,
        says nothing of the rate."""
        self._units_rate: Rate | None = None
        self._lines = UnitLines(self._root)
        self._of_all_runs, self._of_this_run = UnitSums(), UnitSums()
        self._free = 0.0
        self._fitted = True
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Progress:
        if self._dist.is_main:
            self._look()  # what is committed by now is the starting point of the rate
            self._of_this_run = UnitSums()
            self._tracker = Tracker(self._tracker_kind, self._root, self._plan)
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
            self._tracker.close()

    def encoded(self, unit: int, samples: float) -> None:
        """`samples` of a unit of this rank are encoded; called by the thread that encodes. What was
        said before never shrinks."""
        self._at_hand[unit] = max(samples, self._at_hand.get(unit, 0.0))

    def captions(self) -> float:
        """Captions of committed units, and those that this rank has encoded besides."""
        at_hand = [n for unit, n in list(self._at_hand.items()) if unit not in self._seen]
        return self._committed + sum(at_hand)

    def _watch(self) -> None:
        began = listed = time.monotonic()
        # As a Work: the first line ends a silence that may have begun before.
        silent = max(0.0, began - steps.stderr.said_at)
        due = began + min(max(0.0, steps.LINE_AFTER_S - silent), self._interval_s)
        list_after = LIST_EVERY_S
        bar = tqdm(
            desc="encoding",
            total=self._plan.num_samples,
            initial=int(self.captions()),
            bar_format=BAR_FORMAT,
            dynamic_ncols=True,
            disable=not self._terminal,
        )
        while not self._end.wait(min(POLL_S, self._interval_s)):
            now = time.monotonic()
            is_first = self._captions_rate is None and len(self._at_hand) > 0
            if is_first or now >= due or now - listed >= list_after:
                self._look()
                listed = time.monotonic()
                # Where a listing takes long, it must not keep the file system busy.
                list_after = max(LIST_EVERY_S, LISTING_SHARE * (listed - now))
            figures = self._figures(now)
            bar.n = int(figures["captions"])
            bar.set_postfix_str(", ".join(self._words(figures)), refresh=True)
            if now >= due:
                due = now + self._interval_s
                self._say(figures)
        self._look()
        figures = self._figures(time.monotonic())
        bar.n = int(figures["captions"])
        bar.close()
        self._tracker.put(figures, self._committed)

    def _say(self, figures: dict[str, float]) -> None:
        captions = f"{int(figures['captions']):,} of {self._plan.num_samples:,} captions"
        line = ", ".join([f"encoding: {captions}", *self._words(figures)])
        log.info("%s", line, extra=steps.FILE_ONLY if self._terminal else None)
        self._tracker.put(figures, self._committed)
        if self._fitted and figures["bytes_left"] > figures["free_bytes"]:
            self._fitted = False
            log.warning(
                "%s: what is left needs about %s, and %s are free. The run will stop with exit 74 "
                "when they are used up, and go on from there when there is space.",
                *(self._root, byte_size(figures["bytes_left"]), byte_size(figures["free_bytes"])),
            )

    def _figures(self, now: float) -> dict[str, float]:
        """What is shown, and what a tracker gets; `eta_s` only if it is known."""
        captions, units, alone = self.captions(), len(self._seen), self._dist.world_size == 1
        # Nobody knows what other ranks have at hand: with them, committed units alone count.
        counted = captions if alone else self._committed
        if self._captions_rate is None or self._units_rate is None:
            if self._at_hand:
                self._captions_rate = Rate(now, counted)
                self._units_rate = Rate(now, units)
            rate = seconds = 0.0
        else:
            self._captions_rate.seen(now, counted)
            self._units_rate.seen(now, units)
            rate, seconds = self._captions_rate.per_second(now), self._units_rate.seconds(now)
        every = self._of_all_runs
        left = self._plan.num_samples - captions
        figures = {"captions": captions, "units": float(units), "captions_per_s": rate}
        figures |= {"eta_s": left / rate} if rate > 0 else {}
        figures["free_bytes"] = self._free
        figures["bytes_left"] = left * every.shard_bytes / max(1, every.samples)
        figures["failed_samples"] = float(sum(every.failed.values()))
        for name, tokens in self._of_this_run.tokens.items() if seconds > 0 else ():
            figures[f"{name}_tokens_per_s"] = tokens / seconds
            figures[f"{name}_tflops"] = self._of_this_run.flops[name] / seconds / 1e12
        return figures

    def _words(self, figures: dict[str, float]) -> list[str]:
        """What a person is told besides the captions."""
        ranks = "" if self._dist.world_size == 1 else f" by {self._dist.world_size} ranks"
        rate, free, failed = (
            figures[name] for name in ("captions_per_s", "free_bytes", "failed_samples")
        )
        words = [f"{int(figures['units']):,} of {self._plan.num_units:,} units"]
        words += [f"{rate:,.1f} captions/s{ranks}"] if rate else ["no rate yet"]
        words += [f"{duration(figures['eta_s'])} left"] if "eta_s" in figures else []
        words += [f"{byte_size(free)} free"] if free < UNLIMITED else []
        return words + ([f"{steps.counted(int(failed), 'sample')} failed"] if failed else [])

    def _look(self) -> None:
        """Counts the samples of committed units, their rows times the plan's samples per row, and
        reads what the ranks said of units since."""
        plan = self._plan
        try:
            found = {unit for unit in committed_units(self._root) if unit < plan.num_units}
            self._free = float(free_space(self._root)[0])
            for _, line in self._lines.new():
                self._of_all_runs.add(line)
                self._of_this_run.add(line)
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


def runs_so_far(root: Path) -> int:
    """How many runs have worked on the dataset, by run.json; 0 if it does not say."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):  # for people only
        return len(json.loads((root / "run.json").read_bytes())["runs"])
    return 0


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
