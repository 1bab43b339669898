"""F1, F4, F13, F20: ranks and agents that are killed, stopped or slow; and all faults mixed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

from breaking import flip
from faults.hooks import CODES, Hook
from faults.lab import UNIT_S, Job, Lab, pace
from faults.processes import Gang, signal_to, wait_for
from jobs import call, clean_environment, command


def begun(path: Path) -> list[int]:
    """The units that were begun, by the log of a paced run."""
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


# --- F1 -------------------------------------------------------------------------------------------


def test_f1_ranks_and_agents_are_killed(lab: Lab) -> None:
    """Random ones at random moments; half of the gangs may restart. At most one unit is begun again
    per rank and kill."""
    for _ in range(lab.size(1, 20)):
        job = lab.job(per_shard=1)
        paced = pace(log=str(job.folder / "begun"))
        kills = allowed = finished = 0
        gangs: list[Gang] = []
        while kills < 10 and finished < 3:
            world, restarts = lab.rng.randint(2, 4), lab.rng.choice((0, 0, 1, 2))
            gangs.append(job.gang(world, paced, max_restarts=restarts))
            hit = kill_some(lab, job, gangs[-1], min(10 - kills, restarts + 1))
            kills, allowed = kills + hit, allowed + hit * world
            finished += (job.root / "manifest.json").exists()
        code, said = job.execute(paced)
        assert code == 0, said
        assert kills > 0
        assert all([gang.ended() for gang in gangs]), "orphans go on"
        job.assert_undisturbed()
        assert len(begun(job.folder / "begun")) - job.num_units <= allowed + 4


def kill_some(lab: Lab, job: Job, gang: Gang, count: int) -> int:
    """Kill up to `count` times in one gang, then bring down what is left of it: how many died."""
    kills = 0
    for _ in range(count):
        wait_for(lambda: gang.ranks() or not gang.agent_lives(), 30)
        goal = len(job.records()) + lab.rng.randint(0, 6)
        wait_for(lambda goal=goal: len(job.records()) >= goal or not gang.ranks(), 20)
        time.sleep(lab.rng.uniform(0, 0.3))
        ranks = gang.ranks()
        if not ranks:
            break
        kills += 1
        if lab.rng.random() < 0.2:
            signal_to(gang.group, signal.SIGKILL)
            break
        signal_to(lab.rng.choice(ranks), signal.SIGKILL)
        time.sleep(0.1)
    if not gang.agent_lives() and lab.rng.random() < 0.5:
        return kills  # orphans go on beside the next gang, or end by themselves
    kills += len(gang.all_ranks())
    gang.kill()
    return kills


def test_f1_under_torchrun_itself(lab: Lab) -> None:
    """A rank is killed and --max-restarts starts all again; the long form kills all, too."""
    for trial in range(lab.size(1, 4)):
        job = lab.job()
        first = torchrun(job)
        wait_for(job.records)
        children = ["ps", "--ppid", str(first.pid), "-o", "pid="]
        ranks = subprocess.run(children, capture_output=True, text=True, check=True).stdout
        signal_to(int(lab.rng.choice(ranks.split())), signal.SIGKILL)
        assert first.wait(180) == 0, job.said()
        job.assert_undisturbed()
        if trial == 0:
            continue
        (job.root / "manifest.json").unlink()
        for record in job.records():
            record.unlink()
        second = torchrun(job)
        wait_for(job.records)
        os.killpg(second.pid, signal.SIGKILL)
        second.wait(60)
        job.assert_resumes()


def torchrun(job: Job) -> subprocess.Popen[bytes]:
    with (job.folder / "log").open("w") as log:
        return subprocess.Popen(
            command("run", str(job.path), nproc=2, torchrun=["--max-restarts=1"]),
            env=clean_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


# --- F4, F13 --------------------------------------------------------------------------------------


def test_f4_killed_and_resumed_at_other_world_sizes(lab: Lab) -> None:
    for chain in [(1, 2, 3, 4, 1), (4, 7, 2, 8, 1), (3, 1, 4, 2)][: lab.size(1, 3)]:
        job = lab.job()
        for world in chain[:-1]:
            goal = min(len(job.records()) + 6, 38)
            gang = job.gang(world, pace())
            wait_for(lambda goal=goal, job=job: len(job.records()) >= goal)
            gang.kill()
        assert job.gang(chain[-1]).finish() == 0, job.said()
        job.assert_undisturbed()


def test_f13_the_others_go_on_when_one_rank_stands_still(lab: Lab) -> None:
    job = lab.job()
    gang = job.gang(3, pace(0.1))
    wait_for(lambda: len(job.records()) >= 3 and len(gang.ranks()) == 3)
    stopped = gang.ranks()[1]
    signal_to(stopped, signal.SIGSTOP)
    assert wait_for((job.root / "manifest.json").exists), "the others did not finalise"
    signal_to(stopped, signal.SIGCONT)
    assert gang.finish() == 0, job.said()
    job.assert_undisturbed()


def test_f13_a_slow_rank_gets_fewer_units(lab: Lab) -> None:
    job = lab.job()
    logs = [job.folder / f"begun{rank}" for rank in range(3)]
    # The slow one waits in each unit until 8 more are committed: no clock has a say in that.
    paces = {r: [pace(log=str(log), lag=8 if r == 1 else 0)] for r, log in enumerate(logs)}
    assert job.gang(3, of=paces).finish() == 0, job.said()
    job.assert_undisturbed()
    fast, slow, other = (len(begun(log)) for log in logs)
    assert 2 * slow < fast + other
    # At the end a rank may be at units that another one has, too: one that it encodes, one that is
    # read ahead and one that waits for the writer.
    assert fast + slow + other - job.num_units <= 3 * 3


# --- F20 ------------------------------------------------------------------------------------------

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


def test_f20_mixed_faults_one_after_another(lab: Lab) -> None:
    """Jobs with one to five faults each, then an undisturbed run."""
    for _ in range(lab.size(2, 500)):
        job = lab.job()
        for _ in range(lab.rng.randint(1, 5)):
            hurt(lab, job)
        job.assert_resumes()


def hurt(lab: Lab, job: Job) -> None:
    """One gang with one fault in it; what it was is printed."""
    rng, world = lab.rng, lab.rng.randint(1, 4)
    kind = rng.choice(("signal", "agent", "stop", "crash", "power", "error", "damage"))
    hooks_of: dict[int, list[Hook]] = {}
    where = str(job.folder)
    if kind in ("crash", "power"):
        # Only with one rank: a power failure in one takes no files from under another.
        world = 1 if kind == "power" else world
        die = {"root": where, "n": rng.randrange(700), "power": kind == "power"}
        hooks_of[rng.randrange(world)] = [("die_at", {**die, "seed": rng.random()})]
    elif kind == "error":
        step = rng.choice(("open", "pwrite", "fsync", "close", "link", "mkdir"))
        fail = {"root": where, "kind": step, "n": rng.randrange(150), "code": rng.choice(CODES)}
        hooks_of[rng.randrange(world)] = [("fail_at", fail)]
    print(kind, world, hooks_of)
    goal = len(job.records()) + rng.randint(0, 12)
    gang = job.gang(world, pace(UNIT_S), of=hooks_of, max_restarts=rng.choice((0, 0, 1)))
    wait_for(gang.board.exists, 10)
    wait_for(lambda: len(job.records()) >= goal or not gang.ranks(), 10)
    time.sleep(rng.uniform(0, 0.3))
    ranks = gang.ranks()
    if kind == "signal" and ranks:
        signal_to(rng.choice(ranks), rng.choice(SIGNALS))
    elif kind == "agent":
        signal_to(gang.group, signal.SIGKILL)
    elif kind == "stop" and ranks:
        rank = rng.choice(ranks)
        signal_to(rank, signal.SIGSTOP)
        time.sleep(rng.uniform(0.1, 1.0))
        signal_to(rank, signal.SIGCONT)
    time.sleep(rng.uniform(0, 0.5))
    gang.kill()
    files = sorted(job.root.glob("shards/*/shard-*"))
    if kind == "damage" and files:
        path = rng.choice(files)
        flip(path, rng.randrange(path.stat().st_size))
        call("repair", str(job.root))
