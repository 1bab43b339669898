"""All checks, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable

from faults import commits, kills
from faults.lab import Finding, Lab

CHECKS: tuple[Callable[[Lab], list[Finding]], ...] = (
    kills.f01_sigkill,
    kills.f01_torchrun,
    commits.f02_every_step,
    commits.f02_run,
    kills.f03_signals,
    kills.f04_world_sizes,
    commits.f07_errors,
    commits.f07_run,
    commits.f07_tmpfs,
    kills.f13_stopped,
    kills.f13_slow,
    commits.f16_order,
    commits.f17_umask,
    kills.f19_orphans,
)
