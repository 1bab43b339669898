"""Converts dataclasses from and to plain JSON or YAML values; makes digests of plain values.

`from_plain` accepts exactly what a dataclass declares, and says which key is wrong, what was found
and what was expected. The plan, the records, the manifest and the configuration are read by it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from embed_precompute.errors import InputError

T = TypeVar("T")
UNIONS = (typing.Union, types.UnionType)

Hex64 = Annotated[str, re.compile(r"[0-9a-f]{64}")]
"""A sha256."""
Hex32 = Annotated[str, re.compile(r"[0-9a-f]{32}")]
"""An XXH3-128."""


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The least value of an `Annotated` number."""

    least: int


Count = Annotated[int, AtLeast(0)]


@dataclasses.dataclass(frozen=True)
class ByKind:
    """Marks an `Annotated` base class: the key `kind` of a mapping names the subclass.

    `classes` returns the class of every kind. It is called late: a registry may be filled by
    modules that import the base class.
    """

    classes: Callable[[], Mapping[str, type]]


class MismatchError(ValueError):
    """A plain value is not what a dataclass declares; the message names the key."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key
        """The dotted key that is wrong; if several keys were checked together, the key of the
        mapping that holds them."""


def canonical_json(value: Any) -> bytes:
    """`value` as UTF-8 JSON with sorted keys, no spaces, no NaN: equal values give equal bytes."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8")


def digest_of(value: Any) -> str:
    """sha256 (hex) of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts of their fields, tuples as lists, down to plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(inner) for inner in value]
    return value


def from_plain(declared: type[T] | Any, value: Any, where: str = "") -> T:
    """`value` as the declared type: a dataclass, a union, Literal, list, tuple, dict or scalar.

    `where` is the dotted key that errors begin with. A field may be left out if it has a default.
    Raises MismatchError, also in place of an InputError from a dataclass's `__post_init__`. The
    message of that InputError should begin with a field's name: `max_length is 0: ...` becomes
    `encoders.t5.max_length is 0: ...`.
    """
    made: T = _from_plain(declared, value, where)
    return made


def _from_plain(declared: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin is Annotated:
        base, mark = inner
        if isinstance(mark, ByKind):
            return _from_plain(class_by_kind(mark, value, where), value, where)
        made = _from_plain(base, value, where)
        if isinstance(mark, re.Pattern):
            good = mark.fullmatch(made) is not None
        else:
            good = made >= mark.least
        if not good:
            raise _mismatch(value, declared, where)
        return made
    if dataclasses.is_dataclass(declared):
        return _dataclass(declared, value, where)
    if origin in UNIONS:
        return _union(declared, inner, value, where)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in inner):
            return value
        raise _mismatch(value, declared, where, nearest_of(value, inner))
    if origin in (list, tuple) and isinstance(value, (list, tuple)):
        types = inner if origin is tuple and inner[-1] is not Ellipsis else inner[:1] * len(value)
        if len(value) != len(types):
            raise _mismatch(value, declared, where)
        pairs = zip(types, value, strict=True)
        return origin([_from_plain(t, v, f"{where}[{i}]") for i, (t, v) in enumerate(pairs)])
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {
            _from_plain(inner[0], key, f"{_dotted(where, key)} (the key)"): _from_plain(
                inner[1], entry, _dotted(where, key)
            )
            for key, entry in value.items()
        }
    if declared is Any or (declared is None and value is None):
        return value
    if declared is float and type(value) is int:
        return float(value)
    if isinstance(declared, type) and type(value) is declared:
        return value
    raise _mismatch(value, declared, where)


def _dataclass(declared: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _mismatch(value, declared, where)
    hints = field_types(declared)
    for key in value:
        if key not in hints:
            dotted = _dotted(where, key)
            raise MismatchError(f"there is no key {dotted}: {nearest_of(key, hints)}", dotted)
    made: dict[str, Any] = {}
    for field in dataclasses.fields(declared):
        dotted = _dotted(where, field.name)
        if field.name in value:
            made[field.name] = _from_plain(hints[field.name], value[field.name], dotted)
        elif field.init and is_required(field):
            raise MismatchError(f"{dotted} is missing: it has no default.", dotted)
    try:
        return declared(**made)
    except InputError as error:
        first = str(error).split(" ", 1)[0].rstrip(":")
        if first.split(".")[0] in hints:
            raise MismatchError(_dotted(where, error), _dotted(where, first)) from error
        raise MismatchError(f"{where}: {error}" if where else str(error), where) from error


@functools.cache
def field_types(declared: Any) -> dict[str, Any]:
    """The declared type of every field that a dataclass is made with, `Annotated` included."""
    hints = typing.get_type_hints(declared, include_extras=True)
    return {f.name: hints[f.name] for f in dataclasses.fields(declared) if f.init}


def is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


def class_by_kind(mark: ByKind, value: Any, where: str) -> Any:
    """The class that the `kind` of the mapping `value` names."""
    classes = mark.classes()
    kinds = " or ".join(classes)
    if not isinstance(value, Mapping):
        raise MismatchError(
            f"{where} is {shown(value)}: expected a mapping with the key kind ({kinds}) and that "
            "kind's own keys.",
            where,
        )
    key = _dotted(where, "kind")
    if "kind" not in value:
        raise MismatchError(f"{key} is missing: expected {kinds}.", key)
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in classes:
        raise MismatchError(f"{key} is {shown(kind)}: {nearest_of(kind, classes)}", key)
    return classes[kind]


def _union(declared: Any, choices: tuple[Any, ...], value: Any, where: str) -> Any:
    """`value` as the first choice that it fits."""
    errors = []
    for choice in choices:
        try:
            return _from_plain(choice, value, where)
        except MismatchError as error:
            # The traceback would keep this frame and its callers' alive, with all their variables.
            errors.append(error.with_traceback(None))
    # A mapping was meant for the choice that takes mappings, a list for the one that takes lists:
    # show the error of that choice.
    for choice, problem in zip(choices, errors, strict=True):
        takes_list = typing.get_origin(choice) in (list, tuple)
        if isinstance(value, Mapping) and takes_mapping(choice):
            raise problem
        if isinstance(value, (list, tuple)) and takes_list:
            raise problem
        mark = typing.get_args(choice)[1] if typing.get_origin(choice) is Annotated else None
        if isinstance(mark, ByKind) and isinstance(value, str) and value in mark.classes():
            hint = f"expected a mapping with a kind, such as '{{kind: {value}}}'."
            raise _mismatch(value, declared, where, hint)
    raise _mismatch(value, declared, where)


def takes_mapping(declared: Any) -> bool:
    """Whether values of the declared type may be mappings."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin in UNIONS:
        return any(map(takes_mapping, inner))
    if origin is Annotated:
        return takes_mapping(inner[0])
    return dataclasses.is_dataclass(declared) or origin in (dict, Mapping)


def _mismatch(value: Any, declared: Any, where: str, hint: str = "") -> MismatchError:
    expected = hint or f"expected {type_name(declared)}."
    return MismatchError(f"{where or 'it'} is {shown(value)}: {expected}", where)


def shown(value: Any) -> str:
    """A value as messages show it: in YAML's words, cut short."""
    return json.dumps(value) if value is None or isinstance(value, bool) else f"{value!r:.80}"


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def nearest_of(value: Any, known: Any) -> str:
    """What `value` was probably meant to be, and what is known."""
    names = [str(name) for name in known]
    lowered = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(str(value).lower(), lowered, n=1, cutoff=0.6)
    if not close:
        return f"expected {' or '.join(names)}."
    meant = f"did you mean {lowered[close[0]]}?"
    return meant if len(names) > 12 else f"{meant} Expected {' or '.join(names)}."


def type_name(declared: Any) -> str:
    """A declared type in a person's words."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin is Annotated:
        mark = inner[1]
        if isinstance(mark, re.Pattern):
            return f"text of the form {mark.pattern}"
        if isinstance(mark, AtLeast):
            return f"a whole number of at least {mark.least}"
        return "a mapping with a kind"
    if origin is Literal:
        return " or ".join(str(choice) for choice in inner)
    if origin in UNIONS:
        return " or ".join(type_name(choice) for choice in inner)
    if isinstance(declared, type) and dataclasses.is_dataclass(declared):
        return f"a mapping with the keys {', '.join(field_types(declared))}"
    if origin in (dict, Mapping):
        return "a mapping"
    if origin is tuple and inner[-1] is not Ellipsis:
        return f"a list of {len(inner)}"
    if origin in (list, tuple):
        return f"a list, each entry {type_name(inner[0])}"
    plain = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    return plain.get(declared, "null")


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys, for naming the fields that differ."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat.update(flatten(inner, _dotted(prefix, key)))
        return flat
    return {prefix: value}


def differing_fields(stored: Any, wanted: Any) -> list[str]:
    """`field: stored -> wanted` for every field that differs, in order of the fields' names."""
    old, new = flatten(stored), flatten(wanted)
    names = sorted(old.keys() | new.keys())
    pairs = ((name, old.get(name, "absent"), new.get(name, "absent")) for name in names)
    return [f"{name}: {_short(was)} -> {_short(now)}" for name, was, now in pairs if was != now]


def _short(value: Any) -> str:
    text = shown(value) if value is None or isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(lines: list[str]) -> str:
    """The first eight lines, and how many more there are."""
    more = [f"and {len(lines) - 8} more"] if len(lines) > 8 else []
    return "\n  ".join(lines[:8] + more)
