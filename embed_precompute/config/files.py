"""A `Config` from a YAML file and dotted overrides, and back to YAML.

Guarantees: an unknown key, in the file or on the command line, is an `InputError` that names the
nearest known one; types are checked by jsonargparse against the dataclasses; overrides win over the
file; hyphens and underscores are the same. YAML is loaded safely and no class path is ever
imported.
Costs: imports jsonargparse (about 0.1 s), not torch.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import os
import re
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from embed_precompute.config.schema import Config
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.errors import InputError

BY_NAME = dict[str, EncoderConfig]
"""The type of `encoders`: any name, then the fields of one."""
UNIONS = (typing.Union, types.UnionType)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """The configuration in the YAML file `path`, changed by `overrides`.

    `overrides` are command-line words: `["--encoders.t5.max_length", "256"]` or `["--a.b=1"]`.
    Raises `InputError` for a missing file, bad YAML, an unknown key or a value of the wrong type.
    """
    loaded = _read_yaml(Path(path))
    _check_keys(loaded, Config, str(path), "")
    words = _normalised_overrides(overrides)
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Config, None)
    argv = [f"--{key}={value}" for key, value in words]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the message is in the exception as well
            parsed = parser.parse_args([f"--config={yaml.safe_dump(loaded)}", *argv])
            values = parser.instantiate(parsed)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:
        raise InputError(_explain(path, error)) from None
    return Config(
        captions=values.captions,
        encoders=dict(values.encoders),
        output=values.output,
        runtime=values.runtime,
    )


def describe_keys() -> str:
    """Every key of the configuration with its type, default and docstring, for `--help`."""
    lines: list[str] = []
    for key, field, hint, doc in _walk(Config, ""):
        default = "required"
        if field.default is not dataclasses.MISSING:
            default = f"default {yaml.safe_dump(field.default).split(chr(10))[0]}"
        elif field.default_factory is not dataclasses.MISSING:
            default = "default {}"
        lines.append(f"  --{key}  ({_type_name(hint)}, {default})")
        lines += textwrap.wrap(doc, 92, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines) + "\n"


def _walk(owner: Any, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any], Any, str]]:
    hints, docs = _fields(owner), _field_docs(owner)
    for field in dataclasses.fields(owner):
        hint, key = hints[field.name], prefix + field.name
        if dataclasses.is_dataclass(hint):
            yield from _walk(hint, f"{key}.")
        elif hint == BY_NAME:
            yield from _walk(EncoderConfig, f"{key}.NAME.")
        else:
            yield key, field, hint, docs.get(field.name, "")
            if (keyed := _mapping_in(hint)) is not None:
                yield from _walk(keyed, f"{key}.")


def _mapping_in(hint: Any) -> Any:
    """The dataclass that a value of this type is, or may be; None where no keys are known."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    return next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)


def _field_docs(owner: Any) -> dict[str, str]:
    """The string under each field of a dataclass; Python keeps it in the source only."""
    body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
    assert isinstance(body, ast.ClassDef)
    docs: dict[str, str] = {}
    for statement, following in itertools.pairwise(body.body):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = str(following.value.value)
    return docs


def _type_name(hint: Any) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(str(choice) for choice in inner)
    if dataclasses.is_dataclass(hint):
        return "mapping"
    if origin is dict:
        return f"mapping of {_type_name(inner[0])} to {_type_name(inner[1])}"
    if origin is tuple and inner[1:] == (...,):
        return f"list of {_type_name(inner[0])}"
    if origin is tuple:
        return f"[{', '.join(map(_type_name, inner))}]"
    if inner:
        return " | ".join(_type_name(choice) for choice in inner)
    return {"NoneType": "null"}.get(hint.__name__, str(hint.__name__))


def to_yaml(config: Config) -> str:
    """`config` as YAML that `load_config` reads back to an equal value."""
    plain = _plain(dataclasses.asdict(config))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read the configuration {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(loaded, dict):
        raise InputError(
            f"{path} holds {type(loaded).__name__}: expected keys captions, encoders, output, "
            "runtime."
        )
    return loaded


def _normalised_overrides(words: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b-c V` and `--a.b-c=V` as (key, value) pairs, hyphens as underscores, keys checked."""
    pairs: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise InputError(f"unexpected argument {word!r}: expected --section.key value.")
        key, equals, value = word[2:].partition("=")
        key = key.replace("-", "_")
        _check_dotted(key)
        if not equals:
            if not rest:
                raise InputError(f"--{key} has no value: expected --{key} VALUE.")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def _fields(owner: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(owner)
    return {field.name: hints[field.name] for field in dataclasses.fields(owner)}


def _nearest(key: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known keys: {', '.join(names)}."


def _check_dotted(dotted: str) -> None:
    owner: Any = Config
    seen: list[str] = []
    for part in dotted.split("."):
        keyed = _mapping_in(owner)
        if owner == BY_NAME:
            owner = EncoderConfig
        elif keyed is not None:
            known = _fields(keyed)
            if part not in known:
                where = f" in {'.'.join(seen)}" if seen else ""
                raise InputError(f"--{dotted}: no key {part!r}{where}; {_nearest(part, known)}")
            owner = known[part]
        else:
            raise InputError(f"--{dotted}: {'.'.join(seen)} has no keys of its own.")
        seen.append(part)


def _check_keys(loaded: Any, owner: Any, path: str, prefix: str) -> None:
    """Reject keys of `loaded` that `owner` does not have, naming the nearest one it has."""
    keyed = _mapping_in(owner)
    if owner == BY_NAME and isinstance(loaded, dict):
        for key, inner in loaded.items():
            if not isinstance(key, str) or not isinstance(inner, dict):
                raise InputError(
                    f"{path}: {prefix}{key} is {inner!r}: expected a name such as t5, with the "
                    "encoder's keys (kind, pretrained, ...) under it."
                )
            _check_keys(inner, EncoderConfig, path, f"{prefix}{key}.")
    elif keyed is not None and isinstance(loaded, dict):
        known = _fields(keyed)
        for key, inner in loaded.items():
            if key not in known:
                raise InputError(f"{path}: unknown key {prefix}{key}; {_nearest(str(key), known)}")
            _check_keys(inner, known[key], path, f"{prefix}{key}.")


def _explain(path: str | os.PathLike[str], error: Exception) -> str:
    """jsonargparse's nested message as one line, without the words about classes."""
    noise = r"Problem with given class_path '[^']*':|Does not validate .* Subtypes: |Errors: "
    line = re.sub(noise, "", " ".join(str(error).split()))
    return f"{path}: {' '.join(line.split())}"
