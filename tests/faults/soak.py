"""F20: runs under mixed faults, one after another, for as long as it is told."""

from __future__ import annotations

import multiprocessing
import signal
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from jobs import call

from faults.commits import CODES
from faults.hooks import Hook
from faults.kills import UNIT_S
from faults.lab import Finding, Job, Lab, check_seed, first_lines, wait_for
from faults.processes import execute, signal_to, start_gang

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def f20_soak(lab: Lab) -> list[Finding]:
    """Per run some random faults, then an undisturbed run; ten such periods in the long form."""
    periods, seconds = lab.size(1, 10), lab.size(6, 600)
    seeds = [check_seed(lab.seed, f"period {k}") for k in range(periods)]
    folders = [lab.new("f20-period") for _ in range(periods)]
    if lab.jobs == 1:
        outcomes = list(map(_period, folders, seeds, [seconds] * periods))
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(lab.jobs, spawn) as pool:
            outcomes = list(pool.map(_period, folders, seeds, [seconds] * periods))
    problems = [problem for outcome in outcomes for problem in outcome.problems]
    runs, faults = (sum(getattr(o, name) for o in outcomes) for name in ("runs", "faults"))
    return [
        Finding(
            "F20", f"{periods} x {seconds} s of mixed faults, {lab.jobs} at a time", "0 violations",
            f"{runs} runs, {faults} faults, seed {lab.seed}: {len(problems)} wrong "
            f"{first_lines(problems)}",
            not problems,
        )
    ]  # fmt: skip


@dataclass
class _Outcome:
    """What a period found."""

    runs: int = 0
    faults: int = 0
    problems: list[str] = field(default_factory=list)


def _period(folder: Path, seed: int, seconds: int) -> _Outcome:
    """Runs under faults for `seconds`, in a workplace of its own."""
    lab = Lab(folder, seed, long=True)
    outcome = _Outcome()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        job = lab.job("f20")
        history: list[str] = []
        for _ in range(lab.rng.randint(1, 5)):
            history.append(_hurt(lab, job))
            outcome.faults += 1
        code, said = execute("run", str(job.path), log=job.path.with_name("log"))
        wrong = job.wrong(lab.undisturbed(), quarantine=True)
        wrong += [f"exit {code} {said[-300:]}"] * (code != 0)
        outcome.problems += [f"seed {seed}, run {outcome.runs} {history}: {p}" for p in wrong]
        outcome.runs += 1
        if not wrong:
            job.remove()
    return outcome


def _hurt(lab: Lab, job: Job) -> str:
    """One gang with one fault in it; gives what it was."""
    rng = lab.rng
    log = job.path.with_name("log")
    world = rng.randint(1, 4)
    kind = rng.choice(("signal", "agent", "stop", "crash", "power", "error", "damage"))
    hooks_of: dict[int, list[Hook]] = {}
    where = str(job.root.parent)
    if kind in ("crash", "power"):
        # Only with one rank: a power failure in one takes no files from under another.
        world = 1 if kind == "power" else world
        arguments = {"root": where, "n": rng.randrange(700), "power": kind == "power"}
        hooks_of[rng.randrange(world)] = [("die_at", {**arguments, "seed": rng.random()})]
    elif kind == "error":
        step = rng.choice(("open", "pwrite", "fsync", "close", "link", "mkdir"))
        arguments = {
            "root": where,
            "kind": step,
            "n": rng.randrange(150),
            "code": rng.choice(CODES),
        }
        hooks_of[rng.randrange(world)] = [("fail_at", arguments)]
    before = len(job.records())
    gang = start_gang(
        "run", str(job.path), log=log, world=world, max_restarts=rng.choice((0, 0, 1)),
        hooks=[("pace", {"seconds": UNIT_S})], hooks_of=hooks_of,
    )  # fmt: skip
    goal = before + rng.randint(0, 12)
    wait_for(lambda: gang.board.exists(), 10)
    wait_for(lambda: len(job.records()) >= goal or not gang.ranks(), 10)
    time.sleep(rng.uniform(0, 0.3))
    ranks = gang.ranks()
    if kind == "signal" and ranks:
        number = rng.choice(SIGNALS)
        kind = number.name
        signal_to(rng.choice(ranks), number)
    elif kind == "agent":
        signal_to(gang.agent.pid or 0, signal.SIGKILL)
    elif kind == "stop" and ranks:
        rank = rng.choice(ranks)
        signal_to(rank, signal.SIGSTOP)
        time.sleep(rng.uniform(0.1, 1.0))
        signal_to(rank, signal.SIGCONT)
    elif kind == "damage":
        gang.kill()
        _damage(lab, job)
    time.sleep(rng.uniform(0, 0.5))
    gang.kill()
    return f"{kind} of {world}"


def _damage(lab: Lab, job: Job) -> None:
    """Flip a byte of a committed file, then repair."""
    files = [path for path in sorted(job.root.glob("shards/*/shard-*"))]
    if not files:
        return
    path = lab.rng.choice(files)
    payload = bytearray(path.read_bytes())
    payload[lab.rng.randrange(len(payload))] ^= 1 << lab.rng.randrange(8)
    path.write_bytes(payload)
    call("repair", str(job.root))
