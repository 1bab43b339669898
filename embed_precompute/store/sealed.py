"""Sealed JSON: the small files of a dataset, canonical, with the digest of their own content.

Guarantees: equal values give equal bytes; what is read is exactly what `seal` writes, or an error
names the file. A hostile file costs no more time and memory than the caps allow.
Costs: each value is written once, to compare.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embed_precompute.documents import canonical_json
from embed_precompute.errors import StorageError, VerificationError

FORMAT_VERSION = 1
MAX_JSON_BYTES = 16 << 20
MAX_RECORD_BYTES = 1 << 20
MAX_JSON_ITEMS = 1 << 19
"""What a JSON file of ours may hold, so that parsing a hostile one takes little memory: an empty
list is 2 bytes in the file and 64 in memory."""


def seal(obj: dict[str, Any]) -> bytes:
    """`obj` as canonical JSON with the digest of its own content, and a final newline."""
    # Keys are sorted, so the digest stands between two parts that need to be written only once.
    before = canonical_json({key: value for key, value in obj.items() if key < "digest"})[1:-1]
    after = canonical_json({key: value for key, value in obj.items() if key > "digest"})[1:-1]
    content = b"{%b}" % b",".join(part for part in (before, after) if part)
    digest = b'"digest":"%b"' % hashlib.sha256(content).hexdigest().encode()
    return b"{%b}\n" % b",".join(part for part in (before, digest, after) if part)


def read_sealed(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The object in a sealed JSON file, with its `digest`.

    A missing file is FileNotFoundError: only the caller knows what absence means. Anything but the
    exact bytes of `seal` (a flipped bit, a torn write, a version or kind this program does not
    know) is VerificationError.
    """
    limit = MAX_RECORD_BYTES if kind in ("unit", "null") else MAX_JSON_BYTES
    try:
        start = read_start(path, limit)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: reading failed: {error.strerror}.") from error
    return parse_sealed(path, start, kind)


def parse_sealed(path: Path, start: FileStart, kind: str | None = None) -> dict[str, Any]:
    """As `read_sealed`, of a file that was read already."""
    payload, limit = start.payload, start.limit
    if start.size > limit:
        raise VerificationError(f"{path} is over {limit} bytes: not one of our files.")
    if sum(payload.count(mark) for mark in b",[{") > MAX_JSON_ITEMS:
        raise VerificationError(f"{path} has over {MAX_JSON_ITEMS} values: not one of our files.")
    remedy = "Restore it, or use `embed-precompute repair` and run the job again."
    try:
        obj = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{path} is damaged: not JSON ({error}). {remedy}") from error
    if not isinstance(obj, dict):
        raise VerificationError(f"{path} is damaged: not a JSON object. {remedy}")
    version = obj.get("format_version")
    if version != FORMAT_VERSION:
        raise VerificationError(
            f"{path} has format_version {version!r}: this program reads {FORMAT_VERSION}."
        )
    try:
        sealed = seal(obj)
    except (ValueError, RecursionError) as error:
        raise VerificationError(
            f"{path} is damaged: not canonical JSON ({error}). {remedy}"
        ) from error
    if payload != sealed:
        raise VerificationError(
            f"{path} is damaged: its content does not have the digest it states. {remedy}"
        )
    if kind is not None and obj.get("kind") != kind:
        raise VerificationError(f"{path} is of kind {obj.get('kind')!r}: expected {kind!r}.")
    return obj


@dataclass(frozen=True)
class FileStart:
    """The first bytes of a file, all of them if it has at most `limit`."""

    payload: bytes
    size: int
    """Of the whole file."""
    limit: int


def read_start(path: Path | str, limit: int) -> FileStart:
    """The first `limit` bytes of a file; OSError when it cannot be read, or is no file."""
    # Opening a pipe would wait for its other end.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        size = status.st_size
        wanted = min(limit, size)
        payload = os.read(fd, wanted)
        while len(payload) < wanted and (more := os.read(fd, wanted - len(payload))):
            payload += more
        return FileStart(payload, size, limit)
    finally:
        os.close(fd)
