"""How a file gets its final name, and how files leave a dataset.

Guarantees: under a final name there is either nothing or a whole file that was fsynced before it
got the name. The order is: bytes, digest, fsync(file), close, link or rename, fsync(folder). A
process that dies leaves at most a `.tmp-*` file.
Costs: one fsync of the file and one of its folder. A file whose digest the caller does not know is
read back once, from the page cache. There are no locks, and no times are compared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import os
import re
import secrets
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embed_precompute.documents import Count, Hex64
from embed_precompute.errors import StorageError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

QUARANTINE = "_quarantine"
TEMP_PREFIX = ".tmp-"
PIECE_BYTES = 256 << 10
"""A piece this small is hashed while the processor's cache still holds it."""
UNLIMITED = 1 << 63
NAME_DIGITS = 16
"""Number of hex digits of the digest that are part of a data file's name."""

_TEMP_NAME = re.compile(
    re.escape(TEMP_PREFIX) + r".+-(?P<host>[A-Za-z0-9._]+)-(?P<pid>[0-9]{1,9})-[0-9a-f]{12}"
)
# What file systems without hard links answer to link().
_NO_LINK = frozenset({errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS})
# What file systems without folder sync answer to fsync() of a folder.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP})


@dataclass(frozen=True)
class StoredFile:
    """A file that is published: its name, size and digest."""

    name: str
    """Basename, never a path."""
    bytes: Count
    sha256: Hex64


def content_name(name: str, digest: str) -> str:
    """The name of a data file by content: `digest` is its digest, or the first digits of it.

    `shard-000042.rows.parquet` becomes `shard-000042-0123456789abcdef.rows.parquet`.
    """
    stem, _, ending = name.partition(".")
    return f"{stem}-{digest[:NAME_DIGITS]}.{ending}"


def open_file(path: Path) -> int:
    """Opens a regular file to read and returns the descriptor; OSError for anything else.

    A pipe has no end to read to, and opening one would wait for its writer.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return fd


def read_file(path: Path, limit: int | None = None) -> bytes:
    """Returns the whole file, or its first `limit` bytes. Raises OSError as `open_file` does."""
    with open(open_file(path), "rb") as file:
        return file.read(-1 if limit is None else limit)


def digest_file(path: Path) -> StoredFile:
    """Size and sha256 of a file, in one sequential pass. Raises OSError as `open_file` does."""
    fd = open_file(path)
    try:
        return _digest(fd, path.name)
    finally:
        os.close(fd)


def _digest(fd: int, name: str) -> StoredFile:
    sha = hashlib.sha256()
    piece = memoryview(bytearray(min(PIECE_BYTES, os.fstat(fd).st_size + 1)))
    position = 0
    while count := os.preadv(fd, [piece], position):
        sha.update(piece[:count])
        position += count
    return StoredFile(name, position, sha.hexdigest())


# --- writing --------------------------------------------------------------------------------------

_staged: set[Path] = set()
"""Temporary files of this process; `drop_staged_files` removes them if it must end at once."""


def drop_staged_files() -> None:
    """Removes this process's temporary files; only for a process that ends right after."""
    for path in _staged.copy():
        with contextlib.suppress(OSError):
            os.unlink(path)


@functools.cache
def this_host() -> str:
    """The machine, and the pid namespace on it, within which a pid names one process."""
    host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64]
    try:
        return f"{host}.{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no /proc here, as in a bare chroot
        return host


def make_folder(folder: Path) -> None:
    """Makes `folder` and its parents, each durably."""
    missing = []
    # Without permission os.path.isdir returns False; Path.is_dir() may raise.
    while not os.path.isdir(folder):
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        try:
            new.mkdir(exist_ok=True)
            sync_folder(new.parent)
        except OSError as error:
            raise storage_error(new, "making this folder", error) from error


def sync_folder(folder: Path) -> None:
    """fsyncs a folder, so that the names in it are durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(fd)


def free_space(folder: Path) -> tuple[int, int]:
    """Number of bytes and of files that are free for `folder`, which need not exist yet."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    facts = os.statvfs(folder)
    # A file system without a fixed number of inodes reports 0 of 0 files. FUSE reports 0 blocks if
    # it knows no size.
    free_bytes = facts.f_bavail * facts.f_frsize if facts.f_blocks else UNLIMITED
    return free_bytes, facts.f_favail if facts.f_files else UNLIMITED


def storage_error(path: Path, action: str, error: OSError, needed: int = 0) -> StorageError:
    """StorageError that names the bytes needed and the free space."""
    code = errno.errorcode.get(error.errno or 0, "unknown error")
    sizes = ""
    if needed:
        sizes = f" The file needs {needed} bytes"
        with contextlib.suppress(OSError):
            free, _ = free_space(path.parent)
            if free < UNLIMITED:
                sizes += f"; {free} bytes are free on its file system"
        sizes += "."
    return StorageError(
        f"{path}: {action} failed: {error.strerror} ({code}).{sizes} Mend that (space, quota, "
        "permission) and run the same command again: what was committed stays."
    )


class StagedFile:
    """A file without a final name, for one thread.

    `publish`, `replace` or `publish_by_content` gives the file its name; leaving the `with` block
    without one of these calls drops the file. The temporary file is
    `.tmp-<name>-<host>-<pid>-<random>` in the target's folder, so that `remove_dead` can tell
    whether its writer is alive.
    """

    def __init__(self, target: Path, expected_bytes: int = 0) -> None:
        """`expected_bytes` is part of the error when there is no space for the file."""
        self.target = target
        self._expected_bytes = expected_bytes
        self._position = 0
        self._digest: StoredFile | None = None
        make_folder(target.parent)
        tag = f"{this_host()}-{os.getpid()}-{secrets.token_hex(6)}"
        self._temp = target.parent / f"{TEMP_PREFIX}{target.name}-{tag}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        _staged.add(self._temp)
        try:
            self._fd = os.open(self._temp, flags, 0o666)  # the kernel takes off the umask
        except OSError as error:
            _staged.discard(self._temp)
            raise self._error("creating its temporary file", error) from error

    def __enter__(self) -> StagedFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.discard()

    @property
    def position(self) -> int:
        """Offset of the next `write`."""
        return self._position

    def write(self, payload: ReadableBuffer) -> int:
        """Writes all of `payload` after the last `write`; returns the number of bytes."""
        count = self.pwrite(payload, self._position)
        self._position += count
        return count

    def pwrite(self, payload: ReadableBuffer, offset: int) -> int:
        """Writes all of `payload` at `offset`; returns the number of bytes."""
        view = memoryview(payload)
        size = view.nbytes
        if size == 0:  # a view with a zero in its shape cannot be cast
            return 0
        view, done, self._digest = view.cast("B"), 0, None
        try:
            while done < size:
                count = os.pwrite(self._fd, view[done:], offset + done)
                if count == 0:  # a broken network file system; else this would never end
                    raise OSError(errno.EIO, "nothing was written")
                done += count
        except OSError as error:
            raise self._error(f"writing at byte {offset + done}", error, offset + size) from error
        return size

    def pread(self, size: int, offset: int) -> bytes:
        """Reads exactly `size` bytes at `offset`."""
        try:
            payload = os.pread(self._fd, size, offset)
            if len(payload) != size:
                raise OSError(errno.EIO, "the file is shorter than what was written")
        except OSError as error:
            raise self._error("reading back", error) from error
        return payload

    def digest(self) -> StoredFile:
        """Size and sha256 of what is staged: one pass, remembered until the next write."""
        if self._digest is None:
            try:
                self._digest = _digest(self._fd, self.target.name)
            except OSError as error:
                raise self._error("reading back", error) from error
        return self._digest

    def publish(self) -> bool:
        """Gives the file its name unless the name is taken: the first file stays.

        Returns whether the file of that name has our content.
        """
        stored = self.digest()
        self._finish()
        ours = True
        try:
            try:
                os.link(self._temp, self.target)
            except OSError as error:
                if error.errno not in _NO_LINK or os.path.lexists(self.target):
                    raise
                # No hard links here. If another process publishes after the check above, this
                # rename replaces its file.
                os.rename(self._temp, self.target)
        except OSError as error:
            if not os.path.lexists(self.target):
                raise self._error("linking into place", error) from error
            # A network file system may report a failure after it did what was asked.
            ours = self._target_is(stored)
        finally:
            self.discard()
        # Also if another process was first: that process may have died before it synced the folder.
        self._sync_parent()
        return ours

    def replace(self, is_same: Callable[[Path], bool] | None = None) -> None:
        """Gives the file its name, replacing any file that has it; an equal file stays.

        `is_same` says whether the file of a path has our content; by default its sha256 does.
        """
        if is_same is None:
            stored = self.digest()

            def is_same(_: Path) -> bool:
                return self._target_is(stored)

        self._finish()
        try:
            if not is_same(self.target):
                os.replace(self._temp, self.target)
        except OSError as error:
            # Another process that finished the same dataset may have removed our temporary file.
            if not is_same(self.target):
                raise self._error("renaming into place", error) from error
        finally:
            self.discard()
        self._sync_parent()

    def publish_by_content(
        self, digest: str | None = None, is_same: Callable[[Path], bool] | None = None
    ) -> str:
        """Gives the file the `content_name` of its target; returns that name.

        The name identifies these bytes. So a file that has the name already is equal, and stays, or
        is damaged, and is replaced. `digest` is the file's sha256 unless given; a caller that gives
        another gives `is_same`, too (see `replace`).
        """
        digest = digest or self.digest().sha256
        self.target = self.target.with_name(content_name(self.target.name, digest))
        self.replace(is_same)
        return self.target.name

    def discard(self) -> None:
        """Closes and removes the temporary file; does nothing the second time."""
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            os.unlink(self._temp)
        _staged.discard(self._temp)

    def _finish(self) -> None:
        """fsync and close: some file systems report a full disk only at close."""
        try:
            os.fsync(self._fd)
            self._close()
        except OSError as error:
            raise self._error("fsync and close", error) from error

    def _close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _target_is(self, stored: StoredFile) -> bool:
        try:
            if os.stat(self.target).st_size != stored.bytes:
                return False
            return digest_file(self.target).sha256 == stored.sha256
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


def publish_bytes(target: Path, payload: bytes) -> bool:
    """Publishes a small file, as `StagedFile.publish` does; returns whether it has our content."""
    with StagedFile(target, len(payload)) as staged:
        staged.write(payload)
        return staged.publish()


def publish_bytes_by_content(target: Path, payload: bytes) -> StoredFile:
    """Publishes a small data file, as `StagedFile.publish_by_content` does."""
    with StagedFile(target, len(payload)) as staged:
        staged.write(payload)
        stored = staged.digest()
        return dataclasses.replace(stored, name=staged.publish_by_content())


def replace_bytes(target: Path, payload: bytes) -> None:
    """Writes a small derived file, replacing the old one; an equal file stays."""
    with StagedFile(target, len(payload)) as staged:
        staged.write(payload)
        staged.replace()


# --- files that leave -----------------------------------------------------------------------------


def move_aside(root: Path, path: Path) -> bool:
    """Moves a file to `_quarantine/` of `root`; False if the file is gone."""
    folder = root / QUARANTINE
    make_folder(folder)
    try:
        os.replace(path, folder / f"{path.name}-{secrets.token_hex(6)}")
        sync_folder(folder)
        sync_folder(path.parent)
    except FileNotFoundError:
        return False  # another process moved it
    except OSError as error:
        raise storage_error(path, "moving it to quarantine", error) from error
    return True


def remove_file(path: Path) -> None:
    """Removes a file durably; it may be gone already."""
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileNotFoundError:
        return  # its folder is gone too
    except OSError as error:
        raise storage_error(path, "removing it", error) from error


def remove_leftovers(*folders: Path) -> None:
    """Removes all temporary files from the folders of a dataset that is complete.

    Another process may still be writing one of them. When it publishes, it finds that the equal
    final file exists already. If it runs in another environment, its file is not equal to that one,
    and it ends with StorageError. The dataset is complete all the same.
    """
    for path in _temporaries(*folders):
        with contextlib.suppress(OSError):
            path.unlink()


def remove_dead(root: Path) -> int:
    """Removes temporary files whose writer was on this machine and is dead; returns their number.

    Files of other machines stay until the dataset is complete: this machine cannot tell whether
    their writers are dead.
    """
    removed = 0
    folders = [root, root / "index"]
    with contextlib.suppress(OSError), os.scandir(root / "shards") as entries:
        folders += [Path(each.path) for each in entries if each.is_dir(follow_symlinks=False)]
    for path in _temporaries(*folders):
        match = _TEMP_NAME.fullmatch(path.name)
        if match is None or match["host"] != this_host() or path in _staged:
            continue
        pid = int(match["pid"])
        # In a container that was started again, our own pid may be that of the dead writer.
        if pid != os.getpid() and _is_alive(pid):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            removed += 1
    return removed


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # the process is another user's
        return True
    return True


def _temporaries(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                if name.startswith(TEMP_PREFIX):
                    yield folder / name
