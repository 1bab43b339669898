"""`runtime.tracker`: the curves of TensorBoard and of Weights & Biases."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from jobs import edit, expect, write_captions, write_job

from embed_precompute.job import tracker


@pytest.fixture
def job(tiny_t5: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", [f"scene {i}" for i in range(9)])
    return write_job(tmp_path, captions, tiny_t5, None, samples_per_shard=3)


FIGURES = {"captions", "units", "captions_per_s", "free_bytes", "bytes_left", "failed_samples"}


def test_tensorboard(job: Path, tmp_path: Path) -> None:
    """A job that is resumed adds to the curves; the last point has all captions."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    edit(job, "runtime", tracker="tensorboard", progress_interval_s=0)
    expect(0, "run", job)
    events = EventAccumulator(str(tmp_path / "out" / "logs" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) >= FIGURES
    assert (events.Scalars("units")[-1].step, events.Scalars("units")[-1].value) == (9, 3)
    assert [event.step for event in events.Scalars("captions")][-1] == 9
    expect(0, "verify", tmp_path / "out")
    expect(0, "run", job, "--runtime.tracker", "none")  # no part of the fingerprint


def test_wandb_offline(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    edit(job, "runtime", tracker="wandb", progress_interval_s=0)
    put: list[tuple[dict[str, float], int]] = []
    begin = tracker._wandb

    def begun(*arguments: Any) -> Any:
        log, close = begin(*arguments)
        return (lambda figures, step: (put.append((figures, step)), log(figures, step))), close

    monkeypatch.setattr(tracker, "_wandb", begun)
    said = expect(0, "run", job)
    assert "runtime.tracker" not in said
    figures, step = put[-1]
    assert step == figures["captions"] == 9
    assert figures.keys() >= FIGURES
    assert list((tmp_path / "out" / "logs" / "wandb").glob("offline-run-*/run-*.wandb"))


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_an_error_at_the_start(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == kind else find(name, *rest)
    )
    said = expect(2, "run", job, "--runtime.tracker", kind)
    assert f"runtime.tracker is {kind}, and the package {kind} is not installed" in said
    assert f"`pip install {kind}`" in said
    assert not (tmp_path / "out").exists()


def test_a_tracker_that_fails_stops_no_job(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def put(figures: Any, step: int) -> None:
        raise ConnectionError("the server\nis gone")

    monkeypatch.setattr(tracker, "check_tracker", lambda kind: None)
    monkeypatch.setattr(tracker, "_wandb", lambda root, plan: (put, lambda: None))
    edit(job, "runtime", tracker="wandb", progress_interval_s=0)
    said = expect(0, "run", job)
    assert said.count("runtime.tracker wandb failed (ConnectionError: the server is gone)") == 1
