"""Faults: files and system calls that break."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest


def flip(path: Path, offset: int = -1) -> None:
    """Changes one bit of a file."""
    payload = bytearray(path.read_bytes())
    payload[offset] ^= 1
    path.write_bytes(payload)


def flips(path: Path, payload: bytes, bits: Iterable[int]) -> Iterator[int]:
    """`path` with one bit of `payload` flipped, for each of `bits`."""
    path.write_bytes(payload)
    with path.open("r+b", buffering=0) as file:
        for bit in bits:
            os.pwrite(file.fileno(), bytes([payload[bit // 8] ^ 1 << bit % 8]), bit // 8)
            yield bit
            os.pwrite(file.fileno(), payload[bit // 8 : bit // 8 + 1], bit // 8)


def raiser(code: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def fail_at(patch: pytest.MonkeyPatch, name: str, n: int) -> list[int]:
    """The n-th call of os.<name> finds the disk full; below 0 once that has happened."""
    original, left = getattr(os, name), [n]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    patch.setattr(os, name, call)
    return left
