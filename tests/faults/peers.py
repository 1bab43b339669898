"""F8, F9, F11, F12: two jobs on one output, a changed input, clocks, a network file system."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from jobs import write_captions

from faults.kills import UNIT_S
from faults.lab import Finding, Job, Lab, first_lines, wait_for
from faults.processes import execute, finish, start, start_gang

WASTE = 0.05


def f08_two_jobs(lab: Lab) -> list[Finding]:
    """Two jobs of one plan at once, of 1 to 3 ranks each; what both encode is wasted."""
    problems: list[str] = []
    wasted: list[tuple[float, str]] = []
    for trial in range(lab.size(5, 50)):
        job = lab.job("f08", per_shard=1)  # many units, so that the tail is not all
        worlds = [1, 1] if trial == 0 else [lab.rng.randint(1, 3), lab.rng.randint(1, 3)]
        begun = job.path.with_name("begun")
        pace = ("pace", {"seconds": UNIT_S * 2, "log": str(begun)})
        gangs = []
        for k, world in enumerate(worlds):
            log = job.path.with_name(f"log{k}")
            gangs.append(start_gang("run", str(job.path), log=log, world=world, hooks=[pace]))
            time.sleep(lab.rng.choice((0.0, 0.0, 0.5, 1.5, 3.0)))
        codes = [gang.finish() for gang in gangs]
        problems += [f"{worlds}: exit codes {codes}"] * any(codes)
        problems += [f"{worlds}: {wrong}" for wrong in job.wrong(lab.undisturbed(per_shard=1))]
        starts = Counter(int(line.split()[1]) for line in begun.read_text().splitlines())
        twice = sum(starts.values()) - len(starts)
        # At the end every rank may be at units that another one has, too: one that it encodes,
        # one that is read ahead and one that waits for the writer.
        tail = sum(worlds) * 3
        share = max(0, twice - tail) / job.num_units
        wasted.append((share, f"{worlds}: {twice} of {job.num_units} units, tail {tail}"))
        job.remove()
    mean = sum(share for share, _ in wasted) / len(wasted)
    worst = max(wasted)
    return [
        Finding(
            "F8", "two jobs with one plan on one output, at once",
            "same bytes as one undisturbed job",
            f"{len(wasted)} trials: {len(problems)} wrong {first_lines(problems)}",
            not problems,
        ),
        Finding(
            "F8 waste", "two jobs with one plan on one output, at once",
            "at most 5 % of units wasted outside the final tail",
            f"wasted {mean:.1%} on average, worst {worst[0]:.1%} ({worst[1]})",
            mean <= WASTE,
        ),
    ]  # fmt: skip


FIELDS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("encoders.t5", {"max_length": 20}, "max_length"),
    ("encoders.t5", {"attention_mask": "padding"}, "attention_mask"),
    ("encoders.t5", {"batch_tokens": 48}, "encoders.t5.shapes"),
    ("encoders.t5", {"dtype": "bfloat16"}, "encoders.t5.dtype"),
    ("encoders.t5", {"seq_align": 5}, "encoders.t5"),
    ("encoders.clip", {"stream_tokens": 999}, "encoders.clip.shapes"),
    ("encoders.clip", {"buckets": [16]}, "encoders.clip.implementation: fused -> hf"),
    ("encoders.clip", {"dtype": "bfloat16"}, "encoders.clip.dtype"),
    ("captions", {"normalize": ["nfc"]}, "captions.normalize"),
    ("captions", {"id_column": None}, "id_column"),
    ("captions", {"text_column": "id"}, "text"),
    ("captions.recipe", {"kind": "template", "template": "a {text}"}, "recipe"),
    ("output", {"samples_per_shard": 7}, "samples_per_shard"),
    ("output", {"dtype": "bfloat16"}, "output.dtype"),
)
NOT_FIELDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("runtime", {"prefetch_units": 3}),
    ("runtime", {"write_queue_batches": 1}),
    ("runtime", {"max_failed_samples": 7}),
    ("runtime", {"progress_interval_s": 5.0}),
    ("runtime", {"on_environment_change": "refuse"}),
)


def f09_another_spec(lab: Lab) -> list[Finding]:
    """While a job runs: one field changed, each in turn; then fields that are not of the spec."""
    job = lab.job("f09")
    log = job.path.with_name("log")
    refused = job.path.with_name("refused")
    pace = ("pace", {"seconds": 0.5, "until": str(refused)})
    first = start("run", str(job.path), log=log, hooks=[pace])
    wait_for(lambda: len(job.records()) > 0)
    problems: list[str] = []
    slowest = 0.0
    running = 0
    for section, fields, named in FIELDS:
        other = _copy(lab, job)
        other.edit(section, **fields)
        running += first.exitcode is None
        began = time.monotonic()
        code, said = execute("run", str(other.path), log=other.path.with_name("log"))
        slowest = max(slowest, time.monotonic() - began)
        if code != 3 or named not in said or "->" not in said or "Traceback" in said:
            problems.append(f"{section} {fields}: exit {code} {said[-300:]}")
    refused.touch()
    code = finish(first)
    problems += [f"the first job: exit {code} {log.read_text()[-200:]}"] * (code != 0)
    for section, fields in NOT_FIELDS:
        other = _copy(lab, job)
        other.edit(section, **fields)
        code, said = execute("run", str(other.path), log=other.path.with_name("log"))
        problems += [f"{section} {fields}: exit {code} {said[-200:]}"] * (code != 0)
    problems += job.wrong(lab.undisturbed())
    return [
        Finding(
            "F9", f"second job, one of {len(FIELDS)} fields changed; {len(NOT_FIELDS)} of runtime",
            "refused in 5 s, exit 3, naming the field; runtime fields join; first job unharmed",
            f"{len(problems)} wrong, slowest refusal {slowest:.1f} s, {running} beside the running "
            f"job {first_lines(problems)}",
            not problems and slowest <= 5,
        )
    ]  # fmt: skip


def _copy(lab: Lab, job: Job) -> Job:
    path = lab.new("second") / "job.yaml"
    shutil.copy(job.path, path)
    return Job(path, job.root, job.texts)


def f09_input(lab: Lab) -> list[Finding]:
    """The caption parquet is edited, extended, cut, replaced, renamed or rewritten in between."""
    rows = 30
    problems: list[str] = []
    slowest = 0.0
    texts = [f"a video of scene {i} with people" for i in range(rows)]
    letter = [*texts[:15], texts[15].replace("video", "vidio"), *texts[16:]]
    changes: dict[str, list[str]] = {
        "one letter": letter,
        "longer caption": [*texts[:-1], "quite another caption"],
        "extended": [*texts, "one more"],
        "cut": texts[:-1],
        "two swapped": [texts[1], texts[0], *texts[2:]],
        "replaced": [f"other {i}" for i in range(rows)],
    }
    layouts: tuple[dict[str, Any], ...] = ({}, {"compression": "none", "use_dictionary": False})
    for layout in layouts:
        for what, changed in changes.items():
            job = lab.job("f09-input", rows)
            captions = job.path.with_name("captions.parquet")
            _write_captions(captions, texts, layout)
            job.edit("captions", path=str(captions))
            log = job.path.with_name("log")
            first = start("run", str(job.path), log=log, hooks=[("pace", {"seconds": 0.1})])
            wait_for(lambda job=job: len(job.records()) > 1)
            first.kill()
            finish(first)
            _write_captions(captions, changed, layout)
            began = time.monotonic()
            code, said = execute("run", str(job.path), log=log)
            slowest = max(slowest, time.monotonic() - began)
            if code != 3 or "captions.parquet" not in said:
                problems.append(f"{what} {layout or ''}: exit {code} {said[-250:]}")
            job.remove()
    tries = len(layouts) * len(changes)
    return [
        Finding(
            "F9", "the input parquet edited, extended, cut or replaced between two runs",
            "refused each time, naming the file",
            f"{tries - len(problems)} of {tries} refused, slowest {slowest:.1f} s "
            f"{first_lines(problems, 5)}",
            not problems,
        )
    ]  # fmt: skip


def _write_captions(path: Path, texts: list[str], layout: dict[str, Any]) -> None:
    write_captions(path, texts)
    if layout:
        pq.write_table(pq.read_table(path), path, row_group_size=7, **layout)


def f11_clocks(lab: Lab) -> list[Finding]:
    """Ranks whose clocks are a day apart, and random times on all files in between."""
    problems: list[str] = []
    for _ in range(lab.size(1, 5)):
        job = lab.job("f11")
        log = job.path.with_name("log")
        clocks = {0: [("clock", {"offset": 86400})], 1: [("clock", {"offset": -86400})]}
        for kill in (True, False):
            gang = start_gang(
                "run", str(job.path), log=log, world=3, hooks=[("pace", {"seconds": UNIT_S})],
                hooks_of=clocks,
            )  # fmt: skip
            if kill:
                wait_for(lambda job=job: len(job.records()) > 9)
                gang.kill()
                for path in job.root.rglob("*"):
                    when = time.time() + lab.rng.uniform(-1e7, 1e7)
                    os.utime(path, (when, when))
            else:
                code = gang.finish()
                problems += [f"exit {code} {log.read_text()[-200:]}"] * (code != 0)
        problems += job.wrong(lab.undisturbed())
        job.remove()
    return [
        Finding(
            "F11", "clocks a day apart, random mtimes between two runs", "no effect",
            f"{len(problems)} wrong {first_lines(problems)}", not problems,
        )
    ]  # fmt: skip


def f12_late(lab: Lab) -> list[Finding]:
    """Records that appear late, and links that report failure after success."""
    problems: list[str] = []
    delay = lab.size(1, 5)
    for trial in range(lab.size(1, 5)):
        job = lab.job("f12")
        log = job.path.with_name("log")
        late = ("late", {"root": str(job.root), "seconds": delay, "seed": lab.seed + trial})
        gang = start_gang(
            "run", str(job.path), log=log, world=3, hooks=[late, ("pace", {"seconds": UNIT_S})]
        )  # fmt: skip
        code = gang.finish()
        if code != 0:  # a peer's unit may be unseen when the dataset is finalised: then again
            problems += [f"exit {code} {log.read_text()[-300:]}"] * (code not in (1, 5))
        code, said = execute("run", str(job.path), log=log)
        problems += [f"rerun exit {code} {said[-300:]}"] * (code != 0)
        problems += job.wrong(lab.undisturbed())
        job.remove()
    return [
        Finding(
            "F12", f"records seen {delay} s late, link fails after success", "same bytes",
            f"{len(problems)} wrong {first_lines(problems)}", not problems,
        )
    ]  # fmt: skip
