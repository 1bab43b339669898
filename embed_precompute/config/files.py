"""A `Config` from a YAML file and overrides of the command line, and back to YAML.

Guarantees: an error says whether the file or the command line is wrong, and names the key, what was
found, what was expected and the nearest known name. YAML is loaded safely.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from embed_precompute.config.schema import Config
from embed_precompute.documents import (
    UNIONS,
    ByKind,
    MismatchError,
    class_by_kind,
    field_types,
    from_plain,
    nearest_of,
    takes_mapping,
    to_plain,
)
from embed_precompute.errors import InputError

PRESETS = Path(__file__).parents[1] / "presets"
"""The configurations that ship with the package; in a checkout a link to configs/."""
TABLE_ENDINGS = (".parquet", ".pq", ".parq", ".csv", ".tsv", ".jsonl")


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration in a YAML file, or the preset of that name, changed by `overrides`.

    `overrides` are command-line words: `["--encoders.t5.max_length", "256"]` or `["--a.b=1"]`;
    hyphens and underscores are the same. A value replaces the file's, also a mapping or a list.
    Raises InputError.
    """
    in_file = _read_yaml(_found(path))
    given = list(_pairs(overrides))
    try:
        return _changed(in_file, given)
    except MismatchError as error:
        complaint = ""  # about the file by itself
        try:
            _changed(in_file, ())
        except MismatchError as alone:
            complaint = str(alone)
        if complaint.startswith("there is no key"):  # no flag can mend that
            raise InputError(f"{path}: {complaint}") from None
        keys = [key for key, _ in given]
        blamed = [error.key] if error.key in keys else [k for k in keys if _concerns(error, k)]
        if not blamed or str(error) == complaint:
            raise InputError(f"{path}: {error}") from None
        if len(blamed) == 1 and str(error).startswith(blamed[0]):
            raise InputError(f"--{error}") from None
        hint = ""
        if blamed[-1].endswith(".kind"):
            whole = blamed[-1].removesuffix(".kind")
            hint = f" To choose another kind, give all its keys: --{whole} '{{kind: ..., ...}}'."
        raise InputError(f"--{', --'.join(blamed)}: {error}{hint}") from None


def _changed(in_file: dict[str, Any], given: Sequence[tuple[str, str]]) -> Config:
    plain = copy.deepcopy(in_file)
    # A kind decides which other keys there are, so it is set before them.
    for key, text in sorted(given, key=lambda pair: not pair[0].endswith(".kind")):
        try:
            _override(plain, key, text)
        except MismatchError as error:
            blamed = error.key if error.key in dict(given) else key
            raise MismatchError(str(error), blamed) from error
    return from_plain(Config, plain)


def _concerns(error: MismatchError, given: str) -> bool:
    """Whether the wrong key lies below the given one, or is a mapping that holds it, or lies beside
    it in a message that names both."""
    wrong, (owner, _, last) = error.key, given.rpartition(".")
    if owner == wrong.rpartition(".")[0] and last in re.findall(r"\w+", str(error)):
        return True
    mapping = given.removesuffix(".kind")  # a kind decides which keys its mapping may have
    below = wrong.startswith((f"{mapping}.", f"{mapping}["))
    return wrong == "" or below or given.startswith(f"{wrong}.")


def preset_paths() -> list[Path]:
    """The presets: the configurations that ship with the package and name a reference."""
    every = (path for path in sorted(PRESETS.glob("*.yaml")) if path.is_file())
    return [path for path in every if "reference:" in path.read_text(encoding="utf-8")]


def preset_path(name: str) -> Path:
    """The preset of that name. Raises InputError naming the nearest."""
    known = {path.stem: path for path in preset_paths()}
    if name not in known:
        raise InputError(
            f"there is no preset {name!r}: {nearest_of(name, known)} For a file of your own: "
            "`embed-precompute plan FILE`."
        )
    return known[name]


def _found(path: str | os.PathLike[str]) -> Path:
    """The file, or the preset of that name where there is no such file."""
    name = Path(path)
    if not name.is_file() and str(path) == name.stem:
        return next((each for each in preset_paths() if each.stem == str(path)), name)
    return name


def to_yaml(config: Config) -> str:
    """`config` as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=100)


def _read_yaml(path: Path) -> dict[str, Any]:
    expected = f"expected a YAML file with the keys {', '.join(field_types(Config))}"
    if path.suffix.lower() in TABLE_ENDINGS:
        raise InputError(
            f"{path} is a caption table: {expected}, such as configs/opensora_v2.yaml, and the "
            f"table as --captions.path {path}."
        )
    if path.is_dir():
        inside = path / "config.yaml"
        meant = f" Did you mean {inside}?" if inside.is_file() else ""
        raise InputError(f"{path} is a folder: {expected}.{meant}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = ""
        if path.suffix not in (".yaml", ".yml"):
            hint = (
                f" E{expected[1:]}; it names the models (encoders.NAME.pretrained). Or a preset's "
                "name: `embed-precompute presets` lists them."
            )
        raise InputError(f"cannot read the configuration {path}: {error.strerror}.{hint}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        keys = ", ".join(field_types(Config))
        raise InputError(f"{path} holds {type(loaded).__name__}: expected the keys {keys}.")
    return loaded


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """`--a.b-c V` and `--a.b-c=V` as (key, text), hyphens in keys as underscores."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise InputError(f"unexpected argument {word!r}: expected --section.key VALUE.")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"--{key} has no value: expected --{key} VALUE.")
            text = rest.pop(0)
        yield key, text


def _override(plain: dict[str, Any], key: str, text: str) -> None:
    """Set a dotted key of nested mappings; MismatchError where there is no such key."""
    declared: Any = Config
    owner = plain
    *above, last = key.split(".")
    for i, part in enumerate(above):
        declared = _type_below(declared, owner, key, i)
        inner = owner.get(part)
        if isinstance(inner, list):
            whole = ".".join(above[: i + 1])
            raise MismatchError(f"{whole} is a list: give the whole of it, --{whole} '[...]'.")
        if not isinstance(inner, dict):
            inner = owner[part] = {}
        owner = inner
    wanted = _type_below(declared, owner, key, len(above))
    value = _from_text(wanted, text)
    if isinstance(value, str) and isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
        below = "path" if "path" in field_types(wanted) else "KEY"
        raise MismatchError(
            f"{key} is {text!r}, and it has keys of its own: expected --{key}.{below} {text}."
        )
    owner[last] = value


def _type_below(declared: Any, owner: Mapping[str, Any], key: str, i: int) -> Any:
    """The type of the `i`-th part of a dotted key; `owner`, of the declared type, holds it."""
    parts = key.split(".")
    where, part = ".".join(parts[:i]), parts[i]
    origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin in UNIONS:
        declared = next(filter(takes_mapping, inner), None)
        origin, inner = typing.get_origin(declared), typing.get_args(declared)
    if origin is Annotated and isinstance(inner[1], ByKind):
        if part == "kind":
            return str
        declared = class_by_kind(inner[1], owner, where)
    if isinstance(declared, type) and dataclasses.is_dataclass(declared):
        known = field_types(declared)
        if part not in known:
            dotted = ".".join(parts[: i + 1])
            raise MismatchError(f"there is no key {dotted}: {nearest_of(part, known)}")
        return known[part]
    if origin is dict and takes_mapping(inner[1]):
        # A new name comes with its whole mapping or its kind; else the name is a mistake.
        if owner and part not in owner and parts[i + 1 :] not in ([], ["kind"]):
            raise MismatchError(f"{where} has no {part}: {nearest_of(part, owner)}")
        return inner[1]
    raise MismatchError(f"{where} has no keys of its own.")


def _from_text(declared: Any, text: str) -> Any:
    """`text` as YAML; as text where the declared type is text and the YAML fits no other choice."""
    choices = typing.get_args(declared) if typing.get_origin(declared) in UNIONS else (declared,)
    if any(typing.get_origin(c) is Literal and text in typing.get_args(c) for c in choices):
        return text
    try:
        loaded = yaml.safe_load(text)
    except yaml.YAMLError:
        if str in choices:
            return text
        raise MismatchError(f"{text!r} is not valid YAML.") from None
    if str not in choices or (isinstance(loaded, Mapping) and takes_mapping(declared)):
        return loaded  # if something in a mapping is wrong, the error is raised later
    for choice in choices:
        if choice is not str:
            with contextlib.suppress(MismatchError):
                from_plain(choice, loaded)
                return loaded
    return text
