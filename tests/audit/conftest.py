"""A finished dataset with its job; every test damages a copy of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from jobs import dataset_bytes, expect, write_captions, write_job

TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(30)]


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, tiny_clip: Path) -> Path:
    """The configuration of a job that has run; its dataset lies beside it."""
    folder = tmp_path_factory.mktemp("finished")
    captions = write_captions(folder / "captions.parquet", TEXTS)
    job = write_job(folder, captions, tiny_t5, tiny_clip, attention_mask="padding")
    expect(0, "run", job)
    return job


@pytest.fixture(scope="session")
def sound(job: Path) -> dict[str, bytes]:
    return dataset_bytes(job.with_name("out"))


@pytest.fixture
def root(job: Path, tmp_path: Path) -> Path:
    return shutil.copytree(job.with_name("out"), tmp_path / "out")
