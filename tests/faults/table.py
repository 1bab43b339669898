"""All checks, in the order of the table."""

from __future__ import annotations

from collections.abc import Callable

from faults import commits, cost, damage, errors, hostile, kills, loading, peers, soak
from faults.lab import Finding, Lab

CHECKS: tuple[Callable[[Lab], list[Finding]], ...] = (
    kills.f01_sigkill,
    kills.f01_torchrun,
    commits.f02_every_step,
    commits.f02_run,
    kills.f03_signals,
    kills.f04_world_sizes,
    damage.f05_bits,
    damage.f05_verify,
    damage.f06_damage,
    damage.f06_run,
    commits.f07_errors,
    commits.f07_run,
    commits.f07_tmpfs,
    peers.f08_two_jobs,
    peers.f09_another_spec,
    peers.f09_input,
    damage.f10_torn,
    peers.f11_clocks,
    peers.f12_late,
    kills.f13_stopped,
    kills.f13_slow,
    errors.f14_poison,
    errors.f14_raises,
    hostile.f15_hostile,
    commits.f16_order,
    commits.f17_umask,
    loading.f18_loader,
    kills.f19_orphans,
    soak.f20_soak,
    cost.cost_integrity,
    cost.cost_run_ram,
    cost.cost_run_disk,
)
