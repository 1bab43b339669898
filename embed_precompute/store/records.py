"""The JSON files of a dataset, called documents: their keys, their bytes, and where files are.

Guarantees: a document that is returned has exactly the keys and types of the format, and its file
is byte for byte what `document_bytes` makes of it. The names of files follow from unit numbers and
digests, so no path that is written in a file is ever opened. A listing of the folders shows which
units are committed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from embed_precompute.documents import (
    AtLeast,
    Count,
    Hex64,
    MismatchError,
    canonical_json,
    digest_of,
    field_types,
    from_plain,
    to_plain,
)
from embed_precompute.errors import (
    IncompleteError,
    InputError,
    StorageError,
    VerificationError,
    require,
)
from embed_precompute.samples import Status
from embed_precompute.store.commit import QUARANTINE, StoredFile, content_name, read_file

FORMAT_VERSION = 1
MAX_JSON_BYTES = 16 << 20
UNITS_PER_FOLDER = 1000
NULL_UNIT = -1
"""The unit number of the null embedding, which is claimed like a unit, before all others."""
ENCODER_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
RESERVED_ENDINGS = ("_offsets", "_xxh3", "_length", "_mask", "_tokens", "_truncated")
"""Suffixes that the format adds to an encoder's or tensor's name, as in `t5_tokens`: no encoder or
tensor may have a name that ends in one."""
PLAN_NAME = re.compile(r"plan(?:-(?P<number>[0-9]{4,9}))?\.json")
"""The name of a plan: plan.json, and for each extension its number, from 1 on."""
OWN_NAMES = frozenset(("null.json", "manifest.json", "manifest.parquet", "shards", "index")) | {
    *("config.yaml", "run.json", "logs", QUARANTINE, "README.md", "report.html")
}
"""What a dataset's folder holds beside its plans and the null embedding."""
SHARD, ROWS, RECORD = ".safetensors", ".rows.parquet", ".json"

_FOLDER_NAME = re.compile(r"[0-9]{3,15}")
FILE_NAME = re.compile(
    r"(?:null|shard-(?P<unit>[0-9]{6,18}))"
    r"(?:\.json|-[0-9a-f]{16}\.(?:safetensors|rows\.parquet))"
)

# --- documents ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Document:
    """A JSON file that has its own digest: its fields are the keys of the file."""

    format_version: Literal[1] = 1
    kind: str = ""
    digest: str = field(default="", compare=False)
    """sha256 of the other fields; empty unless the object was read from a file."""


D = TypeVar("D", bound=Document)


def document_bytes(content: Document | Mapping[str, Any]) -> bytes:
    """`content` as canonical JSON with the digest of all its other keys, and a final newline."""
    plain = to_plain(content)
    plain.pop("digest", None)
    plain["digest"] = hashlib.sha256(canonical_json(plain)).hexdigest()
    return canonical_json(plain) + b"\n"


def read_json(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The object in a document, with its `digest`.

    Raises FileNotFoundError for a missing file: only the caller knows what absence means. Raises
    VerificationError for another version or kind, and for other bytes than those of
    `document_bytes` (a flipped bit, a torn write).
    """
    try:
        payload = read_file(path, MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: reading failed: {error.strerror}.") from error
    if len(payload) > MAX_JSON_BYTES:
        raise VerificationError(f"{path} is over {MAX_JSON_BYTES} bytes: not one of our files.")
    problem = "its content does not have the digest it states"
    try:
        content = json.loads(payload)
        if not isinstance(content, dict):
            problem = "it is no JSON object"
        elif content.get("format_version") != FORMAT_VERSION:
            raise VerificationError(
                f"{path} has format_version {content.get('format_version')!r}: this program reads "
                f"{FORMAT_VERSION}."
            )
        elif payload == document_bytes(content):
            problem = ""
    except (ValueError, RecursionError) as error:
        problem = f"it is not the JSON of our files ({error})"
    if problem:
        raise VerificationError(
            f"{path} is damaged: {problem}. Restore it, or use `embed-precompute repair` and run "
            "the job again."
        )
    if kind is not None and content.get("kind") != kind:
        raise VerificationError(f"{path} is of kind {content.get('kind')!r}: expected {kind!r}.")
    return content  # type: ignore[no-any-return]


def read_document(path: Path, declared: type[D]) -> D:
    """The document in a file. Raises as `read_json`, and VerificationError for other keys."""
    content = read_json(path, declared.kind)
    try:
        return from_plain(declared, content)
    except MismatchError as error:
        raise VerificationError(f"{path} is not as the format says: {error}") from error


# --- what is stored -------------------------------------------------------------------------------

Per = Literal["token", "caption"]
Positions = Literal["real", "real+1", "all"]
StoredDType = Literal["bfloat16", "float16", "float32"]
_EncoderName = Annotated[str, ENCODER_NAME]


@dataclass(frozen=True)
class EncoderOutput:
    """An entry of `spec.encoders.<name>.outputs`: a tensor that an encoder makes."""

    suffix: Annotated[str, re.compile(r"(_[a-z0-9_]+)?")]
    """The tensor's name is the encoder's name and this suffix."""
    per: Per
    width: Annotated[int, AtLeast(1)]
    positions: Positions | None
    """For an output per token: "all" if pads are stored too, "real" if only a caption's own tokens
    are, "real+1" if also the first pad is, where there is one. For an output per caption: None."""

    def __post_init__(self) -> None:
        if (self.positions is None) is (self.per == "token"):
            raise InputError(f"positions is {self.positions} of an output per {self.per}.")


@dataclass(frozen=True)
class _OutputSpec:
    dtype: StoredDType
    codec: Literal["raw"]


@dataclass(frozen=True)
class _PromptSpec:
    """What an encoder with a prompt template has in its spec; see `StoredTensor`."""

    template_stored: Count = 0
    padding_side: Literal["right", "left"] = "right"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a shard: `text_<name>`."""

    name: str
    """The encoder's name and the output's suffix."""
    encoder: str
    per: Per
    width: int
    dtype: StoredDType
    positions: Positions | None = None
    """See `EncoderOutput`."""
    template_stored: int = 0
    """Vectors of a prompt template's tokens that are stored with each caption's own."""
    padding_side: Literal["right", "left"] = "right"
    """Where the pads are, if they are stored."""

    @property
    def per_caption(self) -> bool:
        """True: one vector per stored row, [n, width]. False: a sequence, [total, width] packed."""
        return self.per == "caption"


def stored_tensors(spec: Mapping[str, Any]) -> tuple[StoredTensor, ...]:
    """The tensors that a resolved spec stores, sorted by name. MismatchError: a bad spec."""
    output: _OutputSpec = from_plain(_OutputSpec, spec.get("output"), "spec.output")
    encoders: dict[str, dict[str, Any]] = from_plain(
        dict[_EncoderName, dict[str, Any]], spec.get("encoders"), "spec.encoders"
    )
    tensors: dict[str, StoredTensor] = {}
    for encoder, fields in encoders.items():
        where = f"spec.encoders.{encoder}.outputs"
        outputs: list[EncoderOutput] = from_plain(list[EncoderOutput], fields.get("outputs"), where)
        for each in outputs:
            name = encoder + each.suffix
            if name in tensors or name.endswith(RESERVED_ENDINGS):
                raise MismatchError(
                    f"{where} makes text_{name}: expected a name that no other output makes, "
                    f"and that does not end in {', '.join(RESERVED_ENDINGS)}."
                )
            prompt: _PromptSpec = from_plain(
                _PromptSpec,
                {key: fields[key] for key in field_types(_PromptSpec) if key in fields},
                f"spec.encoders.{encoder}",
            )
            tensors[name] = StoredTensor(
                name,
                encoder,
                each.per,
                each.width,
                output.dtype,
                each.positions,
                prompt.template_stored,
                prompt.padding_side,
            )
    if not tensors:
        raise MismatchError("spec.encoders has no output: expected at least one.")
    return tuple(tensors[name] for name in sorted(tensors))


def encoder_fingerprints(spec: Mapping[str, Any]) -> dict[str, str]:
    """For each encoder of a resolved spec, the identity of what it makes of a text and stores.

    The encoder's name and the recipe are no part of it: the texts are compared as encoded.
    """
    common = {"format_version": spec.get("format_version"), "output": spec["output"]}
    return {name: digest_of({**common, "encoder": each}) for name, each in spec["encoders"].items()}


# --- records and manifest -------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenCounts:
    """Sums over samples, for one encoder."""

    tokens: Count
    """Number of tokens, special tokens included, pads not."""
    truncated: Count
    """Number of captions that lost tokens."""


@dataclass(frozen=True)
class StoredShard:
    """A shard that is published: its name, size and digest."""

    name: str
    """Basename, never a path."""
    bytes: Count
    head_sha256: Hex64
    """sha256 of the bytes before the first stored row. Among them are the checksums of all rows, so
    this digest covers the whole file."""


@dataclass(frozen=True)
class NullFiles:
    shard: StoredShard


@dataclass(frozen=True)
class UnitFiles(NullFiles):
    rows: StoredFile


@dataclass(frozen=True, kw_only=True)
class Record(Document):
    """What the records of units and of the null embedding have in common."""

    fingerprint: Hex64
    plan_id: Hex64
    environment: dict[str, str]
    encoders: dict[str, TokenCounts]
    tensors: dict[str, Count]
    """Number of stored vectors, by tensor."""
    files: NullFiles

    @property
    def number(self) -> int:
        """The unit's number, or NULL_UNIT."""
        return int(getattr(self, "unit", NULL_UNIT))

    def __post_init__(self) -> None:
        digests = {SHARD: (self.files.shard.name, self.files.shard.head_sha256)}
        if isinstance(self.files, UnitFiles):
            digests[ROWS] = (self.files.rows.name, self.files.rows.sha256)
        for ending, (name, digest) in digests.items():
            expected = content_name(unit_path(Path(), self.number, ending).name, digest)
            if name != expected:
                raise MismatchError(f"files has the name {name!r:.80}: expected {expected}.")

    def shard_path(self, root: Path) -> Path:
        return record_path(root, self.number).with_name(self.files.shard.name)


R = TypeVar("R", bound=Record)


@dataclass(frozen=True, kw_only=True)
class UnitRecord(Record):
    """The record of a unit: with it, and only with it, the unit is committed."""

    kind: Literal["unit"] = "unit"
    unit: Count
    first_row: Count
    num_rows: Count
    num_samples: Count
    num_stored: Count
    status: dict[str, Count]
    """Number of samples of each status, by label."""
    noted: dict[str, Count]
    """What of its input may surprise, in words, and how often: such as empty captions, encoded."""
    rows_sha256: Hex64
    files: UnitFiles

    def __post_init__(self) -> None:
        super().__post_init__()
        check_status(self.status, self.num_samples)
        if self.num_samples < self.num_rows:
            raise MismatchError("num_samples is less than num_rows: each row has one or more.")
        if self.num_stored > self.status[Status.OK.label]:
            raise MismatchError("num_stored is more than the samples that are ok.")

    def rows_path(self, root: Path) -> Path:
        return record_path(root, self.unit).with_name(self.files.rows.name)


@dataclass(frozen=True, kw_only=True)
class NullRecord(Record):
    """The record of the null embedding, which is a shard of one row and has no rows part."""

    kind: Literal["null"] = "null"


def check_status(status: Mapping[str, int], num_samples: int) -> None:
    """Raises MismatchError unless there is a count for each status, and the counts add up."""
    if status.keys() != {each.label for each in Status}:
        raise MismatchError(f"status has keys {sorted(status)}: expected one for each status.")
    if sum(status.values()) != num_samples:
        raise MismatchError(f"status does not add up to {num_samples} samples.")


# --- where files are ------------------------------------------------------------------------------


def unit_path(root: Path, unit: int, ending: str) -> Path:
    """Path of a file of a unit (or NULL_UNIT, the null embedding), without a digest in the name."""
    if unit == NULL_UNIT:
        return root / f"null{ending}"
    return root / "shards" / f"{unit // UNITS_PER_FOLDER:03d}" / f"shard-{unit:06d}{ending}"


def record_path(root: Path, unit: int) -> Path:
    return unit_path(root, unit, RECORD)


def unit_of(root: Path, folder: Path, name: str) -> int | None:
    """The unit (or NULL_UNIT) whose record, shard or rows part has this name in this folder; None
    for other names."""
    match = FILE_NAME.fullmatch(name)
    if match is None:
        return None
    if match["unit"] is None:
        return NULL_UNIT if folder == root else None
    unit = int(match["unit"])
    right = folder.name == f"{unit // UNITS_PER_FOLDER:03d}" and match["unit"] == f"{unit:06d}"
    return unit if right else None


def committed_units(root: Path) -> set[int]:
    """The units that have a record, by listing `shards/*`."""
    found = (
        unit_of(root, folder, name)
        for folder in unit_folders(root)
        for name in list_folder(folder)
        if name.endswith(RECORD)
    )
    return {unit for unit in found if unit is not None}


def unit_folders(root: Path) -> list[Path]:
    """The folders that hold the files of units."""
    names = list_folder(root / "shards")
    return [root / "shards" / name for name in names if _FOLDER_NAME.fullmatch(name)]


def unnamed_files(root: Path) -> Iterator[Path]:
    """Yields shards and rows parts that belong to a committed unit and are not named by its record.

    Their writer died, or another writer committed the unit first. The files of a unit without a
    record are left out: a writer may be about to publish that record. The files of a unit with a
    damaged record are left out too: the record may have named any of them. Only records of units
    with too many files are read.
    """
    for folder in (root, *unit_folders(root)):
        found: dict[int, list[str]] = {}
        for name in list_folder(folder):
            unit = unit_of(root, folder, name)
            if unit is not None and not name.endswith(RECORD):
                found.setdefault(unit, []).append(name)
        for unit, names in found.items():
            if len(names) > (1 if unit == NULL_UNIT else 2):
                with contextlib.suppress(IncompleteError, VerificationError, StorageError):
                    files = vars(read_any_record(root, unit).files).values()
                    unnamed = set(names) - {file.name for file in files}
                    yield from (folder / name for name in sorted(unnamed))


def list_folder(folder: Path) -> list[str]:
    """The names in a folder, sorted; none if there is no folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StorageError(f"{folder}: listing failed: {error.strerror}.") from error


def refuse_linked_folders(root: Path) -> None:
    """Raises InputError if a folder of a dataset is a link: we write nothing outside the root."""
    folders = [root / name for name in ("shards", "index", "logs", QUARANTINE)]
    for folder in [*folders, *(root / "shards" / name for name in list_folder(root / "shards"))]:
        if folder.is_symlink():
            raise InputError(
                f"{folder} is a link to {os.readlink(folder)!r}: a dataset is written below its "
                "own folder only. Move the whole dataset there and link output.path itself."
            )


def require_folder(root: Path) -> None:
    """Raises InputError if `root` does not exist or is not a folder."""
    require(root.is_dir(), f"{root} is not a folder. Expected the output.path of a run.")


# --- reading them ---------------------------------------------------------------------------------


def read_record(root: Path, unit: int) -> UnitRecord:
    """The record of a unit. Raises IncompleteError if there is none."""
    return _read_record(root, unit, UnitRecord)


def read_null_record(root: Path) -> NullRecord:
    """The record of the null embedding. Raises IncompleteError if there is none."""
    return _read_record(root, NULL_UNIT, NullRecord)


def read_any_record(root: Path, unit: int) -> Record:
    """The record of a unit, or of the null embedding (NULL_UNIT). Raises IncompleteError if there
    is none."""
    return read_null_record(root) if unit == NULL_UNIT else read_record(root, unit)


def _read_record(root: Path, unit: int, declared: type[R]) -> R:
    path = record_path(root, unit)
    try:
        record = read_document(path, declared)
    except FileNotFoundError:
        raise IncompleteError(
            f"{path} is missing: its unit is not committed yet. Run the job again."
        ) from None
    if record.number != unit:
        raise VerificationError(f"{path}: unit is {record.number}, expected {unit}.")
    return record
