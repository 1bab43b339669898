"""Which process this is among its peers. The only module that reads the launcher's environment.

`DistContext.detect` works the same under torchrun, srun and accelerate, and for a single process.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from embed_precompute.errors import InputError


@dataclass(frozen=True)
class DistContext:
    """This process among its peers, in torchrun's terms."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    source: str = "alone"
    """Where the numbers come from: torchrun, slurm, alone, or group (torch's process group)."""
    run_id: str = ""
    restart_count: int = 0
    store_host: str | None = None
    store_port: int = 0

    @classmethod
    def detect(cls, environ: Mapping[str, str] | None = None) -> DistContext:
        """Read `environ` (this process's by default); torchrun's variables win over Slurm's."""
        env = os.environ if environ is None else environ
        if "RANK" in env:
            return cls._from_torchrun(env)
        if "SLURM_PROCID" in env and _number(env, "SLURM_NTASKS", 1) >= 1 and _in_step(env):
            return cls._from_slurm(env)
        return cls()

    @classmethod
    def of_training(cls, environ: Mapping[str, str] | None = None) -> DistContext:
        """This process in a training job: from torch's process group, if there is one.

        Without a process group the launcher's environment is read. Each element of a Slurm array
        counts as a training of its own: ranks that train together run in one `srun`.
        """
        from torch import distributed as group

        if group.is_available() and group.is_initialized():
            return cls(rank=group.get_rank(), world_size=group.get_world_size(), source="group")
        env = os.environ if environ is None else environ
        return cls.detect({k: v for k, v in env.items() if not k.startswith("SLURM_ARRAY_")})

    @classmethod
    def _from_torchrun(cls, env: Mapping[str, str]) -> DistContext:
        agent_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(
            rank=_number(env, "RANK", 0),
            world_size=_number(env, "WORLD_SIZE", 1),
            local_rank=_number(env, "LOCAL_RANK", 0),
            source="torchrun",
            run_id=env.get("TORCHELASTIC_RUN_ID", ""),
            restart_count=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
            store_host=env.get("MASTER_ADDR") if agent_store else None,
            store_port=_number(env, "MASTER_PORT", 0),
        )._checked()

    @classmethod
    def _from_slurm(cls, env: Mapping[str, str]) -> DistContext:
        tasks = _number(env, "SLURM_NTASKS", 1)
        # All elements of a Slurm job array form one world: element i holds ranks [i * tasks,
        # (i+1) * tasks).
        count = _number(env, "SLURM_ARRAY_TASK_COUNT", 1)
        first = _number(env, "SLURM_ARRAY_TASK_MIN", 0)
        step = max(1, _number(env, "SLURM_ARRAY_TASK_STEP", 1))
        # If the array has gaps (--array=1,5,9), the element is taken modulo the number of elements.
        # Two elements may then get the same ranks and begin with the same units. Units that were
        # dealt to no rank are computed at the end, in the sweep (see `Claims`).
        element = (_number(env, "SLURM_ARRAY_TASK_ID", first) - first) // step % count
        return cls(
            rank=element * tasks + _number(env, "SLURM_PROCID", 0),
            world_size=count * tasks,
            local_rank=_number(env, "SLURM_LOCALID", 0),
            source="slurm",
            run_id=env.get("SLURM_ARRAY_JOB_ID") or env.get("SLURM_JOB_ID", ""),
            restart_count=_number(env, "SLURM_RESTART_COUNT", 0),
        )._checked()

    def _checked(self) -> DistContext:
        if not 0 <= self.rank < self.world_size:
            raise InputError(
                f"rank {self.rank} of {self.world_size} from {self.source}: expected a rank below "
                "the world size. Check RANK and WORLD_SIZE, or SLURM_PROCID and SLURM_NTASKS."
            )
        return self

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def has_agent(self) -> bool:
        """Whether torchrun's agent is the parent of this process, and waits for it."""
        return self.source == "torchrun" and bool(self.run_id)


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name)
    if text is None or text == "":
        return default
    try:
        return int(text)
    except ValueError:
        raise InputError(f"{name} is {text!r} in the environment: expected a number.") from None


def _in_step(env: Mapping[str, str]) -> bool:
    """True inside `srun`; the batch script itself has SLURM_PROCID=0 too and must run alone."""
    return "SLURM_STEP_ID" in env and env.get("SLURM_STEP_NODELIST") is not None
