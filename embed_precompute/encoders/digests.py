"""The sha256 of weight files, computed once per node and remembered.

Guarantees: a remembered digest is used only while path, size, mtime and inode are what they were;
of the ranks of one node one reads a file and the others wait for its result, but never for a rank
that hangs. Neither the cache nor the lock carries correctness: without them a file is read again.
Costs: a first digest reads the file once (about 1 GB/s); later ones take a few system calls. The
cache is XDG_CACHE_HOME/embed_precompute; where that cannot be written, a folder of this user's own
in the machine's temporary folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embed_precompute.documents import canonical_json, digest_of
from embed_precompute.errors import InputError

SHA256 = re.compile(r"[0-9a-f]{64}")
LOCK_POLL_S = 0.1
SLOWEST_BYTES_PER_S = 50e6
"""Whoever holds the lock for longer than this speed allows is taken to hang."""
LOCK_SLACK_S = 10.0


def file_sha256(path: Path) -> str:
    """sha256 of a file, remembered as long as its path, size, mtime and inode stay."""
    real = path.resolve()
    if real.parent.name == "blobs" and SHA256.fullmatch(real.name):
        return real.name  # the hub's cache names a large file by its sha256
    status = real.stat()
    key = [str(real), status.st_size, status.st_mtime_ns, status.st_ino]
    name = f"{digest_of(key)}.json"
    known = _recall(name, key)
    if known is not None:
        return known
    with _one_reader(name, status.st_size / SLOWEST_BYTES_PER_S + LOCK_SLACK_S):
        known = _recall(name, key)  # by the rank that had the lock
        return known if known is not None else _read(real, name, key)


def _read(real: Path, name: str, key: list[Any]) -> str:
    digest = hashlib.sha256()
    with real.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    after = real.stat()
    if [after.st_size, after.st_mtime_ns, after.st_ino] != key[1:]:
        raise InputError(f"{real} changed while it was read. Run again when it is complete.")
    _remember(name, key, digest.hexdigest())
    return digest.hexdigest()


@contextlib.contextmanager
def _one_reader(name: str, timeout_s: float) -> Iterator[None]:
    """Hold this node's lock for `name`, or go on without it after `timeout_s`.

    The lock is on the machine's own temporary folder, where flock works, and goes with its process.
    """
    folder = _node_folder()
    handle = -1
    if folder is not None:
        with contextlib.suppress(OSError):
            handle = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout_s
    try:
        while handle >= 0 and not _try_lock(handle) and time.monotonic() < deadline:
            time.sleep(LOCK_POLL_S)
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def _try_lock(handle: int) -> bool:
    """False while another process has it; True too where locks do not work at all."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _node_folder() -> Path | None:
    """A folder of this user alone on this machine; None where somebody else made that name."""
    folder = Path(tempfile.gettempdir()) / f"embed_precompute-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return None
    private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    return folder if private and status.st_uid == os.getuid() else None


def _cache_folders() -> Iterator[Path]:
    home = os.environ.get("XDG_CACHE_HOME")
    base = Path(home) if home else Path("~/.cache").expanduser()
    yield base / "embed_precompute" / "sha256"
    node = _node_folder()
    if node is not None:
        yield node


def _recall(name: str, key: list[Any]) -> str | None:
    for folder in _cache_folders():
        # No entry, or a damaged one: look further, then hash again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            stored = json.loads((folder / name).read_bytes())
            if stored["file"] == key and SHA256.fullmatch(stored["sha256"]):
                return str(stored["sha256"])
    return None


def _remember(name: str, key: list[Any], sha256: str) -> None:
    """In the first folder that can be written; a cache that cannot costs time, not correctness."""
    payload = canonical_json({"file": key, "sha256": sha256})
    for folder in _cache_folders():
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=folder)
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
            os.replace(temporary, folder / name)
            return
