"""A unit's embeddings written, and its record published.

Guarantees: what is committed for a unit is a function of the plan and the unit alone. The record is
published last, so a unit without one is as if it had never been started. A shard that another
process published first stays.
Costs: one sequential pass over the finished shard for its sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embed_precompute.errors import InputError, InternalError, StorageError, VerificationError
from embed_precompute.job.units import Unit
from embed_precompute.samples import Status
from embed_precompute.store.commit import Outcome, StoredFile, digest_file, publish_bytes
from embed_precompute.store.leftovers import move_aside
from embed_precompute.store.manifest import (
    StoredSample,
    is_sound_orphan,
    null_paths,
    read_record,
    rows_digest,
    rows_part_bytes,
    stored_tensors,
    unit_paths,
)
from embed_precompute.store.nearness import MIN_COSINE, distance
from embed_precompute.store.plan import Plan
from embed_precompute.store.sealed import FORMAT_VERSION, seal
from embed_precompute.store.shards import ShardFile, ShardReader, ShardWriter

EXPONENT_BITS = {
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""dtype -> integers of its size, and the bits that are all set in inf and nan, and only there."""


class UnitWriter:
    """Takes a unit's encoded batches in any order and commits the unit.

    `environment` goes into the record. Use as a context manager: leaving it without `commit`
    removes every temporary file.
    """

    def __init__(self, root: Path, plan: Plan, unit: Unit, environment: Mapping[str, str]) -> None:
        self._root, self._plan, self._unit = root, plan, unit
        self._environment = dict(environment)
        self._tensors = stored_tensors(plan.spec)
        self._paths = null_paths(root) if unit.is_null else unit_paths(root, unit.number)
        self._shard = ShardWriter(
            self._paths.shard,
            plan.fingerprint,
            None if unit.is_null else unit.number,
            self._tensors,
            {name: tokens.lengths for name, tokens in unit.tokens.items()},
            num_rows=unit.num_stored,
        )

    def __enter__(self) -> UnitWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._shard.discard()

    def write(
        self,
        name: str,
        rows: np.ndarray,
        values: torch.Tensor | Sequence[torch.Tensor],
        failed: Mapping[int, str] | None = None,
    ) -> None:
        """Write a batch of encoder `name`: line i of `values` is `rows[i]`.

        `values` is [B, L, D], [B, C] or a list of [length, D]; lines beyond `rows` are filler. A
        row that holds inf or nan is not stored, nor is one of `failed` (row -> reason).
        """
        failed = failed or {}
        lengths = self._unit.tokens[name].lengths
        for line, row in enumerate(rows.tolist()):
            if row in failed:
                self._reject(row, Status.ERROR, f"text_{name}: {failed[row]}")
                continue
            vectors = values[line]
            if vectors.dim() == 2:
                vectors = vectors[: lengths[row]]
            if not is_finite(vectors):
                self._reject(row, Status.NON_FINITE, f"text_{name} holds inf or nan")
                continue
            self._shard.write(name, row, vectors)

    def _reject(self, row: int, status: Status, reason: str) -> None:
        # Encoders come in a fixed order, so the first failure of a row is always the same one.
        self._unit.failures.setdefault(row, (status, reason))
        self._shard.reject(row)

    def commit(self) -> dict[str, Any]:
        """Publish shard, rows part and record; give the record in force (ours or a peer's)."""
        if self._unit.is_null and self._unit.failures:
            reason = self._unit.failures[0][1]
            raise InputError(
                f"the encoding of the empty caption failed: {reason}. float16 overflows in T5: use "
                "dtype bfloat16 or float32."
            )
        shard, adopted = self._settle_shard(self._shard.finish())
        record = self._record(shard, adopted)
        if publish_bytes(self._paths.record, seal(record)) is Outcome.DIFFERENT:
            return self._earlier_record(shard)
        return record

    def _settle_shard(self, ours: ShardFile) -> tuple[ShardFile, bool]:
        """Publish our shard, or adopt (True) the one that is there: the first stays, always.

        A shard without a record is left by a writer that died, or that is about to publish its
        record; replacing it could pair our bytes with its record. So it is kept when every row in
        it checks and is what our row is, as far as environments may differ, and moved aside
        otherwise: it may be damaged, of other captions, or lack another row than ours.
        """
        path = self._paths.shard
        if self._is_orphan(path) and not self._is_sound(path):
            move_aside(self._root, path)
        if self._shard.publish() is not Outcome.DIFFERENT or self._paths.record.exists():
            return ours, False
        found = digest_file(path)
        return ShardFile(found.name, found.bytes, found.sha256, ours.kept), True

    def _is_orphan(self, path: Path) -> bool:
        return path.exists() and not self._paths.record.exists()

    def _is_sound(self, path: Path) -> bool:
        ours = self._shard.read_back()
        unit = None if self._unit.is_null else self._unit.number
        try:
            theirs = ShardReader(path, self._plan.fingerprint, unit, self._tensors)
            return theirs.num_rows == ours.num_rows and all(
                theirs.check_row(tensor.name, row) and _is_same(tensor.name, row, theirs, ours)
                for tensor in self._tensors
                for row in range(ours.num_rows)
            )
        except (VerificationError, StorageError):
            return False

    def _earlier_record(self, shard: ShardFile) -> dict[str, Any]:
        """The record that was there first. Different bytes in one environment are a bug of ours."""
        earlier = read_record(self._root, None if self._unit.is_null else self._unit.number)
        same_environment = earlier["environment"] == self._environment
        if same_environment and earlier["files"]["shard"]["sha256"] != shard.sha256:
            raise InternalError(
                f"{self._paths.shard} was made twice in one environment with different bytes "
                f"(sha256 {earlier['files']['shard']['sha256'][:12]} and {shard.sha256[:12]}): "
                "please report this as a bug, with run.json."
            )
        return earlier

    def _record(self, shard: ShardFile, adopted: bool) -> dict[str, Any]:
        """The record's content; publishes the rows part that it names."""
        body: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "fingerprint": self._plan.fingerprint,
            "plan": self._plan.plan_id,
            "environment": self._environment,
        }
        shard_entry = _entry(shard)
        if self._unit.is_null:
            encoders = {
                name: {"length": tokens.lengths[0], "tokens": len(tokens.ids[0])}
                for name, tokens in self._unit.tokens.items()
            }
            return {**body, "kind": "null", "encoders": encoders, "files": {"shard": shard_entry}}
        stored = self._stored_samples(shard.kept)
        rows = self._publish_rows(stored)
        return {
            **body,
            "kind": "unit",
            "unit": self._unit.number,
            "first_row": self._unit.first_row,
            "num_rows": self._unit.num_rows,
            "num_samples": len(stored),
            "num_stored": len(shard.kept),
            "status": {
                status.label: sum(sample.status is status for sample in stored) for status in Status
            },
            "rows_sha256": rows_digest(stored),
            "encoders": self._counts(stored, shard.kept),
            "files": {
                "shard": shard_entry,
                "rows": _entry(rows),
            },
            "adopted_shard": adopted,
        }

    def _publish_rows(self, samples: Sequence[StoredSample]) -> StoredFile:
        """Publish the rows part, or adopt an orphan of another pyarrow that says the same."""
        path, names = self._paths.rows, [tensor.name for tensor in self._tensors]
        rows = rows_part_bytes(self._unit.number, names, samples)
        if self._is_orphan(path) and not is_sound_orphan(path, rows, names, samples):
            move_aside(self._root, path)
        if publish_bytes(path, rows) is Outcome.DIFFERENT and not self._paths.record.exists():
            return digest_file(path)
        return StoredFile(path.name, len(rows), hashlib.sha256(rows).hexdigest())

    def _stored_samples(self, kept: Sequence[int]) -> list[StoredSample]:
        position = {row: index for index, row in enumerate(kept)}
        stored = []
        for sample, row in zip(self._unit.samples, self._unit.stored_row, strict=True):
            if row is None or row not in position:
                status, error = sample.status, sample.error
                if row is not None:
                    status, error = self._unit.failures[row]
                stored.append(
                    StoredSample(
                        sample.sample_id, sample.row, status, error, None, {}, {}, {}, sample.text
                    )
                )
                continue
            stored.append(
                StoredSample(
                    sample.sample_id,
                    sample.row,
                    sample.status,
                    None,
                    position[row],
                    {name: len(tokens.ids[row]) for name, tokens in self._unit.tokens.items()},
                    {name: tokens.lengths[row] for name, tokens in self._unit.tokens.items()},
                    {name: tokens.truncated[row] for name, tokens in self._unit.tokens.items()},
                    sample.text,
                )
            )
        return stored

    def _counts(
        self, stored: Sequence[StoredSample], kept: Sequence[int]
    ) -> dict[str, dict[str, int]]:
        good = [sample for sample in stored if sample.index is not None]
        return {
            name: {
                "tokens": sum(sample.tokens[name] for sample in good),
                "truncated": sum(sample.truncated[name] for sample in good),
                "stored_tokens": sum(tokens.lengths[row] for row in kept),
            }
            for name, tokens in self._unit.tokens.items()
        }


def is_finite(values: torch.Tensor) -> bool:
    """Whether no element is inf or nan; `values` is contiguous, on the CPU.

    By numpy and from the bits: torch would start threads of its own here, in the writer's, beside
    those of the encoder. Those wait for each other spinning, and a run took a tenth longer.
    """
    integers, exponent = EXPONENT_BITS[values.dtype]
    bits = values.reshape(-1).view(integers).numpy()
    return not bits.size or int(np.bitwise_and(bits, exponent).max()) != exponent


def _is_same(name: str, row: int, theirs: ShardReader, ours: ShardReader) -> bool:
    """Whether a row of two shards is one embedding, perhaps of two environments."""
    if theirs.length(name, row) != ours.length(name, row):
        return False
    if theirs.checksum(name, row) == ours.checksum(name, row):
        return True
    return distance(theirs.row(name, row), ours.row(name, row))[1] >= MIN_COSINE


def _entry(file: StoredFile) -> dict[str, Any]:
    return {"name": file.name, "bytes": file.bytes, "sha256": file.sha256}
