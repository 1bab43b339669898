"""Writes a unit's embeddings and publishes its record.

Guarantees: what is committed for a unit is a function of plan, unit and environment. The record is
published last, so a unit without one is as if it had never been started. If two ranks write a unit,
the first record stays. Equal shards have the same file name, so the second rank adds no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embed_precompute.errors import InputError, InternalError
from embed_precompute.job.units import Unit
from embed_precompute.samples import Status
from embed_precompute.store.commit import publish_bytes, publish_bytes_by_content
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import (
    NULL_UNIT,
    ROWS,
    SHARD,
    NullFiles,
    NullRecord,
    Record,
    StoredShard,
    TokenCounts,
    UnitFiles,
    UnitRecord,
    document_bytes,
    read_any_record,
    record_path,
    unit_path,
)
from embed_precompute.store.rows import rows_digest, rows_part_bytes
from embed_precompute.store.shards import ShardWriter

INF = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""dtype -> integers of its size, and the bits of inf."""


class UnitWriter:
    """Takes a unit's encoded batches in any order and commits the unit.

    `environment` becomes part of the record. Use as a context manager: leaving it without `commit`
    removes every temporary file.
    """

    def __init__(self, root: Path, plan: Plan, unit: Unit, environment: Mapping[str, str]) -> None:
        self._root, self._plan, self._unit = root, plan, unit
        self._environment = {**environment, **unit.copies.environment}
        self._lengths = unit.lengths
        self._shard = ShardWriter(
            unit_path(root, unit.number, SHARD),
            plan.fingerprint,
            unit.number,
            plan.tensors,
            self._lengths,
            num_rows=unit.num_stored,
        )

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._shard.__exit__(*exception)

    def write(
        self,
        name: str,
        rows: np.ndarray,
        values: torch.Tensor | Sequence[torch.Tensor],
        finite: Sequence[bool] | None = None,
    ) -> None:
        """Write a batch of tensor `name`: entry i of `values` is stored row `rows[i]`.

        `values` is [B, L, D], [B, C] or a list of [length, D]; it may be longer than `rows`: the
        entries at its end are captions that fill up the batch, and are not written. A row that
        holds inf or nan is not stored; `finite` says which rows hold none, None: it is looked for.
        """
        numbers, values = rows.tolist(), values[: len(rows)]
        if finite is None:
            parts: Sequence[Any] = [values] if isinstance(values, torch.Tensor) else values
            finite = [True] if all(map(is_finite, parts)) else [is_finite(each) for each in values]
        if all(finite[: len(rows)]):
            self._shard.write(name, numbers, values)
            return
        for row, vectors, is_good in zip(numbers, values, finite, strict=False):
            if is_good:
                self._shard.write(name, [row], [vectors])
            else:
                # Tensors come in a fixed order, so the first failure of a row is always the same.
                failure = (Status.NON_FINITE, f"text_{name} holds inf or nan")
                self._unit.failures.setdefault(row, failure)
                self._shard.reject(row)

    def commit(self) -> Record:
        """Publish shard, rows part and record. Return the record that counts: the first one."""
        if self._unit.is_null and self._unit.failures:
            reason = self._unit.failures[0][1]
            raise InputError(
                f"the encoding of the empty caption failed: {reason}. float16 overflows in T5: use "
                "dtype bfloat16 or float32."
            )
        shard, kept = self._shard.publish()
        record = self._null_record(shard) if self._unit.is_null else self._unit_record(shard, kept)
        if publish_bytes(record_path(self._root, record.number), document_bytes(record)):
            return record
        return self._record_in_force(record)

    def _record_in_force(self, ours: Record) -> Record:
        """The record that was first. If its shard was made in our environment with other bytes,
        that is a bug of ours. Which rows were copied from other environments may differ."""
        first = read_any_record(self._root, ours.number)
        same = first.environment == ours.environment and not self._unit.copies.environment
        if same and first.files.shard != ours.files.shard:
            raise InternalError(
                f"{unit_path(self._root, ours.number, SHARD)} was made twice in one environment "
                f"with different bytes ({first.files.shard.name} and {ours.files.shard.name}): "
                "please report this as a bug, with run.json."
            )
        return first

    def _null_record(self, shard: StoredShard) -> NullRecord:
        tokens = self._unit.tokens
        return NullRecord(
            fingerprint=self._plan.fingerprint,
            plan_id=self._plan.plan_id_of(NULL_UNIT),
            environment=self._environment,
            encoders={
                name: TokenCounts(each.tokens[0], int(each.truncated[0]))
                for name, each in tokens.items()
            },
            tensors={name: lengths[0] for name, lengths in self._lengths.items()},
            files=NullFiles(shard),
        )

    def _unit_record(self, shard: StoredShard, kept: Sequence[int]) -> UnitRecord:
        """Publishes the rows part and returns the record that names it."""
        unit = self._unit
        samples = unit.columns(kept)
        payload = rows_part_bytes(unit.number, self._plan.tensors, samples)
        rows = publish_bytes_by_content(unit_path(self._root, unit.number, ROWS), payload)
        status = Counter(samples.status)
        return UnitRecord(
            fingerprint=self._plan.fingerprint,
            plan_id=self._plan.plan_id_of(unit.number),
            environment=self._environment,
            unit=unit.number,
            first_row=unit.first_row,
            num_rows=unit.num_rows,
            num_samples=len(unit.samples),
            num_stored=len(kept),
            status={each.label: status[each] for each in Status},
            noted=unit.noted,
            rows_sha256=rows_digest(samples),
            encoders={
                name: TokenCounts(
                    sum(filter(None, samples.tokens[name])),
                    sum(filter(None, samples.truncated[name])),
                )
                for name in unit.tokens
            },
            tensors={
                name: sum(lengths[row] for row in kept) for name, lengths in self._lengths.items()
            },
            files=UnitFiles(shard, rows),
        )


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element is inf or nan; `values` is contiguous, on the CPU.

    The bits of inf and nan, and only theirs, are as high as those of inf: of the positive ones
    among the signed integers, of the negative ones among the unsigned. So two maxima tell, with no
    copy. The check is done by numpy: torch would start a second set of threads for the writer
    thread, in addition to the encoder's. Such threads spin while they wait: a whole run took a
    tenth longer.
    """
    integers, inf = INF[values.dtype]
    if not values.numel():
        return True
    bits = values.reshape(-1).view(integers).numpy()
    sign = 1 << (8 * bits.itemsize - 1)
    return int(bits.max()) < inf and int(bits.view(f"u{bits.itemsize}").max()) < sign + inf
