"""Killed anywhere, a rerun ends with the bytes of an undisturbed run; a changed job is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from breaking import flip
from handmade import paths_of
from jobs import (
    call,
    clean_environment,
    command,
    dataset_bytes,
    write_captions,
    write_job,
)

from embed_precompute.job import run as pipeline

TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(90)]


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, tiny_clip: Path
) -> tuple[Path, dict[str, bytes]]:
    """(captions, the bytes of a run that nothing disturbs)."""
    folder = tmp_path_factory.mktemp("undisturbed")
    captions = write_captions(folder / "captions.parquet", TEXTS)
    job = write_job(folder, captions, tiny_t5, tiny_clip, samples_per_shard=6)
    code, _, said = call("run", str(job))
    assert code == 0, said
    return captions, dataset_bytes(folder / "out")


@pytest.fixture
def job(
    undisturbed: tuple[Path, dict[str, bytes]], tiny_t5: Path, tiny_clip: Path, tmp_path: Path
) -> Path:
    return write_job(tmp_path, undisturbed[0], tiny_t5, tiny_clip, samples_per_shard=6)


def records(root: Path) -> list[Path]:
    return sorted(root.glob("shards/*/shard-*.json"))


def kill_after_first_record(process: subprocess.Popen[Any], root: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while not records(root):
        assert process.poll() is None, "ended before its first unit"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, number)
    process.wait(60)


@pytest.mark.parametrize("rounds", [[0, 2, 0]])
def test_sigkill_and_rerun_at_another_world_size(
    rounds: list[int], job: Path, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    root = tmp_path / "out"
    for nproc in rounds:
        if len(records(root)) >= 15:
            break
        for path in records(root):
            path.unlink()  # so that every round has work: units go back to "not done"
        process = subprocess.Popen(
            command("run", str(job), nproc=nproc),
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        kill_after_first_record(process, root, signal.SIGKILL)
    code, _, said = call("run", str(job))
    assert code == 0, said
    assert dataset_bytes(root) == undisturbed[1]


def test_sigterm_ends_with_75_and_leaves_no_temporary_file(
    job: Path, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    root = tmp_path / "out"
    process = subprocess.Popen(
        command("run", str(job)),
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    kill_after_first_record(process, root, signal.SIGTERM)
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()
    if process.returncode != 0:  # 0: it was already done, the machine is that fast
        assert process.returncode == 75, said
        assert "Run the same command again" in said
        assert "Traceback" not in said
    assert not list(root.rglob(".tmp-*"))
    assert call("run", str(job))[0] == 0
    assert dataset_bytes(root) == undisturbed[1]


def test_data_without_a_record_is_used_again_or_replaced(
    job: Path, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """Their writers died before the record: equal bytes have the name already, damage is replaced,
    and a shard of other bytes is removed at the end."""
    root = tmp_path / "out"
    assert call("run", str(job))[0] == 0
    kept, torn = (paths_of(root, unit) for unit in (0, 1))
    inode = kept.shard.stat().st_ino
    for path in (root / "manifest.json", kept.record, torn.record):
        path.unlink()
    flip(torn.shard, -5)
    other = torn.shard.with_name("shard-000001-0123456789abcdef.safetensors")
    other.write_bytes(b"of other captions, or of another environment")
    code, _, said = call("run", str(job))
    assert code == 0, said
    assert "removed 1 files (44 bytes) that no record names" in said
    assert dataset_bytes(root) == undisturbed[1]
    assert kept.shard.stat().st_ino == inode


def test_max_restarts_and_one_worker_killed(
    job: Path, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    root = tmp_path / "out"
    log = tmp_path / "log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            command("run", str(job), nproc=2, torchrun=["--max-restarts=1"]),
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not records(root) and time.monotonic() < deadline:
            time.sleep(0.005)
        listed = subprocess.run(
            ["ps", "--ppid", str(process.pid), "-o", "pid="],
            capture_output=True,
            text=True,
            check=True,
        )
        os.kill(int(listed.stdout.split()[0]), signal.SIGKILL)
        process.wait(180)
    assert process.returncode == 0, log.read_text()[-3000:]
    assert dataset_bytes(root) == undisturbed[1]


def edit(job: Path, section: str, **fields: Any) -> None:
    loaded = yaml.safe_load(job.read_text())
    owner = loaded
    for part in section.split("."):
        owner = owner[part]
    owner.update(fields)
    job.write_text(yaml.safe_dump(loaded))


@pytest.mark.parametrize(
    ("section", "fields", "named"),
    [
        ("encoders.t5", {"max_length": 20}, "encoders.t5.max_length: 24 -> 20"),
        ("encoders.t5", {"attention_mask": "padding"}, "attention_mask: none -> padding"),
        ("encoders.t5", {"batch_tokens": 48}, "encoders.t5.shapes"),
        ("encoders.t5", {"dtype": "bfloat16"}, "encoders.t5.dtype: float32 -> bfloat16"),
        ("encoders.clip", {"stream_tokens": 999}, "encoders.clip.shapes"),
        ("captions", {"normalize": ["nfc"]}, "captions.normalize"),
        ("captions", {"id_column": None}, "id_column: id -> None"),
        ("output", {"samples_per_shard": 7}, "samples_per_shard: 6 -> 7"),
        ("output", {"dtype": "bfloat16"}, "output.dtype: float32 -> bfloat16"),
    ],
)
def test_another_spec_on_the_same_output_is_refused(
    section: str, fields: dict[str, Any], named: str, job: Path, tmp_path: Path
) -> None:
    assert call("plan", str(job), "--write")[0] == 0
    edit(job, section, **fields)
    code, _, said = call("run", str(job))
    assert code == 3, said
    assert named in said
    assert "new output.path" in said
    assert "Traceback" not in said


def test_runtime_fields_change_nothing(
    job: Path, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    assert call("plan", str(job), "--write")[0] == 0
    edit(job, "runtime", prefetch_units=3, write_queue_batches=1, max_failed_samples=0)
    assert call("run", str(job))[0] == 0
    assert dataset_bytes(tmp_path / "out") == undisturbed[1]


def test_a_changed_input_is_refused_by_name(
    job: Path, undisturbed: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    captions = write_captions(tmp_path / "in" / "captions.parquet", TEXTS)
    edit(job, "captions", path=str(captions))
    assert call("plan", str(job), "--write")[0] == 0
    write_captions(captions, [*TEXTS[:-1], "another caption"])
    code, _, said = call("run", str(job))
    assert code == 3, said
    assert "captions.parquet: changed" in said


def test_weights_changed_under_the_same_name_are_refused(
    undisturbed: tuple[Path, dict[str, bytes]], tiny_t5: Path, tmp_path: Path
) -> None:
    mine = shutil.copytree(tiny_t5, tmp_path / "model")
    job = write_job(tmp_path, undisturbed[0], mine, None)
    assert call("plan", str(job), "--write")[0] == 0
    weights = mine / "model.safetensors"
    payload = bytearray(weights.read_bytes())
    payload[-1] ^= 1
    weights.write_bytes(payload)
    code, _, said = call("run", str(job))
    assert code == 3, said
    assert "encoders.t5.weights" in said


def test_limit_is_a_dataset_of_its_own(job: Path, tmp_path: Path) -> None:
    assert call("run", str(job), "--limit", "13")[0] == 0
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["counts"]["samples"] == 13
    assert manifest["counts"]["units"] == 3
    code, _, said = call("run", str(job))
    assert code == 3, said
    assert "limit: 13 -> None" in said


def test_another_environment_warns_or_refuses(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call("run", str(job), "--limit", "13")[0] == 0
    (tmp_path / "out/manifest.json").unlink()
    records(tmp_path / "out")[0].unlink()
    here = pipeline.environment("cpu")
    monkeypatch.setattr(pipeline, "environment", lambda *_: {**here, "device": "another"})
    refuse = ["--runtime.on_environment_change", "refuse"]
    code, _, said = call("run", str(job), "--limit", "13", *refuse)
    assert code == 3, said
    assert "-> another" in said
    code, _, said = call("run", str(job), "--limit", "13")
    assert code == 0, said
    assert "another environment" in said
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert sorted(e["units"] for e in manifest["environments"]) == [1, 2]
