"""Being asked to stop: by a signal, or because the launcher of this process died.

Guarantees: TERM, INT, USR1 and USR2 mean the same, and are noticed and acknowledged at once, even
while the main thread is inside a long call. Code within `StopRequest.finishing` has the grace
(`runtime.grace_s`) to commit its unit; any other code is interrupted at once. When the grace is
over, or at a second signal, the process ends at once: its temporary files are removed, what was
committed stays. The exit code is 75.
Costs: one thread that sleeps; under torchrun it looks once a second whether the agent is alive.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from embed_precompute.distributed import DistContext
from embed_precompute.errors import EXIT_INTERRUPTED, InterruptedRunError
from embed_precompute.store.commit import drop_staged_files

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
SAME_REQUEST_S = 0.5
"""Signals within this many seconds are one request: a terminal's Ctrl-C, or Slurm's signal, reaches
a worker directly and through torchrun's agent."""
PARENT_POLL_S = 1.0
ORPHAN_GRACE_S = 20.0
"""The longest grace of a worker whose agent died, because nobody waits for it. It notices the death
within PARENT_POLL_S, so it ends within 30 s, the time that torchrun itself gives a worker."""


class _Stopped(BaseException):
    """Interrupts whatever the main thread does; no `except Exception` catches it."""


class StopRequest:
    """Whether this process was asked to stop, and how long it still has."""

    def __init__(self, grace_s: float, *, speaks: bool = True) -> None:
        """`speaks`: a request is acknowledged on stderr."""
        self._grace_s, self._speaks = grace_s, speaks
        self._asked = threading.Event()
        self._asked_at = 0.0
        self._finishing = False
        self._broken_off = False
        self.reason = ""
        self.kept = False
        """Some unit is committed, which stays."""

    def is_set(self) -> bool:
        return self._asked.is_set()

    def seconds_left(self) -> float:
        """Seconds until this process is ended; infinite while nobody has asked it to stop."""
        if not self._asked.is_set():
            return float("inf")
        return self._asked_at + self._grace_s - time.monotonic()

    def ask(self, reason: str, grace_s: float | None = None) -> bool:
        """Ask to stop; returns False if there was a request already."""
        if self._asked.is_set():
            return False
        if grace_s is not None:
            self._grace_s = min(self._grace_s, grace_s)
        self._asked_at, self.reason = time.monotonic(), reason
        self._asked.set()
        if self._speaks:
            now = "nothing is under way that could be committed"
            if self._finishing:
                now = (
                    f"finishing the shard at hand if that takes less than {self._grace_s:.0f} s. "
                    "Ctrl-C or another signal drops it"
                )
            say(f"stopping ({reason}): {now}.")
        return True

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Within this block a request interrupts nothing: the code inside asks `is_set` itself."""
        self._finishing = True
        try:
            self._break_off()  # a request may have come just before this block
            yield
        finally:
            self._finishing = False

    def signalled(self, number: int) -> None:
        """Called when a stop signal has arrived; a second signal ends the process."""
        again = not self.ask(f"signal {signal.Signals(number).name}")
        if again and time.monotonic() - self._asked_at > SAME_REQUEST_S:
            end_at_once("a second signal")

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler: Python runs it in the main thread, when a long call there returns."""
        self.ask(f"signal {signal.Signals(number).name}")
        if not self._finishing:
            self._break_off()

    def _break_off(self) -> None:
        if self._asked.is_set() and not self._broken_off:
            self._broken_off = True
            raise _Stopped

    def error(self) -> InterruptedRunError:
        kept = "; committed shards stay" if self.kept else ""
        return InterruptedRunError(
            f"stopped ({self.reason}){kept}. Run the same command again to go on."
        )


def say(line: str) -> None:
    """Writes a line of its own to stderr, past Python's stream: a thread that hangs may hold it."""
    start = "\r\x1b[K" if os.isatty(2) else ""  # over the bar
    with contextlib.suppress(OSError):
        os.write(2, f"{start}embed-precompute: {line}\n".encode())


def end_at_once(reason: str) -> None:
    """Removes this process's temporary files and ends it, without waiting for any thread."""
    say(f"stopped at once ({reason}); run the same command again to go on.")
    drop_staged_files()
    os._exit(EXIT_INTERRUPTED)


@contextlib.contextmanager
def stop_on_signals(grace_s: float, dist: DistContext | None = None) -> Iterator[StopRequest]:
    """Within this block a signal asks to stop, and so does the death of torchrun's agent.

    Raises InterruptedRunError if a request interrupted the block. Only the main thread can set
    signal handlers: called in another thread, this leaves the existing handlers in place.
    """
    stop = StopRequest(grace_s, speaks=dist is not None and dist.is_main)
    parent = os.getppid() if dist is not None and dist.has_agent else None
    reading, writing = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    watcher = threading.Thread(
        target=_watch, args=(stop, reading, parent), name="preemption", daemon=True
    )
    watcher.start()
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {}
    earlier_fd = -1
    if in_main_thread:
        # Through the pipe the watcher hears of a signal while the main thread computes.
        earlier_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {number: signal.signal(number, stop.handle) for number in STOP_SIGNALS}
    try:
        yield stop
    except _Stopped:
        raise stop.error() from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if in_main_thread:
            signal.set_wakeup_fd(earlier_fd)
        os.write(writing, b"\0")
        watcher.join()
        os.close(reading)
        os.close(writing)


def _watch(stop: StopRequest, reading: int, parent: int | None) -> None:
    """The watcher thread of one `stop_on_signals`; a zero byte in the pipe ends it."""
    while True:
        timeout = max(0.0, min(PARENT_POLL_S, stop.seconds_left()))
        if parent is None and not stop.is_set():
            select.select([reading], [], [])
        else:
            select.select([reading], [], [], timeout)
        with contextlib.suppress(BlockingIOError):
            for number in os.read(reading, 64):
                if number == 0:
                    return
                if number in STOP_SIGNALS:
                    stop.signalled(number)
        if parent is not None and os.getppid() != parent:
            stop.ask("the agent that started this worker died", ORPHAN_GRACE_S)
        if stop.seconds_left() <= 0:
            end_at_once("its grace is over")
