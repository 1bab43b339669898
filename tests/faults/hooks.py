"""Faults that a process injects into itself: a hook is (name, arguments), installed by the child.

Steps are the calls of os.open (to create), pwrite, fsync, close, link, rename, replace, unlink and
mkdir that touch the dataset's folder, in the order in which the process makes them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Hook = tuple[str, dict[str, Any]]
STEPS = ("open", "pwrite", "fsync", "close", "link", "rename", "replace", "unlink", "mkdir")
_REAL = {name: getattr(os, name) for name in STEPS}
_REAL_TIME = time.time
Before = Callable[[int, str, str, tuple[Any, ...]], None]
After = Callable[[int, str, str, tuple[Any, ...], Any], None]


def install(hooks: Sequence[Hook]) -> None:
    """Install hooks in this process; only for a process that ends with its fault."""
    for name, arguments in hooks:
        _HOOKS[name](**arguments)


def _subject(name: str, args: Sequence[Any]) -> str:
    first = args[0]
    if name in ("pwrite", "fsync", "close"):
        try:
            return os.readlink(f"/proc/self/fd/{int(first)}")
        except OSError:
            return ""
    if name == "open" and not (len(args) > 1 and args[1] & os.O_CREAT):
        return ""
    return os.fspath(first) if not isinstance(first, int) else ""


class Steps:
    """Counts the steps under `root` and calls `before` and `after` around each."""

    def __init__(self, root: str, before: Before | None = None, after: After | None = None) -> None:
        self.root, self.count = root, 0
        self._before, self._after, self._lock = before, after, threading.RLock()

    def install(self) -> None:
        for name in STEPS:
            setattr(os, name, self._wrapped(name))

    def remove(self) -> None:
        for name, real in _REAL.items():
            setattr(os, name, real)

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real = _REAL[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            subject = _subject(name, args)
            if not subject.startswith(self.root):
                return real(*args, **kwargs)
            with self._lock:
                number, self.count = self.count, self.count + 1
                if self._before is not None:
                    self._before(number, name, subject, args)
                result = real(*args, **kwargs)
                if self._after is not None:
                    self._after(number, name, subject, args, result)
            return result

        return call


class Disk:
    """What a power failure would take: bytes and names that were not synced when it comes.

    A file whose last write was not synced is cut in half. A name whose folder was not synced since
    is there or not, by the toss of a coin: a new name goes, a replaced file is the old one again.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._dirty: set[int] = set()
        self._names: dict[str, bytes | None] = {}

    def before(self, name: str, subject: str, args: Sequence[Any]) -> None:
        target = os.fspath(args[1]) if name in ("rename", "replace", "link") else subject
        if name in ("rename", "replace") and target not in self._names:
            path = Path(target)
            self._names[target] = path.read_bytes() if path.is_file() else None
        elif name in ("link", "mkdir") and not os.path.lexists(target):
            self._names[target] = None

    def after(self, name: str, subject: str, args: Sequence[Any]) -> None:
        if name == "pwrite":
            self._dirty.add(os.fstat(args[0]).st_ino)
        elif name == "fsync":
            self._dirty.discard(os.fstat(args[0]).st_ino)
            for path in [p for p in self._names if os.path.dirname(p) == subject]:
                del self._names[path]

    def fail(self, root: str) -> None:
        for folder, _, names in os.walk(root):
            for name in names:
                path = os.path.join(folder, name)
                if os.stat(path).st_ino in self._dirty:
                    os.truncate(path, os.stat(path).st_size // 2)
        for lost, old in self._names.items():
            path = Path(lost)
            if not path.exists() or self._rng.random() < 0.5:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                _REAL["unlink"](path)
                if old is not None:
                    path.write_bytes(old)


def _die_at(root: str, n: int, power: bool = False, seed: int = 0) -> None:
    """SIGKILL at step n, a write half done; with `power`, what was not synced goes too."""
    disk = Disk(seed)

    def before(number: int, name: str, subject: str, args: tuple[Any, ...]) -> None:
        disk.before(name, subject, args)
        if number < n:
            return
        if name == "pwrite":
            view = memoryview(args[1]).cast("B") if memoryview(args[1]).nbytes else b""
            _REAL["pwrite"](args[0], view[: len(view) // 2], args[2])
            disk.after(name, subject, args)
        if power:
            disk.fail(root)
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

    def after(number: int, name: str, subject: str, args: tuple[Any, ...], result: Any) -> None:
        if name != "close":
            disk.after(name, subject, args)

    Steps(root, before, after).install()


def _writable(fd: int) -> bool:
    return fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY


def failing(root: str, kind: str, n: int, code: int, also: Sequence[str] = ()) -> Steps:
    """Steps whose n-th of `kind` fails with `code`; `lasting` in `also`: and all after it."""
    seen = [0]

    def before(number: int, name: str, subject: str, args: tuple[Any, ...]) -> None:
        if name != kind or (name == "close" and not _writable(args[0])):
            return  # what was not written does not fail at close
        seen[0] += 1
        if seen[0] == n + 1 or ("lasting" in also and seen[0] > n):
            if name == "close":
                _REAL["close"](args[0])
            raise OSError(code, os.strerror(code), subject)

    steps = Steps(root, before)
    steps.seen = seen  # type: ignore[attr-defined]
    return steps


def _fail_at(root: str, kind: str, n: int, code: int, lasting: bool = False) -> None:
    failing(root, kind, n, code, ("lasting",) if lasting else ()).install()


def _trace(root: str, path: str) -> None:
    """A line for every step, with the target of link, rename and replace."""
    stream = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  open until the end

    def after(number: int, name: str, subject: str, args: tuple[Any, ...], result: Any) -> None:
        target = os.fspath(args[1]) if name in ("link", "rename", "replace") else ""
        stream.write(f"{name}\t{subject}\t{target}\n")

    def before(number: int, name: str, subject: str, args: tuple[Any, ...]) -> None:
        if name == "close":
            stream.write(f"{name}\t{subject}\t\n")

    def after_all_but_close(*step: Any) -> None:
        if step[1] != "close":
            after(*step)

    Steps(root, before, after_all_but_close).install()


def _pace(seconds: float, log: str | None = None, until: str | None = None) -> None:
    """Each unit takes `seconds` longer, as long as there is no file `until`; units that are begun
    are noted in `log`."""
    from embed_precompute.job.stages import Stages

    real = Stages._encoded_batches

    def paced(self: Any, unit: Any) -> Iterator[Any]:
        if log is not None:
            fd = _REAL["open"](log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            os.write(fd, f"{os.getpid()} {unit.number}\n".encode())
            _REAL["close"](fd)
        if until is None or not os.path.exists(until):
            time.sleep(seconds)
        yield from real(self, unit)

    Stages._encoded_batches = paced  # type: ignore[method-assign]


def _clock(offset: float) -> None:
    time.time = lambda: _REAL_TIME() + offset


def _late(root: str, seconds: float, seed: int) -> None:
    """A network file system: new records are seen late, and link reports failure after success."""
    from embed_precompute.job import claims

    rng = random.Random(seed)
    real_exists, real_listing = Path.exists, claims.committed_units
    real_link = os.link

    def young(path: Path) -> bool:
        try:
            return _REAL_TIME() - os.stat(path).st_ctime < seconds
        except OSError:
            return False

    def exists(self: Path, **kwargs: Any) -> bool:
        seen = real_exists(self, **kwargs)
        return seen and not ("shard-" in self.name and young(self))

    def listing(folder: Path) -> set[int]:
        return {u for u in real_listing(folder) if exists(claims.record_path(folder, u))}

    def link(*args: Any, **kwargs: Any) -> None:
        real_link(*args, **kwargs)
        if rng.random() < 0.3:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(args[1]))

    Path.exists = exists  # type: ignore[method-assign,assignment]
    claims.committed_units = listing
    os.link = link


def _poison(unit: int, rows: Sequence[int], kind: str = "nan") -> None:
    """Rows of a unit are not finite, or its encoding raises."""
    from embed_precompute.job.stages import Stages, UnitWriter

    real_write, real_batches = UnitWriter.write, Stages._encoded_batches

    def write(self: Any, name: str, which: Any, values: Any, *more: Any) -> None:
        if self._unit.number == unit:
            values = values.clone()
            for line, row in enumerate(which.tolist()):
                if row in rows:
                    values[line] = float("nan")
        real_write(self, name, which, values, *more)

    def batches(self: Any, item: Any) -> Iterator[Any]:
        if item.number == unit:
            raise {"memory": MemoryError, "runtime": RuntimeError}[kind]("injected")
        yield from real_batches(self, item)

    if kind == "nan":
        UnitWriter.write = write  # type: ignore[method-assign]
    else:
        Stages._encoded_batches = batches  # type: ignore[method-assign]


def _umask(mask: int) -> None:
    os.umask(mask)


def _close_standard_streams() -> None:
    for fd in (0, 1):
        _REAL["close"](fd)


_HOOKS: Mapping[str, Callable[..., None]] = {
    "die_at": _die_at,
    "fail_at": _fail_at,
    "trace": _trace,
    "pace": _pace,
    "clock": _clock,
    "late": _late,
    "poison": _poison,
    "umask": _umask,
    "close_standard_streams": _close_standard_streams,
}
