"""F1, F3, F4, F13, F19: processes that are killed, asked to stop, stopped, slowed or orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from jobs import clean_environment, command

from faults.lab import Finding, Job, Lab, first_lines, wait_for
from faults.processes import (
    Gang,
    alive,
    execute,
    finish,
    signal_to,
    start,
    start_gang,
)

UNIT_S = 0.03
"""What a unit takes more in these runs, so that faults meet work."""


def _begun(path: Path) -> Counter[int]:
    """How often each unit was begun."""
    if not path.exists():
        return Counter()
    return Counter(int(line.split()[1]) for line in path.read_text().splitlines())


def f01_sigkill(lab: Lab) -> list[Finding]:
    """Random ranks and agents die at random moments; half of the gangs may restart."""
    least_runs, least_kills, kills_per_run = lab.size(2, 20), lab.size(20, 200), 10
    problems: list[str] = []
    kills: Counter[str] = Counter()
    redone = allowed = 0
    runs = 0
    while runs < least_runs or sum(kills.values()) < least_kills:
        run, runs = runs, runs + 1
        job = lab.job("f01", per_shard=1)
        begun = job.path.with_name("begun")
        pace = ("pace", {"seconds": UNIT_S, "log": str(begun)})
        done, last = 0, 0
        gangs: list[Gang] = []
        while done < kills_per_run and last < 3:
            world = lab.rng.randint(2, 4)
            restarts = lab.rng.choice((0, 0, 1, 2))
            gang = start_gang(
                "run", str(job.path), log=job.path.with_name("log"), world=world,
                max_restarts=restarts, hooks=[pace],
            )  # fmt: skip
            gangs.append(gang)
            hit = _hurt(lab, job, gang, kills_per_run - done, restarts + 1, kills)
            done += hit
            allowed += hit * world
            last += (job.root / "manifest.json").exists()
        code, said = execute("run", str(job.path), log=job.path.with_name("log"), hooks=[pace])
        if code != 0:
            problems.append(f"run {run} ended with {code}: {said[-300:]}")
        problems += [f"run {run}: orphans go on"] * (not all([gang.ended() for gang in gangs]))
        problems += [f"run {run}: {wrong}" for wrong in job.wrong(lab.undisturbed(per_shard=1))]
        extra = sum(_begun(begun).values()) - job.num_units
        redone += extra
        job.remove()
    total = sum(kills.values())
    measured = (
        f"{total} kills ({kills['rank']} ranks, {kills['agent']} agents) in {runs} runs of 2-4 "
        f"ranks: {len(problems)} wrong files; {redone} units begun again, {allowed} allowed "
        f"({redone / max(1, total):.2f} a kill, all ranks together)"
    )
    return [
        Finding(
            "F1", "SIGKILL of random ranks and agents, rerun or --max-restarts",
            "0 lost, 0 twice, same bytes; at most 1 unit redone per rank per kill",
            measured + (f": {first_lines(problems)}" if problems else ""),
            not problems and redone <= allowed + 4 * runs,
        )
    ]  # fmt: skip


def _hurt(lab: Lab, job: Job, gang: Gang, most: int, lives: int, kills: Counter[str]) -> int:
    """Kill up to `lives` times in one gang, then bring down what is left of it."""
    done = 0
    target = len(job.records())
    for _ in range(min(most, lives)):
        wait_for(lambda: gang.ranks() or not alive(gang.agent.pid or 0), 30)
        goal = target + lab.rng.randint(0, 6)
        wait_for(lambda goal=goal: len(job.records()) >= goal or not gang.ranks(), 20)
        time.sleep(lab.rng.uniform(0, 0.3))
        ranks = gang.ranks()
        if not ranks:
            break
        target = len(job.records())
        if lab.rng.random() < 0.2:
            signal_to(gang.agent.pid or 0, signal.SIGKILL)
            kills["agent"] += 1
            done += 1
            break
        signal_to(lab.rng.choice(ranks), signal.SIGKILL)
        kills["rank"] += 1
        done += 1
        time.sleep(0.1)
    orphans = gang.agent.exitcode is None and not alive(gang.agent.pid or 0)
    if orphans and lab.rng.random() < 0.5:
        return done  # they go on beside the next gang, or end by themselves
    for pid in gang.all_ranks():
        signal_to(pid, signal.SIGKILL)
        kills["rank"] += 1
        done += 1
    gang.kill()
    return done


def f01_torchrun(lab: Lab) -> list[Finding]:
    """The same under the real torchrun, whose starts are slow."""
    problems: list[str] = []
    kills = 0
    runs = lab.size(0, 3)
    for run in range(runs):
        job = lab.job(f"f01-torchrun-{run}")
        for attempt in range(2):
            process = subprocess.Popen(
                command("run", str(job.path), nproc=2, torchrun=["--max-restarts=2"]),
                env=clean_environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
            for _ in range(2):
                before = len(job.records())
                wait_for(
                    lambda before=before, process=process, job=job: (
                        len(job.records()) > before or process.poll() is not None
                    )
                )
                listed = _children(process.pid)
                if process.poll() is not None or not listed:
                    break
                signal_to(lab.rng.choice(listed), signal.SIGKILL)
                kills += 1
                time.sleep(0.2)
            if attempt == 0:
                os.killpg(process.pid, signal.SIGKILL)
                kills += 1
            process.wait(180)
        code, said = execute("run", str(job.path), log=job.path.with_name("log"))
        problems += [f"exit {code}: {said[-200:]}"] * (code != 0)
        problems += job.wrong(lab.undisturbed())
        job.remove()
    measured = f"{kills} kills in {runs} runs: {len(problems)} wrong files {first_lines(problems)}"
    return [
        Finding("F1", "the same under torchrun itself", "same bytes", measured, not problems)
    ] * bool(runs)


def _children(pid: int) -> list[int]:
    listed = subprocess.run(
        ["ps", "--ppid", str(pid), "-o", "pid="], capture_output=True, text=True, check=False
    )
    return [int(word) for word in listed.stdout.split()]


def f03_signals(lab: Lab) -> list[Finding]:
    """One signal while units are under way; then two, where the second ends it at once."""
    problems: list[str] = []
    slowest = twice = 0.0
    names = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT")
    for trial in range(lab.size(1, 5)):
        for name in names:
            number = getattr(signal, name)
            job = lab.job("f03", 30)
            pace = ("pace", {"seconds": 0.2})
            log = job.path.with_name("log")
            process = start("run", str(job.path), log=log, hooks=[pace])
            wait_for(lambda job=job: len(job.records()) > 1)
            began = time.monotonic()
            signal_to(process.pid or 0, number)
            code = finish(process, 60)
            slowest = max(slowest, time.monotonic() - began)
            said = log.read_text()
            if code != 75 or "Traceback" in said:
                problems.append(f"{name} {trial}: exit {code} {said[-200:]}")
            problems += [f"{name}: {path} left" for path in job.root.rglob(".tmp-*")]
            code, said = execute("run", str(job.path), log=log)
            problems += [f"{name}: rerun exit {code}"] * (code != 0)
            problems += [f"{name}: {wrong}" for wrong in job.wrong(lab.undisturbed(30))]
            job.remove()
    job = lab.job("f03-twice", 30)
    log = job.path.with_name("log")
    process = start("run", str(job.path), log=log, hooks=[("pace", {"seconds": 30.0})])
    wait_for(lambda: (job.root / "plan.json").exists() and "units are done" in log.read_text())
    time.sleep(1.0)
    signal_to(process.pid or 0, signal.SIGTERM)
    time.sleep(1.0)  # within half a second of when the first is heard of they would be one request
    began = time.monotonic()
    signal_to(process.pid or 0, signal.SIGTERM)
    code = finish(process, 60)
    twice = time.monotonic() - began
    problems += [f"second signal: exit {code} after {twice:.1f} s"] * (twice > 2 or code <= 0)
    gang_problems, gang_s = _gang_stops(lab)
    problems += gang_problems
    return [
        Finding(
            "F3", "SIGTERM, USR1, USR2, INT mid-unit; a second signal; a gang of 3",
            "out in 20 s, exit 75, no temporary file, resume identical; second at once",
            f"slowest {slowest:.2f} s, second signal {twice:.2f} s (exit {code}), gang "
            f"{gang_s:.2f} s; {len(problems)} wrong {first_lines(problems)}",
            not problems and slowest <= 20 and gang_s <= 20,
        )
    ]  # fmt: skip


def _gang_stops(lab: Lab) -> tuple[list[str], float]:
    """SIGTERM to each rank of a gang, as Slurm does."""
    job = lab.job("f03-gang")
    gang = start_gang(
        "run", str(job.path), log=job.path.with_name("log"), world=3,
        hooks=[("pace", {"seconds": 0.2})],
    )  # fmt: skip
    wait_for(lambda: len(job.records()) > 2)
    began = time.monotonic()
    for pid in gang.ranks():
        signal_to(pid, signal.SIGTERM)
    out = wait_for(lambda: not gang.all_ranks(), 40)
    spent = time.monotonic() - began
    gang.kill()
    problems = [f"gang: {path} left" for path in job.root.rglob(".tmp-*")]
    problems += ["gang: a rank did not end"] * (not out)
    code, _ = execute("run", str(job.path), log=job.path.with_name("log"))
    problems += [f"gang: rerun exit {code}"] * (code != 0)
    problems += job.wrong(lab.undisturbed())
    job.remove()
    return problems, spent


def f04_world_sizes(lab: Lab) -> list[Finding]:
    """Each link of the chain is killed at work, and the next one has another world size."""
    chains = [(1, 2, 3, 4, 1)] if not lab.long else [(1, 2, 3, 4, 1), (4, 7, 2, 8, 1), (3, 1, 4, 2)]
    problems: list[str] = []
    for chain in chains:
        job = lab.job("f04")
        log = job.path.with_name("log")
        for world in chain[:-1]:
            before = len(job.records())
            gang = start_gang(
                "run", str(job.path), log=log, world=world,
                hooks=[("pace", {"seconds": UNIT_S})],
            )  # fmt: skip
            wait_for(
                lambda before=before, job=job: len(job.records()) >= min(before + 6, 38), timeout=60
            )
            gang.kill()
        gang = start_gang("run", str(job.path), log=log, world=chain[-1])
        code = gang.finish()
        problems += [f"{chain}: exit {code} {log.read_text()[-200:]}"] * (code != 0)
        problems += [f"{chain}: {wrong}" for wrong in job.wrong(lab.undisturbed())]
        job.remove()
    return [
        Finding(
            "F4", "killed and resumed over world sizes", "same bytes",
            f"chains {chains}: {len(problems)} wrong files {first_lines(problems)}", not problems,
        )
    ]  # fmt: skip


def f13_stopped(lab: Lab) -> list[Finding]:
    """One rank of three stands still; the others do all the rest and finalise."""
    still_s = lab.size(2, 120)
    job = lab.job("f13-stop")
    unit_s = 0.1
    gang = start_gang(
        "run", str(job.path), log=job.path.with_name("log"), world=3,
        hooks=[("pace", {"seconds": unit_s})],
    )  # fmt: skip
    wait_for(lambda: len(job.records()) >= 3 and len(gang.ranks()) == 3)
    stopped = gang.ranks()[1]
    began, left = time.monotonic(), job.num_units - len(job.records())
    signal_to(stopped, signal.SIGSTOP)
    complete = wait_for((job.root / "manifest.json").exists, 100)
    spent = time.monotonic() - began
    time.sleep(max(0.0, still_s - spent))
    signal_to(stopped, signal.SIGCONT)
    code = gang.finish()
    problems = job.wrong(lab.undisturbed()) + [f"exit {code}"] * (code != 0)
    ideal = left * unit_s / 2
    job.remove()
    return [
        Finding(
            "F13", f"SIGSTOP of one rank of three for {still_s} s",
            "the others complete and finalise; exit 0 after SIGCONT",
            f"finalised {spent:.1f} s after the stop (ideal for two ranks {ideal:.1f} s) and "
            f"{'before' if complete else 'NOT before'} SIGCONT; {len(problems)} wrong "
            f"{first_lines(problems)}",
            complete and not problems,
        )
    ]  # fmt: skip


def f13_slow(lab: Lab) -> list[Finding]:
    """One rank is ten times slower; claims give it fewer units."""
    unit_s = 0.4
    job = lab.job("f13-slow")
    log = job.path.with_name("log")
    begun = job.path.with_name("begun")
    fast = [("pace", {"seconds": unit_s, "log": str(begun)})]
    slow = [("pace", {"seconds": unit_s * 10, "log": str(begun)})]
    gang = start_gang(
        "run", str(job.path), log=log, world=3, hooks_of={0: fast, 1: slow, 2: fast}
    )  # fmt: skip
    wait_for(begun.exists)
    began = time.monotonic()
    wait_for(lambda: len(job.records()) == job.num_units - 1)
    spent = time.monotonic() - began
    code = gang.finish()
    problems = job.wrong(lab.undisturbed()) + [f"exit {code}"] * (code != 0)
    ideal = job.num_units * unit_s / 2.1
    twice = sum(_begun(begun).values()) - job.num_units
    job.remove()
    return [
        Finding(
            "F13", "one rank of three ten times slower", "makespan within 1.3 of ideal",
            f"{spent:.2f} s, ideal {ideal:.2f} s: {spent / ideal:.2f}; {twice} units twice; "
            f"{len(problems)} wrong {first_lines(problems)}",
            spent <= 1.3 * ideal and not problems,
        )
    ]  # fmt: skip


def f19_orphans(lab: Lab) -> list[Finding]:
    """The agent dies: its workers must notice. And a run without standard streams."""
    limit = 30.0
    job = lab.job("f19")
    gang = start_gang(
        "run", str(job.path), log=job.path.with_name("log"), world=2,
        hooks=[("pace", {"seconds": 3.0})],
    )  # fmt: skip
    wait_for(lambda: len(gang.ranks()) == 2 and (job.root / "plan.json").exists())
    wait_for(lambda: len(list(job.root.rglob("null*"))) > 0, 30)
    began = time.monotonic()
    signal_to(gang.agent.pid or 0, signal.SIGKILL)
    ended = wait_for(lambda: not gang.all_ranks(), limit + 15, 0.05)
    spent = time.monotonic() - began
    gang.kill()
    job.remove()
    closed = lab.job("f19-closed", 12)
    code, _ = execute(
        "run", str(closed.path), log=closed.path.with_name("log"),
        hooks=[("close_standard_streams", {})],
    )  # fmt: skip
    problems = closed.wrong(lab.undisturbed(12)) + [f"exit {code}"] * (code != 0)
    return [
        Finding(
            "F19", "agent SIGKILLed under two ranks", "workers end within 30 s",
            f"ended after {spent:.1f} s" if ended else f"alive after {spent:.0f} s",
            ended and spent <= limit,
        ),
        Finding(
            "F19", "stdin and stdout closed", "run completes, same bytes",
            f"exit {code}, {len(problems)} wrong {first_lines(problems)}", not problems,
        ),
    ]  # fmt: skip
