"""F8, F9, F11, F12: two jobs on one output, a changed job, clocks, a network file system."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from faults.lab import TEXTS, UNIT_S, Lab, assert_same, pace
from faults.processes import finish, launch, wait_for
from faults.test_kills import begun
from handmade import write_dataset, write_units
from jobs import dataset_bytes, edit, expect, write_captions

from embed_precompute.store.manifest import finalize


def test_f8_two_jobs_on_one_output(lab: Lab) -> None:
    """Same bytes; and at most 5 % of the units are encoded by both, outside the final tail."""
    wasted = units = 0
    for trial in range(lab.size(2, 50)):
        job = lab.job(80, per_shard=1)  # many units, so that the tail is not all
        worlds = [1, 1] if trial == 0 else [lab.rng.randint(1, 3), lab.rng.randint(1, 3)]
        gangs = []
        for world in worlds:
            gangs.append(job.gang(world, pace(UNIT_S * 2, log=str(job.folder / "begun"))))
            time.sleep(lab.rng.choice((0.0, 0.0, 0.5, 1.5, 3.0)))
        assert [gang.finish() for gang in gangs] == [0, 0], job.said()
        job.assert_undisturbed()
        # At the end every rank may be at units that another one has, too: one that it encodes,
        # one that is read ahead and one that waits for the writer.
        twice = len(begun(job.folder / "begun")) - job.num_units
        wasted += max(0, twice - 3 * sum(worlds))
        units += job.num_units
    assert wasted <= 0.05 * units


def finalize_often(root: Path) -> None:
    for _ in range(8):
        finalize(root)


def test_f8_finalized_by_several_at_once(lab: Lab) -> None:
    alone, together = lab.new(), lab.new()
    write_dataset(alone, TEXTS[:12])
    write_units(together, TEXTS[:12])
    started = [launch(finalize_often, together) for _ in range(2)]
    assert [finish(process) for process in started] == [0, 0]
    assert_same(dataset_bytes(together), dataset_bytes(alone))


# --- F9 -------------------------------------------------------------------------------------------

FIELDS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("encoders.t5", {"max_length": 20}, "encoders.t5.max_length: 24 -> 20"),
    ("encoders.t5", {"attention_mask": "padding"}, "attention_mask: none -> padding"),
    ("encoders.t5", {"batch_tokens": 48}, "encoders.t5.shapes"),
    ("encoders.t5", {"dtype": "bfloat16"}, "encoders.t5.dtype: float32 -> bfloat16"),
    ("encoders.t5", {"seq_align": 5}, "encoders.t5"),
    ("encoders.clip", {"stream_tokens": 999}, "encoders.clip.shapes"),
    ("encoders.clip", {"buckets": [16]}, "encoders.clip.implementation: fused -> hf"),
    ("encoders.clip", {"dtype": "bfloat16"}, "encoders.clip.dtype"),
    ("captions", {"normalize": ["nfc"]}, "captions.normalize"),
    ("captions", {"id_column": None}, "id_column: id -> null"),
    ("captions", {"text_column": "id"}, "text"),
    ("captions.recipe", {"kind": "template", "template": "a {text}"}, "recipe"),
    ("output", {"samples_per_shard": 7}, "samples_per_shard: 3 -> 7"),
    ("output", {"dtype": "bfloat16"}, "output.dtype: float32 -> bfloat16"),
)
RUNTIME = {
    "prefetch_units": 3,
    "write_queue_mb": 0.5,
    "max_failed_samples": 7,
    "progress_interval_s": 5.0,
    "on_environment_change": "refuse",
}


def test_f9_another_spec_beside_a_running_job(lab: Lab) -> None:
    """One field changed, each in turn: refused, naming it. Fields of runtime join the job."""
    job = lab.job(30)
    sound = job.path.read_text()
    first = job.start(pace(600.0))
    wait_for((job.root / "plan.json").exists)
    for section, fields, named in FIELDS:
        edit(job.path, section, **fields)
        said = expect(3, "run", job.path)
        assert named in said
        assert "->" in said
        assert "new output.path" in said
        assert "Traceback" not in said
        job.path.write_text(sound)
    first.kill()
    finish(first)
    edit(job.path, "runtime", **RUNTIME)
    job.assert_resumes()


CHANGES: dict[str, Callable[[list[str]], list[str]]] = {
    "one letter": lambda texts: [*texts[:15], texts[15].replace("video", "vidio"), *texts[16:]],
    "longer caption": lambda texts: [*texts[:-1], "quite another caption"],
    "extended": lambda texts: [*texts, "one more"],
    "cut": lambda texts: texts[:-1],
    "two swapped": lambda texts: [texts[1], texts[0], *texts[2:]],
    "replaced": lambda texts: [f"other {i}" for i in range(len(texts))],
}


@pytest.mark.parametrize("layout", [{}, {"compression": "none", "use_dictionary": False}])
def test_f9_a_changed_input_is_refused_by_name(layout: dict[str, Any], lab: Lab) -> None:
    job, texts = lab.job(30), TEXTS[:30]
    captions = job.folder / "captions.parquet"

    def write(texts: list[str]) -> None:
        write_captions(captions, texts)
        if layout:
            pq.write_table(pq.read_table(captions), captions, row_group_size=7, **layout)

    write(texts)
    edit(job.path, "captions", path=str(captions))
    expect(0, "run", job.path)
    (job.root / "manifest.json").unlink()  # as if killed before the last unit
    job.records()[-1].unlink()
    before = dataset_bytes(job.root)
    for change in CHANGES.values():
        write(change(texts))
        assert "captions.parquet: changed" in expect(3, "run", job.path)
    assert dataset_bytes(job.root) == before


# --- F11, F12 -------------------------------------------------------------------------------------


def test_f11_clocks_a_day_apart(lab: Lab) -> None:
    """Of the ranks; and random times on all files between two runs."""
    for _ in range(lab.size(1, 5)):
        job = lab.job()
        clocks = {0: [("clock", {"offset": 86400})], 1: [("clock", {"offset": -86400})]}
        gang = job.gang(3, pace(), of=clocks)
        wait_for(lambda job=job: len(job.records()) > 9)
        gang.kill()
        for path in job.root.rglob("*"):
            when = time.time() + lab.rng.uniform(-1e7, 1e7)
            os.utime(path, (when, when))
        assert job.gang(3, pace(), of=clocks).finish() == 0, job.said()
        job.assert_undisturbed()


def test_f12_a_network_file_system(lab: Lab) -> None:
    """Records are seen a second late, and link reports failure after success."""
    for _ in range(lab.size(1, 5)):
        job = lab.job()
        late = ("late", {"seconds": lab.size(1, 5), "seed": lab.rng.random()})
        code = job.gang(3, late, pace()).finish()
        # A peer's unit may be unseen when the dataset is finalised: then it is 5, and so 1 of all.
        assert code in (0, 1, 5), job.said()
        job.assert_resumes()
