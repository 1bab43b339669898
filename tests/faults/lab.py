"""What every check needs: folders, a small job, the bytes of an undisturbed run, and findings."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from jobs import call, dataset_bytes, write_captions, write_job

from make_demo import demo_captions, write_clip, write_t5

TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(120)]
SAMPLES_PER_SHARD = 3
RAM_BYTES = 1 << 28


@dataclass(frozen=True)
class Finding:
    """One line of the table."""

    fault: str
    injection: str
    target: str
    measured: str
    holds: bool | None
    """None: it could not be injected here, and `measured` says why."""
    seconds: float = 0.0


def check_seed(seed: int, check: str) -> int:
    """The seed of one check, so that `--only` gives it the faults it has in a whole run."""
    return random.Random(f"{seed}:{check}").getrandbits(32)


class Lab:
    """A workplace for checks: one seed, one size, one folder."""

    def __init__(self, folder: Path, seed: int, *, long: bool, jobs: int = 1) -> None:
        self.folder, self.seed, self.long, self.jobs = folder, seed, long, jobs
        self.rng = random.Random(seed)
        self._made = 0
        self._undisturbed: dict[tuple[int | None, int], dict[str, bytes]] = {}

    def sow(self, seed: int, check: str) -> None:
        """The faults of one check from here on: the same whatever ran before it, or beside it."""
        self.seed = check_seed(seed, check)
        self.rng = random.Random(self.seed)

    def size(self, short: int, long: int) -> int:
        """How many times to try."""
        return long if self.long else short

    def new(self, name: str, *, ram: bool = False) -> Path:
        """A folder nobody has used; `ram`: where fsync costs nothing, if there is such a place."""
        self._made += 1
        folder = (self._ram if ram else self.folder) / f"{self._made:04d}-{name}"
        folder.mkdir(parents=True)
        return folder

    @cached_property
    def _ram(self) -> Path:
        shm = Path("/dev/shm")
        if not os.access(shm, os.W_OK) or shutil.disk_usage(shm).free < RAM_BYTES:
            return self.folder
        self._ram_folder = tempfile.TemporaryDirectory(prefix="faults-", dir=shm)
        return Path(self._ram_folder.name)

    @cached_property
    def captions(self) -> Path:
        return write_captions(self.new("captions") / "captions.parquet", TEXTS)

    @cached_property
    def encoders(self) -> tuple[Path, Path]:
        folder = self.new("checkpoints")
        corpus = demo_captions(200).column("text").to_pylist()
        return write_t5(folder / "t5", corpus), write_clip(folder / "clip", corpus)

    def job(
        self,
        name: str,
        rows: int | None = None,
        per_shard: int = SAMPLES_PER_SHARD,
        **fields: dict[str, Any],
    ) -> Job:
        """A job of its own; `rows` captions, or all; `fields` by section, such as runtime."""
        folder = self.new(name)
        captions = self.captions
        if rows is not None:
            captions = self.folder / f"captions-{rows}.parquet"
            if not captions.exists():
                write_captions(captions, TEXTS[:rows])
        t5, clip = self.encoders
        path = write_job(folder, captions, t5, clip, samples_per_shard=per_shard)
        job = Job(path, folder / "out", TEXTS[:rows], per_shard)
        for section, values in fields.items():
            job.edit(section, **values)
        return job

    def undisturbed(
        self, rows: int | None = None, per_shard: int = SAMPLES_PER_SHARD
    ) -> dict[str, bytes]:
        """The bytes of a run that nothing disturbs."""
        key = (rows, per_shard)
        if key not in self._undisturbed:
            job = self.job("undisturbed", rows, per_shard)
            code, _, said = call("run", str(job.path))
            assert code == 0, said
            self._undisturbed[key] = dataset_bytes(job.root)
        return self._undisturbed[key]


@dataclass(frozen=True)
class Job:
    """A configuration and where its dataset goes."""

    path: Path
    root: Path
    texts: list[str]
    per_shard: int = SAMPLES_PER_SHARD

    def edit(self, section: str, **values: Any) -> None:
        """Set fields of a section, `a.b` for a nested one."""
        loaded = yaml.safe_load(self.path.read_text())
        owner = loaded
        for part in section.replace("__", ".").split("."):
            owner = owner.setdefault(part, {})
        owner.update(values)
        self.path.write_text(yaml.safe_dump(loaded))

    @property
    def num_units(self) -> int:
        """Units of the plan, with the null embedding."""
        return -(-len(self.texts) // self.per_shard) + 1

    def records(self) -> list[Path]:
        return sorted(self.root.glob("shards/*/shard-*.json"))

    def wrong(self, expected: dict[str, bytes], *, quarantine: bool = False) -> list[str]:
        """What is not as after an undisturbed run; nothing is the aim."""
        found = dataset_bytes(self.root)
        if quarantine:
            found = {k: v for k, v in found.items() if not k.startswith("_quarantine")}
        problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
        problems += [f"{name} is too many" for name in found.keys() - expected.keys()]
        both = expected.keys() & found.keys()
        problems += [f"{name} differs" for name in both if expected[name] != found[name]]
        problems += [f"{path} is left" for path in self.root.rglob(".tmp-*")]
        table = self.root / "manifest.parquet"
        if table.exists():
            ids = pq.read_table(table, columns=["sample_id"]).column(0).to_pylist()
            if ids != [f"s{i}" for i in range(len(self.texts))]:
                problems.append("ids lost, repeated or out of order")
        return sorted(problems)

    def remove(self) -> None:
        shutil.rmtree(self.path.parent)


def wait_for(condition: Any, timeout: float = 120.0, step: float = 0.005) -> bool:
    """Whether `condition()` comes true in time."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step)
    return True


@contextmanager
def timed() -> Iterator[list[float]]:
    """A list that holds the seconds of the block once it ends."""
    spent: list[float] = []
    started = time.monotonic()
    try:
        yield spent
    finally:
        spent.append(time.monotonic() - started)


def first_lines(problems: list[str], count: int = 3) -> str:
    """Some of the problems, for the table."""
    more = f" and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problem.replace(os.linesep, " ")[:200] for problem in problems[:count]) + more
