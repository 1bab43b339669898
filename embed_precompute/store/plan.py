"""The plan: which input rows are in which shard, and under which fingerprint.

Guarantees: a plan is a pure function of the resolved spec, the contents of the input files in row
order, the shard size and the plan that it extends; it names no rank. An input file is known by its
content: its path is kept for people only. A plan that is read does not contradict itself. Comparing
two plans names every field or file that differs.

A plan is never changed. An extension is another plan, which appends files and units and leaves the
earlier units as they are: plan.json, then plan-0001.json and so on. The last one is in force.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
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
from embed_precompute.errors import (
    ConflictError,
    IncompleteError,
    InputError,
    StorageError,
    VerificationError,
)
from embed_precompute.steps import Work, duration
from embed_precompute.store.commit import publish_bytes
from embed_precompute.store.records import (
    FILE_NAME,
    MAX_JSON_BYTES,
    NULL_UNIT,
    OWN_NAMES,
    PLAN_NAME,
    Document,
    StoredTensor,
    committed_units,
    document_bytes,
    list_folder,
    read_any_record,
    read_document,
    record_path,
    refuse_linked_folders,
    require_folder,
    stored_tensors,
)

PLAN_FILE = "plan.json"
POLL_S = 0.2
AUTO_SHARD_BYTES = 1 << 30
AUTO_MAX_SAMPLES = 4096
MAX_UNITS = 1 << 31
"""The index stores a unit's number in 32 bits."""
DERIVED = (".null_shape", ".padded_length", ".shapes")
"""Fields of an encoder that follow from its others: a conflict names those first."""
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
    """The files in the order in which rows are numbered: sorted by path, those that an extension
    added after all earlier ones."""
    text_column: str | tuple[str, ...]
    """Column of the captions; several columns give several samples a row, `id#column`."""
    id_column: str | None
    limit: Count | None = None
    """Number of samples asked for."""


@dataclass(frozen=True)
class EarlierPlan:
    """A plan that was extended."""

    plan_id: Hex64
    num_files: Count
    """Number of input files, the first ones of the later plan."""
    num_samples: Count


@dataclass(frozen=True)
class _Part:
    """The units that one plan introduced."""

    plan_id: str
    first_unit: int
    first_row: int
    end_row: int


@dataclass(frozen=True, kw_only=True)
class Plan(Document):
    """Units are runs of `rows_per_unit` input rows, and a shard each.

    The last unit of a plan may have fewer rows. An extension leaves that unit as it is: its own
    first unit begins with the first row of the first file that it added.
    """

    kind: Literal["plan"] = "plan"
    fingerprint: Hex64
    """Digest of `spec`: the identity of what a caption becomes."""
    plan_id: Hex64
    """Digest of fingerprint, contents of the inputs, samples_per_shard and `extends`: the other
    fields follow from these. Records name the plan that introduced their unit."""
    spec: dict[str, Any]
    inputs: Inputs
    extends: tuple[EarlierPlan, ...]
    """The plans that this one extends, oldest first."""
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
                plan_id=_plan_id(fingerprint, inputs, samples_per_shard, ()),
                spec=dict(spec),
                inputs=inputs,
                extends=(),
                samples_per_shard=samples_per_shard,
                num_rows=num_rows,
                num_samples=num_samples,
                last_row_samples=last_row_samples,
                rows_per_unit=rows,
                num_units=-(-num_rows // rows),
            )
        except MismatchError as error:
            raise InputError(f"no plan can be made: {error}") from error

    def extended(self, added: Sequence[InputFile], num_samples: int) -> Plan:
        """The plan of `num_samples` samples that has the rows of `added` in units of their own."""
        earlier = EarlierPlan(self.plan_id, len(self.inputs.files), self.num_samples)
        files = (*self.inputs.files, *added)
        return self._with(files, (*self.extends, earlier), num_samples)

    def as_of(self, plan_id: str) -> Plan | None:
        """This plan, or the one among those it extends, that has `plan_id`."""
        if plan_id == self.plan_id:
            return self
        for number, earlier in enumerate(self.extends):
            if earlier.plan_id == plan_id:
                files = self.inputs.files[: earlier.num_files]
                return self._with(files, self.extends[:number], earlier.num_samples)
        return None

    def _with(
        self, files: tuple[InputFile, ...], extends: tuple[EarlierPlan, ...], num_samples: int
    ) -> Plan:
        inputs = dataclasses.replace(self.inputs, files=files)
        plan_id = _plan_id(self.fingerprint, inputs, self.samples_per_shard, extends)
        parts = _parts(inputs, extends, plan_id, sum(f.rows for f in files), self.rows_per_unit)
        return dataclasses.replace(
            self,
            plan_id=plan_id,
            inputs=inputs,
            extends=extends,
            num_rows=parts[-1].end_row,
            num_samples=num_samples,
            num_units=_end_unit(parts[-1], self.rows_per_unit),
        )

    def __post_init__(self) -> None:
        stored_tensors(self.spec)
        inputs, extends = self.inputs, self.extends
        rows = sum(file.rows for file in inputs.files)
        samples = [*(earlier.num_samples for earlier in extends), self.num_samples]
        files = [0, *(earlier.num_files for earlier in extends), len(inputs.files)]
        parts = _parts(inputs, extends, self.plan_id, self.num_rows, self.rows_per_unit)
        if self.num_rows > rows or (inputs.limit is None and self.num_rows < rows):
            problem = f"num_rows is {self.num_rows}, and its inputs have {rows}"
        elif any(n < part.end_row for n, part in zip(samples, parts, strict=True)):
            problem = f"num_samples is {self.num_samples}, less than num_rows {self.num_rows}"
        elif not _end_unit(parts[-1], self.rows_per_unit) == self.num_units < MAX_UNITS:
            problem = f"num_units is {self.num_units} of {self.num_rows} rows"
        elif extends and (inputs.limit is not None or sorted(set(files)) != files):
            problem = "extends does not name plans of fewer files, or a limit is extended"
        elif self.fingerprint != digest_of(self.spec):
            problem = "fingerprint is not the digest of spec"
        elif self.plan_id != _plan_id(self.fingerprint, inputs, self.samples_per_shard, extends):
            problem = "plan_id is not the digest of what it names"
        else:
            return
        raise MismatchError(f"it contradicts itself: {problem}.")

    @functools.cached_property
    def tensors(self) -> tuple[StoredTensor, ...]:
        """The tensors that are stored, sorted by name."""
        return stored_tensors(self.spec)

    @property
    def file_name(self) -> str:
        """The name of the file that holds this plan."""
        return f"plan-{len(self.extends):04d}.json" if self.extends else PLAN_FILE

    def unit_rows(self, unit: int) -> tuple[int, int]:
        """(first row, number of rows) of `unit`."""
        part = self._part_of(unit)
        first = part.first_row + (unit - part.first_unit) * self.rows_per_unit
        return first, min(self.rows_per_unit, part.end_row - first)

    def place(self, row: int) -> str:
        """How messages name an input row: its file, and the row within it."""
        first = 0
        for file in self.inputs.files:
            if first <= row < first + file.rows:
                return f"{file.path}, row {row - first} (row {row} of the dataset)"
            first += file.rows
        return f"row {row}, which no file of the plan has"

    def plan_id_of(self, unit: int) -> str:
        """The plan that the record of `unit` names; the first one for the null embedding."""
        return self._part_of(max(0, unit)).plan_id

    @functools.cached_property
    def _units(self) -> list[_Part]:
        return _parts(self.inputs, self.extends, self.plan_id, self.num_rows, self.rows_per_unit)

    def _part_of(self, unit: int) -> _Part:
        after = bisect.bisect_right(self._units, unit, key=lambda part: part.first_unit)
        return self._units[after - 1]


def _parts(
    inputs: Inputs,
    extends: Sequence[EarlierPlan],
    plan_id: str,
    num_rows: int,
    rows_per_unit: int,
) -> list[_Part]:
    rows = [0, *itertools.accumulate(file.rows for file in inputs.files)]
    ends = [(each.plan_id, rows[min(each.num_files, len(rows) - 1)]) for each in extends]
    parts: list[_Part] = []
    unit = first_row = 0
    for part_id, end in [*ends, (plan_id, num_rows)]:
        parts.append(_Part(part_id, unit, first_row, end))
        unit, first_row = _end_unit(parts[-1], rows_per_unit), end
    return parts


def _end_unit(part: _Part, rows_per_unit: int) -> int:
    return part.first_unit - (part.first_row - part.end_row) // rows_per_unit


def _plan_id(
    fingerprint: str, inputs: Inputs, samples_per_shard: int, extends: Sequence[EarlierPlan]
) -> str:
    identity = to_plain(inputs)
    for file in identity["files"]:
        del file["path"]  # a file that was moved is the same input
    return digest_of(
        {
            "fingerprint": fingerprint,
            "inputs": identity,
            "samples_per_shard": samples_per_shard,
            "extends": to_plain(extends),
        }
    )


def plan_path(root: Path) -> Path:
    """The file of the plan in force: the last extension of plan.json, or plan.json itself."""
    matches = (PLAN_NAME.fullmatch(name) for name in list_folder(root))
    names = {int(match["number"] or 0): match.string for match in matches if match}
    return root / names[max(names)] if names else root / PLAN_FILE


def stored_plan(root: Path) -> Plan | None:
    """The plan in force; None if there is none."""
    path = plan_path(root)
    try:
        plan = read_document(path, Plan)
    except FileNotFoundError:
        return None
    if plan.file_name != path.name:
        raise VerificationError(f"{path} holds the plan of {plan.file_name}: name it so.")
    return plan


def await_plan(root: Path, inputs: Inputs, timeout_s: float, *, extend: bool) -> Plan | None:
    """The plan in force, when rank 0 has written it and, with `extend`, when it has all files of
    `inputs`; or what there is after `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    with Work(f"waiting for rank 0's plan, at most {duration(timeout_s)}"):
        while True:
            plan = stored_plan(root)
            is_due = plan is None or (extend and match_files(plan.inputs.files, inputs.files)[1])
            if not is_due or time.monotonic() >= deadline:
                return plan
            time.sleep(POLL_S)


def read_plan(root: Path) -> Plan:
    """The plan in force. Raises InputError if there is none."""
    require_folder(root)
    plan = stored_plan(root)
    if plan is None:
        raise InputError(f"{root} is not a dataset of embed-precompute: no {PLAN_FILE}.")
    return plan


def damaged_earlier_plans(root: Path, plan: Plan) -> Iterator[Plan]:
    """Yields the plans that `plan` extends whose files are missing or damaged.

    Nothing reads these files while `plan` is in force; one who takes the extension back does.
    """
    for earlier in plan.extends:
        expected = plan.as_of(earlier.plan_id)
        assert expected is not None, "it is one of those that the plan extends"
        try:
            found = read_document(root / expected.file_name, Plan).plan_id
        except (FileNotFoundError, StorageError, VerificationError):
            found = ""
        if found != earlier.plan_id:
            yield expected


def refuse_foreign_folder(root: Path) -> None:
    """Raises InputError if `root` is a folder of other things: a dataset is not strewn among them.
    What a killed run leaves, and hidden files, are no other things."""
    names = list_folder(root)
    if "null.json" in names or any(map(PLAN_NAME.fullmatch, names)):
        return
    ours = {*OWN_NAMES, "lost+found"}
    others = [
        name
        for name in names
        if name not in ours and not name.startswith(".") and not FILE_NAME.fullmatch(name)
    ]
    if others:
        more = f" and {len(others) - 3:,} more" if len(others) > 3 else ""
        raise InputError(
            f"output.path {root} holds no dataset, but {', '.join(others[:3])}{more}: expected a "
            "new or an empty folder. Choose another, such as "
            f"{root / 'embeddings'}."
        )


def publish_plan(root: Path, plan: Plan) -> Plan:
    """Writes the plan unless it is there. Returns the plan in force, which is equal.

    Raises ConflictError if the stored plan is another, or if there is none and the units in `root`
    belong to another.
    """
    refuse_linked_folders(root)
    stored = stored_plan(root)
    if stored is None or (plan.extends and plan.extends[-1].plan_id == stored.plan_id):
        _refuse_foreign_units(root, plan, stored)
        payload = document_bytes(plan)
        if len(payload) > MAX_JSON_BYTES:
            raise InputError(
                f"{plan.file_name} would have {len(payload):,} bytes for "
                f"{len(plan.inputs.files):,} input files: at most {MAX_JSON_BYTES:,} are read "
                "back. Merge the caption files."
            )
        publish_bytes(root / plan.file_name, payload)
        stored = read_plan(root)
    if stored.plan_id != plan.plan_id:
        if stored.as_of(plan.plan_id) is None:
            check_same(stored, plan.spec, plan.inputs, plan.samples_per_shard)
        raise IncompleteError(
            f"{root}: another job has just written {stored.file_name}, another plan than this "
            "run's. Run the same command again."
        )
    return stored


def _refuse_foreign_units(root: Path, plan: Plan, stored: Plan | None) -> None:
    """Raises ConflictError if the plan file was lost and the units that it introduced, those that
    `stored` does not have, belong to another plan."""
    units = committed_units(root)
    if stored is not None:
        units = {unit for unit in units if unit >= stored.num_units}
    elif record_path(root, NULL_UNIT).exists():
        units.add(NULL_UNIT)
    if not units:
        return
    record = read_any_record(root, min(units))
    if record.plan_id != plan.plan_id and stored is not None:
        raise ConflictError(
            f"{root} holds units of another extension ({record.plan_id[:16]}; this run's is "
            f"{plan.plan_id[:16]}), whose plan is gone. `embed-precompute repair {root}` moves "
            "them away; then run the same command again."
        )
    if record.plan_id != plan.plan_id:
        raise ConflictError(
            f"{root} has no {PLAN_FILE}, and its units belong to another plan "
            f"({record.plan_id[:16]}, fingerprint {record.fingerprint[:16]}) than this "
            f"configuration makes ({plan.plan_id[:16]}, fingerprint {plan.fingerprint[:16]}). "
            "Give the configuration and captions back that these units were made with, or write to "
            "a new output.path."
        )


def auto_samples_per_shard(bytes_per_sample: float) -> int:
    """1 GiB divided by the estimated bytes of a sample, at most 4,096."""
    return max(1, min(AUTO_MAX_SAMPLES, int(AUTO_SHARD_BYTES / max(1.0, bytes_per_sample))))


# --- comparing ------------------------------------------------------------------------------------


def match_files(
    planned: Sequence[InputFile], found: Sequence[InputFile]
) -> tuple[list[int | None], list[int]]:
    """For each planned file the index of the found one with the same content, or None; and the
    indexes of the found files that were not planned.

    Files of equal content are told apart by their paths, or else matched in order.
    """
    by_path = {file: index for index, file in enumerate(found)}
    matched = [by_path.pop(file, None) for file in planned]
    left: dict[InputFile, list[int]] = {}
    for file, index in by_path.items():
        left.setdefault(dataclasses.replace(file, path=""), []).insert(0, index)
    for number, file in enumerate(planned):
        same = left.get(dataclasses.replace(file, path=""))
        if matched[number] is None and same:
            matched[number] = same.pop()
    return matched, sorted(set(range(len(found))) - set(matched))


def check_same(
    stored: Plan, spec: Mapping[str, Any], inputs: Inputs, samples_per_shard: int | None
) -> None:
    """Raises ConflictError, naming what differs, unless `stored` fits the other arguments.

    `samples_per_shard` None means `auto`: the plan is the authority once it is written.
    """
    same = stored.fingerprint == digest_of(spec)
    lines = [] if same else differing_fields(stored.spec, spec)
    lines.sort(key=lambda line: line.partition(":")[0].endswith(DERIVED))  # stable
    files, added = _differing_files(stored.inputs.files, inputs.files)
    lines += files
    old, new = to_plain(stored.inputs), to_plain(inputs)
    del old["files"], new["files"]
    lines += differing_fields(old, new)
    if samples_per_shard not in (None, stored.samples_per_shard):
        lines.append(f"samples_per_shard: {stored.samples_per_shard} -> {samples_per_shard}")
    if not lines and not added:
        return
    advice = (
        "Give the old one back, or write to a new output.path; with --reuse and the folder of this "
        "dataset, what is the same is copied."
    )
    if added and not lines and stored.inputs.limit is None:
        advice = (
            "Run with --extend to append the added files. Or write to a new output.path; with "
            "--reuse and the folder of this dataset, what is the same is copied."
        )
        if stored.inputs.id_column is not None:  # row numbers would be ids of both
            advice += (
                " Or make the added files a dataset of their own: EmbeddingDataset([one, other]) "
                "reads both as one."
            )
    lines += [f"{path}: added" for path in added]
    raise ConflictError(
        "the output holds another dataset; this run differs in\n  " + listed(lines) + f"\n{advice}"
    )


def _differing_files(
    planned: Sequence[InputFile], found: Sequence[InputFile]
) -> tuple[list[str], list[str]]:
    """A line for each planned file that is gone or has changed; the paths of added files."""
    matched, others = match_files(planned, found)
    added = {found[index].path: found[index] for index in others}
    lines = []
    for file, match in zip(planned, matched, strict=True):
        if match is None and (now := added.pop(file.path, None)) is not None:
            sizes = f"bytes {file.bytes:,} -> {now.bytes:,}"
            same = "same size, other content"
            lines.append(f"{file.path}: changed ({same if file.bytes == now.bytes else sizes})")
        elif match is None:
            lines.append(f"{file.path}: removed")
    return lines, sorted(added)
