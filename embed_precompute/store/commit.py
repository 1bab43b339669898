"""How a file gets its final name: staged beside the target, synced, then published at once.

Guarantees: under a final name there is either nothing or a whole file that was fsynced before it
got the name; a published file is never overwritten, except by `replace` (derived files, which
anyone can make again). Order: bytes, sha256, fsync(file), close, link, fsync(folder). A process
that dies leaves at most a `.tmp-*` file.
Costs: one fsync of the file and one of its folder; the digest reads the file back once, in 8 MiB
pieces, from the page cache. No locks, no clocks.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import hashlib
import io
import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from embed_precompute.errors import InternalError, StorageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

TEMP_PREFIX = ".tmp-"
PIECE_BYTES = 8 << 20

# What file systems without hard links answer to link().
_NO_LINK = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})
# What file systems without folder sync answer to fsync() of a folder.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})


class Outcome(enum.Enum):
    """What became of an attempt to publish a file that must never be overwritten."""

    PUBLISHED = "published"
    SAME = "same"
    """The target was there with equal content; ours was dropped."""
    DIFFERENT = "different"
    """The target was there with other content; it stays, ours was dropped."""


@dataclass(frozen=True)
class StoredFile:
    """A file by content."""

    name: str
    """Basename, never a path."""
    bytes: int
    sha256: str


_staged: set[Path] = set()
"""Temporary files of this process: they go when it ends in a hurry."""


def staged_files() -> frozenset[Path]:
    """The temporary files this process has now."""
    return frozenset(_staged.copy())


def drop_staged_files() -> None:
    """Removes this process's temporary files; only for a process that ends right after."""
    for path in staged_files():
        with contextlib.suppress(OSError):
            os.unlink(path)


@functools.cache
def this_host() -> str:
    """The machine, and the pid namespace on it, within which a pid names one process."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64]
    try:
        return f"{host}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return host


def digest_file(path: Path) -> StoredFile:
    """Size and sha256 of a file, in one sequential pass; FileNotFoundError when it is missing."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _digest_fd(fd, path.name)
    finally:
        os.close(fd)


def _digest_fd(fd: int, name: str) -> StoredFile:
    sha = hashlib.sha256()
    piece = memoryview(bytearray(min(PIECE_BYTES, os.fstat(fd).st_size + 1)))
    position = 0
    while count := os.preadv(fd, [piece], position):
        sha.update(piece[:count])
        position += count
    return StoredFile(name, position, sha.hexdigest())


def make_folder(folder: Path) -> None:
    """Makes `folder` and its parents, each durably."""
    missing = []
    while not os.path.isdir(folder):  # unlike is_dir(), False where we may not look
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        try:
            new.mkdir(exist_ok=True)
            sync_folder(new.parent)
        except OSError as error:
            raise storage_error(new, "making this folder", error) from error


def sync_folder(folder: Path) -> None:
    """fsync of a folder: the names in it are durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def storage_error(path: Path, action: str, error: OSError, needed: int = 0) -> StorageError:
    """StorageError with what is needed and what is there."""
    code = errno.errorcode.get(error.errno or 0, "unknown error")
    room = ""
    if needed:
        room = f" The file needs {needed} bytes"
        with contextlib.suppress(OSError):
            space = os.statvfs(path.parent)
            room += f"; {space.f_bavail * space.f_frsize} bytes are free on its file system"
        room += "."
    return StorageError(
        f"{path}: {action} failed: {error.strerror} ({code}).{room} Mend that (space, quota, "
        "permission) and run the same command again: what was committed stays."
    )


class StagedFile:
    """A file without a final name; `publish` or `replace` gives it one, anything else drops it.

    The temporary file is `.tmp-<name>-<host>-<pid>-<random>` in the target's folder; the host has
    the number of its pid namespace, so that `leftovers` can tell whether the writer still lives.
    Its mode is 0666 less the umask (and default ACLs), applied by the kernel when it is created, so
    no thread's umask is touched. Not for use by several threads at once.
    """

    def __init__(self, target: Path, expected_bytes: int = 0) -> None:
        self.target = target
        self._expected_bytes = expected_bytes
        self._position = 0
        self._digest: StoredFile | None = None
        self._identity: tuple[int, int] | None = None
        make_folder(target.parent)
        tag = f"{this_host()}-{os.getpid()}-{secrets.token_hex(6)}"
        self._temp = target.parent / f"{TEMP_PREFIX}{target.name}-{tag}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        _staged.add(self._temp)
        try:
            self._fd = os.open(self._temp, flags, 0o666)
        except OSError as error:
            _staged.discard(self._temp)
            raise self._error("creating its temporary file", error) from error

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    def fileno(self) -> int:
        if self._fd < 0:
            raise InternalError(f"{self.target}: its staged file is closed.")
        return self._fd

    @property
    def path(self) -> Path:
        """The temporary file."""
        return self._temp

    @property
    def position(self) -> int:
        """Where the next `write` goes."""
        return self._position

    def write(self, payload: ReadableBuffer) -> int:
        """Appends behind the last `write`."""
        count = self.pwrite(payload, self._position)
        self._position += count
        return count

    def pwrite(self, payload: ReadableBuffer, offset: int) -> int:
        """Writes all of `payload` at `offset`; returns its bytes."""
        view = memoryview(payload)
        size = view.nbytes
        if size == 0:  # a view with a zero in its shape cannot be cast
            return 0
        view = view.cast("B")
        self._digest = None
        done = 0
        try:
            while done < size:
                count = os.pwrite(self.fileno(), view[done:], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "nothing was written")
                done += count
        except OSError as error:
            raise self._error(f"writing at byte {offset + done}", error, offset + size) from error
        return size

    def pread(self, size: int, offset: int) -> bytes:
        """Exactly `size` bytes at `offset`."""
        pieces = []
        try:
            while size:
                piece = os.pread(self.fileno(), size, offset)
                if not piece:
                    raise OSError(errno.EIO, "the file is shorter than what was written")
                pieces.append(piece)
                offset += len(piece)
                size -= len(piece)
        except OSError as error:
            raise self._error("reading back", error) from error
        return b"".join(pieces)

    def digest(self) -> StoredFile:
        """Size and sha256 of what is staged: one pass, remembered until the next write."""
        if self._digest is None:
            try:
                self._digest = _digest_fd(self.fileno(), self.target.name)
            except OSError as error:
                raise self._error("reading back", error) from error
        return self._digest

    def sync(self) -> None:
        """fsync of what is staged."""
        try:
            os.fsync(self.fileno())
        except OSError as error:
            raise self._error("fsync", error) from error

    def publish(self) -> Outcome:
        """Gives the file its name unless the name is taken: the first wins, and stays.

        After DIFFERENT the staged file is still there: whoever moves the other one away may publish
        again. Otherwise it is dropped when the `with` block ends.
        """
        self._finish()
        outcome = self._link()
        if outcome is not Outcome.DIFFERENT:
            self.discard()
        return outcome

    def replace(self) -> bool:
        """Gives the file its name, in place of what has it; False when that was equal already."""
        self._finish()
        stored = self.digest()
        try:
            if self._is_target(stored):
                return False
            try:
                os.replace(self._temp, self.target)
            except OSError as error:
                # Another process that finished the same dataset may have removed our temporary.
                if not self._has_our_inode():
                    if self._is_target(stored):
                        return False
                    raise self._error("renaming into place", error) from error
            self._sync_parent()
            return True
        finally:
            self.discard()

    def discard(self) -> None:
        """Closes and removes the temporary file; does nothing the second time."""
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._temp)
        _staged.discard(self._temp)

    def _finish(self) -> None:
        """Digest, fsync, close: some file systems report a full disk only at close."""
        if self._identity is not None:
            return
        self.digest()
        self.sync()
        status = os.fstat(self.fileno())
        self._identity = (status.st_dev, status.st_ino)
        try:
            self._close()
        except OSError as error:
            raise self._error("closing", error) from error

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _link(self) -> Outcome:
        try:
            os.link(self._temp, self.target)
        except OSError as error:
            if error.errno in _NO_LINK and not os.path.lexists(self.target):
                return self._rename()
            return self._lost(error, "linking into place")
        with contextlib.suppress(OSError):
            os.unlink(self._temp)
        self._sync_parent()
        return Outcome.PUBLISHED

    def _rename(self) -> Outcome:
        """For file systems without links: in the instant between check and rename the last wins."""
        try:
            os.rename(self._temp, self.target)
        except OSError as error:
            return self._lost(error, "renaming into place")
        self._sync_parent()
        return Outcome.PUBLISHED

    def _lost(self, error: OSError, action: str) -> Outcome:
        """The name was not ours to take: by whom, and with what content?"""
        if self._has_our_inode():  # a network file system may report failure after success
            self._sync_parent()
            return Outcome.PUBLISHED
        if not os.path.lexists(self.target):
            raise self._error(action, error) from error
        self._sync_parent()  # the winner may have died before its own
        return Outcome.SAME if self._is_target(self.digest()) else Outcome.DIFFERENT

    def _has_our_inode(self) -> bool:
        try:
            status = os.stat(self.target)
        except OSError:
            return False
        return self._identity == (status.st_dev, status.st_ino)

    def _is_target(self, stored: StoredFile) -> bool:
        try:
            if os.stat(self.target).st_size != stored.bytes:
                return False
            return digest_file(self.target) == stored
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._error("reading the file that has this name", error) from error

    def _sync_parent(self) -> None:
        try:
            sync_folder(self.target.parent)
        except OSError as error:
            raise self._error("fsync of its folder", error) from error

    def _error(self, action: str, error: OSError, needed: int = 0) -> StorageError:
        return storage_error(self.target, action, error, max(needed, self._expected_bytes))


class Sink(io.RawIOBase):
    """A staged file as the file object that pyarrow writes to."""

    def __init__(self, staged: StagedFile) -> None:
        self._staged = staged

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._staged.position

    def write(self, payload: Any) -> int:
        return self._staged.write(payload)


def publish_bytes(target: Path, payload: bytes) -> Outcome:
    """Publishes a small file; the first wins."""
    with StagedFile(target, len(payload)) as staged:
        staged.write(payload)
        return staged.publish()


def replace_bytes(target: Path, payload: bytes) -> bool:
    """Writes a small derived file in place of what is there; False when that was equal already."""
    with StagedFile(target, len(payload)) as staged:
        staged.write(payload)
        return staged.replace()
