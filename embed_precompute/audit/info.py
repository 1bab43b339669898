"""Status and info: what a dataset holds, how far it is, and all about one sample.

Nothing is written, and an unfinished dataset is described as far as it goes.
Costs: status lists the folders, and reads every record of an unfinished dataset. A sample costs a
look-up and one rows part; without an index, all rows parts are searched.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embed_precompute.errors import IncompleteError, InputError
from embed_precompute.samples import Status, count_failed
from embed_precompute.store.index import DatasetIndex, read_manifest
from embed_precompute.store.plan import Plan, read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    UnitRecord,
    committed_units,
    read_record,
    record_path,
)
from embed_precompute.store.rows import StoredSample, read_samples
from embed_precompute.store.shards import ShardReader


@dataclass(frozen=True)
class DatasetStatus:
    """How much of a dataset is made."""

    root: Path
    plan: Plan
    units_committed: int
    null_committed: bool
    samples: dict[str, int]
    """Number of samples of the committed units, by status label."""
    finalised: bool

    @property
    def complete(self) -> bool:
        """Everything is committed and the manifest is written: training can read it."""
        return self.finalised and self.null_committed and not self.units_left

    @property
    def units_left(self) -> int:
        return self.plan.num_units - self.units_committed

    @property
    def failed_samples(self) -> int:
        """Number of samples that got no embedding through a fault of ours (inf or nan)."""
        return count_failed(self.samples)

    def to_json(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "finalised": self.finalised,
            "fingerprint": self.plan.fingerprint,
            "plan": self.plan.plan_id,
            "units": self.plan.num_units,
            "units_committed": self.units_committed,
            "units_left": self.units_left,
            "null_committed": self.null_committed,
            "samples": self.plan.num_samples,
            "samples_committed": sum(self.samples.values()),
            "status": self.samples,
            "failed_samples": self.failed_samples,
        }

    def lines(self) -> list[str]:
        """For a person."""
        by_status = ", ".join(f"{label} {n:,}" for label, n in self.samples.items() if n)
        lines = [
            f"{self.root}: {'complete' if self.complete else 'incomplete'}, "
            f"{self.units_committed:,} of {self.plan.num_units:,} units committed, "
            f"{self.units_left:,} left",
            f"  {sum(self.samples.values()):,} of {self.plan.num_samples:,} samples: "
            f"{by_status or 'none yet'}",
        ]
        if not self.null_committed:
            lines.append("  the null embedding is not made yet")
        if self.failed_samples:
            lines.append(
                f"  {self.failed_samples:,} samples failed: the status column of manifest.parquet "
                "names them (before that is there, each unit's rows part)"
            )
        if self.units_left or not self.null_committed:
            lines.append("  not finalised: run the same command again to go on")
        elif not self.finalised:
            lines.append(f"  not finalised: run `embed-precompute finalize {self.root}`")
        return lines


def read_status(root: Path) -> DatasetStatus:
    """How far the dataset in `root` is. Raises InputError if there is none."""
    root = Path(root)
    plan, manifest = read_plan(root), None
    with contextlib.suppress(FileNotFoundError):
        manifest = read_manifest(root)
    finalised = manifest is not None and manifest.plan_id == plan.plan_id
    committed = [unit for unit in committed_units(root) if unit < plan.num_units]
    samples = {status.label: 0 for status in Status}
    if manifest is not None and finalised and len(committed) == plan.num_units:
        samples |= manifest.counts.status
    else:
        for unit in committed:
            for label, count in read_record(root, unit).status.items():
                samples[label] += count
    null = record_path(root, NULL_UNIT).exists()
    return DatasetStatus(root, plan, len(committed), null, samples, finalised)


def dataset_lines(root: Path) -> list[str]:
    """What the dataset in `root` is: identity, inputs, encoders, counts, size."""
    status = read_status(root)
    plan, inputs = status.plan, status.plan.inputs
    limit = "" if inputs.limit is None else f", limited to {inputs.limit:,} samples"
    lines = [
        *status.lines(),
        f"  fingerprint {plan.fingerprint}",
        f"  plan        {plan.plan_id}",
        f"  input: {len(inputs.files):,} files, {sum(file.rows for file in inputs.files):,} rows, "
        f"text column {inputs.text_column!r}, id column {inputs.id_column!r}{limit}",
        f"  captions: {plan.spec.get('captions')}",
    ]
    for tensor in plan.tensors:
        lines.append(
            f"  text_{tensor.name}: one vector per {tensor.per}, width {tensor.width}, "
            f"{tensor.dtype}, by encoder {tensor.encoder}"
        )
    for name, encoder in sorted(plan.spec["encoders"].items()):
        lines.append(f"  encoder {name}")
        lines += [f"    {key}: {value}" for key, value in sorted(encoder.items())]
    if status.finalised:
        manifest = read_manifest(status.root)
        counts = manifest.counts
        lines.append(
            f"  {counts.stored:,} embeddings stored for {counts.samples:,} samples of "
            f"{counts.rows:,} rows (equal captions of a shard share one)"
        )
        lines += [f"  {n:,} {what}" for what, n in sorted(counts.noted.items())]
        for name, sums in sorted(counts.encoders.items()):
            lines.append(f"  {name}: {sums.tokens:,} tokens, {sums.truncated:,} captions truncated")
        for name, vectors in sorted(counts.tensors.items()):
            lines.append(f"  text_{name}: {vectors:,} vectors stored")
        for made in manifest.environments:
            what = ", ".join(f"{key} {value}" for key, value in sorted(made.environment.items()))
            lines.append(f"  {made.units:,} units made with {what}")
    size = 0
    for path in status.root.glob("shards/*/shard-*"):
        with contextlib.suppress(OSError):  # a job that runs may just have removed it
            size += path.stat().st_size
    return [*lines, f"  shards: {size:,} bytes, with their rows parts and records"]


def sample_lines(root: Path, sample_id: str) -> list[str]:
    """All about one sample. Raises InputError if the dataset has no such id."""
    root = Path(root)
    plan = read_plan(root)
    units = sorted(unit for unit in committed_units(root) if unit < plan.num_units)
    where = f"{root}, in any of its {len(units):,} units"
    if len(units) < plan.num_units:
        where += f" ({plan.num_units - len(units):,} are not made yet)"
    with contextlib.suppress(IncompleteError):  # without an index all units are searched
        index = DatasetIndex(root)
        sample_number = index.find(sample_id)
        units = [] if sample_number is None else [int(index.shard[sample_number])]
    for unit in units:
        record = read_record(root, unit)
        for sample in read_samples(record.rows_path(root), plan.tensors, record.num_samples):
            if sample.sample_id == sample_id:
                return _sample_lines(root, plan, record, sample)
    raise InputError(f"sample {sample_id!r} is not in {where}. Give an id of the id column.")


def _sample_lines(root: Path, plan: Plan, record: UnitRecord, sample: StoredSample) -> list[str]:
    first, place = 0, f"row {sample.row}, which no file of the plan has"
    for file in plan.inputs.files:
        if first <= sample.row < first + file.rows:
            place = f"{file.path}, row {sample.row - first} (row {sample.row} of the dataset)"
        first += file.rows
    lines = [
        f"id: {sample.sample_id}",
        f"input: {place}",
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
