"""`run --reuse`: what another dataset has of the same text and encoder is copied, byte for byte."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash
from breaking import flip
from handmade import paths_of, write_dataset
from jobs import dataset_bytes, edit, expect, write_captions, write_job

from embed_precompute.job import run as pipeline
from embed_precompute.job import stages
from embed_precompute.job.reuse import COPIED_FROM, Reuse
from embed_precompute.job.stages import Stages
from embed_precompute.store.index import read_manifest
from embed_precompute.store.records import encoder_fingerprints, read_record, record_path
from embed_precompute.store.shards import open_alone

TEXTS = [f"scene {i % 17} with {'many ' * (i % 5)}people" for i in range(30)]


@pytest.fixture
def job(tiny_t5: Path, tiny_clip: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    return write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=8)


@pytest.fixture
def old(job: Path, tmp_path: Path) -> Path:
    """A finished dataset, of which the tests make others."""
    expect(0, "run", job)
    return (tmp_path / "out").rename(tmp_path / "old")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The encoders that a run loads."""
    names: list[str] = []
    real: Callable[..., Any] = pipeline.start

    def start(resolved: Any, *arguments: Any) -> Any:
        names.append(resolved.name)
        return real(resolved, *arguments)

    monkeypatch.setattr(pipeline, "start", start)
    return names


def assert_as_without(job: Path, tmp_path: Path, *words: object) -> None:
    """The dataset in `out` has the bytes of a run that copies nothing."""
    expect(0, "run", job, "--output.path", tmp_path / "plain", *words)
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain")


def test_one_corrected_caption_is_one_encoding(job: Path, old: Path, tmp_path: Path) -> None:
    """Whatever its rows are called now, and in whatever shards they are."""
    texts = [*TEXTS[:20], "another scene", *reversed(TEXTS[20:])]
    write_captions(tmp_path / "captions.parquet", texts)
    edit(job, "output", samples_per_shard=7)
    said = expect(0, "run", job, "--reuse", old)
    stored = read_manifest(tmp_path / "out").counts.stored
    for name in ("t5", "clip"):
        assert f"{name} copied: {stored - 1}\n  {name} encoded: 1\n" in said
    assert_as_without(job, tmp_path)
    expect(0, "verify", tmp_path / "out", "--level", "deep")


def test_what_is_copied_needs_no_encoder(
    job: Path, old: Path, tmp_path: Path, loaded: list[str]
) -> None:
    """The null embedding is copied too. Another recipe may give the same texts."""
    recipe = ("--captions.recipe", "{kind: template, template: '{text}'}")
    expect(0, "run", job, "--reuse", old, *recipe)
    assert loaded == []
    assert_as_without(job, tmp_path, *recipe)


def test_a_changed_clip_leaves_t5_alone(
    job: Path, old: Path, tmp_path: Path, loaded: list[str]
) -> None:
    edit(job, "encoders.clip", max_length=60)
    said = expect(0, "run", job, "--reuse", old)
    assert loaded == ["clip"]
    assert "another encoder: encoders.clip.max_length: 77 -> 60" in said
    assert_as_without(job, tmp_path)
    # Each from another dataset, and the encoder has another name there.
    shutil.move(tmp_path / "out", tmp_path / "newer")
    job.write_text(job.read_text().replace("clip:", "other:"))
    loaded.clear()
    expect(0, "run", job, "--reuse", old, "--reuse", tmp_path / "newer")
    assert loaded == []
    assert_as_without(job, tmp_path)


def test_what_is_damaged_is_named_and_encoded(job: Path, old: Path, tmp_path: Path) -> None:
    shard, rows, record = paths_of(old, 0)
    flip(shard, -3)
    said = expect(0, "run", job, "--reuse", old)
    assert f"{shard} is damaged: row" in said
    assert "t5 encoded: 1\n" in said
    assert "damaged, so encoded: 1\n" in said
    assert_as_without(job, tmp_path)
    for path in (rows, record, shard, old / "null.json"):
        shutil.rmtree(tmp_path / "out")
        path.unlink()
        assert path.name in expect(0, "run", job, "--reuse", old)
        assert_as_without(job, tmp_path)


def test_a_row_that_is_sound_but_another_is_encoded(job: Path, old: Path, tmp_path: Path) -> None:
    """Its checksum in the shard was changed with it; the index states the right one."""
    path = paths_of(old, 0).shard
    reader = open_alone(path)
    last, before = reader.num_rows - 1, path.read_bytes()
    values = bytearray(reader.row("t5", last).numpy().tobytes())
    assert before.endswith(values)
    values[-1] ^= 1
    checksums = int(reader.checksums("t5")[last]), xxhash.xxh3_64_intdigest(bytes(values))
    was, now = (each.to_bytes(8, "little") for each in checksums)
    path.write_bytes(before[: -len(values)].replace(was, now) + values)
    assert open_alone(path).first_damaged() is None
    said = expect(0, "run", job, "--reuse", old)
    assert f"{path} is damaged: row {last} of text_t5 is not the one that its index states" in said
    assert_as_without(job, tmp_path)


def test_loading_an_encoder_late_is_no_part_of_a_units_time(
    job: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a stop that time decides whether a unit fits the grace."""
    late, made, start, begin = [0.0], list[Stages](), pipeline.start, Stages.load

    def slow(*arguments: Any) -> Any:
        late[0] += 1000
        return start(*arguments)

    def load(self: Stages) -> None:
        made.append(self)
        begin(self)

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + late[0])
    monkeypatch.setattr(stages, "time", clock)
    monkeypatch.setattr(pipeline, "start", slow)
    monkeypatch.setattr(Stages, "load", load)
    write_captions(tmp_path / "captions.parquet", [*TEXTS, "another scene"])
    expect(0, "run", job, "--reuse", old)
    assert made[0].load_seconds >= 2000
    assert made[0]._unit_s < 1000


def test_failed_samples_and_other_texts_are_not_found(tmp_path: Path) -> None:
    write_dataset(tmp_path / "old", ["a b", None, "nan", "c"])
    spec = read_manifest(tmp_path / "old").spec
    reuse = Reuse([tmp_path / "old"], tmp_path / "new", spec)
    reuse.check_environment({}, "warn")
    found = reuse.find(["c", "nan", "d", "a b"], {"t5": [2, 2, 2, 3], "clip": [1] * 4}, null=False)
    assert {name: sorted(rows) for name, rows in found.rows.items()} == {
        "t5": [0, 3],
        "clip": [0, 3],
    }
    assert found.environment[COPIED_FROM] == "device cpu, torch 2.0"
    assert found.num_damaged == 0
    assert encoder_fingerprints({**spec, "captions": {"recipe": 1}}) == encoder_fingerprints(spec)


def test_copies_of_another_environment(
    job: Path, old: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The manifest names it; a run beside it that copies nothing is no conflict."""
    here = pipeline.environment("cpu")
    monkeypatch.setattr(pipeline, "environment", lambda *_: {**here, "device": "another"})
    refuse = ("--runtime.on_environment_change", "refuse")
    assert f"{here['device']} -> another" in expect(3, "run", job, "--reuse", old, *refuse)
    assert not (tmp_path / "out").exists()
    write_captions(tmp_path / "captions.parquet", [*TEXTS[:24], "new", *TEXTS[:5]])
    assert "made in another environment" in expect(0, "run", job, "--reuse", old)
    first, last = (read_record(tmp_path / "out", unit) for unit in (0, 3))
    assert f"device {here['device']}" in first.environment[COPIED_FROM]
    assert last.environment == first.environment
    # A unit that another job made without copies, and the other way round.
    newest = (tmp_path / "out").rename(tmp_path / "newest")
    expect(0, "run", job, "--limit", "16", "--reuse", newest)
    units = read_manifest(tmp_path / "out").environments
    assert [each.environment for each in units] == [first.environment]
    record_path(tmp_path / "out", 1).unlink()
    expect(0, "run", job, "--limit", "16")
    assert len(read_manifest(tmp_path / "out").environments) == 2
    record_path(tmp_path / "out", 0).unlink()
    expect(0, "run", job, "--limit", "16", "--reuse", old)


def test_what_cannot_be_reused_is_said_before_anything_is_written(
    job: Path, old: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "is the output itself" in expect(2, "run", job, "--reuse", old, "--output.path", old)
    assert "is not a folder" in expect(2, "run", job, "--reuse", tmp_path / "absent")
    (old / "manifest.json").rename(tmp_path / "aside")
    assert "holds no finished dataset" in expect(2, "run", job, "--reuse", old)
    (tmp_path / "aside").rename(old / "manifest.json")
    said = expect(2, "run", job, "--reuse", old, "--output.dtype", "bfloat16")
    assert "none of this run's encoders" in said
    assert "output.dtype: float32 -> bfloat16" in said
    assert not out.exists()


def test_copied_and_encoded_rows_are_noted(job: Path, old: Path, tmp_path: Path) -> None:
    write_captions(tmp_path / "captions.parquet", [*TEXTS[:8], *(["new"] * 3)])
    expect(0, "run", job, "--reuse", old)
    facts = json.loads((tmp_path / "out/run.json").read_text())
    assert facts["reuse"] == [str(old)]
    assert facts["copies"]["t5 copied"] == 8
    assert facts["copies"]["t5 encoded"] == 1
