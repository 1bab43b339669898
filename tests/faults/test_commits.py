"""F2, F7, F16, F17: a commit cut short or refused at every step, its order, its modes."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from faults.hooks import CODES, failing, install
from faults.lab import Lab, assert_same
from faults.processes import finish, fork, launch
from handmade import write_units
from jobs import dataset_bytes

from embed_precompute.audit.verify import verify
from embed_precompute.cli.main import main
from embed_precompute.errors import StorageError
from embed_precompute.store.manifest import finalize

TEXTS = ["one", "two words", None, "nan"]


def write(root: Path) -> None:
    """Plan, null embedding, units and finalize, as a run commits them, without encoders."""
    write_units(root, TEXTS, samples_per_shard=2)
    finalize(root)


def write_and_die(root: Path, die: dict[str, Any]) -> None:
    install([("die_at", die)])
    write(root)


@pytest.fixture
def whole(lab: Lab) -> dict[str, bytes]:
    root = lab.new()
    write(root)
    return dataset_bytes(root)


# --- F2 -------------------------------------------------------------------------------------------


def test_f2_killed_at_every_step(lab: Lab, whole: dict[str, bytes]) -> None:
    """SIGKILL, and a power failure, at every step of plan, shard, rows, record, index and root; in
    the short form one of the two."""
    for powers in ((False,), (True,)) if lab.long else ((False, True),):
        for n in count():
            root = lab.new()
            die = {"root": str(root), "n": n, "power": powers[n % len(powers)], "seed": n}
            code = os.waitstatus_to_exitcode(os.waitpid(fork(write_and_die, root, die), 0)[1])
            if code == 0:
                break
            assert code == -9
            write(root)
            assert_same(dataset_bytes(root), whole)
            shutil.rmtree(root)
        assert n > 50


def test_f2_killed_at_a_step_of_a_run(lab: Lab) -> None:
    for n in count(lab.rng.randint(0, 20), lab.size(23, 1)):
        job = lab.job(6)
        # The name of the dataset's folder may be lost, too.
        die = {"root": str(job.folder), "n": n, "power": bool(n % 2), "seed": n}
        code, _ = job.execute(("die_at", die))
        if code == 0:
            break
        assert code == -9
        job.assert_resumes()
    assert n > 150


# --- F7 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["open", "pwrite", "fsync", "close", "link", "replace", "mkdir"])
def test_f7_every_call_fails_once(kind: str, lab: Lab, whole: dict[str, bytes]) -> None:
    """A StorageError (exit 74) names path and bytes; then the same command goes on."""
    for n in count():
        root, code = lab.new(), CODES[n % len(CODES)]
        steps, failed = failing(str(root), kind, n, code)
        said = None
        steps.install()
        try:
            write(root)
        except StorageError as error:
            said = str(error)
        finally:
            steps.remove()
        assert said is None or (errno.errorcode[code] in said and str(root) in said), said
        if kind in ("pwrite", "link"):
            assert said is None or "needs" in said, "it names no bytes"
        assert not list(root.rglob(".tmp-*"))
        write(root)
        assert_same(dataset_bytes(root), whole)
        if not failed():
            break
        shutil.rmtree(root)
    assert n > 1


@pytest.mark.parametrize("kind", ["pwrite", "fsync", "close", "link"])
def test_f7_a_run_on_a_disk_that_stays_full(kind: str, lab: Lab) -> None:
    for n in range(0, 60, 2) if lab.long else (lab.rng.randint(0, 25),):
        job, code = lab.job(6), CODES[n % len(CODES)]
        fail = {"root": str(job.root), "kind": kind, "n": n, "code": code, "lasting": True}
        result, said = job.execute(("fail_at", fail))
        if result != 0:
            assert result == 74, said
            assert str(job.root) in said
            assert "Traceback" not in said
        job.assert_resumes()


def test_f7_a_run_on_a_real_small_disk(lab: Lab) -> None:
    """A tmpfs in a mount namespace of its own: exit 74 naming the bytes; enlarged, it goes on."""
    whole = sum(map(len, lab.job(30).undisturbed.values()))
    sizes = (s << 10 for s in (lab.size(64, 16), *range(96, 4 * whole >> 10, lab.size(200, 32))))
    codes = []
    for size in sizes:
        job = lab.job(30)
        report = job.folder / "report"
        finish(launch(run_in_tmpfs, str(job.path), str(job.root), size, str(report)))
        outcome = json.loads(report.read_text())
        if "missing" in outcome:
            pytest.skip(outcome["missing"])
        codes.append(outcome["first"])
        assert outcome["first"] in (0, 74), outcome
        assert outcome["first"] == 0 or "bytes" in outcome["said"]
        assert "Traceback" not in outcome["said"]
        assert (outcome["second"], outcome["problems"]) == (0, []), outcome
    assert 74 in codes


def run_in_tmpfs(job: str, root: str, size: int, report: str) -> None:
    """Runs in a child: mounts, runs, enlarges, runs; leaves JSON in `report`."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, remount = 0x10000000, 0x00020000, 32
    uid, gid = os.getuid(), os.getgid()

    def done(**outcome: object) -> None:
        Path(report).write_text(json.dumps(outcome))
        os._exit(0)

    if libc.unshare(new_user | new_mounts) != 0:
        done(missing=f"no mount namespace here: {os.strerror(ctypes.get_errno())}")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    os.mkdir(root)
    options = f"size={size},mode=777".encode()
    if libc.mount(b"tmpfs", root.encode(), b"tmpfs", 0, options) != 0:
        done(missing=f"no tmpfs here: {os.strerror(ctypes.get_errno())}")
    log = Path(report).with_name("log")
    sink = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    first = main(["run", job])
    said = log.read_text()
    libc.mount(b"tmpfs", root.encode(), b"tmpfs", remount, b"size=64m")
    second = main(["run", job])
    problems = [str(path) for path in Path(root).rglob(".tmp-*")] + verify(Path(root)).problems
    done(first=first, second=second, said=said, problems=problems)


# --- F16, F17 -------------------------------------------------------------------------------------


def test_f16_the_order_of_every_commit_of_a_run(lab: Lab) -> None:
    """write < fsync(file) < close < link or rename < fsync(folder), for every file."""
    job = lab.job(30)
    trace = job.folder / "trace"
    code, said = job.execute(("trace", {"root": str(job.folder), "path": str(trace)}))
    assert code == 0, said
    calls = [tuple(line.split("\t")) for line in trace.read_text().splitlines()]
    published = set()
    for at, (name, path, target) in enumerate(calls):
        synced_later = {call[1] for call in calls[at:] if call[0] == "fsync"}
        if name == "mkdir" and Path(path).name != "logs":
            assert os.path.dirname(path) in synced_later
        if name in ("link", "rename", "replace"):
            published.add(target)
            last = {call[0]: i for i, call in enumerate(calls[:at]) if call[1] == path}
            order = [last[step] for step in ("pwrite", "fsync", "close")]
            assert order == sorted(order), f"{target}: {last} before {name}"
            assert os.path.dirname(target) in synced_later, f"{target}: folder is never fsynced"
    files = {str(path) for path in job.root.rglob("*") if path.is_file()}
    assert {name for name in files - published if "/logs/" not in name} == set()


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_f17_modes_follow_the_umask(umask: int, lab: Lab) -> None:
    job = lab.job(6)
    code, said = job.execute(("umask", {"mask": umask}))
    assert code == 0, said
    for path in [job.root, *job.root.rglob("*")]:
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
