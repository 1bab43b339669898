"""Failed samples, full disks, and files that are not what they seem: bounded and named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import paths_of
from jobs import call, write_captions, write_job

from embed_precompute.audit.info import read_status
from embed_precompute.encoders.encoder import TextEncoder
from embed_precompute.job.writer import UnitWriter
from embed_precompute.store.plan import read_plan
from embed_precompute.store.records import read_record
from embed_precompute.store.rows import read_samples

TEXTS = [f"scene {i} with {'many ' * (i % 5)}people" for i in range(20)]


@pytest.fixture
def job(tiny_clip: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    return write_job(tmp_path, captions, None, tiny_clip, samples_per_shard=10)


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
    original, count = TextEncoder.submit, [0]

    def submit(self: Any, batch: Any) -> Any:
        count[0] += 1
        if count[0] > len(list(self.resolved.every_shape())) + 2:
            raise RuntimeError("the device is gone")
        return original(self, batch)

    monkeypatch.setattr(TextEncoder, "submit", submit)
    code, _, said = call("run", str(job))
    assert code == 1
    assert "the device is gone" in said


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


def test_a_caption_of_absurd_length_is_a_fact_of_the_input(tiny_clip: Path, tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "c.parquet", ["a", "b " * (1 << 20), "c"])
    job = write_job(tmp_path, captions, None, tiny_clip)
    assert call("run", str(job))[0] == 0
    record = read_record(tmp_path / "out", 0)
    assert (record.status["ok"], record.status["invalid_text"]) == (2, 1)
