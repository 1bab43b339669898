"""Typed documents: dataclasses from and to plain JSON or YAML values, and the bytes that name them.

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
    """Marks an `Annotated` base class whose mapping says by its `kind` which class it is.

    `classes` gives the class of every kind; it is called late, so that a registry can be filled by
    modules that import the base class. Give the `Annotated` type a name of its own at the top of a
    module: a lambda written inside a field's annotation does not see that module's names.
    """

    classes: Callable[[], Mapping[str, type]]


class MismatchError(ValueError):
    """A plain value is not what a dataclass declares; the message names the key."""

    def __init__(self, message: str, key: str = "") -> None:
        super().__init__(message)
        self.key = key
        """The dotted key that is wrong; of a check over several keys, the one above them."""


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

    `where` is the dotted key that errors begin with. A field may be left out where it has a
    default. Raises MismatchError, also for the InputError of a dataclass's own `__post_init__`,
    whose message best begins with a field's name: `max_length is 0: ...` becomes
    `encoders.t5.max_length is 0: ...`.
    """
    made: T = _from_plain(declared, value, where)
    return made


def _from_plain(declared: Any, value: Any, where: str) -> Any:
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin is Annotated:
        for mark in inner[1:]:
            if isinstance(mark, ByKind):
                return _from_plain(class_by_kind(mark, value, where), value, where)
        made = _from_plain(inner[0], value, where)
        for mark in inner[1:]:
            _check_mark(mark, made, declared, where)
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
        return _sequence(declared, origin, inner, value, where)
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
    """The class that the `kind` of a mapping names."""
    classes = mark.classes()
    kinds = " or ".join(classes)
    if not isinstance(value, Mapping):
        raise MismatchError(
            f"{where} is {value!r:.80}: expected a mapping with the key kind ({kinds}) and that "
            "kind's own keys.",
            where,
        )
    key = _dotted(where, "kind")
    if "kind" not in value:
        raise MismatchError(f"{key} is missing: expected {kinds}.", key)
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in classes:
        raise MismatchError(f"{key} is {kind!r:.80}: {nearest_of(kind, classes)}", key)
    return classes[kind]


def _union(declared: Any, choices: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first choice that fits."""
    errors = []
    for choice in choices:
        try:
            return _from_plain(choice, value, where)
        except MismatchError as error:
            # Its traceback has this frame and its callers', and with them all they hold.
            errors.append(error.with_traceback(None))
    # A mapping or a list was meant for the choice that takes one, so its error is the one to show.
    for choice, problem in zip(choices, errors, strict=True):
        if takes_mapping(choice) if isinstance(value, Mapping) else _takes_list(choice, value):
            raise problem
    raise _mismatch(value, declared, where)


def takes_mapping(declared: Any) -> bool:
    """Whether values of the declared type may be mappings."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin in UNIONS:
        return any(map(takes_mapping, inner))
    if origin is Annotated:
        return takes_mapping(inner[0])
    return dataclasses.is_dataclass(declared) or origin in (dict, Mapping)


def _takes_list(declared: Any, value: Any) -> bool:
    return isinstance(value, (list, tuple)) and typing.get_origin(declared) in (list, tuple)


def _sequence(declared: Any, origin: Any, inner: tuple[Any, ...], value: Any, where: str) -> Any:
    if origin is list or inner[-1] is Ellipsis:
        entries = [_from_plain(inner[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
        return origin(entries)
    if len(value) != len(inner):
        raise _mismatch(value, declared, where)
    pairs = zip(inner, value, strict=True)
    return tuple(_from_plain(each, v, f"{where}[{i}]") for i, (each, v) in enumerate(pairs))


def _check_mark(mark: Any, value: Any, declared: Any, where: str) -> None:
    if isinstance(mark, re.Pattern):
        good = mark.fullmatch(value) is not None
    elif isinstance(mark, AtLeast):
        good = value >= mark.least
    else:
        return
    if not good:
        raise _mismatch(value, declared, where)


def _mismatch(value: Any, declared: Any, where: str, hint: str = "") -> MismatchError:
    expected = hint or f"expected {type_name(declared)}."
    return MismatchError(f"{where or 'it'} is {value!r:.80}: {expected}", where)


def _dotted(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def nearest_of(value: Any, known: Any) -> str:
    """What was probably meant, and what there is."""
    names = [str(name) for name in known]
    lowered = {name.lower(): name for name in reversed(names)}
    close = difflib.get_close_matches(str(value).lower(), lowered, n=1, cutoff=0.6)
    meant = f"did you mean {lowered[close[0]]}?" if close else ""
    if meant and len(names) > 12:
        return meant
    return f"{meant} Expected {' or '.join(names)}." if meant else f"expected {' or '.join(names)}."


def type_name(declared: Any) -> str:
    """A declared type in a person's words."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin is Annotated:
        for mark in inner[1:]:
            if isinstance(mark, re.Pattern):
                return f"text of the form {mark.pattern}"
            if isinstance(mark, AtLeast):
                return f"a whole number of at least {mark.least}"
            if isinstance(mark, ByKind):
                return "a mapping with a kind"
        return type_name(inner[0])
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
    if declared in plain:
        return plain[declared]
    if declared in (None, type(None)):
        return "null"
    return str(getattr(declared, "__name__", declared))


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys, for naming the fields that differ."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for key, inner in value.items():
            flat.update(flatten(inner, _dotted(prefix, key)))
        return flat
    return {prefix: value}


MAX_NAMED_DIFFERENCES = 8


def differing_fields(stored: Any, wanted: Any) -> list[str]:
    """`field: stored -> wanted` for every field that differs, in order of the fields' names."""
    old, new = flatten(stored), flatten(wanted)
    return [
        f"{name}: {_short(old.get(name, 'absent'))} -> {_short(new.get(name, 'absent'))}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
    ]


def listed(lines: list[str]) -> str:
    """The first differences, a line each, and how many more there are."""
    named = lines[:MAX_NAMED_DIFFERENCES]
    if len(lines) > len(named):
        named.append(f"and {len(lines) - len(named)} more")
    return "\n  ".join(named)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
