"""F15: files made to hurt whoever reads them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faults.hostile_worker import attack
from faults.lab import Finding, Lab, first_lines

BATCH = 250
MAX_MIB = 512
MAX_S = 2.0
Trial = dict[str, Any]


def f15_hostile(lab: Lab) -> list[Finding]:
    """Mutated files of every kind, read in processes that import no transformers."""
    problems: list[str] = []
    kinds: Counter[str] = Counter()
    slowest, largest = 0.0, 0
    for batch, (code, trials) in enumerate(_batches(lab, lab.size(500, 10_000) // BATCH)):
        if code != 0 or len(trials) != BATCH:
            last = trials[-1]["what"] if trials else "none"
            problems.append(f"batch {batch}: exit {code} after {last}")
        for trial in trials:
            kinds[trial["what"].split(":")[0]] += 1
            slowest = max(slowest, trial["seconds"])
            largest = max(largest, trial["peak_mib"])
            problems += [f"{trial['what'].split(':')[0]}: {p}" for p in trial["problems"]]
            if trial["seconds"] > MAX_S:
                problems.append(f"{trial['what']} over {MAX_S} s")
            if trial["peak_mib"] > MAX_MIB:
                problems.append(f"{trial['what']} over {MAX_MIB} MiB")
    distinct = [f"{n} x {problem}" for problem, n in Counter(problems).most_common()]
    listed = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
    return [
        Finding(
            "F15", "mutated safetensors, JSON (digests made right), index, rows and caption "
            "parquet; traversal names; bombs",
            "no crash, no traceback, no code, nothing outside the root, 512 MiB, 2 s each",
            f"{sum(kinds.values())} files ({listed}): {len(problems)} wrong, slowest "
            f"{slowest:.2f} s, largest {largest} MiB resident {first_lines(distinct, 25)}",
            not problems,
        )
    ]  # fmt: skip


def _batches(lab: Lab, count: int) -> Iterator[tuple[int | None, list[Trial]]]:
    """Exit code and trials of `count` processes; a core each, for only their own time counts."""
    folders = [(lab.new("f15", ram=True), lab.rng.getrandbits(32)) for _ in range(count)]
    spawn = multiprocessing.get_context("spawn")

    def run(folder: Path, seed: int) -> tuple[int | None, list[Trial]]:
        report = folder / "report.jsonl"
        process = spawn.Process(target=attack, args=(str(folder), seed, BATCH, str(report)))
        process.start()
        process.join(BATCH * MAX_S + 60)
        if process.exitcode is None:
            process.kill()
            process.join()
        trials = [json.loads(line) for line in report.read_text().splitlines()]
        if process.exitcode == 0:
            shutil.rmtree(folder)
        return process.exitcode, trials

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        yield from pool.map(lambda batch: run(*batch), folders)
