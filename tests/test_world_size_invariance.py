"""The promise: the same bytes from any number of ranks, whatever the order of claims."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import call, dataset_bytes, execute, write_captions, write_job

TEXTS = [f"a {c} cat number {i} walks" for i, c in enumerate(["red", "blue", "grey"] * 20)]
TEXTS += [None, "", "a red cat number 0 walks", "long " * 60, "눈 위의 고양이 🐈"]


@pytest.fixture(scope="module")
def captions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_captions(tmp_path_factory.mktemp("captions") / "captions.parquet", TEXTS)


@pytest.mark.parametrize("implementation", ["hf", "fused"])
@pytest.mark.parametrize("attention_mask", ["none", "padding"])
def test_same_bytes_from_1_2_and_3_ranks(
    attention_mask: str,
    implementation: str,
    captions: Path,
    tiny_t5: Path,
    tiny_clip: Path,
    tmp_path: Path,
) -> None:
    made = {}
    settings = [f"--encoders.{name}.implementation={implementation}" for name in ("t5", "clip")]
    for world_size in (0, 2, 3):  # 0: without torchrun
        folder = tmp_path / str(world_size)
        folder.mkdir()
        job = write_job(folder, captions, tiny_t5, tiny_clip, attention_mask=attention_mask)
        done = execute("run", str(job), *settings, nproc=world_size)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(": complete, ") == 1, "the summary is of all ranks, and said once"
        made[world_size] = dataset_bytes(folder / "out")
        assert not [name for name in made[world_size] if ".tmp-" in name]
    assert len(made[0]) > 20
    assert made[0] == made[2] == made[3]
    assert call("verify", str(tmp_path / "2" / "out"), "--level", "deep")[0] == 0


def test_srun_tasks_share_the_work(captions: Path, tiny_t5: Path, tmp_path: Path) -> None:
    """Two Slurm tasks, one after the other: the first does everything, the second finds it done."""
    job = write_job(tmp_path, captions, tiny_t5, None)
    step = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n1"}
    for task in ("0", "1"):
        done = execute("run", str(job), env={**step, "SLURM_PROCID": task})
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(": complete, ") == (task == "0")
    assert call("status", str(tmp_path / "out"))[0] == 0
