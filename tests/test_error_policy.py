"""Failed samples, full disks, and files that are not what they seem: bounded and named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import paths_of
from jobs import call, write_captions, write_job

from embed_precompute.audit.info import read_status
from embed_precompute.encoders.batching import TokenBatch
from embed_precompute.encoders.fused.encoder import FusedEncoder
from embed_precompute.encoders.hf import HfEncoder
from embed_precompute.encoders.spec import TextEncoder
from embed_precompute.job import prepare as preflight
from embed_precompute.job.writer import UnitWriter
from embed_precompute.store import space
from embed_precompute.store.commit import this_host
from embed_precompute.store.plan import read_plan
from embed_precompute.store.records import read_record
from embed_precompute.store.rows import read_samples
from embed_precompute.store.space import UNLIMITED, Room, _lower, _Quota, room_at

TEXTS = [f"scene {i} with {'many ' * (i % 5)}people" for i in range(20)]


@pytest.fixture(params=["fused", "hf"])
def job(tiny_clip: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    return write_job(
        tmp_path, captions, None, tiny_clip, samples_per_shard=10, implementation=request.param
    )


def spoil(patch: pytest.MonkeyPatch, texts: list[str]) -> None:
    """What the encoder gives for `texts` is not finite."""
    original = UnitWriter.write

    def write(self: Any, name: str, rows: Any, values: Any, *more: Any) -> None:
        unit = self._unit
        bad = {row for row, s in zip(unit.stored_row, unit.samples, strict=True) if s.text in texts}
        each = zip(rows.tolist(), values, strict=False)
        spoiled = [value * torch.nan if row in bad else value for row, value in each]
        original(self, name, rows, spoiled, *more)

    patch.setattr(UnitWriter, "write", write)


def before_each_forward(
    patch: pytest.MonkeyPatch, check: Callable[[TextEncoder, TokenBatch], None]
) -> None:
    for encoder_class in (HfEncoder, FusedEncoder):
        original = encoder_class.submit

        def submit(self: Any, batch: Any, original: Any = original) -> Any:
            check(self, batch)
            return original(self, batch)

        patch.setattr(encoder_class, "submit", submit)


def test_a_failed_sample_gets_a_status_and_its_neighbours_their_bytes(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, [TEXTS[3], TEXTS[14]])
        code, _, said = call("run", str(job))
    assert code == 6, said
    root = tmp_path / "out"
    plan = read_plan(root)
    samples = [s for u in (0, 1) for s in read_samples(paths_of(root, u).rows, plan.tensors)]
    failed = [s for s in samples if s.status.label == "non_finite"]
    assert [s.sample_id for s in failed] == ["s3", "s14"]
    assert failed[0].error == "text_clip holds inf or nan"
    assert call("verify", str(root), "--level", "deep", "--sample", "20")[0] == 0
    assert call("run", str(job))[0] == 6  # a rerun does not help
    assert call("repair", str(root), "--failed")[0] == 5
    assert call("run", str(job))[0] == 0
    assert read_status(root).failed_samples == 0


def test_too_many_failed_samples_stop_the_run(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, TEXTS[2:6])
        code, _, said = call("run", str(job), "--runtime.max_failed_samples", "3")
    assert code == 5
    assert "4 samples failed, more than runtime.max_failed_samples (3)" in said
    assert "sample 's2', row 2" in said
    assert call("run", str(job))[0] == 0


def test_an_encoder_that_always_fails_blames_no_sample(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = [0]

    def check(encoder: TextEncoder, batch: TokenBatch) -> None:
        count[0] += 1
        if count[0] > len(list(encoder.resolved.every_shape())) + 2:
            raise RuntimeError("the device is gone")

    before_each_forward(monkeypatch, check)
    code, _, said = call("run", str(job))
    assert code == 1
    assert "the device is gone" in said


# --- room -----------------------------------------------------------------------------------------


def test_room_is_read_before_the_start(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for room in (
        Room(100, UNLIMITED, "the user quota", "the file system"),
        Room(UNLIMITED, 2, "the file system", "the user quota"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(preflight, "room_at", lambda root, room=room: room)
            code, _, said = call("run", str(job))
        assert code == 74, said
        assert "the user quota" in said
        assert str(tmp_path / "out") in said
        assert "needs about" in said
    few = Room(3000, 5, "the group quota", "the user quota")
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "room_at", lambda root: few)
        code, _, said = call("run", str(job))
    assert code == 0
    assert "the group quota allows 3,000 bytes" in said


def test_quota_is_the_lower_limit(tmp_path: Path) -> None:
    here = room_at(tmp_path / "not" / "yet")
    assert here.bytes > 0
    assert here.files > 0
    whole = Room(10_000, 50, "fs", "fs")
    quota = _Quota(block_hard=4, bytes_used=1000, inode_hard=20, inodes_used=21)
    assert _lower(whole, quota, "q") == Room(3096, 0, "q", "q")
    assert _lower(whole, _Quota(), "q") == whole
    assert _lower(whole, _Quota(block_soft=3), "q").bytes == 3072


def test_what_a_killed_job_left_makes_room(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its temporary files fill the disk, and go before anybody asks for room."""
    dead = tmp_path / "out/shards/000" / f".tmp-shard-000000-{this_host()}-999999999-0123456789ab"
    dead.parent.mkdir(parents=True)
    dead.touch()

    def room(root: Path) -> Room:
        return Room(0 if dead.exists() else UNLIMITED, UNLIMITED, "the disk", "the disk")

    monkeypatch.setattr(preflight, "room_at", room)
    code, _, said = call("run", str(job))
    assert code == 0, said


def test_room_for_the_last_small_shard_is_enough(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = [str(job), "--output.samples_per_shard", "19"]
    assert call("run", *config)[0] == 0
    whole, last = (paths_of(tmp_path / "out", unit) for unit in (0, 1))
    free = whole.shard.stat().st_size // 2
    last.record.unlink()
    monkeypatch.setattr(preflight, "room_at", lambda root: Room(free, 99, "it", "it"))
    code, _, said = call("run", *config)
    assert code == 0, said


def test_a_limit_that_is_not_known_or_not_ours_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE says 0 of 0 blocks where a file system cannot tell; a folder's group counts only where
    new files get it."""
    facts = os.statvfs(tmp_path)
    nothing = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    full = _Quota(block_hard=1, bytes_used=1024)
    asked: list[tuple[str, int]] = []

    def quota(kind: str, device: str, owner: int) -> _Quota | None:
        asked.append((kind, owner))
        return full if kind == "group" and owner == tmp_path.stat().st_gid else None

    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: nothing)
        patch.setattr(space, "_device_of", lambda folder: None)
        assert room_at(tmp_path).bytes == UNLIMITED
    monkeypatch.setattr(os, "statvfs", lambda path: facts)
    monkeypatch.setattr(space, "_device_of", lambda folder: "/dev/sda1")
    monkeypatch.setattr(space, "_read_quota", quota)
    other = tmp_path.stat().st_gid + 1
    monkeypatch.setattr(os, "getegid", lambda: other)
    assert room_at(tmp_path).bytes > 0
    assert ("group", other) in asked
    tmp_path.chmod(0o2755)
    assert room_at(tmp_path).bytes == 0


def test_a_log_that_cannot_be_written_stops_nothing(job: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "logs").write_bytes(b"in the way")
    code, _, said = call("run", str(job))
    assert code == 0, said
    assert "Traceback" not in said
    assert "not written" in said


def test_nothing_is_written_through_a_link(job: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("shards", "shards/000", "index", "logs"):
        link = tmp_path / "out" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(elsewhere)
        code, _, said = call("run", str(job))
        assert code == 2, said
        assert "is a link" in said
        link.unlink()
    assert list(elsewhere.iterdir()) == []


# --- hostile files --------------------------------------------------------------------------------


def test_a_caption_of_absurd_length_is_a_fact_of_the_input(tiny_clip: Path, tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "c.parquet", ["a", "b " * (1 << 20), "c"])
    job = write_job(tmp_path, captions, None, tiny_clip)
    assert call("run", str(job))[0] == 0
    record = read_record(tmp_path / "out", 0)
    assert (record.status["ok"], record.status["invalid_text"]) == (2, 1)
