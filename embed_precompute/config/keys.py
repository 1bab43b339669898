"""Every key of the configuration with its type, default and docstring, for help and docs."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import yaml

from embed_precompute.config.schema import Config
from embed_precompute.documents import (
    UNIONS,
    ByKind,
    field_types,
    is_required,
    takes_mapping,
    to_plain,
    type_name,
)


@dataclass(frozen=True)
class Key:
    """One setting."""

    name: str
    """Dotted; NAME stands for a name that the person chooses."""
    type: str
    default: str
    doc: str


@dataclass(frozen=True)
class KeyGroup:
    """The settings of one mapping, or those that one kind of it has."""

    name: str
    doc: str
    keys: tuple[Key, ...]


def key_groups() -> list[KeyGroup]:
    """All keys, in the order of the dataclasses."""
    return [group for group in _groups(Config, "", "") if group.name]


def describe_keys() -> str:
    """All keys for a terminal."""
    lines: list[str] = []
    for group in key_groups():
        lines += ["", f"{group.name}: {group.doc}"]
        for key in group.keys:
            lines.append(f"  --{key.name}  ({key.type}; {key.default})")
            lines += textwrap.wrap(key.doc, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines[1:]) + "\n"


def markdown() -> str:
    """All keys as Markdown: a heading and a table for each group."""
    lines: list[str] = []
    for group in key_groups():
        lines += [f"## {group.name}", "", group.doc, ""]
        if group.keys:
            lines += ["| key | type | default | |", "|---|---|---|---|"]
        for key in group.keys:
            cells = (f"`{key.name}`", key.type, key.default.removeprefix("default "), key.doc)
            lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def _groups(
    owner: Any, name: str, title: str, *, base: Any = None, kinds: tuple[str, ...] = ()
) -> Iterator[KeyGroup]:
    """The keys of a dataclass, less those that `base` has too, then the keys of its mappings."""
    types, docs = field_types(owner), _field_docs(owner)
    keys: list[Key] = []
    below: list[KeyGroup] = []
    for field in dataclasses.fields(owner):
        if field.name not in types or (base is not None and _is_alike(field, base)):
            continue
        declared = types[field.name]
        dotted = f"{name}.{field.name}" if name else field.name
        groups = list(_groups_of(declared, dotted))
        below += groups
        only_mapping = dataclasses.is_dataclass(declared) or typing.get_origin(declared) is dict
        if not groups or not only_mapping:
            shown = " or ".join(kinds) if field.name == "kind" and kinds else type_name(declared)
            keys.append(Key(dotted, shown, _default(field), docs.get(field.name, "")))
    yield KeyGroup(title, " ".join((inspect.getdoc(owner) or "").split()), tuple(keys))
    yield from below


def _groups_of(declared: Any, name: str) -> Iterator[KeyGroup]:
    """The groups of the mapping that a value of this type may be."""
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin in UNIONS:
        choice = next(filter(takes_mapping, inner), None)
        yield from _groups_of(choice, name)
    elif origin is dict:
        yield from _groups_of(inner[1], f"{name}.NAME")
    elif origin is Annotated and isinstance(inner[1], ByKind):
        classes = inner[1].classes()
        yield from _groups(inner[0], name, name, kinds=tuple(classes))
        for kind, owner in classes.items():
            yield from _groups(owner, name, f"{name}, kind {kind}", base=inner[0])
    elif dataclasses.is_dataclass(declared):
        yield from _groups(declared, name, name)


def _is_alike(field: dataclasses.Field[Any], base: Any) -> bool:
    """Whether a kind has this key as all kinds have it."""
    of_base = {each.name: each for each in dataclasses.fields(base)}.get(field.name)
    same = of_base is not None and of_base.type == field.type and of_base.default == field.default
    return same or field.name == "kind"


def _default(field: dataclasses.Field[Any]) -> str:
    if is_required(field):
        return "required"
    made = field.default_factory
    value = field.default if made is dataclasses.MISSING else made()
    dumped = yaml.safe_dump(to_plain(value), default_flow_style=True, width=1000)
    return f"default {dumped.split(chr(10))[0]}"


def _field_docs(owner: Any) -> dict[str, str]:
    """The string under each field of a dataclass; Python keeps it in the source only."""
    docs: dict[str, str] = {}
    for each in reversed(owner.__mro__):
        if "__dataclass_fields__" not in vars(each):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(each))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, following in itertools.pairwise(body.body):
            if (
                isinstance(statement, ast.AnnAssign)
                and isinstance(statement.target, ast.Name)
                and isinstance(following, ast.Expr)
                and isinstance(following.value, ast.Constant)
            ):
                docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs
