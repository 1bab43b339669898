"""F15: datasets of others that are damaged or made to hurt whoever reads them; damaged captions.

Mutated safetensors, JSON (digests made right), index and rows files, names that leave the folder,
bombs: an error of ours, no code run, nothing opened outside the root, 512 MiB. A damaged caption
table ends in an error, or costs the process that reads it. Checkpoints: tests/encoders.
"""

from __future__ import annotations

import json
import multiprocessing

from faults.hostile_worker import attack
from faults.lab import Lab
from faults.processes import HANGS_S

BATCH = 150


def test_f15_hostile_files(lab: Lab) -> None:
    """In processes that import no transformers."""
    spawn = multiprocessing.get_context("spawn")
    for _ in range(lab.size(1, 67)):
        folder, report = lab.new(), lab.new()
        folder.mkdir()
        seed = lab.rng.getrandbits(32)
        process = spawn.Process(target=attack, args=(str(folder), seed, BATCH, str(report)))
        process.start()
        process.join(HANGS_S)
        process.kill()
        trials = [json.loads(line) for line in report.read_text().splitlines()]
        assert len(trials) == BATCH, f"ended after {trials[-1:]}"
        assert [trial for trial in trials if trial[1]] == []
