"""F2, F7, F16, F17: a commit cut short or refused at every step, its order, its modes."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import stat
import traceback
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from handmade import write_units
from jobs import dataset_bytes

from embed_precompute.errors import StorageError
from embed_precompute.store.manifest import finalize
from faults.hooks import Hook, failing, install
from faults.lab import Finding, Lab, first_lines
from faults.processes import execute, finish, launch

TEXTS = ["one", "two words", None, "nan"]
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
KINDS = ("open", "pwrite", "fsync", "close", "link", "replace", "mkdir")


def _write(root: str) -> None:
    """Plan, null embedding, units and finalize, as a run commits them, without encoders."""
    write_units(Path(root), TEXTS, samples_per_shard=2)
    finalize(Path(root))


def _write_with(root: str, hooks: list[Hook]) -> None:
    install(hooks)
    _write(root)
    os._exit(0)


def f02_every_step(lab: Lab) -> list[Finding]:
    """SIGKILL, and a power failure, at every step of plan, shard, rows, record, index, root."""
    whole = lab.new("f02-whole", ram=True)
    _write(str(whole))
    expected = dataset_bytes(whole)
    findings = []
    for powers in ((False,), (True,)) if lab.long else ((False, True),):
        problems: list[str] = []
        steps = 0
        for n in count():
            root = lab.new("f02", ram=True)
            power = powers[n % len(powers)]
            hook = ("die_at", {"root": str(root), "n": n, "power": power, "seed": lab.seed + n})
            code = finish(launch(_write_with, str(root), [hook]))
            if code == 0:
                break
            steps += 1
            if code != -9:
                problems.append(f"step {n}: exit {code}")
            problems += [f"step {n}: {p}" for p in _recovers(root, expected)]
            shutil.rmtree(root)
        names = {False: "SIGKILL, torn write", True: "power failure (what was not fsynced is lost)"}
        name = " or ".join(names[power] for power in powers)
        findings.append(
            Finding(
                "F2", f"{name} at every step of every commit", "all recover by the same command",
                f"{steps} steps: {len(problems)} did not recover {first_lines(problems)}",
                not problems and steps > 50,
            )
        )  # fmt: skip
    return findings


def _recovers(root: Path, expected: dict[str, bytes]) -> list[str]:
    try:
        _write(str(root))
    except Exception:
        return [traceback.format_exc()[-400:]]
    found = dataset_bytes(root)
    names = found.keys() ^ expected.keys()
    return [f"{sorted(names) or 'other bytes'}"] if found != expected else []


def f02_run(lab: Lab) -> list[Finding]:
    """The same through `run`: every step in the long form, every 23rd in the short one."""
    rows = 6
    problems: list[str] = []
    died = 0
    for n in count(lab.rng.randint(0, 20) if not lab.long else 0, lab.size(23, 1)):
        job = lab.job("f02-run", rows)
        log = job.path.with_name("log")
        power = bool(n % 2)
        where = str(job.root.parent)  # the name of the dataset's folder may be lost, too
        hook = ("die_at", {"root": where, "n": n, "power": power, "seed": lab.seed + n})
        code, _ = execute("run", str(job.path), log=log, hooks=[hook])
        if code == 0:
            break
        died += 1
        code, said = execute("run", str(job.path), log=log)
        problems += [f"step {n}: exit {code} {said[-300:]}"] * (code != 0)
        problems += [f"step {n}: {wrong}" for wrong in job.wrong(lab.undisturbed(rows))]
        job.remove()
    return [
        Finding(
            "F2", "SIGKILL and power failure in turn, through run", "all recover by a rerun",
            f"{died} steps of a run: {len(problems)} wrong {first_lines(problems)}",
            not problems and died > 3,
        )
    ]  # fmt: skip


def f07_errors(lab: Lab) -> list[Finding]:
    """The n-th call of each kind fails, for all n, in this process."""
    whole = lab.new("f07-whole", ram=True)
    _write(str(whole))
    expected = dataset_bytes(whole)
    problems: list[str] = []
    failures = survived = 0
    for kind in KINDS:
        for n in count():
            code = CODES[n % len(CODES)]
            root = lab.new("f07", ram=True)
            steps = failing(str(root), kind, n, code)
            steps.install()
            try:
                _write(str(root))
                survived += 1
            except StorageError as error:
                said = str(error)
                if errno.errorcode[code] not in said or str(root) not in said:
                    problems.append(f"{kind} {n}: {said}")
                if kind == "pwrite" and "needs" not in said:
                    problems.append(f"{kind} {n} names no bytes: {said}")
            except Exception as error:
                problems.append(f"{kind} {n} {errno.errorcode[code]}: {error!r}")
            finally:
                steps.remove()
            problems += [f"{kind} {n}: {path.name} left" for path in root.rglob(".tmp-*")]
            problems += [f"{kind} {n}: rerun {p}" for p in _recovers(root, expected)]
            if steps.seen[0] <= n:  # type: ignore[attr-defined]
                survived -= 1
                break
            failures += 1
    names = ", ".join(errno.errorcode[code] for code in CODES)
    return [
        Finding(
            "F7", f"{names} at every create, write, fsync, close, link, rename, mkdir",
            "StorageError (exit 74) naming path and bytes; resumes; no bad unit",
            f"{failures} failures ({survived} of them harmless): {len(problems)} wrong "
            f"{first_lines(problems)}",
            not problems and failures > 50,
        )
    ]  # fmt: skip


def f07_run(lab: Lab) -> list[Finding]:
    """Through `run`: the disk fills up at the n-th write and stays full; then there is space."""
    rows = 6
    problems: list[str] = []
    tried = 0
    for kind, n in _run_cases(lab):
        job = lab.job("f07-run", rows)
        log = job.path.with_name("log")
        code = CODES[n % len(CODES)]
        hook = ("fail_at", {"root": str(job.root), "kind": kind, "n": n, "code": code})
        hook[1]["lasting"] = True
        result, said = execute("run", str(job.path), log=log, hooks=[hook])
        tried += 1
        if result == 0:
            problems += [f"{kind} {n}: {w}" for w in job.wrong(lab.undisturbed(rows))]
        elif result != 74 or "Traceback" in said or str(job.root) not in said:
            problems.append(f"{kind} {n} {errno.errorcode[code]}: exit {result}: {said[-500:]}")
        result, said = execute("run", str(job.path), log=log)
        problems += [f"{kind} {n}: rerun exit {result} {said[-300:]}"] * (result != 0)
        problems += [f"{kind} {n}: {wrong}" for wrong in job.wrong(lab.undisturbed(rows))]
        job.remove()
    return [
        Finding(
            "F7", "the same through run, lasting from the n-th call on",
            "exit 74 naming the path; the next run goes on to the same bytes",
            f"{tried} runs: {len(problems)} wrong {first_lines(problems)}", not problems,
        )
    ]  # fmt: skip


def _run_cases(lab: Lab) -> Iterator[tuple[str, int]]:
    for kind in ("pwrite", "fsync", "close", "link"):
        yield from ((kind, n) for n in (range(0, 60, 2) if lab.long else (lab.rng.randint(0, 25),)))


def f07_tmpfs(lab: Lab) -> list[Finding]:
    """A real small tmpfs, in a mount namespace of its own; enlarged, the run goes on."""
    rows = 30
    whole = sum(map(len, lab.undisturbed(rows).values()))
    sizes = [s << 10 for s in (lab.size(64, 16), *range(96, 4 * whole >> 10, lab.size(160, 32)))]
    problems: list[str] = []
    full = 0
    for size in sizes:
        job = lab.job("f07-tmpfs", rows)
        report = job.path.with_name("report")
        log = job.path.with_name("log")
        finish(launch(_in_tmpfs, str(job.path), str(job.root), size, str(log), str(report)))
        outcome = json.loads(report.read_text()) if report.exists() else {"error": "no report"}
        if "error" in outcome:
            return [Finding("F7", "a real small tmpfs", "exit 74, resumes", outcome["error"], None)]
        full += outcome["first"] == 74
        said = outcome["said"]
        if outcome["first"] not in (0, 74) or "Traceback" in said:
            problems.append(f"{size} bytes: exit {outcome['first']} {said[-400:]}")
        if outcome["first"] == 74 and "bytes" not in said:
            problems.append(f"{size} bytes: {said[-300:]}")
        if outcome["second"] != 0 or outcome["wrong"]:
            problems.append(f"{size} bytes, resumed: {outcome}")
    return [
        Finding(
            "F7", f"a real tmpfs of {sizes[0] >> 10} to {sizes[-1] >> 10} KiB, then enlarged",
            "exit 74 with the bytes needed; resumes to the same bytes",
            f"{len(sizes)} sizes, {full} too small: {len(problems)} wrong {first_lines(problems)}",
            not problems and full > 0,
        )
    ]  # fmt: skip


def _in_tmpfs(job: str, root: str, size: int, log: str, report: str) -> None:
    """Runs in a child: mounts, runs, enlarges, runs; leaves JSON in `report`."""
    from embed_precompute.cli.main import main

    libc = ctypes.CDLL(None, use_errno=True)
    new_user, new_mounts, remount = 0x10000000, 0x00020000, 32
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(new_user | new_mounts) != 0:
        why = os.strerror(ctypes.get_errno())
        Path(report).write_text(json.dumps({"error": f"no mount namespace here: {why}"}))
        os._exit(0)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
    Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
    os.mkdir(root)
    options = f"size={size},mode=777".encode()
    if libc.mount(b"tmpfs", root.encode(), b"tmpfs", 0, options) != 0:
        why = os.strerror(ctypes.get_errno())
        Path(report).write_text(json.dumps({"error": f"no tmpfs here: {why}"}))
        os._exit(0)
    sink = os.open(log, os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    first = main(["run", job])
    said = Path(log).read_text()
    libc.mount(b"tmpfs", root.encode(), b"tmpfs", remount, b"size=64m")
    second = main(["run", job])
    # The parent's undisturbed bytes do not fit in an argument; digests do for both.
    wrong = [str(path) for path in Path(root).rglob(".tmp-*")]
    from embed_precompute.audit.verify import verify

    wrong += verify(Path(root)).problems
    outcome = {"first": first, "second": second, "said": said, "wrong": wrong}
    Path(report).write_text(json.dumps(outcome))
    os._exit(0)


def f16_order(lab: Lab) -> list[Finding]:
    """Every name that a run publishes: writes < fsync(file) < close < link < fsync(folder)."""
    job = lab.job("f16", 30)
    trace = job.path.with_name("trace")
    hook = ("trace", {"root": str(job.root.parent), "path": str(trace)})
    code, said = execute("run", str(job.path), log=job.path.with_name("log"), hooks=[hook])
    assert code == 0, said
    calls = [tuple(line.split("\t")) for line in trace.read_text().splitlines()]
    problems, published = _out_of_order(calls)
    made = {
        str(path) for path in job.root.rglob("*") if path.is_file() and "logs" not in path.parts
    }
    problems += [f"{name} was not published by a commit" for name in sorted(made - published)]
    return [
        Finding(
            "F16", "every system call of a run's commits, in order",
            "write < fsync(file) < close < link or rename < fsync(folder) for every file",
            f"{len(published)} files, {len(calls)} calls: {len(problems)} out of order "
            f"{first_lines(problems)}",
            not problems,
        )
    ]  # fmt: skip


def _out_of_order(calls: list[tuple[str, ...]]) -> tuple[list[str], set[str]]:
    problems: list[str] = []
    published: set[str] = set()
    for at, (name, subject, target) in enumerate(calls):
        if name not in ("link", "rename", "replace") or "_quarantine" in target:
            continue
        published.add(target)
        last: dict[str, int] = {}
        for i, call in enumerate(calls[:at]):
            if call[1] == subject:
                last[call[0]] = i
        order = [last.get(step, -1) for step in ("pwrite", "fsync", "close")]
        if -1 in order or order != sorted(order):
            problems.append(f"{target}: {sorted(last, key=lambda step: last[step])} before {name}")
        folder = os.path.dirname(target)
        later = {call[1] for call in calls[at:] if call[0] == "fsync"}
        if folder not in later:
            problems.append(f"{target}: its folder is never fsynced")
    for at, (name, subject, _) in enumerate(calls):
        if (
            name == "mkdir"
            and Path(subject).name != "logs"
            and not any(call[:2] == ("fsync", os.path.dirname(subject)) for call in calls[at:])
        ):
            problems.append(f"{subject}: made, and its parent is never fsynced")
    return problems, published


def f17_umask(lab: Lab) -> list[Finding]:
    """Modes of every file and folder under three umasks."""
    problems: list[str] = []
    files = 0
    for mask in (0o022, 0o002, 0o077):
        job = lab.job("f17", 6)
        code, said = execute(
            "run", str(job.path), log=job.path.with_name("log"), hooks=[("umask", {"mask": mask})]
        )
        assert code == 0, said
        for path in [job.root, *job.root.rglob("*")]:
            files += 1
            found = stat.S_IMODE(path.stat().st_mode)
            wanted = (0o777 if path.is_dir() else 0o666) & ~mask
            if found != wanted:
                problems.append(f"{path.name}: {found:o}, expected {wanted:o}")
    return [
        Finding(
            "F17", "umask 022, 002, 077", "modes follow the umask",
            f"{files} files and folders: {len(problems)} other modes {first_lines(problems)}",
            not problems,
        )
    ]  # fmt: skip
