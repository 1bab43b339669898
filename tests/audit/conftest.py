"""A finished dataset with its job; every test damages a copy of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from jobs import call, dataset_bytes, write_captions, write_job

TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(30)]


@pytest.fixture(scope="session")
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
