"""What is said and refused before the first unit: free space, tokenizers, decisions of the plan."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from handmade import paths_of
from jobs import call, edit, expect, write_captions, write_job

from embed_precompute.captions.reader import CaptionReader
from embed_precompute.job import prepare
from embed_precompute.store.commit import UNLIMITED, free_space, this_host
from embed_precompute.store.plan import read_plan

TEXTS = [f"scene {i} with {'many ' * (i % 5)}people" for i in range(20)]


@pytest.fixture
def job(tiny_clip: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    return write_job(tmp_path, captions, None, tiny_clip, samples_per_shard=10)


@pytest.mark.parametrize(
    ("free", "code", "message"),
    [
        ((100, UNLIMITED), 74, "out: a shard needs about"),
        ((UNLIMITED, 2), 74, "out: a shard needs about"),
        ((3000, 5), 0, "3,000 bytes and 5 files are free"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused_and_a_dataset_warned_of(
    job: Path, monkeypatch: pytest.MonkeyPatch, free: tuple[int, int], code: int, message: str
) -> None:
    monkeypatch.setattr(prepare, "free_space", lambda root: free)
    assert message in expect(code, "run", job)


def test_free_space_of_a_folder_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(0 < free < UNLIMITED for free in free_space(tmp_path / "not" / "yet"))
    nothing = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: nothing)
    assert free_space(tmp_path) == (UNLIMITED, UNLIMITED)


def test_what_a_killed_job_left_is_removed_before_space_is_looked_at(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / "out/shards/000" / f".tmp-shard-000000-{this_host()}-999999999-0123456789ab"
    dead.parent.mkdir(parents=True)
    dead.touch()
    monkeypatch.setattr(
        prepare, "free_space", lambda root: (0 if dead.exists() else UNLIMITED, UNLIMITED)
    )
    expect(0, "run", job)


def test_space_for_the_last_small_shard_is_enough(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = [str(job), "--output.samples_per_shard", "19"]
    expect(0, "run", *config)
    whole, last = (paths_of(tmp_path / "out", unit) for unit in (0, 1))
    free = (whole.shard.stat().st_size // 2, 99)
    last.record.unlink()
    monkeypatch.setattr(prepare, "free_space", lambda root: free)
    expect(0, "run", *config)


def test_the_first_captions_are_read_once(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the shard size, the free space and the report of `plan`."""
    reads: list[tuple[int, int]] = []
    original = CaptionReader.read

    def read(self: Any, first_row: int, num_rows: int) -> Any:
        reads.append((first_row, num_rows))
        return original(self, first_row, num_rows)

    monkeypatch.setattr(CaptionReader, "read", read)
    expect(0, "plan", job, "--output.samples_per_shard", "auto")
    assert reads == [(0, 20)]
    reads.clear()
    expect(0, "run", job, "--output.samples_per_shard", "auto")
    assert reads == [(0, 20)] * 2  # and the one unit


def test_the_first_captions_are_shown_as_they_are_encoded(job: Path) -> None:
    """A wrong recipe shows before the run."""
    template = ("--captions.recipe", "{kind: template, template: '<{text}>'}")
    for command, output in (("plan", 1), ("run", 2)):
        said = call(command, str(job), *template)[output]
        for text in TEXTS[:3]:
            assert f"encoded as '<{text}>'" in said
        assert TEXTS[3] not in said


def test_another_models_tokenizer_is_warned_of(
    tmp_path: Path, tiny_t5: Path, corpus: list[str]
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", corpus[:20])
    job = write_job(tmp_path, captions, tiny_t5, None)
    said = expect(0, "plan", job)
    ratio = float(said.partition(" characters per token")[0].rpartition(" ")[2])
    assert ratio > 2
    assert "WARNING" not in said
    letters = write_captions(tmp_path / "letters.parquet", ["zzqxjkvwq " * 2] * 3)
    words = ("--captions.path", str(letters))
    said = expect(0, "plan", job, *words)
    assert "WARNING    tokenizer " in said
    assert "it may be another model's tokenizer" in said
    assert "WARNING encoders.t5: tokenizer " in expect(0, "run", job, *words)


def test_a_plan_without_weights(job: Path, tmp_path: Path, tiny_clip: Path) -> None:
    """All but the fingerprint, from config.json and tokenizer."""
    whole = expect(0, "plan", job).splitlines()
    bare = shutil.copytree(tiny_clip, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    edit(job, "encoders.clip", pretrained=str(bare))
    said = expect(2, "plan", job)
    assert "holds no weights" in said
    assert "plan --no-weights" in said
    assert f"embed-precompute fetch {job}" in said
    found = expect(0, "plan", job, "--no-weights").splitlines()
    assert found[0].endswith("its id and fingerprint follow when the weights are there")
    assert found[1:] == whole[1:]
    with pytest.raises(SystemExit) as ended:
        call("plan", str(job), "--no-weights", "--write")
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


def test_a_rerun_takes_the_plans_implementation(job: Path, tmp_path: Path) -> None:
    option = "--encoders.clip.implementation"
    expect(0, "run", job, option, "hf")
    assert read_plan(tmp_path / "out").spec["encoders"]["clip"]["implementation"] == "hf"
    expect(0, "run", job, option, "auto")
    assert "clip.implementation: hf -> fused" in expect(3, "run", job, option, "fused")
