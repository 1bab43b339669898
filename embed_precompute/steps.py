"""Long commands: how far they are, and worker processes for them.

`steps` shows a bar on a terminal, a line now and then elsewhere.

Costs: nothing is shown of what takes less than a second or, without a terminal, less than a minute.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
BAR_AFTER_S = 1.0
LINE_EVERY_S = 60.0


def steps(
    items: Iterable[T], total: int, what: str, unit: str, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yields `items`, and shows on stderr how much of `total` is done.

    `what`: the work, such as "verifying"; `unit`: what is counted, such as " units"; `size`: how
    many of them an item is.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(
            desc=what, total=total, leave=False, unit=unit, delay=BAR_AFTER_S, dynamic_ncols=True
        ) as bar:
            for item in items:
                yield item
                bar.update(size(item))
        return
    began = said = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += size(item)
        now = time.monotonic()
        if now - said >= LINE_EVERY_S and done < total:
            said = now
            left = (now - began) / done * (total - done)
            log.info("%s: %s of %s%s, %s left", what, done, total, unit, duration(left))


def worker_processes(number: int) -> ProcessPoolExecutor:
    """A pool of processes that leave a Ctrl-C to this one. Whoever shuts it down cancels what has
    not begun."""
    return ProcessPoolExecutor(
        number,
        multiprocessing.get_context("spawn"),  # a fork would copy locks that other threads hold
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )


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
