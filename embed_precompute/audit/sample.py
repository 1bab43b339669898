"""All about one sample: its text, tokens, status, place and norms.

Nothing is written. Costs: a look-up and one rows part; without an index, all rows parts are
searched.
"""

from __future__ import annotations

import contextlib
from itertools import islice
from pathlib import Path

import torch

from embed_precompute.errors import IncompleteError, InputError
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.plan import Plan, read_plan
from embed_precompute.store.records import UnitRecord, committed_units, read_record
from embed_precompute.store.rows import StoredSample, read_samples
from embed_precompute.store.shards import ShardReader

NAMED = 8
"""Captions of a row that a message names."""


def sample_lines(root: Path, sample_id: str) -> list[str]:
    """All about one sample. Raises InputError if the dataset has no such id."""
    root = Path(root)
    plan = read_plan(root)
    units = sorted(unit for unit in committed_units(root) if unit < plan.num_units)
    where = f"{root}, in any of its {len(units):,} units"
    if len(units) < plan.num_units:
        where += f" ({plan.num_units - len(units):,} are not made yet)"
    ids: list[str] = []
    """Of the captions, where `sample_id` is that of a row with several."""
    with contextlib.suppress(IncompleteError):  # without an index all units are searched
        index = DatasetIndex(root)
        sample_number = index.find(sample_id)
        if sample_number is not None:
            units = [int(index.shard[sample_number])]
        else:  # an extension that is not finished has units that the index does not know
            captions = index.captions_of(sample_id, plan.inputs.text_column)
            ids += map(index.sample_id, islice(captions, NAMED))
            units = [unit for unit in units if unit >= index.num_units]
    for unit in units:
        record = read_record(root, unit)
        for sample in read_samples(record.rows_path(root), plan.tensors, record.num_samples):
            if sample.sample_id == sample_id:
                return _sample_lines(root, plan, record, sample)
            if len(ids) < NAMED and sample.sample_id.rpartition("#")[0] == sample_id:
                ids.append(sample.sample_id)
    if ids:
        raise InputError(
            f"sample {sample_id!r} is not in {where}. The captions of a row are samples of their "
            f"own: give one of {', '.join(ids)}."
        )
    raise InputError(f"sample {sample_id!r} is not in {where}. Give an id of the id column.")


def _sample_lines(root: Path, plan: Plan, record: UnitRecord, sample: StoredSample) -> list[str]:
    lines = [
        f"id: {sample.sample_id}",
        f"input, as named when planned: {plan.place(sample.row)}",
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
