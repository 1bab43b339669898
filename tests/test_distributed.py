"""Who this process is, read from the launcher's environment."""

from __future__ import annotations

import pytest

from embed_precompute.distributed import DistContext
from embed_precompute.errors import InputError


def variables(text: str) -> dict[str, str]:
    return dict(word.split("=") for word in text.split())


TORCHRUN = variables("""
    RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=29500
    TORCHELASTIC_RUN_ID=abc TORCHELASTIC_RESTART_COUNT=1 TORCHELASTIC_USE_AGENT_STORE=True
""")
SRUN = variables("""
    SLURM_PROCID=2 SLURM_NTASKS=4 SLURM_LOCALID=0 SLURM_TASKS_PER_NODE=2(x2) SLURM_STEP_ID=0
    SLURM_STEP_NODELIST=n[1-2] SLURM_JOB_ID=77
""")
ARRAY = variables("""
    SLURM_ARRAY_TASK_ID=7 SLURM_ARRAY_TASK_MIN=3 SLURM_ARRAY_TASK_STEP=2 SLURM_ARRAY_TASK_COUNT=5
""")


def test_detects_torchrun_before_slurm() -> None:
    dist = DistContext.detect({**SRUN, **TORCHRUN})
    assert (dist.rank, dist.world_size, dist.local_rank) == (3, 8, 1)
    assert (dist.source, dist.store_host, dist.store_port) == ("torchrun", "localhost", 29500)


def test_detects_srun() -> None:
    dist = DistContext.detect(SRUN)
    assert (dist.rank, dist.world_size, dist.local_rank) == (2, 4, 0)
    assert (dist.source, dist.store_host) == ("slurm", None)


def test_a_slurm_array_of_steps_is_one_row_of_ranks() -> None:
    dist = DistContext.detect({**SRUN, **ARRAY})
    assert (dist.rank, dist.world_size) == (2 * 4 + 2, 20)
    alone = DistContext.of_training({**SRUN, **ARRAY})  # a training is one element's
    assert (alone.rank, alone.world_size) == (2, 4)


def test_a_batch_script_without_srun_is_alone() -> None:
    assert DistContext.detect({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}) == DistContext()
    assert DistContext.detect({}) == DistContext()


def test_a_wrong_environment_is_named() -> None:
    with pytest.raises(InputError, match="WORLD_SIZE is 'x'"):
        DistContext.detect({"RANK": "0", "WORLD_SIZE": "x"})
    with pytest.raises(InputError, match="rank 9 of 8"):
        DistContext.detect({**TORCHRUN, "RANK": "9"})
