"""Status and info: what a dataset holds, how far it is, and all about one sample.

Guarantees: nothing is written; an unfinished dataset is described as far as it goes; every figure
comes from the plan, the records or the stored rows, none is guessed.
Costs: status lists the folders, and of an unfinished dataset reads every record; a sample is a
look-up and one rows part, or a search through the rows parts where there is no index.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embed_precompute.errors import IncompleteError, InputError
from embed_precompute.samples import Status, count_failed
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.plan import Plan, read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    Manifest,
    UnitRecord,
    committed_units,
    read_manifest,
    read_record,
    record_path,
)
from embed_precompute.store.rows import StoredSample, read_samples
from embed_precompute.store.shards import ShardReader


@dataclass(frozen=True)
class DatasetStatus:
    """How far a dataset is."""

    root: Path
    fingerprint: str
    plan: str
    num_units: int
    units_done: int
    num_samples: int
    samples: dict[str, int]
    """Samples of the units that are done, by status label."""
    null_done: bool
    finalised: bool

    @property
    def complete(self) -> bool:
        """Everything is done and the manifest is written: training can read it."""
        return self.finalised and self.null_done and self.units_done == self.num_units

    @property
    def samples_done(self) -> int:
        return sum(self.samples.values())

    @property
    def failed_samples(self) -> int:
        """Samples that have no embedding through a failure of ours."""
        return count_failed(self.samples)

    def to_json(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "finalised": self.finalised,
            "fingerprint": self.fingerprint,
            "plan": self.plan,
            "units": self.num_units,
            "units_done": self.units_done,
            "units_left": self.num_units - self.units_done,
            "null_done": self.null_done,
            "samples": self.num_samples,
            "samples_done": self.samples_done,
            "status": self.samples,
            "failed_samples": self.failed_samples,
        }

    def lines(self) -> list[str]:
        """For a person."""
        left = self.num_units - self.units_done
        state = "complete" if self.complete else "incomplete"
        lines = [
            f"{self.root}: {state}, {self.units_done:,} of {self.num_units:,} units done, "
            f"{left:,} left",
            f"  {self.samples_done:,} of {self.num_samples:,} samples: {_by_status(self.samples)}",
        ]
        if not self.null_done:
            lines.append("  the null embedding is not made yet")
        if self.failed_samples:
            lines.append(
                f"  {self.failed_samples:,} samples failed: the status column of manifest.parquet "
                "names them (before that is there, each unit's rows part)"
            )
        if left or not self.null_done:
            lines.append("  not finalised: run the same command again to go on")
        elif not self.finalised:
            lines.append(f"  not finalised: run `embed-precompute finalize {self.root}`")
        return lines


def read_status(root: Path) -> DatasetStatus:
    """How far the dataset in `root` is; InputError when there is none."""
    root = Path(root)
    plan = read_plan(root)
    done = sorted(unit for unit in committed_units(root) if unit < plan.num_units)
    manifest = _read_manifest(root, plan)
    samples = {status.label: 0 for status in Status}
    if manifest is not None and len(done) == plan.num_units:
        samples |= manifest.counts.status
    else:
        for unit in done:
            for label, count in read_record(root, unit).status.items():
                samples[label] += count
    return DatasetStatus(
        root=root,
        fingerprint=plan.fingerprint,
        plan=plan.plan_id,
        num_units=plan.num_units,
        units_done=len(done),
        num_samples=plan.num_samples,
        samples=samples,
        null_done=record_path(root, NULL_UNIT).exists(),
        finalised=manifest is not None,
    )


def dataset_lines(root: Path) -> list[str]:
    """What the dataset in `root` is: identity, inputs, encoders, counts, size."""
    root = Path(root)
    status, plan = read_status(root), read_plan(root)
    lines = status.lines()
    lines += [f"  fingerprint {status.fingerprint}", f"  plan        {status.plan}"]
    inputs = plan.inputs
    limit = "" if inputs.limit is None else f", limited to {inputs.limit:,} samples"
    lines.append(
        f"  input: {len(inputs.files):,} files, {sum(file.rows for file in inputs.files):,} rows, "
        f"text column {inputs.text_column!r}, id column {inputs.id_column!r}{limit}"
    )
    lines.append(f"  captions: {plan.spec.get('captions')}")
    for tensor in plan.tensors:
        lines.append(
            f"  text_{tensor.name}: one vector per {tensor.per}, width {tensor.width}, "
            f"{tensor.dtype}, by encoder {tensor.encoder}"
        )
    for name, encoder in sorted(plan.spec["encoders"].items()):
        lines.append(f"  encoder {name}")
        lines += [f"    {key}: {value}" for key, value in sorted(encoder.items())]
    manifest = _read_manifest(root, plan)
    if manifest is not None:
        lines += _counted_lines(manifest)
    lines.append(f"  shards: {_shard_bytes(root):,} bytes, with their rows parts and records")
    return lines


def _counted_lines(manifest: Manifest) -> list[str]:
    counts = manifest.counts
    lines = [
        f"  {counts.stored:,} embeddings stored for {counts.samples:,} samples of "
        f"{counts.rows:,} rows (equal captions of a shard share one)"
    ]
    for name, sums in sorted(counts.encoders.items()):
        lines.append(f"  {name}: {sums.tokens:,} tokens, {sums.truncated:,} captions truncated")
    for name, vectors in sorted(counts.tensors.items()):
        lines.append(f"  text_{name}: {vectors:,} vectors stored")
    for made in manifest.environments:
        what = ", ".join(f"{key} {value}" for key, value in sorted(made.environment.items()))
        lines.append(f"  {made.units:,} units made with {what}")
    return lines


def sample_lines(root: Path, sample_id: str) -> list[str]:
    """All about one sample; InputError when the dataset has no such id."""
    root = Path(root)
    plan = read_plan(root)
    done = sorted(unit for unit in committed_units(root) if unit < plan.num_units)
    for unit in _candidate_units(root, done, sample_id):
        record = read_record(root, unit)
        for sample in read_samples(record.rows_path(root), plan.tensors, record.num_samples):
            if sample.sample_id == sample_id:
                return _describe(root, plan, record, sample)
    left = plan.num_units - len(done)
    where = f"{root}, in any of its {len(done):,} units" + (
        f" ({left:,} are not made yet)" if left else ""
    )
    raise InputError(f"sample {sample_id!r} is not in {where}. Give an id of the id column.")


def _candidate_units(root: Path, done: Sequence[int], sample_id: str) -> Sequence[int]:
    """The one unit that the index knows, or all that are there when there is no index."""
    try:
        index = DatasetIndex(root)
    except IncompleteError:
        return done
    sample = index.find(sample_id)
    return [] if sample is None else [int(index.shard[sample])]


def _describe(root: Path, plan: Plan, record: UnitRecord, sample: StoredSample) -> list[str]:
    lines = [
        f"id: {sample.sample_id}",
        f"input: {_input_place(plan, sample.row)}",
        f"status: {sample.status.label}" + (f" ({sample.error})" if sample.error else ""),
        f"encoded text: {sample.text!r}" if sample.text is not None else "encoded text: none",
    ]
    if sample.index is None:
        return [*lines, f"stored: nothing; its unit is {record.unit}"]
    path = record.shard_path(root)
    lines.append(f"stored: {path.relative_to(root)}, row {sample.index}")
    reader = ShardReader(path, plan.fingerprint, record.unit, plan.tensors)
    for tensor in plan.tensors:
        name = tensor.name
        cut = ", truncated" if sample.truncated[tensor.encoder] else ""
        values = reader.row(name, sample.index)
        sound = "" if reader.check_row(name, sample.index) else "; DAMAGED: not its checksum"
        lines.append(
            f"text_{name}: {sample.tokens[tensor.encoder]} tokens{cut}, stored "
            f"{list(values.shape)} {tensor.dtype}; {_norms(values)}{sound}"
        )
    return lines


def _norms(values: torch.Tensor) -> str:
    """L2 norms of the vectors in `values` ([L, D] or [C]), computed in float64."""
    norms = torch.linalg.vector_norm(values.double(), dim=-1).reshape(-1)
    finite = "finite" if bool(torch.isfinite(values).all()) else "NOT FINITE"
    if norms.numel() == 1:
        return f"L2 norm {norms[0]:.4f}, {finite}"
    if norms.numel() == 0:
        return "no vectors"
    return (
        f"L2 norm per token mean {norms.mean():.4f}, min {norms.min():.4f}, max {norms.max():.4f}, "
        f"{finite}"
    )


def _input_place(plan: Plan, row: int) -> str:
    """Which file holds input row `row`, and which row of that file it is."""
    first = 0
    for file in plan.inputs.files:
        if row < first + file.rows:
            return f"{file.path}, row {row - first} (row {row} of the dataset)"
        first += file.rows
    return f"row {row}, which no file of the plan has"


def _read_manifest(root: Path, plan: Plan) -> Manifest | None:
    """manifest.json, if it is there and of this plan."""
    try:
        manifest = read_manifest(root)
    except FileNotFoundError:
        return None
    return manifest if manifest.plan_id == plan.plan_id else None


def _by_status(samples: Mapping[str, int]) -> str:
    return ", ".join(f"{label} {n:,}" for label, n in samples.items() if n) or "none yet"


def _shard_bytes(root: Path) -> int:
    total = 0
    for folder, _, names in os.walk(root / "shards"):
        for name in names:
            try:
                total += os.stat(os.path.join(folder, name)).st_size
            except OSError:  # a temporary file of a run that goes on, or a link to nowhere
                continue
    return total
