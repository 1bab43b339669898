"""repair: what was damaged is made again, byte for byte."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from breaking import flip, swap
from handmade import make_plan, paths_of, write_dataset, write_units
from jobs import call, dataset_bytes, expect

from embed_precompute.audit import repair as repair_module
from embed_precompute.audit.verify import verify
from embed_precompute.job import writer
from embed_precompute.samples import Status
from embed_precompute.store.commit import QUARANTINE, replace_bytes
from embed_precompute.store.records import (
    NULL_UNIT,
    committed_units,
    document_bytes,
    read_null_record,
    read_record,
    record_path,
)

Again = Callable[[Path], bool]


@pytest.fixture
def again(job: Path, sound: dict[str, bytes]) -> Again:
    """Runs the job on a folder: whether that gives the bytes of the sound dataset."""

    def run(root: Path) -> bool:
        expect(0, "run", job, "--output.path", root)
        shutil.rmtree(root / QUARANTINE, ignore_errors=True)
        return dataset_bytes(root) == sound

    return run


def test_nothing_to_repair(root: Path, sound: dict[str, bytes]) -> None:
    assert "0 files moved" in expect(0, "repair", root)
    assert dataset_bytes(root) == sound


# --- units ----------------------------------------------------------------------------------------


# what is done, and what repair says
DAMAGE = {
    "shard": (lambda root: flip(paths_of(root, 1).shard), "1 unit (1)"),
    "shard offsets": (lambda root: flip(paths_of(root, 1).shard, 1000), "1 unit (1)"),
    "shard missing": (lambda root: paths_of(root, 1).shard.unlink(), "1 unit (1)"),
    "rows": (lambda root: flip(paths_of(root, 1).rows, 40), "1 unit (1)"),
    "record": (lambda root: flip(record_path(root, 1), 40), "1 unit (1)"),
    "record cut": (lambda root: os.truncate(record_path(root, 1), 100), "1 unit (1)"),
    "record a folder": (
        lambda root: (record_path(root, 1).unlink(), record_path(root, 1).mkdir()),
        "1 unit (1)",
    ),
    "two swapped": (
        lambda root: swap(paths_of(root, 0).shard, paths_of(root, 1).shard),
        "2 units (0, 1)",
    ),
    "null": (lambda root: flip(read_null_record(root).shard_path(root)), "the null embedding"),
    # Training must not take it for a whole one.
    "all of a unit": (lambda root: [path.unlink() for path in paths_of(root, 1)], "not finished"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_is_damaged_is_made_again(name: str, root: Path, again: Again) -> None:
    damage, message = DAMAGE[name]
    sound = paths_of(root, 2).shard
    before = sound.stat().st_mtime_ns
    damage(root)
    assert call("verify", str(root))[0] in (4, 5)
    said = expect(5, "repair", root)
    assert message in said
    assert "run the job again" in said
    assert not (root / "manifest.json").exists()
    expect(5, "status", root)
    expect(5, "verify", root)
    expect(5, "repair", root)  # twice is harmless
    assert again(root)
    assert sound.stat().st_mtime_ns == before


def test_only_what_is_damaged_is_moved(root: Path) -> None:
    """A job that makes the unit again meanwhile may rely on a sound file."""
    paths = paths_of(root, 1)
    flip(paths.rows)
    assert "2 files moved" in expect(5, "repair", root)
    assert [path.exists() for path in paths] == [True, False, False]


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_job_that_makes_the_units_while_repair_opens_them(
    after: int, root: Path, job: Path, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each of repair's moves the job comes to its end: what it made is not taken away."""
    flip(paths_of(root, 0).shard)
    flip(paths_of(root, 1).shard)
    original, moves = repair_module.move_aside, itertools.count(1)

    def move(folder: Path, path: Path) -> bool:
        moved = original(folder, path)
        if next(moves) == after:
            with monkeypatch.context() as patch:
                patch.setattr(repair_module, "move_aside", original)
                call("run", str(job), "--output.path", str(root))
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "move_aside", move)
        repair_module.repair(root)
    for unit in committed_units(root):
        assert all(path.exists() for path in paths_of(root, unit))
    assert again(root)


@pytest.mark.parametrize("num_moves", [0, 1])
def test_repair_that_dies_half_way(
    num_moves: int, root: Path, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each single move the rest is still found, or harmless."""
    flip(paths_of(root, 1).shard)
    original, moves = repair_module.move_aside, iter(range(num_moves))

    def move(folder: Path, path: Path) -> bool:
        next(moves)  # StopIteration: it dies here
        return original(folder, path)

    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "move_aside", move)
        with pytest.raises(StopIteration):
            repair_module.repair(root)
    assert not (root / "manifest.json").exists()
    repair_module.repair(root)
    assert again(root)


def test_failed_samples_are_made_again(
    job: Path, tmp_path: Path, again: Again, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that gives nan once; `repair --failed` opens that unit only."""
    out = tmp_path / "again"
    with monkeypatch.context() as patch:
        # The null embedding's two outputs are finite; the next batch is not, by its first row.
        answers = itertools.chain([True, True, False, False], itertools.repeat(True))
        patch.setattr(writer, "is_finite", lambda values: next(answers))
        said = expect(6, "run", job, "--output.path", out)
    (out / "manifest.json").unlink()
    expect(6, "finalize", out)  # as run and status say
    (failed,) = [u for u in range(3) if read_record(out, u).status[Status.NON_FINITE.label]]
    expect(0, "repair", out)  # nothing is damaged
    said = expect(5, "repair", out, "--failed")
    assert f"1 unit ({failed})" in said
    assert "1 file moved" in said  # the record: the shard is garbage, which the run removes
    assert again(out)


# --- the plan, and what is derived ----------------------------------------------------------------


@pytest.mark.parametrize("change", ["flip", "missing", "folder", "fifo"])
@pytest.mark.parametrize("name", ["manifest.json", "manifest.parquet", "index/ok.npy"])
def test_derived_files_are_made_again_at_once(
    name: str, change: str, root: Path, sound: dict[str, bytes]
) -> None:
    path = root / name
    if change == "flip":
        flip(path)
    else:
        path.unlink()
        {"missing": lambda: None, "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[change]()
    expect(0, "repair", root)
    shutil.rmtree(root / QUARANTINE, ignore_errors=True)
    assert dataset_bytes(root) == sound


def test_a_damaged_plan_is_made_again(root: Path, again: Again) -> None:
    flip(root / "plan.json", 30)
    assert "plan CONFIG --write" in expect(5, "repair", root)
    assert not (root / "plan.json").exists()
    assert again(root)


def test_plan_and_record_damaged_at_once(root: Path, job: Path, again: Again) -> None:
    """plan.json is made again only beside records that can be read."""
    flip(root / "plan.json", 30)
    flip(record_path(root, 0), 40)
    flip(paths_of(root, 1).shard)
    assert "2 units (0, 1)" in expect(5, "repair", root)
    expect(0, "plan", job, "--output.path", root, "--write")
    expect(5, "repair", root)
    assert again(root)


def test_the_plan_of_another_dataset_costs_no_unit(
    root: Path, job: Path, tmp_path: Path, again: Again
) -> None:
    """It is sound, and every unit contradicts it."""
    other = tmp_path / "other"
    size = ["--output.samples_per_shard", "5"]
    expect(0, "plan", job, "--output.path", other, *size, "--write")
    shutil.copy(other / "plan.json", root / "plan.json")
    said = expect(5, "repair", root)
    assert "expected that of its records" in said
    assert "1 file moved" in said
    assert not (root / "plan.json").exists()
    assert again(root)


# --- what is in the way ---------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["repair", "finalize"])
def test_nothing_is_moved_or_removed_through_a_link(
    command: str, root: Path, tmp_path: Path
) -> None:
    mine = tmp_path / "elsewhere" / ".tmp-of-mine"
    mine.parent.mkdir()
    mine.touch()
    (root / "shards" / "zzz").symlink_to(mine.parent)
    assert "is a link" in expect(2, command, root)
    assert mine.exists()


@pytest.mark.parametrize("name", ["plan.json", "null.json", "record", "rows", "manifest.json"])
def test_what_is_no_file_is_named_and_never_waited_for(name: str, tmp_path: Path) -> None:
    """A pipe makes whoever opens it wait; a link to itself and a folder are other errors."""
    whole = tmp_path / "whole"
    write_dataset(whole, ["a", "b", "c"])
    commands = [["status"], ["info"], ["info", "--id", "s1"], ["finalize"], ["repair"]]
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path)):
        for number, words in enumerate(commands):
            root = shutil.copytree(whole, tmp_path / f"{make} {number}")
            path = getattr(paths_of(root, 0), name, root / name)
            path.unlink()
            make(path)
            code, _, said = call(words[0], str(root), *words[1:])
            assert code in (0, 2, 4, 5, 74), said
            assert "Traceback" not in said


def test_a_plan_of_absurd_size_is_checked_in_no_time(tmp_path: Path) -> None:
    """All of it is consistent, so the units that are missing are the only problem."""
    write_dataset(tmp_path, ["a", "b", "c"])
    replace_bytes(tmp_path / "plan.json", document_bytes(make_plan(10**9, 3)))
    report = verify(tmp_path)
    assert any("shards" in line for line in report.problems)
    assert report.num_missing == -(-(10**9) // 3) - 1
    assert len(report.problems) < 100
    assert call("status", str(tmp_path))[0] in (4, 5)
    assert call("finalize", str(tmp_path))[0] in (4, 5)


def test_unfinished_and_sound(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c", "d"], samples_per_shard=1)
    record_path(tmp_path, 2).unlink()
    assert "0 files moved" in expect(5, "repair", tmp_path)
    assert record_path(tmp_path, 1).exists()
    record_path(tmp_path, NULL_UNIT).unlink()
    assert "the null embedding is not made yet" in expect(5, "status", tmp_path)
