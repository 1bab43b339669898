"""The plan: which input rows are in which shard, and under which fingerprint.

Guarantees: a plan is a pure function of the resolved spec, the input files and the shard size; it
names no rank. A plan that is read does not contradict itself. Comparing two plans names every field
or file that differs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from embed_precompute.documents import (
    AtLeast,
    Count,
    Hex32,
    Hex64,
    MismatchError,
    differing_fields,
    digest_of,
    listed,
    to_plain,
)
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.store.records import (
    Document,
    StoredTensor,
    read_document,
    require_folder,
    stored_tensors,
)

PLAN_FILE = "plan.json"
AUTO_SHARD_BYTES = 1 << 30
AUTO_MAX_SAMPLES = 4096
MAX_UNITS = 1 << 31
"""The index stores a unit's number in 32 bits."""
_Positive = Annotated[int, AtLeast(1)]


@dataclass(frozen=True)
class InputFile:
    """A file of the caption table."""

    path: str
    """Path below the input folder, with `/`; if the input is a single file, the file's name."""
    bytes: Count
    rows: Count
    footer_sha256: Hex64
    content_xxh3: Hex32


@dataclass(frozen=True)
class Inputs:
    """The caption rows of a dataset."""

    files: tuple[InputFile, ...]
    """The files in the order in which rows are numbered."""
    text_column: str | tuple[str, ...]
    """Column of the captions; several columns give several samples a row, `id#column`."""
    id_column: str | None
    limit: Count | None = None
    """Number of samples asked for."""


@dataclass(frozen=True, kw_only=True)
class Plan(Document):
    """Unit k is the input rows [k * rows_per_unit, (k + 1) * rows_per_unit), and one shard."""

    kind: Literal["plan"] = "plan"
    fingerprint: Hex64
    """Digest of `spec`: the identity of what a caption becomes."""
    plan_id: Hex64
    """Digest of fingerprint, inputs and samples_per_shard: the other fields follow from these."""
    spec: dict[str, Any]
    inputs: Inputs
    samples_per_shard: _Positive
    num_rows: _Positive
    num_samples: Count
    last_row_samples: Count | None
    """Number of samples taken from the last row, if the limit cuts its list of captions."""
    rows_per_unit: _Positive
    num_units: Count

    @classmethod
    def make(
        cls,
        spec: Mapping[str, Any],
        inputs: Inputs,
        *,
        samples_per_shard: int,
        num_rows: int,
        num_samples: int,
        last_row_samples: int | None = None,
    ) -> Plan:
        """Makes the plan. Raises InputError if the spec's names of tensors clash."""
        fingerprint = digest_of(spec)
        # Rows that hold about `samples_per_shard` samples: a row with a list is never split.
        rows = max(1, samples_per_shard * num_rows // max(1, num_samples))
        try:
            return cls(
                fingerprint=fingerprint,
                plan_id=_plan_id(fingerprint, inputs, samples_per_shard),
                spec=dict(spec),
                inputs=inputs,
                samples_per_shard=samples_per_shard,
                num_rows=num_rows,
                num_samples=num_samples,
                last_row_samples=last_row_samples,
                rows_per_unit=rows,
                num_units=-(-num_rows // rows),
            )
        except MismatchError as error:
            raise InputError(f"no plan can be made: {error}") from error

    def __post_init__(self) -> None:
        stored_tensors(self.spec)
        rows = sum(file.rows for file in self.inputs.files)
        if self.num_rows > rows or (self.inputs.limit is None and self.num_rows < rows):
            problem = f"num_rows is {self.num_rows}, and its inputs have {rows}"
        elif self.num_samples < self.num_rows:
            problem = f"num_samples is {self.num_samples}, less than num_rows {self.num_rows}"
        elif not -(-self.num_rows // self.rows_per_unit) == self.num_units < MAX_UNITS:
            problem = f"num_units is {self.num_units} of {self.num_rows} rows"
        elif self.fingerprint != digest_of(self.spec):
            problem = "fingerprint is not the digest of spec"
        elif self.plan_id != _plan_id(self.fingerprint, self.inputs, self.samples_per_shard):
            problem = "plan_id is not the digest of what it names"
        else:
            return
        raise MismatchError(f"it contradicts itself: {problem}.")

    @functools.cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors that are stored, sorted by name."""
        return stored_tensors(self.spec)

    def unit_rows(self, unit: int) -> tuple[int, int]:
        """(first row, number of rows) of `unit`."""
        first = unit * self.rows_per_unit
        return first, min(self.rows_per_unit, self.num_rows - first)


def _plan_id(fingerprint: str, inputs: Inputs, samples_per_shard: int) -> str:
    return digest_of(
        {
            "fingerprint": fingerprint,
            "inputs": to_plain(inputs),
            "samples_per_shard": samples_per_shard,
        }
    )


def read_plan(root: Path) -> Plan:
    """Reads plan.json. Raises InputError if there is none."""
    require_folder(root)
    try:
        return read_document(root / PLAN_FILE, Plan)
    except FileNotFoundError:
        raise InputError(f"{root} is not a dataset of embed-precompute: no {PLAN_FILE}.") from None


def auto_samples_per_shard(bytes_per_sample: float) -> int:
    """1 GiB divided by the estimated bytes of a sample, at most 4,096."""
    return max(1, min(AUTO_MAX_SAMPLES, int(AUTO_SHARD_BYTES / max(1.0, bytes_per_sample))))


def check_same(
    stored: Plan, spec: Mapping[str, Any], inputs: Inputs, samples_per_shard: int | None
) -> None:
    """Raises ConflictError, naming what differs, unless `stored` fits the other arguments.

    `samples_per_shard` None means `auto`: the plan is the authority once it is written.
    """
    same = stored.fingerprint == digest_of(spec)
    lines = [] if same else differing_fields(stored.spec, spec)
    old, new = to_plain(stored.inputs), to_plain(inputs)
    old_files, new_files = ({f["path"]: f for f in each.pop("files")} for each in (old, new))
    for path in sorted(old_files.keys() | new_files.keys()):
        if path not in new_files:
            lines.append(f"{path}: removed")
        elif path not in old_files:
            lines.append(f"{path}: added")
        elif fields := differing_fields(old_files[path], new_files[path]):
            lines.append(f"{path}: changed ({'; '.join(fields)})")
    lines += differing_fields(old, new)
    if samples_per_shard not in (None, stored.samples_per_shard):
        lines.append(f"samples_per_shard: {stored.samples_per_shard} -> {samples_per_shard}")
    if not lines:
        return
    raise ConflictError(
        "the output holds another dataset; this run differs in\n  "
        + listed(lines)
        + "\nGive the old value back, or write to a new output.path."
    )
