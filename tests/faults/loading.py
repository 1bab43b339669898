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

from handmade import write_dataset

from embed_precompute import EmbeddingDataset, EmbeddingLoader
from faults.lab import TEXTS, Finding, Lab, first_lines, wait_for

NUM_SAMPLES = 25
BATCH_SIZE = 2
WORLD_SIZES = (1, 2, 3, 4)
NUM_WORKERS = (0, 1, 2, 3)
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Training:
    """A job of `world_size` ranks that only reads; each rank is a process with loader workers."""

    dataset: EmbeddingDataset
    folder: Path
    world_size: int
    num_workers: int

    def run(self, state: Any, stop: int | None) -> tuple[list[str], list[Any], list[str]]:
        """Ids in global order, the ranks' last states, and what went wrong.

        After step `stop` every rank is killed, while its workers fetch ahead; None: to the end of
        the epoch.
        """
        self.folder.mkdir()
        ranks = range(self.world_size)
        context = multiprocessing.get_context("fork")  # starting an interpreter takes seconds
        gang = [context.Process(target=self._train, args=(r, state, stop)) for r in ranks]
        for process in gang:
            process.start()
        problems = self._kill(gang, stop) if stop is not None else self._end(gang)
        logs = [self._log(rank) for rank in ranks]
        steps = itertools.zip_longest(*([line["ids"] for line in log[1:]] for log in logs))
        return interleaved(steps), [log[-1]["state"] for log in logs], problems

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
                time.sleep(TIMEOUT_S)

    def _log(self, rank: int) -> list[Any]:
        path = self.folder / str(rank)
        lines = path.read_text().splitlines() if path.exists() else []
        return [line for line in map(json.loads, lines) if line]

    def _kill(self, gang: list[BaseProcess], stop: int) -> list[str]:
        def stands(rank: int) -> bool:
            path = self.folder / str(rank)
            return path.exists() and path.read_text().endswith("{}\n")

        stood = wait_for(lambda: all(map(stands, range(len(gang)))), TIMEOUT_S, 0.002)
        for process in gang:
            process.kill()
        for process in gang:
            process.join()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid or 0, signal.SIGKILL)  # workers see it after some seconds
        return [] if stood else [f"{self.world_size} ranks did not come to step {stop}"]

    def _end(self, gang: list[BaseProcess]) -> list[str]:
        for process in gang:
            process.join(TIMEOUT_S)
        codes = [process.exitcode for process in gang]
        for process in gang:
            process.kill()
        return [f"exit codes {codes}"] * any(code != 0 for code in codes)


def ids_of(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["id"] for sample in samples]


def interleaved(steps: Any) -> list[str]:
    """Ids in the order of the epoch; `steps` gives each step's ids by rank, None for no batch."""
    dealt = []
    for batches in steps:
        for turn in itertools.zip_longest(*(batch or [] for batch in batches)):
            dealt += [sample_id for sample_id in turn if sample_id is not None]
    return dealt


def f18_loader(lab: Lab) -> list[Finding]:
    """SIGKILL at a step, then the rest of the epoch: on the same world and on others."""
    write_dataset(lab.folder / "f18-dataset", TEXTS[:NUM_SAMPLES])
    dataset = EmbeddingDataset(lab.folder / "f18-dataset", "rows")
    whole = EmbeddingLoader(dataset, NUM_SAMPLES, rank=0, world_size=1, collate_fn=ids_of)
    (order,) = whole
    problems: list[str] = []
    kills = resumed = 0
    pairs = list(itertools.product(WORLD_SIZES, NUM_WORKERS))
    for world_size, num_workers in pairs if lab.long else lab.rng.sample(pairs, 4):
        steps = -(-NUM_SAMPLES // (BATCH_SIZE * world_size))
        for stop in range(steps + 1) if lab.long else lab.rng.sample(range(steps + 1), 2):
            killed = Training(dataset, lab.new("f18") / "ranks", world_size, num_workers)
            before, states, wrong = killed.run(None, stop)
            kills += 1
            name = f"{world_size} ranks x {num_workers} workers, step {stop}"
            expected = min(NUM_SAMPLES, stop * BATCH_SIZE * world_size)
            if before != order[:expected] or states[0]["consumed"] != expected:
                wrong.append(f"before the kill {before}, {states[0]}")
            other = lab.rng.choice([pair for pair in pairs if pair[0] != world_size])
            for pair in pairs if lab.long else ((world_size, num_workers), other):
                rest = Training(dataset, lab.new("f18") / "ranks", *pair)
                after, ended, failed = rest.run(states[0], None)
                resumed += 1
                wrong += failed
                if before + after != order:
                    wrong.append(f"on {pair}: {before} then {after}")
                if any((state["epoch"], state["consumed"]) != (1, 0) for state in ended):
                    wrong.append(f"on {pair}: ended at {ended}")
            problems += [f"{name}: {each}" for each in wrong]
    return [
        Finding(
            "F18", "loader SIGKILLed at a step (worlds 1-4 x workers 0-3), resumed on the same and "
            "on other worlds and workers",
            "each sample exactly once per epoch, in the same global order",
            f"{kills} kills, {resumed} resumed: {len(problems)} wrong {first_lines(problems)}",
            not problems,
        )
    ]  # fmt: skip
