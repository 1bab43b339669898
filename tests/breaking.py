"""Faults: files and system calls that break."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


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


def swap(one: Path, two: Path) -> None:
    """Each file gets the other's bytes."""
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)


def raiser(code: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail
