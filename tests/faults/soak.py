"""F20: runs under mixed faults, one after another, for as long as it is told."""

from __future__ import annotations

import signal
import time

from jobs import call

from faults.commits import CODES
from faults.hooks import Hook
from faults.kills import UNIT_S
from faults.lab import Finding, Job, Lab, first_lines, wait_for
from faults.processes import execute, signal_to, start_gang

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def f20_soak(lab: Lab) -> list[Finding]:
    """Per run some random faults, then an undisturbed run; ten such periods in the long form."""
    periods, seconds = lab.size(1, 10), lab.size(6, 600)
    problems: list[str] = []
    runs = faults = 0
    for _ in range(periods):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            job = lab.job("f20")
            history: list[str] = []
            for _ in range(lab.rng.randint(1, 5)):
                history.append(_hurt(lab, job))
                faults += 1
            code, said = execute("run", str(job.path), log=job.path.with_name("log"))
            wrong = job.wrong(lab.undisturbed(), quarantine=True)
            wrong += [f"exit {code} {said[-300:]}"] * (code != 0)
            problems += [f"run {runs} {history}: {p}" for p in wrong]
            runs += 1
            job.remove()
    return [
        Finding(
            "F20", f"{periods} x {seconds} s of mixed faults", "0 violations",
            f"{runs} runs, {faults} faults, seed {lab.seed}: {len(problems)} wrong "
            f"{first_lines(problems)}",
            not problems,
        )
    ]  # fmt: skip


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
    wait_for(lambda: len(job.records()) >= goal or (not gang.ranks() and before != 0), 10)
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
