"""verify --level deep, and repair: what was damaged is made again, byte for byte."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import make_plan, write_dataset, write_units
from jobs import call, dataset_bytes, write_captions, write_job

from embed_precompute.audit import reencode
from embed_precompute.audit import repair as repair_module
from embed_precompute.audit.unit_check import UnitCheck
from embed_precompute.audit.verify import verify
from embed_precompute.encoders import device as device_module
from embed_precompute.encoders import hf, shardformer
from embed_precompute.encoders.transfers import Pending
from embed_precompute.errors import InputError
from embed_precompute.samples import Status
from embed_precompute.store.commit import replace_bytes
from embed_precompute.store.leftovers import QUARANTINE
from embed_precompute.store.nearness import distance
from embed_precompute.store.records import null_paths, read_record, unit_paths
from embed_precompute.store.sealed import seal

TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(30)]


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, tiny_clip: Path
) -> tuple[Path, dict[str, bytes]]:
    """(folder with a job and its finished dataset, the dataset's bytes)."""
    folder = tmp_path_factory.mktemp("finished")
    captions = write_captions(folder / "captions.parquet", TEXTS)
    write_job(folder, captions, tiny_t5, tiny_clip, attention_mask="padding")
    code, _, said = call("run", str(folder / "job.yaml"))
    assert code == 0, said
    return folder, dataset_bytes(folder / "out")


@pytest.fixture
def root(finished: tuple[Path, dict[str, bytes]], tmp_path: Path) -> Path:
    return shutil.copytree(finished[0] / "out", tmp_path / "out")


def rerun(finished: tuple[Path, dict[str, bytes]], root: Path) -> dict[str, bytes]:
    """Run the job on `root`; give the bytes, without the quarantine."""
    code, _, said = call("run", str(finished[0] / "job.yaml"), "--output.path", str(root))
    assert code == 0, said
    shutil.rmtree(root / QUARANTINE, ignore_errors=True)
    return dataset_bytes(root)


def flip(path: Path, offset: int = -1) -> None:
    payload = bytearray(path.read_bytes())
    payload[offset] ^= 1
    path.write_bytes(payload)


# --- deep -----------------------------------------------------------------------------------------


def test_deep_is_byte_equal_in_the_same_environment(root: Path) -> None:
    code, said, _ = call("verify", str(root), "--level", "deep", "--sample", "9", "--seed", "5")
    assert code == 0, said
    assert "9 samples and the null embedding encoded again (seed 5)" in said
    assert "20 embeddings byte-equal" in said
    code, said, _ = call("verify", str(root), "--level", "deep", "--sample", "1000")
    assert code == 0, said
    assert "30 samples" in said


@pytest.mark.parametrize("attention_mask", ["none", "padding"])
def test_deep_in_half_precision_and_with_padding(
    tmp_path: Path, tiny_t5: Path, attention_mask: str
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", [*TEXTS, None, TEXTS[0], ""])
    fields = {"dtype": "bfloat16", "attention_mask": attention_mask}
    job = write_job(tmp_path, captions, tiny_t5, None, **fields)
    assert call("run", str(job), "--output.dtype", "bfloat16")[0] == 0
    code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep", "--sample", "100")
    assert code == 0, said
    assert "33 embeddings byte-equal" in said


def disturb(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Of every implementation: another environment is compared with the reference."""
    original = Pending.wait

    def wait(self: Pending) -> Any:
        values = original(self)
        return change(values) if isinstance(values, torch.Tensor) else list(map(change, values))

    patch.setattr(Pending, "wait", wait)


def test_deep_finds_what_the_digests_cannot(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the encoder is another one than it was: every stored byte is as it was written."""
    disturb(monkeypatch, lambda values: values * (1 + 1e-6))
    assert call("verify", str(root))[0] == 0
    code, said, _ = call("verify", str(root), "--level", "deep", "--sample", "3")
    assert code == 4
    assert "in the same environment" in said


@pytest.mark.parametrize(("factor", "code"), [(1 + 1e-6, 0), (1 + 1e-4, 4), (torch.nan, 4)])
def test_deep_has_a_tolerance_in_another_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch, factor: float, code: int
) -> None:
    here = device_module.environment("cpu")
    monkeypatch.setattr(reencode, "environment", lambda *_: {**here, "device": "another"})
    disturb(monkeypatch, lambda values: values * factor)
    found, said, _ = call("verify", str(root), "--level", "deep", "--sample", "5")
    assert found == code, said
    expected = "within the tolerance" if code == 0 else f"relative difference of {factor - 1:.2e}"
    assert expected.replace("nan", "inf") in said


def test_another_release_of_ours_is_another_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own layers may round otherwise in it: to one that does, nothing is damaged."""
    disturb(monkeypatch, lambda values: values * (1 + 1e-6))
    assert call("verify", str(root), "--level", "deep", "--sample", "5")[0] == 4
    monkeypatch.setattr(device_module, "__version__", "0.0.9")
    code, said, _ = call("verify", str(root), "--level", "deep", "--sample", "5")
    assert code == 0, said
    assert "within the tolerance" in said


@pytest.mark.parametrize("installed", [True, False])
def test_deep_of_an_implementation_that_needs_another_stack(
    installed: bool, tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ColossalAI is, its version is part of the environment; elsewhere hf stands in for it.

    Shardformer's numbers are those of hf, so here hf is made to pass for it.
    """
    version = importlib.metadata.version
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    job = write_job(tmp_path, captions, tiny_t5, None, implementation="shardformer")
    with monkeypatch.context() as patch:
        patch.setattr(shardformer, "check_usable", lambda *_: None)
        patch.setattr(shardformer, "build", hf.build)
        versions = {"colossalai": "0.5.0"}
        patch.setattr(importlib.metadata, "version", lambda n: versions.get(n) or version(n))
        assert call("run", str(job))[0] == 0
        if installed:
            disturb(patch, lambda values: values * (1 + 1e-6))
            code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep")
            assert code == 4
            assert "in the same environment" in said
    if not installed:
        monkeypatch.setattr(shardformer, "check_usable", _unusable)
        code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep")
        assert code == 0, said
        assert "31 embeddings byte-equal" in said


def _unusable(*_: str) -> None:
    raise InputError("ColossalAI is not installed")


def test_deep_needs_the_checkpoint_of_the_dataset(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so at once, and not in place of what hours of checking have found."""
    monkeypatch.setattr(UnitCheck, "check", lambda *_: pytest.fail("the full check has begun"))
    config = root / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("max_length: 24", "max_length: 23"))
    code, _, said = call("verify", str(root), "--level", "deep")
    assert code == 3, said
    assert "max_length: 24 -> 23" in said
    config.unlink()
    code, _, said = call("verify", str(root), "--level", "deep")
    assert code == 2, said
    assert "config.yaml" in said


def test_distance_of_two_embeddings() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert distance(a, a) == (0.0, 1.0)
    difference, cosine = distance(a, torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    assert (difference, cosine) == (1.0, 0.0)


# --- repair ---------------------------------------------------------------------------------------


def test_nothing_to_repair(root: Path, finished: tuple[Path, dict[str, bytes]]) -> None:
    code, said, _ = call("repair", str(root))
    assert code == 0, said
    assert "0 files moved" in said
    assert dataset_bytes(root) == finished[1]


DAMAGE = {
    "shard": lambda root: flip(unit_paths(root, 1).shard),
    "shard offsets": lambda root: flip(unit_paths(root, 1).shard, 1000),
    "shard missing": lambda root: unit_paths(root, 1).shard.unlink(),
    "rows": lambda root: flip(unit_paths(root, 1).rows, 40),
    "record": lambda root: flip(unit_paths(root, 1).record, 40),
    "record cut": lambda root: os.truncate(unit_paths(root, 1).record, 100),
    "record a folder": lambda root: (
        unit_paths(root, 1).record.unlink(),
        unit_paths(root, 1).record.mkdir(),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_unit_is_made_again(
    name: str, root: Path, finished: tuple[Path, dict[str, bytes]]
) -> None:
    DAMAGE[name](root)
    others = {u: unit_paths(root, u).shard.stat().st_mtime_ns for u in (0, 2)}
    code, said, _ = call("repair", str(root))
    assert code == 5, said
    assert "open again: 1 units (1)" in said
    assert "run the job again" in said
    assert not (root / "manifest.json").exists()
    assert call("status", str(root))[0] == 5
    assert call("verify", str(root))[0] == 0
    assert call("repair", str(root))[0] == 5  # twice is harmless
    assert rerun(finished, root) == finished[1]
    assert {u: unit_paths(root, u).shard.stat().st_mtime_ns for u in (0, 2)} == others


def test_two_shards_swapped_are_both_made_again(
    root: Path, finished: tuple[Path, dict[str, bytes]]
) -> None:
    first, second = (unit_paths(root, unit).shard for unit in (0, 1))
    payload = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(payload)
    assert "2 units (0, 1)" in call("repair", str(root))[1]
    assert rerun(finished, root) == finished[1]


def test_a_damaged_null_embedding_is_made_again(
    root: Path, finished: tuple[Path, dict[str, bytes]]
) -> None:
    flip(null_paths(root).shard)
    code, said, _ = call("repair", str(root))
    assert code == 5, said
    assert "the null embedding" in said
    assert rerun(finished, root) == finished[1]


@pytest.mark.parametrize("change", ["flip", "missing", "folder", "fifo"])
@pytest.mark.parametrize("name", ["manifest.json", "manifest.parquet", "index/ok.npy"])
def test_derived_files_are_made_again_at_once(
    name: str, change: str, root: Path, finished: tuple[Path, dict[str, bytes]]
) -> None:
    path = root / name
    if change == "flip":
        flip(path)
    else:
        path.unlink()
        {"missing": lambda: None, "folder": path.mkdir, "fifo": lambda: os.mkfifo(path)}[change]()
    code, said, _ = call("repair", str(root))
    assert code == 0, said
    shutil.rmtree(root / QUARANTINE, ignore_errors=True)
    assert dataset_bytes(root) == finished[1]
    assert call("verify", str(root))[0] == 0


def test_a_damaged_plan_is_made_again(root: Path, finished: tuple[Path, dict[str, bytes]]) -> None:
    flip(root / "plan.json", 30)
    code, said, _ = call("repair", str(root))
    assert code == 5, said
    assert "plan CONFIG --write" in said
    assert not (root / "plan.json").exists()
    assert rerun(finished, root) == finished[1]


def test_plan_and_record_damaged_at_once(
    root: Path, finished: tuple[Path, dict[str, bytes]]
) -> None:
    """plan.json is made again only beside records that can be read."""
    flip(root / "plan.json", 30)
    flip(unit_paths(root, 0).record, 40)
    flip(unit_paths(root, 1).shard)
    code, said, _ = call("repair", str(root))
    assert code == 5, said
    assert "2 units (0, 1)" in said
    job = [str(finished[0] / "job.yaml"), "--output.path", str(root)]
    code, _, said = call("plan", *job, "--write")
    assert code == 0, said
    assert call("repair", str(root))[0] == 5
    assert rerun(finished, root) == finished[1]


def test_the_plan_of_another_dataset_costs_no_unit(
    root: Path, finished: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """It is sound, and every unit contradicts it."""
    other = tmp_path / "other"
    job = [str(finished[0] / "job.yaml"), "--output.path", str(other)]
    assert call("plan", *job, "--output.samples_per_shard", "5", "--write")[0] == 0
    shutil.copy(other / "plan.json", root / "plan.json")
    code, said, _ = call("repair", str(root))
    assert code == 5, said
    assert "expected that of its records" in said
    assert "1 files moved" in said
    assert not (root / "plan.json").exists()
    assert rerun(finished, root) == finished[1]


def test_a_finalised_dataset_that_lost_a_record_is_open_again(
    root: Path, finished: tuple[Path, dict[str, bytes]]
) -> None:
    """Training must not take it for a whole one."""
    for path in dataclasses.astuple(unit_paths(root, 1)):
        path.unlink()
    assert call("repair", str(root))[0] == 5
    assert not (root / "manifest.json").exists()
    assert call("verify", str(root))[0] == 0
    assert rerun(finished, root) == finished[1]


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_a_job_that_makes_the_units_while_repair_opens_them(
    after: int,
    root: Path,
    finished: tuple[Path, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After each of repair's moves the job comes to its end: what it made is not taken away."""
    flip(unit_paths(root, 0).shard)
    flip(unit_paths(root, 1).shard)
    original, moves = repair_module.move_aside, itertools.count(1)

    def move(folder: Path, path: Path) -> bool:
        moved = original(folder, path)
        if next(moves) == after:
            with monkeypatch.context() as patch:
                patch.setattr(repair_module, "move_aside", original)
                call("run", str(finished[0] / "job.yaml"), "--output.path", str(root))
        return moved

    with monkeypatch.context() as patch:
        patch.setattr(repair_module, "move_aside", move)
        repair_module.repair(root)
    for unit in range(3):
        paths = unit_paths(root, unit)
        assert not paths.record.exists() or (paths.shard.exists() and paths.rows.exists())
    assert rerun(finished, root) == finished[1]


@pytest.mark.parametrize("command", ["repair", "finalize"])
def test_nothing_is_moved_or_removed_through_a_link(
    command: str, root: Path, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mine = elsewhere / ".tmp-of-mine"
    mine.touch()
    (root / "shards" / "zzz").symlink_to(elsewhere)
    code, _, said = call(command, str(root))
    assert code == 2, said
    assert "is a link" in said
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
            paths = unit_paths(root, 0)
            path = {"record": paths.record, "rows": paths.rows}.get(name, root / name)
            path.unlink()
            make(path)
            code, _, said = call(words[0], str(root), *words[1:])
            assert code in (0, 2, 4, 5, 74), said
            assert "Traceback" not in said


def test_status_of_a_dataset_that_lost_its_null_embedding(root: Path) -> None:
    null_paths(root).record.unlink()
    code, said, _ = call("status", str(root))
    assert code == 5, said
    assert "incomplete" in said


def test_records_of_another_plan_are_refused(
    root: Path, finished: tuple[Path, dict[str, bytes]]
) -> None:
    """After the loss of plan.json a run with another configuration would make another plan."""
    (root / "plan.json").unlink()
    job = str(finished[0] / "job.yaml")
    more = ["--output.path", str(root), "--output.samples_per_shard", "7"]
    code, _, said = call("run", job, *more)
    assert code == 3, said
    assert "another plan" in said
    assert not (root / "plan.json").exists()


def test_failed_samples_are_made_again(
    finished: tuple[Path, dict[str, bytes]], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward that gives nan once; `repair --failed` opens that unit only."""
    job = str(finished[0] / "job.yaml")
    out = root.with_name("again")
    with monkeypatch.context() as patch:
        count = [0]

        def spoil(values: torch.Tensor) -> torch.Tensor:
            count[0] += 1
            return values * torch.nan if count[0] == 25 else values

        disturb(patch, spoil)
        code, _, said = call("run", job, "--output.path", str(out))
        assert code == 6, said
    (out / "manifest.json").unlink()
    assert call("finalize", str(out))[0] == 6  # as run and status say
    failed = [u for u in range(3) if read_record(out, u)["status"][Status.NON_FINITE.label]]
    assert len(failed) == 1
    assert call("repair", str(out))[0] == 0  # nothing is damaged
    code, said, _ = call("repair", str(out), "--failed")
    assert code == 5, said
    assert f"1 units ({failed[0]})" in said
    assert rerun(finished, out) == finished[1]


@pytest.mark.parametrize("num_moves", [0, 1, 2])
def test_repair_that_dies_half_way(
    num_moves: int,
    root: Path,
    finished: tuple[Path, dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After each single move the rest is still found, or harmless."""
    flip(unit_paths(root, 1).shard)
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
    assert rerun(finished, root) == finished[1]


def test_a_plan_of_absurd_size_is_checked_in_no_time(tmp_path: Path) -> None:
    """All of it is consistent, so the units that are missing are the only problem."""
    small = make_plan(3, 3)
    write_dataset(tmp_path, ["a", "b", "c"])
    rows = 10**9
    file = {**small.inputs.files[0], "rows": rows}
    plan = dataclasses.replace(
        small,
        inputs=dataclasses.replace(small.inputs, files=(file,)),
        num_rows=rows,
        num_samples=rows,
    )
    replace_bytes(tmp_path / "plan.json", seal(plan.to_json()))
    report = verify(tmp_path)
    assert any("shards" in line for line in report.problems)
    assert len(report.problems) < 100
    assert call("status", str(tmp_path))[0] in (4, 5)
    assert call("finalize", str(tmp_path))[0] in (4, 5)


def test_unfinished_and_sound(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c", "d"], samples_per_shard=1)
    unit_paths(tmp_path, 2).record.unlink()
    code, said, _ = call("repair", str(tmp_path))
    assert code == 5, said
    assert "0 files moved" in said
    assert unit_paths(tmp_path, 1).record.exists()
