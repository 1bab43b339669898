"""Columns of the caption table: which are needed, what type each may have, and their values.

Guarantees: every file has every needed column, once, with a type of one family; a value is a Python
object, None (null) or a `Problem` that says why the row has no text. Bad UTF-8 never raises.
Costs: a batch's values are decoded by Arrow's kernels; only a batch with bad UTF-8 is decoded value
by value.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embed_precompute.captions.files import Footer, Source
from embed_precompute.errors import InputError
from embed_precompute.samples import Status

STRING, STRINGS, INTEGER, FLOAT = "string", "list of string", "integer", "float"
BOOLEAN, DECIMAL = "boolean", "decimal"


@dataclass(frozen=True)
class Problem:
    """Why a row, or one caption of it, has no text to encode."""

    status: Status
    error: str


@dataclass(frozen=True)
class Need:
    """A column the configuration asks for, by which setting, and the families it may have."""

    column: str
    setting: str
    families: tuple[str, ...]
    advice: str = ""


def family(arrow_type: Any) -> str:
    """The family of an Arrow type; its own name where captions have no use for it."""
    is_type = pa.types
    if is_type.is_dictionary(arrow_type):
        return family(arrow_type.value_type)
    if (
        is_type.is_string(arrow_type)
        or is_type.is_large_string(arrow_type)
        or is_type.is_string_view(arrow_type)
    ):
        return STRING
    if is_type.is_list(arrow_type) or is_type.is_large_list(arrow_type):
        return STRINGS if family(arrow_type.value_type) == STRING else str(arrow_type)
    if is_type.is_integer(arrow_type):
        return INTEGER
    if is_type.is_floating(arrow_type):
        return FLOAT
    if is_type.is_boolean(arrow_type):
        return BOOLEAN
    if is_type.is_decimal(arrow_type):
        return DECIMAL
    return str(arrow_type)


def check_columns(footer: Footer, needs: Sequence[Need]) -> dict[str, str]:
    """Family of each needed column of one file; InputError naming file, column and setting."""
    families: dict[str, str] = {}
    for need in needs:
        positions = footer.schema.get_all_field_indices(need.column)
        if not positions:
            raise _missing(footer, need)
        if len(positions) > 1:
            raise InputError(
                f"{footer.source} has {len(positions)} columns named {need.column!r} "
                f"({need.setting}): expected one. Rename the others."
            )
        arrow_type = footer.schema.field(positions[0]).type
        found = family(arrow_type)
        if found not in need.families:
            raise InputError(
                f"{footer.source}: column {need.column!r} ({need.setting}) has type {arrow_type}: "
                f"expected {' or '.join(need.families)}. Convert the column, or name another in "
                f"{need.setting}.{need.advice}"
            )
        families[need.column] = found
    return families


def _missing(footer: Footer, need: Need) -> InputError:
    names = list(footer.schema.names)
    lowered = {name.lower(): name for name in reversed(names)}
    near = difflib.get_close_matches(need.column.lower(), lowered, n=1)
    hint = f" Did you mean {lowered[near[0]]!r}?" if near else ""
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return InputError(
        f"{footer.source} has no column {need.column!r} ({need.setting}).{hint} Its columns: "
        f"{shown}. Set {need.setting} to one of them.{need.advice}"
    )


def check_agreement(
    sources: Sequence[Source], families: Sequence[dict[str, str]], needs: Sequence[Need]
) -> None:
    """Every file must agree with the first on the family of every needed column."""
    for source, found in zip(sources, families, strict=True):
        for need in needs:
            first, other = families[0][need.column], found[need.column]
            if first != other:
                raise InputError(
                    f"{source}: column {need.column!r} ({need.setting}) is {other}, but it is "
                    f"{first} in {sources[0]}: the files' schemas disagree. Convert one of them, "
                    "or point captions.path at files that agree."
                )


def as_bytes(array: Any) -> list[bytes | None]:
    """The stored bytes of a string array, valid UTF-8 or not."""
    stored: list[bytes | None]
    stored = array.cast(pa.binary()).to_numpy(zero_copy_only=False).tolist()
    return stored


def strings(array: Any, column: str) -> list[str | Problem | None]:
    """Values of a string array; None is null, a Problem says where its UTF-8 breaks."""
    try:
        values: list[str | Problem | None] = array.to_numpy(zero_copy_only=False).tolist()
        return values
    except (pa.ArrowException, UnicodeDecodeError):
        return [_decode(value, column) for value in as_bytes(array)]


def _decode(value: bytes | None, column: str) -> str | Problem | None:
    if value is None:
        return None
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        return Problem(
            Status.INVALID_TEXT,
            f"column {column!r} is not UTF-8 at byte {error.start} ({error.reason})",
        )


def values(array: Any, column: str) -> list[Any]:
    """Values of a scalar column as Python objects, for a recipe; null is None."""
    if pa.types.is_float16(array.type):
        array = array.cast(pa.float32())
    if family(array.type) == STRING:
        return strings(array, column)
    if array.null_count == 0 and family(array.type) in (INTEGER, FLOAT):
        numbers: list[Any] = array.to_numpy(zero_copy_only=False).tolist()
        return numbers
    objects: list[Any] = array.to_pylist()
    return objects


def entries_per_row(array: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Captions of each row of a list column; 0 for an empty or a null list."""
    lengths = pc.list_value_length(array).fill_null(0)
    return np.asarray(lengths.to_numpy(zero_copy_only=False), np.int64)


def first_null(array: Any) -> int:
    """Position of the first null of an array that has one."""
    return int(np.argmax(array.is_null().to_numpy(zero_copy_only=False)))
