"""F18: the data loader of a training job, killed and resumed on the same and on another world."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from faults.lab import TEXTS, Lab
from faults.processes import HANGS_S, wait_for
from handmade import write_dataset

from embed_precompute import EmbeddingDataset, EmbeddingLoader

NUM_SAMPLES = 25
BATCH_SIZE = 2
WORLD_SIZES = (1, 2, 3, 4)
NUM_WORKERS = (0, 1, 2, 3)


@dataclass(frozen=True)
class Training:
    """A job of `world_size` ranks that only reads; each rank is a process with loader workers."""

    dataset: EmbeddingDataset
    folder: Path
    world_size: int
    num_workers: int

    def run(self, state: Any, stop: int | None) -> tuple[list[str], list[Any]]:
        """Ids in global order, and the ranks' last states.

        After step `stop` every rank is killed, while its workers fetch ahead; None: to the end of
        the epoch.
        """
        self.folder.mkdir()
        ranks = range(self.world_size)
        context = multiprocessing.get_context("fork")  # starting an interpreter takes seconds
        gang = [context.Process(target=self._train, args=(r, state, stop)) for r in ranks]
        for process in gang:
            process.start()
        self._end(gang) if stop is None else self._kill(gang)
        logs = [self._log(rank) for rank in ranks]
        steps = itertools.zip_longest(*([line["ids"] for line in log[1:]] for log in logs))
        return interleaved(steps), [log[-1]["state"] for log in logs]

    def _train(self, rank: int, state: Any, stop: int | None) -> None:
        """One rank, in its own process: a line of its log per step."""
        os.setsid()
        loader = EmbeddingLoader(
            self.dataset,
            BATCH_SIZE,
            ends="uneven",
            rank=rank,
            world_size=self.world_size,
            num_workers=self.num_workers,
            collate_fn=ids_of,
        )
        if state is not None:
            loader.load_state_dict(state)
        with (self.folder / str(rank)).open("a", buffering=1) as log:

            def record(ids: list[str]) -> None:
                log.write(json.dumps({"ids": ids, "state": loader.state_dict()}) + "\n")

            record([])
            batches = iter(loader)
            for ids in itertools.islice(batches, stop):
                record(ids)
            if stop is None:
                record([])
            else:
                log.write("{}\n")
                time.sleep(HANGS_S)

    def _log(self, rank: int) -> list[Any]:
        path = self.folder / str(rank)
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line]

    def _kill(self, gang: list[BaseProcess]) -> None:
        """SIGKILL once all ranks stand at their step."""

        def stands(rank: int) -> bool:
            path = self.folder / str(rank)
            return path.exists() and path.read_text().endswith("{}\n")

        assert wait_for(lambda: all(map(stands, range(len(gang)))), HANGS_S, 0.002)
        for process in gang:
            process.kill()
        for process in gang:
            process.join()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # workers see it after some seconds

    def _end(self, gang: list[BaseProcess]) -> None:
        for process in gang:
            process.join(HANGS_S)
        codes = [process.exitcode for process in gang]
        for process in gang:
            process.kill()
        assert set(codes) == {0}


def ids_of(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["id"] for sample in samples]


def interleaved(steps: Any) -> list[str]:
    """Ids in the order of the epoch; `steps` gives each step's ids by rank, None for no batch."""
    dealt = []
    for batches in steps:
        for turn in itertools.zip_longest(*(batch or [] for batch in batches)):
            dealt += [sample_id for sample_id in turn if sample_id is not None]
    return dealt


def test_f18_a_training_job_killed_and_resumed(lab: Lab) -> None:
    """SIGKILL at a step, then the rest of the epoch: on the same world and on others, every sample
    comes once, in the same global order."""
    root = lab.new()
    write_dataset(root, TEXTS[:NUM_SAMPLES])
    dataset = EmbeddingDataset(root, "rows")
    (order,) = EmbeddingLoader(dataset, NUM_SAMPLES, rank=0, world_size=1, collate_fn=ids_of)
    pairs = list(itertools.product(WORLD_SIZES, NUM_WORKERS))
    for world_size, num_workers in lab.sample(pairs, 4):
        steps = -(-NUM_SAMPLES // (BATCH_SIZE * world_size))
        for stop in lab.sample(range(steps + 1), 2):
            print(f"{world_size} ranks x {num_workers} workers, killed at step {stop}")
            killed = Training(dataset, lab.new(), world_size, num_workers)
            before, states = killed.run(None, stop)
            consumed = min(NUM_SAMPLES, stop * BATCH_SIZE * world_size)
            assert before == order[:consumed]
            assert states[0]["consumed"] == consumed
            other = lab.rng.choice([pair for pair in pairs if pair[0] != world_size])
            for pair in pairs if lab.long else ((world_size, num_workers), other):
                after, ended = Training(dataset, lab.new(), *pair).run(states[0], None)
                assert before + after == order, pair
                assert {(state["epoch"], state["consumed"]) for state in ended} == {(1, 0)}
