"""Long work: how far it is, and worker processes for it.

`Work` shows a bar on a terminal. Elsewhere it says a line when nothing was said for ten seconds,
then one a minute. Log files have the lines in either case. A thread says them, so what is in the
middle of one long call is not silent either.

Costs: a thread for each work, which sleeps. Nothing is shown of what takes less than a second.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
BAR_AFTER_S = 1.0
BAR_EVERY_S = 0.5
LINE_AFTER_S = 10.0
LINE_EVERY_S = 60.0
FILE_ONLY = {"file_only": True}
"""Marks what a log file gets and stderr has already, or does not want."""
BYTES = "B"
"""The unit of a work that counts bytes."""


class _Stderr:
    """What this process has said on stderr."""

    speaks = True
    """Whether it shows its work there: of a job's ranks one does."""
    said_at = time.monotonic()
    """When the last line came. Silence begins there, not where a work begins."""


stderr = _Stderr()


def on_terminal() -> bool:
    """Whether this process shows bars."""
    return stderr.speaks and sys.stderr is not None and sys.stderr.isatty()


class Work:
    """Some work that may be long. As a context manager it says what is done, and how far it is."""

    def __init__(
        self, what: str, total: int = 0, unit: str = "", done: Callable[[], int] | None = None
    ) -> None:
        """`what`: such as "verifying"; `total` of what is counted (0: nobody knows); `unit`: what
        that is, such as " units"; `done` counts instead of `add`, asked by another thread."""
        self._what, self._total, self._unit = what, total, unit
        self._added, self._lock = 0, threading.Lock()
        self._done = done or (lambda: self._added)
        self._end = threading.Event()
        self._said = False

    def __enter__(self) -> Work:
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="work", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end.set()
        self._thread.join()
        if self._said and kind is None:
            self._say(f"{self._what}: done in {duration(time.monotonic() - self._began)}")

    def add(self, number: int = 1) -> None:
        """So much more is done; any thread may say so."""
        with self._lock:
            self._added += number

    def line(self, elapsed: float) -> str:
        """How far it is, `elapsed` seconds after its start."""
        done, total = self._done(), self._total
        shown, of = f"{done:,}", f" of {total:,}{self._unit}" if total else self._unit
        if self._unit == BYTES:
            name, size = ("GB", 1e9) if total >= 1e9 else ("MB", 1e6)
            shown = f"{done / size:,.1f}"
            of = f" of {total / size:,.1f} {name}" if total else f" {name}"
        time_left = f"{duration(elapsed)} so far"
        if total / 100 <= done < total and done:
            time_left = f"{duration(elapsed / done * (total - done))} left"
        far = f"{shown}{of}, " if done or total else ""
        return f"{self._what}: {far}{time_left}"

    def _watch(self) -> None:
        terminal = on_terminal()
        bar, due = None, max(BAR_AFTER_S, stderr.said_at + LINE_AFTER_S - self._began)
        pause = BAR_AFTER_S if terminal else due
        while not self._end.wait(pause):
            elapsed = time.monotonic() - self._began
            if terminal:
                bar = self._bar(elapsed) if bar is None else bar
                bar.n = min(self._done(), self._total) if self._total else 0
                bar.refresh()
            if elapsed >= due:
                due = elapsed + LINE_EVERY_S
                self._said = True
                self._say(self.line(elapsed))
            pause = BAR_EVERY_S if terminal else due - elapsed
        if bar is not None:
            bar.close()

    def _bar(self, elapsed: float) -> Any:
        from tqdm import tqdm

        bar = tqdm(
            desc=self._what,
            total=self._total or None,
            unit=self._unit,
            unit_scale=self._unit == BYTES,
            bar_format=None if self._total else "{desc} [{elapsed}]",
            smoothing=0,
            leave=False,
            dynamic_ncols=True,
            delay=1e-9,  # else it is drawn here, before it knows when the work began
        )
        bar.start_t = time.time() - elapsed
        return bar

    def _say(self, line: str) -> None:
        log.info("%s", line, extra=FILE_ONLY if on_terminal() else None)


def steps(
    items: Iterable[T], total: int, what: str, unit: str, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yields `items`, as a `Work` of `total`; `size`: how many of them an item is."""
    with Work(what, total, unit) as work:
        for item in items:
            yield item
            work.add(size(item))


def worker_processes(number: int) -> ProcessPoolExecutor:
    """A pool of processes that leave a Ctrl-C to this one. Whoever shuts it down cancels what has
    not begun."""
    return ProcessPoolExecutor(
        number,
        multiprocessing.get_context("spawn"),  # a fork would copy locks that other threads hold
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )


def byte_size(num_bytes: float) -> str:
    """Such as 12 bytes, 4.00 MiB, 1,015 GiB: three digits or more."""
    units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(num_bytes) >= 1024 and len(units) > 1:
        num_bytes, units = num_bytes / 1024, units[1:]
    digits = 0 if units[0] == "bytes" or abs(num_bytes) >= 100 else 1 if abs(num_bytes) >= 10 else 2
    return f"{num_bytes:,.{digits}f} {units[0]}"


def counted(number: int, noun: str) -> str:
    """Such as 1 unit, 2,000 units."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def duration(seconds: float) -> str:
    """Such as 12.3 s, 4 min 5 s, 7 h 3 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"
