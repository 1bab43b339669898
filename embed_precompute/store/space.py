"""How much may still be written: by the file system, and by the user's quota where it can be read.

Guarantees: never more than what the system says; a limit that cannot be read is no limit. Quotas of
local ext4 and XFS are read from the kernel; those of a network file system show only where it puts
them into `statvfs`, as many do.
Costs: two or three system calls.
"""

from __future__ import annotations

import ctypes
import os
import stat
from dataclasses import dataclass
from pathlib import Path

UNLIMITED = 1 << 63
_GET_QUOTA = 0x800007
_KINDS = {"user": 0, "group": 1}


@dataclass(frozen=True)
class Room:
    """What may still be written below a folder."""

    bytes: int
    files: int
    bytes_limit: str
    """Who sets that limit, for messages."""
    files_limit: str


class _Quota(ctypes.Structure):
    """struct if_dqblk of linux/quota.h; blocks are of 1 KiB, the space used is in bytes."""

    _fields_ = (
        ("block_hard", ctypes.c_uint64),
        ("block_soft", ctypes.c_uint64),
        ("bytes_used", ctypes.c_uint64),
        ("inode_hard", ctypes.c_uint64),
        ("inode_soft", ctypes.c_uint64),
        ("inodes_used", ctypes.c_uint64),
        ("block_time", ctypes.c_uint64),
        ("inode_time", ctypes.c_uint64),
        ("valid", ctypes.c_uint32),
    )


def room_at(root: Path) -> Room:
    """What may be written at `root`, which need not exist yet."""
    folder = root.absolute()
    while not folder.exists():
        folder = folder.parent
    facts = os.statvfs(folder)
    # Without a table of inodes it is 0 of 0, and what FUSE says of a file system that cannot tell
    # its size is 0 of 0 blocks.
    files = facts.f_favail if facts.f_files else UNLIMITED
    free = facts.f_bavail * facts.f_frsize if facts.f_blocks else UNLIMITED
    room = Room(free, files, "the file system", "the file system")
    device = _device_of(folder)
    if device is None:
        return room
    made_in = folder.stat()
    # New files are of the folder's group where it says so, else of ours.
    group = made_in.st_gid if made_in.st_mode & stat.S_ISGID else os.getegid()
    for kind, owner in (("user", os.geteuid()), ("group", group)):
        quota = _read_quota(kind, device, owner)
        if quota is not None:
            room = _lower(room, quota, f"the {kind} quota")
    return room


def _lower(room: Room, quota: _Quota, name: str) -> Room:
    blocks = int(quota.block_hard or quota.block_soft)
    inodes = int(quota.inode_hard or quota.inode_soft)
    free = max(0, blocks * 1024 - int(quota.bytes_used)) if blocks else UNLIMITED
    files = max(0, inodes - int(quota.inodes_used)) if inodes else UNLIMITED
    if free < room.bytes:
        room = Room(free, room.files, name, room.files_limit)
    if files < room.files:
        room = Room(room.bytes, files, room.bytes_limit, name)
    return room


def _device_of(folder: Path) -> str | None:
    """The block device that `folder` is on, or None: a quota is asked for by its device."""
    number = folder.stat().st_dev
    wanted = f"{os.major(number)}:{os.minor(number)}"
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            for line in mounts:
                fields, _, source = line.partition(" - ")
                if fields.split()[2] == wanted:
                    device = source.split()[1]
                    return device if device.startswith("/") else None
    except (OSError, LookupError):
        pass  # no Linux, or no /proc: then no quota is known
    return None


def _read_quota(kind: str, device: str, owner: int) -> _Quota | None:
    """The quota of a user or group on a device; None where there is none we may read."""
    try:
        quotactl = ctypes.CDLL(None, use_errno=True).quotactl
    except (OSError, AttributeError):
        return None
    quota = _Quota()
    command = (_GET_QUOTA << 8) | _KINDS[kind]
    # c_int of a command whose top bit is set
    code = quotactl(
        ctypes.c_int(command), device.encode(), ctypes.c_int(owner), ctypes.byref(quota)
    )
    return quota if code == 0 else None
