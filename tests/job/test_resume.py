"""What a run finds: data without a record, temporary files, other weights, another environment.

Killed runs and changed jobs: tests/faults.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from breaking import flip
from handmade import paths_of
from jobs import dataset_bytes, edit, expect, write_captions, write_job

from embed_precompute.job import run as pipeline
from embed_precompute.store.commit import StagedFile, remove_dead, this_host
from embed_precompute.store.records import committed_units, record_path

TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(30)]


@pytest.fixture
def job(tiny_t5: Path, tiny_clip: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    return write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=6)


def test_data_without_a_record_is_used_again_or_replaced(job: Path, tmp_path: Path) -> None:
    """Their writers died before the record: equal bytes have the name already, damage is replaced,
    and a shard of other bytes is removed at the end."""
    root = tmp_path / "out"
    expect(0, "run", job)
    undisturbed = dataset_bytes(root)
    kept, torn = (paths_of(root, unit) for unit in (0, 1))
    inode = kept.shard.stat().st_ino
    for path in (root / "manifest.json", kept.record, torn.record):
        path.unlink()
    flip(torn.shard, -5)
    other = torn.shard.with_name("shard-000001-0123456789abcdef.safetensors")
    other.write_bytes(b"of other captions, or of another environment")
    assert "removed 1 file (44 bytes) that no record names" in expect(0, "run", job)
    assert dataset_bytes(root) == undisturbed
    assert kept.shard.stat().st_ino == inode


def test_weights_changed_under_the_same_name_are_refused(
    job: Path, tiny_t5: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(tiny_t5, tmp_path / "model")
    edit(job, "encoders.t5", pretrained=str(mine))
    expect(0, "plan", job, "--write")
    flip(mine / "model.safetensors")
    assert "encoders.t5.weights" in expect(3, "run", job)


def test_limit_is_a_dataset_of_its_own(job: Path, tmp_path: Path) -> None:
    expect(0, "run", job, "--limit", "13")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"]["samples"] == 13
    assert manifest["counts"]["units"] == 3
    assert "limit: 13 -> null" in expect(3, "run", job)


def test_another_environment_warns_or_refuses(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect(0, "run", job, "--limit", "13")
    (tmp_path / "out/manifest.json").unlink()
    record_path(tmp_path / "out", 0).unlink()
    here = pipeline.environment("cpu")
    monkeypatch.setattr(pipeline, "environment", lambda *_: {**here, "device": "another"})
    refuse = ["--runtime.on_environment_change", "refuse"]
    assert "-> another" in expect(3, "run", job, "--limit", "13", *refuse)
    assert "another environment" in expect(0, "run", job, "--limit", "13")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert sorted(e["units"] for e in manifest["environments"]) == [1, 2]


def test_temporary_files_of_dead_writers_go_with_the_next_run(job: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    expect(0, "run", job)
    before = dataset_bytes(root)
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    folder = root / "shards/000"
    gone = [
        root / f".tmp-plan.json-{this_host()}-{dead.stdout.strip()}-0123456789ab",
        folder / f".tmp-shard-000001.json-{this_host()}-{dead.stdout.strip()}-0123456789ab",
        folder / f".tmp-shard-000002.safetensors-{this_host()}-{os.getpid()}-0123456789ab",
    ]
    kept = [
        folder / f".tmp-shard-000001.json-{this_host()}-{os.getppid()}-0123456789ab",
        folder / f".tmp-shard-000001.json-other.{socket.gethostname()}-1-0123456789ab",
        folder / ".tmp-x",
    ]
    for path in (*gone, *kept):
        path.write_bytes(before["shards/000/shard-000000.json"])
    with StagedFile(folder / "mine"):
        assert remove_dead(root) == len(gone)
        assert len(list(root.rglob(".tmp-*"))) == len(kept) + 1
    assert len(committed_units(root)) == 5
    expect(0, "verify", root)
    (root / "manifest.json").unlink()
    expect(0, "run", job)
    assert dataset_bytes(root) == before  # finalize takes those of other machines too
