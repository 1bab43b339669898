"""What every fault needs: folders, small jobs, and the bytes of a run that nothing disturbs.

The short form of the suite is part of every pytest. `pytest tests/faults --long` runs the same
faults in their full number (over an hour); `--seed` draws other ones.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from faults.hooks import Hook
from faults.processes import Gang, agent, finish, launch, program
from jobs import clean_environment, dataset_bytes, edit, expect, write_captions, write_job

TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(120)]
UNIT_S = 0.03
"""What a unit takes more in many of these runs, so that faults meet work."""


def pace(seconds: float = UNIT_S, **more: Any) -> Hook:
    """Each unit takes `seconds` longer; see `hooks`."""
    return "pace", {"seconds": seconds, **more}


@dataclass(frozen=True)
class Job:
    """A configuration, where its dataset goes, and the bytes that dataset must have."""

    path: Path
    num_units: int
    """Units of the plan, with the null embedding."""
    undisturbed: dict[str, bytes]
    options: tuple[str, ...] = ()
    """Of `run`, after the configuration."""

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def root(self) -> Path:
        return self.folder / "out"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def records(self) -> list[Path]:
        return sorted(self.root.glob("shards/*/shard-*.json"))

    def start(self, *hooks: Hook) -> ForkServerProcess:
        """`run` in a process of its own; what it says is in the log."""
        environment = clean_environment()
        words = ["run", str(self.path), *self.options]
        return launch(program, words, str(self.log), environment, hooks)

    def gang(
        self,
        world: int,
        *hooks: Hook,
        max_restarts: int = 0,
        of: dict[int, list[Hook]] | None = None,
    ) -> Gang:
        """`run` on `world` ranks under an agent; `of` has more hooks for some ranks."""
        by_rank = [[*hooks, *(of or {}).get(rank, ())] for rank in range(world)]
        board = self.folder / f"{time.monotonic_ns()}.pids"
        words = ["run", str(self.path), *self.options]
        process = launch(agent, words, str(self.log), by_rank, max_restarts, str(board))
        assert process.pid is not None
        return Gang(process, process.pid, board)

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def execute(self, *hooks: Hook) -> tuple[int, str]:
        """`run` in a process of its own, to the end: (exit code, what it said)."""
        self.log.unlink(missing_ok=True)
        code = finish(self.start(*hooks))
        return code, self.said()

    def assert_resumes(self) -> None:
        """The same command, undisturbed, ends with the undisturbed bytes."""
        expect(0, "run", self.path, *self.options)
        self.assert_undisturbed()

    def assert_undisturbed(self) -> None:
        """Every byte is that of an undisturbed run; no file is missing, none too many."""
        assert_same(dataset_bytes(self.root), self.undisturbed)

    def assert_nothing_left(self) -> None:
        assert not list(self.root.rglob(".tmp-*"))


def assert_same(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
    """Equal datasets, but for what is in quarantine; names of files, not bytes, on failure."""
    found = {name: found[name] for name in found if not name.startswith("_quarantine")}
    assert sorted(found) == sorted(expected)
    assert [name for name in expected if found[name] != expected[name]] == []


@dataclass
class Undisturbed:
    """Captions and undisturbed runs, made once a session."""

    folder: Path
    t5: Path
    clip: Path
    made: dict[tuple[int, int], dict[str, bytes]] = field(default_factory=dict)

    def write_job(self, folder: Path, rows: int, per_shard: int) -> Path:
        folder.mkdir(parents=True)
        captions = self.folder / f"captions-{rows}.parquet"
        if not captions.exists():
            write_captions(captions, TEXTS[:rows])
        return write_job(folder, captions, self.t5, self.clip, samples_per_shard=per_shard)

    def bytes_of(self, rows: int, per_shard: int) -> dict[str, bytes]:
        """The bytes of a run that nothing disturbs."""
        if (rows, per_shard) not in self.made:
            path = self.write_job(self.folder / f"{rows}-{per_shard}", rows, per_shard)
            expect(0, "run", path)
            ids = pq.read_table(path.parent / "out/manifest.parquet", columns=["sample_id"])
            assert ids.column(0).to_pylist() == [f"s{i}" for i in range(rows)]
            self.made[rows, per_shard] = dataset_bytes(path.parent / "out")
        return self.made[rows, per_shard]


@dataclass
class Lab:
    """A workplace for one test: one size, one seed, one folder, which is on a RAM disk if there is
    one, for fsync costs nothing there."""

    folder: Path
    runs: Undisturbed
    rng: random.Random
    long: bool
    _made: int = 0

    def size(self, short: int, long: int) -> int:
        """How many times to try."""
        return long if self.long else short

    def sample(self, every: Sequence[Any], count: int) -> Sequence[Any]:
        """`count` of them; all in the long form."""
        return every if self.long else self.rng.sample(every, count)

    def new(self) -> Path:
        """A path that nobody has used."""
        self._made += 1
        return self.folder / f"{self._made:04d}"

    def copy(self, whole: Path) -> Path:
        return shutil.copytree(whole, self.new())

    def job(self, rows: int = 120, per_shard: int = 3, **runtime: Any) -> Job:
        """A job of its own over the first `rows` captions."""
        path = self.runs.write_job(self.new(), rows, per_shard)
        if runtime:
            edit(path, "runtime", **runtime)
        return Job(path, -(-rows // per_shard) + 1, self.runs.bytes_of(rows, per_shard))
