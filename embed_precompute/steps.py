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
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
log = logging.getLogger(__name__)
BAR_AFTER_S = 1.0
LINE_EVERY_S = 60.0


def steps(items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """Yields `items`, of which there are `total`, and shows on stderr how many are done.

    `what`: the work, such as "verifying"; `unit`: what is counted, such as " units".
    """
    if sys.stderr is not None and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(
            items, what, total, leave=False, unit=unit, delay=BAR_AFTER_S, dynamic_ncols=True
        )
        return
    began = said = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= LINE_EVERY_S and done < total:
            said = now
            left = (now - began) / done * (total - done)
            log.info("%s: %s of %s%s, %.1f min left", what, done, total, unit, left / 60)


def worker_processes(number: int) -> ProcessPoolExecutor:
    """A pool of processes that leave a Ctrl-C to this one. Whoever shuts it down cancels what has
    not begun."""
    return ProcessPoolExecutor(
        number,
        multiprocessing.get_context("spawn"),  # a fork would copy locks that other threads hold
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
