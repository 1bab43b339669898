"""What an encoder takes of the device's memory.

Guarantees: on a GPU the figures are those of torch's allocator. On a CPU they are of the process'
resident memory, with what the C library holds back given up first; they waver by some tens of MiB.
None where the kernel does not tell.
Costs: reading /proc.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

MEMORY = Path("/proc/meminfo")
STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def held(device: str) -> int | None:
    """Bytes that are held now; on a CPU without mapped files, which are the weights."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    _trim()
    return _resident("RssAnon")


def growth(device: str, forward: Callable[[], object]) -> int | None:
    """Bytes of memory that `forward` needs at its height beyond what is held before it."""
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        return torch.cuda.max_memory_allocated(device) - before
    _trim()  # else what an earlier forward freed is still resident
    try:
        CLEAR_REFS.write_text("5")  # the height is now what is resident
    except OSError:
        return None
    resident = _resident("VmRSS")
    forward()
    height = _resident("VmHWM")
    if resident is None or height is None:
        return None
    return max(0, height - resident)


def available(device: str) -> int | None:
    """Bytes that may still be taken; None on a GPU, whose allocator says by itself when none are.

    A limit of the process' control group, as of a container, is not looked at.
    """
    if device.startswith("cuda"):
        return None
    return _kib(MEMORY, "MemAvailable")


def _trim() -> None:
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def _resident(name: str) -> int | None:
    return _kib(STATUS, name)


def _kib(path: Path, name: str) -> int | None:
    """Bytes of a line such as `VmRSS: 10 kB`."""
    for line in path.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
