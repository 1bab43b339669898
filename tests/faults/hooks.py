"""Faults that a process injects into itself: a hook is (name, arguments), installed by the child.

Steps are the calls of os.open (to create), pwrite, fsync, close, link, rename, replace, unlink and
mkdir that touch the dataset's folder, in the order in which the process makes them.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Hook = tuple[str, dict[str, Any]]
Call = tuple[Any, ...]
_REAL = {
    name: getattr(os, name)
    for name in ("open", "pwrite", "fsync", "close", "link", "rename", "replace", "unlink", "mkdir")
}
_NAMING = ("link", "rename", "replace")
_REAL_TIME = time.time
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
"""What calls fail with."""


def install(hooks: Sequence[Hook]) -> None:
    """Install hooks in this process; only for a process that ends with its fault."""
    for name, arguments in hooks:
        _HOOKS[name](**arguments)


class Steps:
    """Calls `before(number, name, path, args)` and `after(name, path, args)` around each step under
    `root`, from `install` to `remove`."""

    def __init__(
        self,
        root: str,
        before: Callable[[int, str, str, Call], None],
        after: Callable[[str, str, Call], None] = lambda *_: None,
    ) -> None:
        self._root, self._before, self._after = root, before, after
        self._count, self._lock = 0, threading.RLock()

    def install(self) -> None:
        for name in _REAL:
            setattr(os, name, self._wrapped(name))

    def remove(self) -> None:
        for name, real in _REAL.items():
            setattr(os, name, real)

    def _wrapped(self, name: str) -> Callable[..., Any]:
        real = _REAL[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            path = _path(name, args)
            if not path.startswith(self._root):
                return real(*args, **kwargs)
            with self._lock:
                number, self._count = self._count, self._count + 1
                self._before(number, name, path, args)
                result = real(*args, **kwargs)
                self._after(name, path, args)
            return result

        return call


def _path(name: str, args: Call) -> str:
    """What a call is about; empty for what is no step."""
    if name in ("pwrite", "fsync", "close"):
        try:
            return os.readlink(f"/proc/self/fd/{int(args[0])}")
        except OSError:
            return ""
    if name == "open" and not (len(args) > 1 and args[1] & os.O_CREAT):
        return ""
    return os.fspath(args[0]) if not isinstance(args[0], int) else ""


class Disk:
    """What a power failure would take: bytes and names that were not synced when it comes.

    A file whose last write was not synced is cut in half. A name whose folder was not synced since
    is there or not, by the toss of a coin: a new name goes, a replaced file is the old one again.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._dirty: set[int] = set()
        self._names: dict[str, bytes | None] = {}

    def before(self, name: str, path: str, args: Call) -> None:
        target = Path(args[1] if name in _NAMING else path)
        if name in ("rename", "replace") and str(target) not in self._names:
            self._names[str(target)] = target.read_bytes() if target.is_file() else None
        elif name in ("link", "mkdir") and not os.path.lexists(target):
            self._names[str(target)] = None

    def after(self, name: str, path: str, args: Call) -> None:
        if name == "pwrite":
            self._dirty.add(os.fstat(args[0]).st_ino)
        elif name == "fsync":
            self._dirty.discard(os.fstat(args[0]).st_ino)
            for named in [each for each in self._names if os.path.dirname(each) == path]:
                del self._names[named]

    def fail(self, root: str) -> None:
        for path in Path(root).rglob("*"):
            if path.is_file() and path.stat().st_ino in self._dirty:
                os.truncate(path, path.stat().st_size // 2)
        for path, old in ((Path(name), old) for name, old in self._names.items()):
            if not path.exists() or self._rng.random() < 0.5:
                continue
            if path.is_dir():
                shutil.rmtree(path)
                continue
            _REAL["unlink"](path)
            if old is not None:
                path.write_bytes(old)


def _die_at(root: str, n: int, power: bool = False, seed: int = 0) -> None:
    """SIGKILL at step n, a write half done; with `power`, what was not synced goes too."""
    disk = Disk(seed)

    def before(number: int, name: str, path: str, args: Call) -> None:
        disk.before(name, path, args)
        if number < n:
            return
        if name == "pwrite":
            view = memoryview(args[1]).cast("B") if memoryview(args[1]).nbytes else b""
            _REAL["pwrite"](args[0], view[: len(view) // 2], args[2])
            disk.after(name, path, args)
        if power:
            disk.fail(root)
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()

    Steps(root, before, disk.after).install()


def failing(root: str, kind: str, n: int, code: int, lasting: bool = False) -> tuple[Steps, Any]:
    """Steps whose n-th call of `kind` fails with `code`, and all after it if that is `lasting`; and
    a function that says whether it came to that."""
    seen = [0]

    def before(number: int, name: str, path: str, args: Call) -> None:
        if name != kind:
            return
        if name == "close" and fcntl.fcntl(args[0], fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            return  # what was not written does not fail at close
        seen[0] += 1
        if seen[0] == n + 1 or (lasting and seen[0] > n):
            if name == "close":
                _REAL["close"](args[0])
            raise OSError(code, os.strerror(code), path)

    return Steps(root, before), lambda: seen[0] > n


def _trace(root: str, path: str) -> None:
    """A line for every step, with the target of link, rename and replace."""
    stream = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  open until the end

    def before(number: int, name: str, path: str, args: Call) -> None:
        stream.write(f"{name}\t{path}\t{os.fspath(args[1]) if name in _NAMING else ''}\n")

    Steps(root, before).install()


def _pace(seconds: float, log: str | None = None, lag: int = 0) -> None:
    """Each unit takes `seconds` longer, and until `lag` more units are committed or no other is
    left; the numbers of units that are begun are noted in `log`."""
    from embed_precompute.job.stages import Stages
    from embed_precompute.store.records import committed_units

    real = Stages._forwards_of

    def paced(self: Any, unit: Any) -> Iterator[Any]:
        if log is not None:
            with open(log, "ab", buffering=0) as file:
                file.write(f"{unit.number}\n".encode())
        time.sleep(seconds)
        root, others = self._prepared.root, self._plan.num_units - 1
        goal = min(others, len(committed_units(root)) + lag) if lag else 0
        while len(committed_units(root)) < goal:
            time.sleep(0.01)
        yield from real(self, unit)

    Stages._forwards_of = paced  # type: ignore[method-assign]


def _die_in_layer(n: int) -> None:
    """SIGKILL when the n-th token batch begins one of T5's layers."""
    from embed_precompute.encoders.fused.layers import T5Layers

    real, calls = T5Layers.layer, itertools.count(1)

    def layer(self: Any, number: int, state: Any) -> None:
        if next(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        real(self, number, state)

    T5Layers.layer = layer  # type: ignore[method-assign]


def _clock(offset: float) -> None:
    time.time = lambda: _REAL_TIME() + offset


def _late(seconds: float, seed: int) -> None:
    """A network file system: new records are seen late, and link reports failure after success."""
    rng = random.Random(seed)
    real_exists, real_listing = Path.exists, os.listdir

    def young(path: Any) -> bool:
        try:
            is_record = re.search(r"shard-[0-9]+\.json$", str(path)) is not None
            return is_record and _REAL_TIME() - os.stat(path).st_ctime < seconds
        except OSError:
            return False

    def exists(self: Path, **kwargs: Any) -> bool:
        return real_exists(self, **kwargs) and not young(self)

    def listing(folder: Any = ".") -> list[str]:
        return [name for name in real_listing(folder) if not young(os.path.join(folder, name))]

    def link(*args: Any, **kwargs: Any) -> None:
        _REAL["link"](*args, **kwargs)
        if rng.random() < 0.3:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(args[1]))

    Path.exists = exists  # type: ignore[method-assign,assignment]
    os.listdir = listing  # type: ignore[assignment]
    os.link = link


_HOOKS: Mapping[str, Callable[..., Any]] = {
    "die_at": _die_at,
    "fail_at": lambda **arguments: failing(**arguments)[0].install(),
    "trace": _trace,
    "pace": _pace,
    "die_in_layer": _die_in_layer,
    "clock": _clock,
    "late": _late,
    "umask": lambda mask: os.umask(mask),
    "close_standard_streams": lambda: os.closerange(0, 2),
}
