"""A checkpoint: where its folder is, what its config says, which files hold its weights.

Only safetensors is ever read; the command `fetch` alone reads pickles, to convert them. What is on
this machine is used: a copy that `fetch` made first of all. Nothing is downloaded unless `online`
is given, and then only what is not here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from embed_precompute.documents import digest_of
from embed_precompute.encoders import hub
from embed_precompute.errors import InputError, one_line

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""Patterns of config, tokenizer and chat template."""
TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
VARIANTS = ("bf16", "fp16")
"""The weights in another dtype may lie beside them (model.fp16.safetensors), or alone."""
FETCH = "embed-precompute fetch CONFIG"
ORIGIN = "fetched.json"
"""In a folder that `fetch` made: what it was made from, and what it wrote."""
TOKENIZER = "tokenizer"
"""The folder in a copy with the tokenizer of `tokenizer`, if that is a hub id."""

Need = Literal["weights", "convertible", "config", "config.json", "tokenizer", "tensors"]
"""What is needed: safetensors; these or pickles, for `fetch`; config.json and tokenizer; one of the
two; safetensors alone, whatever their names are."""


@dataclass(frozen=True)
class Checkpoint:
    """An encoder's weights on this machine; nothing of them is loaded."""

    where: str
    """The configuration's key of this checkpoint; errors begin with it."""
    folder: Path
    config: dict[str, Any]
    """config.json."""
    files: tuple[Path, ...]
    """The files of its weights, sorted by name; none if it was opened without weights."""

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def architectures(self) -> tuple[str, ...]:
        """The classes that the checkpoint was saved from, if config.json names them."""
        return tuple(self.config.get("architectures") or ())

    @functools.cached_property
    def text_config(self) -> Any:
        """transformers' config of the text encoder: config.json, or its text_config if the
        checkpoint holds a vision tower too. Raises InputError: transformers cannot read
        config.json."""
        import transformers

        try:
            with quiet_transformers():
                config = transformers.AutoConfig.from_pretrained(
                    str(self.folder), local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # of many kinds
            reason = one_line(error)[:300]
            raise InputError(
                f"{self.where}: transformers {transformers.__version__} cannot read "
                f"{self.folder / 'config.json'} ({type(error).__name__}: {reason}). It may be "
                "damaged, or of a newer transformers."
            ) from error
        text = getattr(config, "text_config", config)
        if isinstance(text, dict):
            raise InputError(
                f"{self.where}: transformers {transformers.__version__} does not know the "
                f"text_config in {self.folder / 'config.json'}: a newer release saved it. Install "
                "transformers 4.52.0 or newer."
            )
        return text


def open_checkpoint(
    where: str,
    pretrained: str,
    revision: str | None,
    kind: str,
    models: Mapping[str, str],
    *,
    dtype: str | None = None,
    part: str | None = None,
    tokenizer: str | None = None,
    need: Need = "weights",
    online: bool = False,
) -> Checkpoint:
    """The checkpoint in a folder or under a hub id; reads no weights.

    `models`: model_type -> transformers class of the family `kind`. `dtype`, `part`,
    `tokenizer`: take the copy that `fetch` made of this part in this dtype with this tokenizer, if
    there is one. `online`: download what is needed and not here. Raises InputError: nothing there,
    no config.json, another kind of model, no weights of the form that is needed, a copy whose files
    are not those that `fetch` wrote.
    """
    folder = None
    if need != "convertible" and dtype is not None:
        origin = origin_of(pretrained, revision, kind, dtype, part, tokenizer)
        folder, place = find_fetched(origin), fetched_folder(origin)
        if place.is_dir() and read_origin(place) is None:  # not to take another commit unnoticed
            raise not_as_written(where, place, f"{place / ORIGIN} cannot be read")
    if folder is None:
        folder = locate(where, pretrained, revision, need, online=online)
    found = read_origin(folder)
    if found is not None and (damage := damage_of(folder, found)):
        raise not_as_written(where, folder, damage)
    config = _read_json(where, folder / "config.json")
    model_type = str(config.get("model_type"))
    if model_type not in models:
        raise InputError(
            f"{where}: {folder / 'config.json'} has model_type {model_type!r}: an encoder of kind "
            f"{kind} takes {', '.join(models)}. Choose another checkpoint or kind."
        )
    files = [] if need in ("config", "config.json") else _weight_files(where, folder, need)
    return Checkpoint(where, folder, config, tuple(files))


Origin = dict[str, str | None]


def is_hub_id(pretrained: str) -> bool:
    """Whether this names a folder of the hub, and none here."""
    here = Path(pretrained).expanduser().exists()
    return not here and hub.HUB_ID.fullmatch(pretrained) is not None


def origin_of(
    pretrained: str,
    revision: str | None,
    kind: str,
    dtype: str,
    part: str | None,
    tokenizer: str | None,
) -> Origin:
    """What names a copy that `fetch` makes: the checkpoint as it is configured, kind, dtype, the
    part of the encoder (`EncoderConfig.part`; None: all of it), and the tokenizer that is in the
    copy too: one of the hub. A folder's stays where it is."""
    if not is_hub_id(pretrained):
        pretrained = str(Path(pretrained).expanduser().resolve())
    if tokenizer is not None and not is_hub_id(tokenizer):
        tokenizer = None
    return {
        "pretrained": pretrained,
        "revision": revision or "main",
        "kind": kind,
        "dtype": dtype,
        "part": part,
        "tokenizer": tokenizer,
    }


def fetched_folder(origin: Origin) -> Path:
    """Where `fetch` puts the copy."""
    path = Path(str(origin["pretrained"]))
    name = path.name if path.is_absolute() else "-".join(path.parts[1:] or path.parts)
    given = {key: value for key, value in origin.items() if value is not None}
    return cache_home() / "checkpoints" / f"{name}-{digest_of(given)[:16]}"


def find_fetched(origin: Origin, folder: Path | None = None) -> Path | None:
    """The copy that `fetch` made of `origin`, in its own place or in `folder`; None: there is none.

    A copy of a folder whose files have changed since is none.
    """
    folder = folder or fetched_folder(origin)
    found, source = read_origin(folder), Path(str(origin["pretrained"]))
    if found is None or not is_copy_of(found, origin):
        return None
    if source.is_absolute() and source.is_dir() and found.get("state") != state_of(source):
        return None
    return folder


def tokenizer_in(folder: Path, tokenizer: str) -> Path | None:
    """The folder of this tokenizer in a copy; None: the checkpoint's folder does not hold it."""
    folder = folder.expanduser()
    held = (read_origin(folder) or {}).get("tokenizer") == tokenizer and is_hub_id(tokenizer)
    return folder / TOKENIZER if held else None


def damage_of(folder: Path, found: Mapping[str, Any]) -> str | None:
    """Which file of a copy is not what `fetch` wrote; of the weights only the size is compared.

    `found`: fetched.json, as read. None: all are as they were.
    """
    files = found.get("files")
    if not isinstance(files, dict):
        return f"{folder / ORIGIN} does not list its files"
    for name, (size, sha256) in files.items():
        path = folder / name
        try:
            same = path.stat().st_size == size
            if same and sha256 is not None:
                same = hashlib.sha256(path.read_bytes()).hexdigest() == sha256
        except FileNotFoundError:
            return f"{path} is missing"
        if not same:
            return f"{path} is not what fetch wrote"
    return None


def not_as_written(where: str, folder: Path, damage: str) -> InputError:
    """The error for a copy that is damaged."""
    source = (read_origin(folder) or {}).get("pretrained", "a checkpoint")
    again = f"Make it again: {FETCH}"
    if folder.parent != cache_home() / "checkpoints":
        again = f"Make it again, as it was made: fetch --output, of {source}."
    return InputError(f"{where}: the copy of {source} in {folder} is damaged: {damage}. {again}")


def is_copy_of(found: Mapping[str, Any], origin: Origin) -> bool:
    """Whether fetched.json, as read, is of a copy of `origin`."""
    return all(found.get(key) == value for key, value in origin.items())


def read_origin(folder: Path) -> dict[str, Any] | None:
    """What a copy was made from; None: `fetch` did not make this folder."""
    try:
        found = json.loads((folder / ORIGIN).read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def state_of(folder: Path) -> dict[str, list[int]]:
    """Name -> [size, mtime in ns] of the files that a checkpoint in a folder may consist of."""
    patterns = (*SMALL_FILES, "*.safetensors", "*.bin")
    paths = {path for pattern in patterns for path in folder.glob(pattern) if path.name != ORIGIN}
    stats = {path.name: path.stat() for path in sorted(paths)}
    return {name: [each.st_size, each.st_mtime_ns] for name, each in stats.items()}


def locate(
    where: str,
    pretrained: str,
    revision: str | None,
    need: Need = "weights",
    *,
    online: bool = False,
) -> Path:
    """Folder of a checkpoint or tokenizer: `pretrained` itself, or a snapshot of that hub id.

    A snapshot in the hub's cache that has what is needed is taken as it is. `online`: another is
    downloaded. Raises InputError.
    """
    folder = Path(pretrained).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise InputError(
                f"{where} is the folder {pretrained!r}, but revision is {revision!r}: only a hub "
                "id has revisions. Remove it."
            )
        return folder
    if folder.exists():
        raise InputError(f"{where} is {pretrained!r}, which is a file: expected its folder.")
    if hub.HUB_ID.fullmatch(pretrained) is None:
        raise InputError(
            f"{where} is {pretrained!r}: there is no such folder, and it is not a hub id either. "
            "Expected a checkpoint folder, or an id such as owner/name or owner/name/text_encoder."
        )
    cached = hub.cached(pretrained, revision)
    if cached is not None and (not online or _looks_whole(cached, need)):
        return cached
    if online:
        return _download(where, pretrained, revision, need)
    raise InputError(
        f"{where} is {pretrained!r}: there is no such folder, and nothing of the hub's revision "
        f"{revision or 'main'} is on this machine. Check the name, or bring it here where there is "
        f"a network: {FETCH}"
    )


def bring(where: str, hub_id: str, revision: str | None) -> Path:
    """The folder in the hub's cache with all its small files, of one commit: that which the cache
    has for a branch, or the newest.

    The hub is asked what there is; files that are here are not sent again. Where it cannot be asked
    what is here counts, unless its download has not ended. Raises InputError.
    """
    found = hub.cached(hub_id, revision)
    commit = hub.commit_of(found) if found is not None else None
    try:
        return _download(where, hub_id, commit or revision, "config.json")
    except InputError:
        found = hub.cached(hub_id, revision)
        if found is None:
            raise
        return found


def _download(where: str, hub_id: str, revision: str | None, need: Need) -> Path:
    """What is needed of a folder of a hub repository, in the hub's cache."""

    def small(names: Iterable[str]) -> list[str]:
        patterns = ("*.safetensors",) if need == "tensors" else SMALL_FILES
        return [name for name in names if any(fnmatch(name, each) for each in patterns)]

    folder = hub.download(where, hub_id, revision, small)
    if need in ("weights", "convertible"):  # an index among the small files says which they are
        hub.download(
            where, hub_id, revision, lambda names: weight_names(where, folder, set(names), need)
        )
    return folder


def _looks_whole(folder: Path, need: Need) -> bool:
    """Whether a snapshot has what is needed."""
    if need == "tensors":
        return any(folder.glob("*.safetensors"))
    config = (folder / "config.json").is_file()
    tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
    if need in ("config", "config.json", "tokenizer"):
        return (tokenizer or need == "config.json") and (config or need == "tokenizer")
    names = _names_in(folder)
    try:
        weights = weight_names("", folder, names, need)
    except InputError:  # a damaged index
        return False
    # Of a variant the hub may have full precision.
    whole = bool(weights) and names.issuperset(weights) and not is_variant(weights[0])
    return whole and config


def _weight_files(where: str, folder: Path, need: Need) -> list[Path]:
    """The weights' files that transformers would load, sorted by name."""
    files = [folder / name for name in weight_names(where, folder, _names_in(folder), need)]
    for path in files:
        if not path.is_file():
            raise InputError(
                f"{where}: {path} is missing, but the index of {folder} names it. Copy the whole "
                f"checkpoint, or download the rest: {FETCH}"
            )
    if files:
        return files
    others = sorted(
        path.name
        for pattern in ("*.bin", *(f"*.{each}*.safetensors" for each in VARIANTS))
        for path in folder.glob(pattern)
    )
    if need == "convertible":
        raise InputError(
            f"{where}: {folder} holds no weights: expected {WEIGHTS} or {PICKLE}, or the index of "
            "several files and these. Copy or download the whole checkpoint."
        )
    if others:
        kind = "pickled weights" if others[0].endswith(".bin") else "a variant of the weights"
        raise InputError(
            f"{where}: {folder} holds only {kind} ({', '.join(others)}): expected {WEIGHTS}. "
            f"No copy that fetch made of it is in {cache_home() / 'checkpoints'} "
            f"(EMBED_PRECOMPUTE_HOME names another place). Convert them once: {FETCH}"
        )
    raise InputError(
        f"{where}: {folder} holds no weights: expected {WEIGHTS}, or {WEIGHTS_INDEX} and its "
        "files. Copy the whole checkpoint there, or name a hub id and bring it here once: "
        f"{FETCH}. For rows, tokens and bytes without weights there is plan --no-weights."
    )


def weight_names(where: str, folder: Path, names: Collection[str], need: Need) -> list[str]:
    """Of the files `names` of a checkpoint those that hold its weights: one, or what an index in
    `folder` lists, there or not; sorted. None of them: there are no weights of a form that is read.

    For `fetch` the best of several forms: full precision before a variant, which has rounded it,
    then safetensors before pickles.
    """
    for name, index in _forms(need):
        if name in names:
            return [name]
        if index in names:
            listed = _read_json(where, folder / index).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise InputError(
                    f"{where}: {folder / index} has no weight_map. Download the checkpoint again."
                )
            return sorted({str(each) for each in listed.values()})
    return []


def is_variant(name: str) -> bool:
    """Whether the file of this name holds weights that are rounded, by what it is called."""
    return any(f".{variant}" in name for variant in VARIANTS)


def _forms(need: Need) -> Iterator[tuple[str, str]]:
    """(one file, index of several), the best first."""
    for variant in ("", *VARIANTS) if need == "convertible" else ("",):
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            if suffix == "bin" and need != "convertible":
                continue
            dot = f".{variant}" * bool(variant)
            yield f"{stem}{dot}.{suffix}", f"{stem}.{suffix}.index{dot}.json"


def _names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.is_file()}


def _read_json(where: str, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"{where}: {path.parent} has no {path.name}. Expected a checkpoint folder as "
            "transformers saves one."
        ) from None
    except OSError as error:
        raise InputError(f"{where}: cannot read {path}: {error.strerror}.") from error
    except ValueError as error:
        raise InputError(f"{where}: {path} is not JSON ({error}).") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: {path} holds a {type(value).__name__}: expected an object.")
    return value


def cache_home() -> Path:
    """The folder for what may be made again: digests and converted checkpoints."""
    if home := os.environ.get("EMBED_PRECOMPUTE_HOME"):
        return Path(home).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "embed_precompute"


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turns off transformers' progress bars and load reports; we check the reports ourselves."""
    from transformers.utils import logging

    library: Any = logging  # untyped functions
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity_error()
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()
