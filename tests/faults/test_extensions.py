"""F21: an extension that is killed. The dataset stays readable, and a rerun ends with the bytes of
an extension that nothing disturbs. F22: jobs that copy from another dataset, and a job that does
not."""

from __future__ import annotations

import dataclasses
import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from faults.hooks import install
from faults.lab import TEXTS, Job, Lab, assert_same, pace
from faults.processes import finish, fork, wait_for
from handmade import samples_of, write_dataset, write_unit
from jobs import dataset_bytes, edit, expect, write_job

from embed_precompute import EmbeddingDataset
from embed_precompute.store.manifest import finalize
from embed_precompute.store.plan import InputFile, publish_plan, read_plan
from embed_precompute.store.records import record_path


def extend(root: Path) -> None:
    """Appends a file of three samples, as a run does."""
    plan = read_plan(root)
    if not plan.extends:
        added = InputFile("b.parquet", 1, 3, footer_sha256="1" * 64, content_xxh3="1" * 32)
        plan = publish_plan(root, plan.extended([added], plan.num_samples + 3))
    for unit in range(plan.num_units):
        first, rows = plan.unit_rows(unit)
        if not record_path(root, unit).exists():
            write_unit(root, plan, unit, samples_of(TEXTS[first : first + rows], first))
    finalize(root)


def extend_and_die(root: Path, die: dict[str, Any]) -> None:
    install([("die_at", die)])
    extend(root)


def test_f21_killed_at_every_step(lab: Lab) -> None:
    """By SIGKILL and, at every second step, by a power failure."""
    whole = lab.new()
    write_dataset(whole, TEXTS[:4])
    before = lab.copy(whole)
    extend(whole)
    for n in count(lab.rng.randint(0, 6), lab.size(7, 1)):
        root = lab.copy(before)
        die = {"root": str(root), "n": n, "power": bool(n % 2), "seed": n}
        code = os.waitstatus_to_exitcode(os.waitpid(fork(extend_and_die, root, die), 0)[1])
        if code == 0:
            break
        # Unless the manifest is just being replaced, the dataset is the old one or the new one.
        if (root / "manifest.json").exists():
            assert len(list(EmbeddingDataset(root, verify="rows"))) in (4, 7)
        extend(root)
        assert_same(dataset_bytes(root), dataset_bytes(whole))
        shutil.rmtree(root)
    assert n > 20


def test_f21_killed_ranks(lab: Lab) -> None:
    """Gangs that extend are killed; a plain run, or the same command, ends what they began."""
    captions, base = lab.new(), lab.new()
    base.mkdir()
    write_ids(captions / "b.parquet", 0, 10)
    path = write_job(base, captions, lab.runs.t5, lab.runs.clip, samples_per_shard=3)
    expect(0, "run", path)
    write_ids(captions / "a.parquet", 10, 40)
    before = lab.copy(base)
    expect(0, "run", path, "--extend")
    undisturbed = dataset_bytes(base / "out")
    for world in (1, 2, 3):
        folder = lab.copy(before)
        edit(folder / "job.yaml", "output", path=str(folder / "out"))
        job = Job(folder / "job.yaml", 15, undisturbed, ("--extend",))
        gang = job.gang(world, pace())
        assert wait_for(lambda job=job: len(job.records()) > 5)
        gang.kill()
        assert len(EmbeddingDataset(job.root, verify="rows")) == 10
        if world == 2:
            expect(0, "run", job.path)
        elif world == 3:
            assert job.gang(world).finish() == 0, job.said()
        job.assert_resumes()


def write_ids(path: Path, first: int, end: int) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = {"id": [f"s{i}" for i in range(first, end)], "text": TEXTS[first:end]}
    pq.write_table(pa.table(rows), path)


def test_f22_jobs_with_and_without_copies(lab: Lab) -> None:
    """On one output, one of them killed: the bytes of a run that copies nothing."""
    old, job = lab.job(30, per_shard=7), lab.job(60)
    expect(0, "run", old.path)
    copying = dataclasses.replace(job, options=("--reuse", str(old.root)))
    gang, other = copying.gang(2, pace()), job.start(pace())
    assert wait_for(lambda: len(job.records()) > 3)
    gang.kill()
    second = copying.start(pace())
    assert [finish(other), finish(second)] == [0, 0], job.said()
    job.assert_resumes()
