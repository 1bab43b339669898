"""F5, F6, F10: flipped bits, cut, swapped, foreign and missing files, torn small files."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from breaking import flips
from handmade import paths_of, write_dataset, write_units
from jobs import call, dataset_bytes

from embed_precompute.audit.repair import repair
from embed_precompute.audit.verify import verify
from embed_precompute.errors import VerificationError
from embed_precompute.store.check import check_digest
from embed_precompute.store.commit import StoredFile
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import read_json, read_record, record_path
from faults.lab import Finding, Lab, first_lines

LONG_TEXT = " ".join(f"word{i}" for i in range(42))
TEXTS = [f"{LONG_TEXT} {i}" for i in range(96)]
"""One shard of them has a little over 32 KiB."""
FEW = ["one", "two words", None, "three more words", "one", "nan", "last of all"]


def f05_bits(lab: Lab) -> list[Finding]:
    """Each bit, through the function by which verify compares a file with its digest."""
    root = lab.new("f05", ram=True)
    manifest = write_dataset(root, TEXTS, samples_per_shard=len(TEXTS))
    paths, named = paths_of(root, 0), read_record(root, 0).files
    files = {paths.shard: named.shard, paths.rows: named.rows}
    files |= {
        root / name: StoredFile(name, entry.bytes, entry.sha256)
        for name, entry in manifest.files.items()
        if name.startswith("index/") or name == "manifest.parquet"
    }
    stride = lab.size(3, 1)
    missed: list[str] = []
    cases = 0
    for path, entry in files.items():
        payload = path.read_bytes()
        for bit in flips(path, payload, range(0, len(payload) * 8, stride)):
            cases += 1
            try:
                check_digest(path, entry)
                missed.append(f"{path.name} bit {bit}")
            except VerificationError:
                continue
    shard_bytes = paths.shard.stat().st_size
    for path in (root / "plan.json", root / "null.json", paths.record, root / "manifest.json"):
        payload = path.read_bytes()
        for bit in flips(path, payload, range(len(payload) * 8)):
            cases += 1
            try:
                read_json(path)
                missed.append(f"{path.name} bit {bit}")
            except VerificationError:
                continue
    return [
        Finding(
            "F5", f"each {'' if stride == 1 else 'third '}bit of a {shard_bytes}-byte shard, rows "
            "part, index and manifest.parquet; each bit of every JSON",
            "100 % detected", f"{cases - len(missed)} of {cases} {first_lines(missed)}",
            not missed and shard_bytes >= 32768,
        )
    ]  # fmt: skip


def f05_verify(lab: Lab) -> list[Finding]:
    """Random bits of all files through the whole of verify, and clean verifications."""
    root = lab.new("f05-verify", ram=True)
    write_dataset(root, FEW)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    missed: list[str] = []
    tries = lab.size(150, 10_000)
    for _ in range(tries):
        path = lab.rng.choice(files)
        payload = path.read_bytes()
        for bit in flips(path, payload, [lab.rng.randrange(len(payload) * 8)]):
            if not any(path.name in line for line in verify(root).problems):
                missed.append(f"{path.name} bit {bit}")
    runs = lab.size(50, 1000)
    alarms = [line for _ in range(runs) for line in verify(root).problems]
    return [
        Finding(
            "F5", "random bits of any file, the whole verify", "100 % detected and named",
            f"{tries - len(missed)} of {tries} {first_lines(missed)}", not missed,
        ),
        Finding(
            "F5", "verify of an undamaged dataset", "0 false alarms",
            f"{len(alarms)} in {runs} runs", not alarms,
        ),
    ]  # fmt: skip


Damage = tuple[str, str, Callable[[Path], None]]


def f06_damage(lab: Lab) -> list[Finding]:
    """Each damage is named by verify; repair opens its unit only; the rest is made again."""
    whole = lab.new("f06-whole", ram=True)
    write_dataset(whole, FEW)
    expected = dataset_bytes(whole)
    other = lab.new("f06-foreign", ram=True)
    write_dataset(other, ["uno", *FEW[1:]])
    problems: list[str] = []
    cases = 0
    for what, named, damage in _damages(whole, other, lab):
        root = lab.new("f06", ram=True)
        shutil.copytree(whole, root, dirs_exist_ok=True)
        damage(root)
        cases += 1
        found = verify(root).problems
        unit = named[:12] if named.startswith("shard-") else named.partition(".")[0]
        gone = what == "delete" and named == "manifest.json"  # then it is not finalised
        if not gone and not any(unit in line for line in found):
            problems.append(f"{what} of {named}: not named in {found[:2]}")
        problems += [f"{what} of {named}: {p}" for p in _mends(root, expected, named)]
        shutil.rmtree(root)
    return [
        Finding(
            "F6", "cut at every 512 B, append, zero 4 KiB, swap, foreign, delete, of every file",
            "100 % detected and named; repair opens just those units; same bytes again",
            f"{cases} damages: {len(problems)} wrong {first_lines(problems)}", not problems,
        )
    ]  # fmt: skip


def _mends(root: Path, expected: dict[str, bytes], named: str) -> list[str]:
    unit = int(named[6:12]) if named.startswith("shard-") else None
    if unit is not None and not record_path(root, unit).exists():
        unit = None  # it is open already
    done = repair(root)
    wrong = []
    if unit is not None and unit not in done.opened:
        wrong.append(f"repair opened {done.opened}, not {unit}")
    if len(done.opened) > 2 or (unit is None and done.opened and named != "plan.json"):
        wrong.append(f"repair opened {done.opened}")
    write_units(root, FEW)  # what is there already stays
    finalize(root)
    found = {k: v for k, v in dataset_bytes(root).items() if not k.startswith("_quarantine")}
    if found != expected:
        differing = sorted(name for name in expected if found.get(name) != expected[name])
        wrong.append(f"not the same bytes again: {differing}")
    return wrong


def _damages(whole: Path, other: Path, lab: Lab) -> Iterator[Damage]:
    files = [path for path in sorted(whole.rglob("*")) if path.is_file()]
    for path in files:
        name = path.relative_to(whole)
        size = path.stat().st_size
        for end in range(0, size, 512):
            yield f"cut at {end}", path.name, lambda root, n=name, e=end: _rewrite(root / n, e)
        yield "append", path.name, lambda root, n=name: _append(root / n)
        for begin in range(0, size, 4096):
            payload = path.read_bytes()
            if any(payload[begin : begin + 4096]):
                yield "zero", path.name, lambda root, n=name, b=begin: _zero(root / n, b)
        yield "delete", path.name, lambda root, n=name: (root / n).unlink()
        # The other dataset's file in the same place; data files have other names there.
        place = re.sub(r"-[0-9a-f]{16}\.", "-*.", str(name))
        for foreign in other.glob(place):
            if foreign.read_bytes() != path.read_bytes():
                yield "foreign", path.name, lambda root, f=foreign, n=name: shutil.copy(f, root / n)
    first, second = (paths_of(whole, unit) for unit in (0, 1))
    for one, two in zip(first, second, strict=True):
        names = [str(path.relative_to(whole)) for path in (one, two)]
        yield "swap", one.name, lambda root, n=names: _swap(root, *n)


def _rewrite(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:end])


def _append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def _zero(path: Path, begin: int) -> None:
    payload = bytearray(path.read_bytes())
    end = min(begin + 4096, len(payload))
    payload[begin:end] = bytes(end - begin)
    path.write_bytes(payload)


def _swap(root: Path, one: str, two: str) -> None:
    spare = root / "spare"
    (root / one).rename(spare)
    (root / two).rename(root / one)
    spare.rename(root / two)


def f06_run(lab: Lab) -> list[Finding]:
    """Through the program: run, damage, verify, repair, run."""
    rows = 12
    job = lab.job("f06-run", rows)
    assert call("run", str(job.path))[0] == 0
    shards = sorted(job.root.glob("shards/*/*.safetensors"))
    hurt = lab.rng.sample(shards, 2)
    for path in hurt:
        _zero(path, 4096)
    codes = [call("verify", str(job.root))[0], call("repair", str(job.root))[0]]
    began = time.time_ns()
    codes.append(call("run", str(job.path))[0])
    made = [path for path in shards if path.stat().st_mtime_ns >= began]
    wrong = job.wrong(lab.undisturbed(rows), quarantine=True)
    codes.append(call("verify", str(job.root), "--level", "deep")[0])
    wrong += [f"made again {len(made)} units, not {len(hurt)}"] * (set(made) != set(hurt))
    return [
        Finding(
            "F6", "two shards damaged; verify, repair, run, verify --level deep",
            "exit 4, then just those units made again, same bytes, exit 0",
            f"exit codes {codes}; {len(wrong)} wrong {first_lines(wrong)}",
            not wrong and codes[0] == 4 and codes[2:] == [0, 0],
        )
    ]  # fmt: skip


def f10_torn(lab: Lab) -> list[Finding]:
    """Plan, record, null record and root cut at every byte; some of the cuts are mended."""
    whole = lab.new("f10-whole", ram=True)
    write_dataset(whole, FEW)
    expected = dataset_bytes(whole)
    names = ["plan.json", "null.json", "manifest.json", "shards/000/shard-000001.json"]
    missed: list[str] = []
    problems: list[str] = []
    cuts = mended = 0
    for name in names:
        path = whole / name
        payload = expected[name]
        for end in range(len(payload)):
            path.write_bytes(payload[:end])
            cuts += 1
            try:
                read_json(path)
                missed.append(f"{name} cut at {end}")
            except VerificationError:
                continue
        path.write_bytes(payload)
        for end in lab.rng.sample(range(len(payload)), lab.size(4, 60)):
            root = lab.new("f10", ram=True)
            shutil.copytree(whole, root, dirs_exist_ok=True)
            _rewrite(root / name, end)
            mended += 1
            problems += [f"{name} cut at {end}: {p}" for p in _mends(root, expected, path.name)]
            shutil.rmtree(root)
    return [
        Finding(
            "F10", "plan, record, null record and root torn at every byte",
            "100 % detected; repair and rerun give the same bytes (a record: its unit is redone)",
            f"{cuts - len(missed)} of {cuts} detected, {mended} mended: {len(problems)} wrong "
            f"{first_lines(missed + problems)}",
            not missed and not problems,
        )
    ]  # fmt: skip
