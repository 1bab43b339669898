"""The small JSON files of a dataset: plan, unit records, the null record; and where files are.

Guarantees: a record that is returned has exactly the keys, types and file names of the format, and
belongs to the unit it was asked for; no path in a file is ever followed. Which units are committed
is a folder listing, nothing is parsed for it.
Costs: a listing is O(files); reading a record is one small file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embed_precompute.errors import (
    IncompleteError,
    InputError,
    StorageError,
    VerificationError,
    require,
)
from embed_precompute.samples import Status
from embed_precompute.store.sealed import FORMAT_VERSION, read_sealed

UNITS_PER_FOLDER = 1000
ENCODER_NAME = re.compile(r"^[a-z][a-z0-9_]{0,31}$")
RESERVED_ENDINGS = ("_offsets", "_xxh3", "_length", "_mask", "_tokens", "_truncated")
"""Of names that stand beside an encoder's: no encoder's name may end so."""
NULL_UNIT = -1
"""The number of the null embedding where units are counted; it is claimed like one, first."""
CODECS = ("raw",)
_DTYPES = ("bfloat16", "float16", "float32")
_HEX = re.compile(r"[0-9a-f]{64}")
_FOLDER_NAME = re.compile(r"[0-9]{3,15}")
_RECORD_NAME = re.compile(r"shard-([0-9]{6,18})\.json")


@dataclass(frozen=True)
class StoredTensor:
    """What an encoder stores: tensor `text_<name>`."""

    name: str
    """The encoder's name."""
    pooled: bool
    """True: one vector per row, [n, dim]; False: a sequence per row, packed [total_tokens, dim]."""
    dim: int
    dtype: str


@dataclass(frozen=True)
class UnitPaths:
    """The files of one unit; the record is published last and makes it count."""

    shard: Path
    rows: Path
    record: Path


def unit_paths(root: Path, unit: int) -> UnitPaths:
    folder = root / "shards" / _folder_name(unit)
    stem = _stem(unit)
    return UnitPaths(
        folder / f"{stem}.safetensors", folder / f"{stem}.rows.parquet", folder / f"{stem}.json"
    )


def _folder_name(unit: int) -> str:
    return f"{unit // UNITS_PER_FOLDER:03d}"


def _stem(unit: int) -> str:
    return f"shard-{unit:06d}"


def null_paths(root: Path) -> UnitPaths:
    """The files of the null embedding, which is a shard of one row; it has no rows part."""
    return UnitPaths(root / "null.safetensors", root / "null.rows.parquet", root / "null.json")


def committed_units(root: Path) -> set[int]:
    """The units that have a record, by listing `shards/*`."""
    units: set[int] = set()
    shards = str(root / "shards")
    try:
        for folder in _names(shards):
            if _FOLDER_NAME.fullmatch(folder) is None:
                continue
            for name in _names(os.path.join(shards, folder)):
                match = _RECORD_NAME.fullmatch(name) if name.endswith(".json") else None
                unit = int(match[1]) if match else -1
                if match and folder == _folder_name(unit) and name == f"{_stem(unit)}.json":
                    units.add(unit)
    except OSError as error:
        raise StorageError(f"{root / 'shards'}: listing failed: {error}.") from error
    return units


def refuse_linked_folders(root: Path) -> None:
    """InputError when a folder of the dataset is a link: nothing is written outside the root."""
    for name in ("shards", "index", "logs", "_quarantine"):
        _refuse_link(root / name)
    for name in _names(str(root / "shards")):
        _refuse_link(root / "shards" / name)


def _refuse_link(folder: Path) -> None:
    if os.path.islink(folder):
        raise InputError(
            f"{folder} is a link to {os.readlink(folder)!r}: a dataset is written below its own "
            "folder only. Move the whole dataset there and link output.path itself."
        )


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def require_folder(root: Path) -> None:
    """InputError where there is no folder, or something else in its place."""
    require(root.is_dir(), f"{root} is not a folder. Expected the output.path of a run.")


def read_plan(root: Path) -> dict[str, Any]:
    """plan.json, with what the store needs of it checked."""
    require_folder(root)
    path = root / "plan.json"
    try:
        plan = read_sealed(path, "plan")
    except FileNotFoundError:
        raise InputError(f"{root} is not a dataset of embed-precompute: no plan.json.") from None
    needed: dict[str, Any] = {"fingerprint": _HEX, "plan": _HEX, "spec": dict}
    needed |= dict.fromkeys(("num_rows", "num_samples", "rows_per_unit", "num_units"), int)
    _require(path, {key: plan.get(key) for key in needed}, needed)
    if plan["num_units"] != -(-plan["num_rows"] // max(1, plan["rows_per_unit"])):
        raise VerificationError(f"{path}: its units do not hold its {plan['num_rows']} rows.")
    return plan


def stored_tensors(spec: Mapping[str, Any]) -> tuple[StoredTensor, ...]:
    """What each encoder of a resolved spec stores, sorted by name."""
    shape = {"dtype": str, "codec": str}
    problem = mismatch(spec.get("output"), shape, "spec.output")
    encoders = spec.get("encoders")
    if not problem and (not isinstance(encoders, dict) or not encoders):
        problem = "spec.encoders: expected at least one encoder"
    if problem:
        raise VerificationError(f"the plan's {problem}.")
    dtype, codec = spec["output"]["dtype"], spec["output"]["codec"]
    if codec not in CODECS or dtype not in _DTYPES:
        raise VerificationError(
            f"the dataset has codec {codec!r} and dtype {dtype!r}: this program reads codec "
            f"{' or '.join(CODECS)} and {', '.join(_DTYPES)}. Use the version that wrote it."
        )
    tensors = []
    for name, encoder in sorted(spec["encoders"].items()):
        encoder = encoder if isinstance(encoder, dict) else {}
        found = {key: encoder.get(key) for key in ("pooled", "dim")}
        problem = mismatch(found, {"pooled": bool, "dim": int}, f"spec.encoders.{name}")
        if problem or not ENCODER_NAME.fullmatch(name):
            raise VerificationError(f"the plan's {problem or f'encoder name {name!r} is bad'}.")
        tensors.append(StoredTensor(name, encoder["pooled"], encoder["dim"], dtype))
    return tuple(tensors)


def read_manifest(root: Path) -> dict[str, Any]:
    """manifest.json; FileNotFoundError while the dataset is not finalised."""
    path = root / "manifest.json"
    manifest = read_sealed(path, "dataset")
    _require(path, manifest, _MANIFEST_SHAPE)
    return manifest


def read_record(root: Path, unit: int | None) -> dict[str, Any]:
    """The record of a unit, or the null embedding's for None; IncompleteError when it has none."""
    paths = null_paths(root) if unit is None else unit_paths(root, unit)
    try:
        record = read_sealed(paths.record, "null" if unit is None else "unit")
    except FileNotFoundError:
        raise no_record(paths.record) from None
    return checked_record(paths, unit, record)


def no_record(path: Path) -> IncompleteError:
    return IncompleteError(f"{path} is missing: not committed yet. Run the same command again.")


def checked_record(paths: UnitPaths, unit: int | None, record: dict[str, Any]) -> dict[str, Any]:
    """`record`, if it is as the format says and of this unit."""
    _require(paths.record, record, _null_shape(paths) if unit is None else _shape(paths, unit))
    if unit is not None:
        status = record["status"]
        if sum(status.values()) != record["num_samples"]:
            raise VerificationError(f"{paths.record}: status does not add up to num_samples.")
        if record["num_stored"] > status[Status.OK.label]:
            raise VerificationError(f"{paths.record}: more rows stored than samples are ok.")
    return record


def _file_shape(path: Path) -> dict[str, Any]:
    return {"name": path.name, "bytes": int, "sha256": _HEX}


_COMMON_SHAPE: dict[str, Any] = {
    "format_version": FORMAT_VERSION,
    "fingerprint": _HEX,
    "plan": _HEX,
    "environment": {str: str},
    "digest": _HEX,
}
_UNIT_SHAPE: dict[str, Any] = {
    **_COMMON_SHAPE,
    "kind": "unit",
    **dict.fromkeys(("first_row", "num_rows", "num_samples", "num_stored"), int),
    "status": {status.label: int for status in Status},
    "rows_sha256": _HEX,
    "encoders": {str: {"tokens": int, "truncated": int, "stored_tokens": int}},
    "adopted_shard": bool,
}


def _null_shape(paths: UnitPaths) -> dict[str, Any]:
    return {
        **_COMMON_SHAPE,
        "kind": "null",
        "encoders": {str: {"length": int, "tokens": int}},
        "files": {"shard": _file_shape(paths.shard)},
    }


def _shape(paths: UnitPaths, unit: int) -> dict[str, Any]:
    return {
        **_UNIT_SHAPE,
        "unit": unit,
        "files": {"shard": _file_shape(paths.shard), "rows": _file_shape(paths.rows)},
    }


_MANIFEST_SHAPE: dict[str, Any] = {
    "format_version": FORMAT_VERSION,
    "kind": "dataset",
    "fingerprint": _HEX,
    "plan": _HEX,
    "spec": dict,
    "encoders": {str: {"tensor": str, "pooled": bool, "dim": int, "dtype": str}},
    "counts": {
        **dict.fromkeys(("rows", "samples", "units", "stored"), int),
        "status": {status.label: int for status in Status},
        "encoders": {str: {"tokens": int, "truncated": int, "stored_tokens": int}},
    },
    "environments": [{"environment": {str: str}, "units": int}],
    "records_sha256": _HEX,
    "files": {str: {"bytes": int, "sha256": _HEX}},
    "digest": _HEX,
}


def _require(path: Path, value: Any, shape: Any) -> None:
    problem = mismatch(value, shape, "it")
    if problem:
        raise VerificationError(f"{path} is not as the format says: {problem}.")


def mismatch(value: Any, shape: Any, where: str) -> str | None:
    """How `value` differs from `shape`, or None.

    A shape is a type (int: 0 or more), a pattern, a literal value, `[shape]` for a list, a tuple of
    shapes that are all allowed, `{str: shape}` for any keys, or a dictionary of exact keys.
    """
    kind = type(shape)
    if kind is dict:
        return _mismatched_object(value, shape, where)
    if kind is tuple:
        problems = [mismatch(value, choice, where) for choice in shape]
        return problems[0] if all(problems) else None
    if kind is list:
        if not isinstance(value, list):
            return f"{where} is {value!r:.80}, expected a list"
        entries = (mismatch(v, shape[0], f"{where}[{i}]") for i, v in enumerate(value))
        return next((problem for problem in entries if problem), None)
    if _fits(value, shape, kind):
        return None
    expected = shape.__name__ if isinstance(shape, type) else getattr(shape, "pattern", shape)
    return f"{where} is {value!r:.80}, expected {expected}"


def _mismatched_object(value: Any, shape: Mapping[Any, Any], where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where} is {value!r:.80}, expected an object"
    free = shape.get(str)
    if free is None and value.keys() != shape.keys():
        return f"{where} has keys {sorted(value)}, expected {sorted(shape)}"
    for key, inner in value.items():
        expected = free or shape[key]
        kind = type(expected)
        # Most values are plain and right: nothing is written about them.
        if kind in (dict, tuple, list) or not _fits(inner, expected, kind):
            problem = mismatch(inner, expected, f"{where}.{key}")
            if problem:
                return problem
    return None


def _fits(value: Any, shape: Any, kind: type) -> bool:
    """Whether a value has a type (int: 0 or more), fits a pattern, or is a literal."""
    if kind is type:
        return type(value) is shape and not (shape is int and value < 0)
    if kind is re.Pattern:
        return isinstance(value, str) and shape.fullmatch(value) is not None
    return type(value) is kind and bool(value == shape)
