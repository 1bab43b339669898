"""The plan: which input rows are in which shard, and under which fingerprint.

Guarantees: a plan is a pure function of the resolved spec, the input files and the shard size; it
names no rank, and whoever makes it makes the same bytes. Comparing two plans names every field or
file that differs.
Costs: O(files) in memory and on disk.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from embed_precompute.documents import differing_fields, digest_of, listed
from embed_precompute.errors import ConflictError, VerificationError
from embed_precompute.store.records import mismatch
from embed_precompute.store.sealed import FORMAT_VERSION

AUTO_SHARD_BYTES = 1 << 30
AUTO_MAX_SAMPLES = 4096
MAX_UNITS = 1 << 31
"""The index stores a unit's number in 32 bits."""
_HEX = re.compile(r"[0-9a-f]{64}")
_INPUT = {
    "path": str,
    "bytes": int,
    "rows": int,
    "footer_sha256": _HEX,
    "content_xxh3": re.compile(r"[0-9a-f]{32}"),
}
_SHAPE: dict[str, Any] = {
    "format_version": FORMAT_VERSION,
    "kind": "plan",
    "digest": _HEX,
    "fingerprint": _HEX,
    "plan": _HEX,
    "spec": dict,
    "inputs": [_INPUT],
    "columns": {"text": str, "id": (str, None)},
    "limit": (int, None),
    "num_rows": int,
    "num_samples": int,
    "last_row_samples": (int, None),
    "samples_per_shard": int,
    "rows_per_unit": int,
    "num_units": int,
}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The caption rows of a dataset: files with their footers, columns, and how many rows count."""

    files: tuple[dict[str, Any], ...]
    """Per file path (relative), bytes, rows and digests; in the order rows are numbered."""
    text_column: str
    id_column: str | None
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """Unit k is the input rows [k * rows_per_unit, (k + 1) * rows_per_unit), and one shard."""

    fingerprint: str
    spec: dict[str, Any]
    inputs: Inputs
    num_rows: int
    num_samples: int
    last_row_samples: int | None
    samples_per_shard: int
    rows_per_unit: int

    @property
    def num_units(self) -> int:
        return -(-self.num_rows // self.rows_per_unit)

    def unit_rows(self, unit: int) -> tuple[int, int]:
        """(first row, number of rows) of `unit`."""
        first = unit * self.rows_per_unit
        return first, min(self.rows_per_unit, self.num_rows - first)

    @property
    def plan_id(self) -> str:
        """sha256 of the identity: fingerprint, inputs and shard size, nothing derived."""
        return digest_of(_identity(self))

    def to_json(self) -> dict[str, Any]:
        """The content of plan.json, without its digest."""
        return {
            "format_version": FORMAT_VERSION,
            "kind": "plan",
            "plan": self.plan_id,
            "spec": self.spec,
            "num_rows": self.num_rows,
            "num_samples": self.num_samples,
            "last_row_samples": self.last_row_samples,
            "rows_per_unit": self.rows_per_unit,
            "num_units": self.num_units,
            **_identity(self),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Plan:
        """The plan in plan.json; VerificationError unless it is one this program would make."""
        problem = mismatch(dict(stored), _SHAPE, "it")
        if problem:
            raise VerificationError(f"plan.json is not as the format says: {problem}.")
        plan = cls._from_json(stored)
        plan._require_consistent(stored)
        return plan

    def _require_consistent(self, stored: Mapping[str, Any]) -> None:
        """Whether what is derived follows from the rest."""
        rows = sum(file["rows"] for file in self.inputs.files)
        problem = None
        if not 0 < self.num_rows <= rows or (self.inputs.limit is None and self.num_rows < rows):
            problem = f"num_rows {self.num_rows} of {rows} rows in its inputs"
        elif self.samples_per_shard < 1 or self.num_samples < self.num_rows:
            problem = f"{self.num_samples} samples, {self.samples_per_shard} to a shard"
        elif self.rows_per_unit < 1:
            problem = f"rows_per_unit {self.rows_per_unit}"
        elif not stored["num_units"] == self.num_units < MAX_UNITS:
            problem = f"num_units {stored['num_units']}"
        elif (stored["fingerprint"], stored["plan"]) != (digest_of(self.spec), self.plan_id):
            problem = "a fingerprint or plan that is not the digest of what it names"
        if problem:
            raise VerificationError(f"plan.json contradicts itself: it has {problem}.")

    @classmethod
    def _from_json(cls, stored: Mapping[str, Any]) -> Plan:
        return cls(
            fingerprint=stored["fingerprint"],
            spec=stored["spec"],
            inputs=Inputs(
                files=tuple(stored["inputs"]),
                text_column=stored["columns"]["text"],
                id_column=stored["columns"]["id"],
                limit=stored["limit"],
            ),
            num_rows=stored["num_rows"],
            num_samples=stored["num_samples"],
            last_row_samples=stored["last_row_samples"],
            samples_per_shard=stored["samples_per_shard"],
            rows_per_unit=stored["rows_per_unit"],
        )


def _identity(plan: Plan) -> dict[str, Any]:
    return {
        "fingerprint": plan.fingerprint,
        "inputs": list(plan.inputs.files),
        "columns": {"text": plan.inputs.text_column, "id": plan.inputs.id_column},
        "limit": plan.inputs.limit,
        "samples_per_shard": plan.samples_per_shard,
    }


def rows_per_unit(samples_per_shard: int, num_rows: int, num_samples: int) -> int:
    """Rows that hold about `samples_per_shard` samples: a row with a list is never split."""
    return max(1, samples_per_shard * num_rows // max(1, num_samples))


def auto_samples_per_shard(bytes_per_sample: float) -> int:
    """1 GiB over the estimated bytes of a sample, at most 4,096."""
    return max(1, min(AUTO_MAX_SAMPLES, int(AUTO_SHARD_BYTES / max(1.0, bytes_per_sample))))


def changed_files(
    stored: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[str]:
    """One line for every input file that was added, removed or changed."""
    old = {file["path"]: file for file in stored}
    new = {file["path"]: file for file in now}
    lines = [f"{path}: removed" for path in old if path not in new]
    lines += [f"{path}: added" for path in new if path not in old]
    for path in old.keys() & new.keys():
        fields = differing_fields(old[path], new[path])
        if fields:
            lines.append(f"{path}: changed ({'; '.join(fields)})")
    return sorted(lines)


def check_same(
    stored: Plan,
    fingerprint: str,
    spec: Mapping[str, Any],
    inputs: Inputs,
    samples_per_shard: int | None,
) -> None:
    """Raise `ConflictError` naming what differs, unless a run with these may go on with `stored`.

    `samples_per_shard` None means `auto`: the plan is the authority once it is written.
    """
    lines: list[str] = []
    if stored.fingerprint != fingerprint:
        lines += differing_fields(stored.spec, spec)
    lines += changed_files(stored.inputs.files, inputs.files)
    for label in ("text_column", "id_column", "limit"):
        old, new = getattr(stored.inputs, label), getattr(inputs, label)
        if old != new:
            lines.append(f"{label}: {old} -> {new}")
    if samples_per_shard not in (None, stored.samples_per_shard):
        lines.append(f"samples_per_shard: {stored.samples_per_shard} -> {samples_per_shard}")
    if not lines:
        return
    raise ConflictError(
        "the output holds another dataset; this run differs in\n  "
        + listed(lines)
        + "\nGive the old value back, or write to a new output.path."
    )
