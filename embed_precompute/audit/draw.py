"""Samples drawn at random, each with the text and the embeddings that are stored of it.

Costs: reads one rows part for each unit that a sample falls into.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from embed_precompute.audit.findings import Report
from embed_precompute.samples import Status
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import NULL_UNIT, read_null_record, read_record
from embed_precompute.store.rows import read_samples
from embed_precompute.store.shards import ShardReader


@dataclass(frozen=True)
class Drawn:
    """What is stored of a sample."""

    shard: Path
    name: str
    """For people."""
    text: str
    tokens: Mapping[str, int]
    """By encoder."""
    embeddings: Mapping[str, Tensor]
    """By tensor."""
    is_null: bool = False


def null_embedding(root: Path, plan: Plan) -> Drawn:
    """The null embedding, as a sample with an empty text."""
    record = read_null_record(root)
    path = record.shard_path(root)
    shard = ShardReader(path, plan.fingerprint, NULL_UNIT, plan.tensors)
    tokens = {name: sums.tokens for name, sums in record.encoders.items()}
    values = {t.name: shard.row(t.name, 0) for t in plan.tensors}
    return Drawn(path, "the empty caption", "", tokens, values, is_null=True)


def draw_samples(report: Report, plan: Plan, num_samples: int, seed: int) -> list[Drawn]:
    """`num_samples` of all samples whose status is ok, each equally likely.

    `report.num_ok` says which units may be drawn from.
    """
    total = sum(report.num_ok.values())
    wanted = sorted(random.Random(seed).sample(range(total), min(num_samples, total)))
    drawn: list[Drawn] = []
    first = 0
    for unit, count in sorted(report.num_ok.items()):
        mine = {position - first for position in wanted if first <= position < first + count}
        first += count
        if not mine:
            continue
        record = read_record(report.root, unit)
        path = record.shard_path(report.root)
        shard = ShardReader(path, plan.fingerprint, unit, plan.tensors)
        samples = read_samples(record.rows_path(report.root), plan.tensors)
        ok = (sample for sample in samples if sample.status is Status.OK)
        for position, sample in enumerate(ok):
            if position in mine:
                assert sample.index is not None
                values = {t.name: shard.row(t.name, sample.index) for t in plan.tensors}
                name = f"sample {sample.sample_id!r}"
                drawn.append(Drawn(path, name, sample.text or "", sample.tokens, values))
    return drawn
