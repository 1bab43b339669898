"""A checkpoint: where its folder is, what its config says, which files hold its weights.

Only safetensors is ever read; the command `fetch` alone reads pickles, to convert them. What is on
this machine is used before the hub is asked: a copy that `fetch` made first of all.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from embed_precompute.documents import digest_of
from embed_precompute.errors import InputError, one_line

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
SMALL_FILES = ("*.json", "*.model", "*.txt", "*.jinja")
"""Patterns of config, tokenizer and chat template."""
TOKENIZERS = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")
WEIGHT_FILES = ("model.safetensors", "model-*.safetensors", "model.safetensors-*.safetensors")
"""What the weights' files are called on the hub; beside them may lie the same weights in another
dtype (model.fp16.safetensors) or form (consolidated.safetensors)."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
"""owner/name, or owner/name/folder: a folder of a pipeline's repository, such as text_encoder."""
FETCH = "embed-precompute fetch CONFIG"
ORIGIN = "fetched.json"
"""In a folder that `fetch` made: what it was made from."""

Need = Literal["weights", "convertible", "config", "tokenizer", "tensors"]
"""What is needed: all with safetensors; with these or pickles, for `fetch`; without weights; the
tokenizer alone; safetensors alone, whatever their names are."""


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
    need: Need = "weights",
) -> Checkpoint:
    """The checkpoint in a folder or under a hub id; reads no weights.

    `models`: model_type -> transformers class of the family `kind`. `dtype`: take the copy that
    `fetch` made in this dtype, if there is one. Raises InputError: nothing there, no config.json,
    another kind of model, no weights of the form that is needed.
    """
    folder = None
    if need != "convertible" and dtype is not None:
        folder = find_fetched(origin_of(pretrained, revision, kind, dtype))
    if folder is None:
        folder = locate(where, pretrained, revision, need)
    config = _read_json(where, folder / "config.json")
    model_type = str(config.get("model_type"))
    if model_type not in models:
        raise InputError(
            f"{where}: {folder / 'config.json'} has model_type {model_type!r}: an encoder of kind "
            f"{kind} takes {', '.join(models)}. Choose another checkpoint or kind."
        )
    files = [] if need == "config" else _weight_files(where, folder, need)
    return Checkpoint(where, folder, config, tuple(files))


def origin_of(pretrained: str, revision: str | None, kind: str, dtype: str) -> dict[str, str]:
    """What names a copy that `fetch` makes: the checkpoint as it is configured, kind and dtype."""
    path = Path(pretrained).expanduser()
    if path.is_dir() or HUB_ID.fullmatch(pretrained) is None:
        pretrained = str(path.resolve())
    return {
        "pretrained": pretrained,
        "revision": revision or "main",
        "kind": kind,
        "dtype": dtype,
    }


def fetched_folder(origin: Mapping[str, str]) -> Path:
    """Where `fetch` puts the copy."""
    path = Path(origin["pretrained"])
    name = path.name if path.is_absolute() else "-".join(path.parts[1:] or path.parts)
    return cache_home() / "checkpoints" / f"{name}-{digest_of(dict(origin))[:16]}"


def find_fetched(origin: Mapping[str, str], folder: Path | None = None) -> Path | None:
    """The copy that `fetch` made of `origin`, in its own place or in `folder`; None: there is none.

    A copy of a folder whose files have changed since is none, and so is one without its weights.
    """
    folder = folder or fetched_folder(origin)
    found, source = read_origin(folder), Path(origin["pretrained"])
    if found is None or not found.items() >= origin.items():
        return None
    if not (folder / WEIGHTS).is_file():
        return None
    if source.is_absolute() and source.is_dir() and found.get("state") != state_of(source):
        return None
    return folder


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


def locate(where: str, pretrained: str, revision: str | None, need: Need = "weights") -> Path:
    """Folder of a checkpoint or tokenizer: `pretrained` itself, or a snapshot of that hub id."""
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
    if HUB_ID.fullmatch(pretrained) is None:
        raise InputError(
            f"{where} is {pretrained!r}: there is no such folder, and it is not a hub id either. "
            "Expected a checkpoint folder, or an id such as owner/name or owner/name/text_encoder."
        )
    return _snapshot(where, pretrained, revision, need)


def split_hub_id(hub_id: str) -> tuple[str, str]:
    """Repository and folder in it: ("owner/name", "text_encoder"); "" for its top level."""
    owner, *rest = hub_id.split("/", 2)
    return "/".join([owner, *rest[:1]]), "/".join(rest[1:])


def _snapshot(where: str, hub_id: str, revision: str | None, need: Need) -> Path:
    """One folder's files of a hub repository: from the local cache if whole, else downloaded."""
    from huggingface_hub import HfApi, snapshot_download

    repo_id, folder = split_hub_id(hub_id)
    prefix = f"{folder}/" if folder else ""

    def snapshot(patterns: list[str] | None) -> Path:
        path = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=patterns and [prefix + pattern for pattern in patterns],
            ignore_patterns=[f"{prefix}*/*"],  # other formats, other models of a pipeline
            local_files_only=patterns is None,
        )
        return Path(path, folder)

    # The hub client's errors share no base class in all its versions, hence the two broad excepts.
    cached: Path | None = None
    with contextlib.suppress(Exception):
        cached = snapshot(None)
        cached = cached if cached.is_dir() else None
    if cached is not None and _looks_whole(cached, need):
        return cached
    reason = f"there is no folder {folder} in {repo_id}"
    try:
        weights = list(WEIGHT_FILES) if need in ("weights", "convertible") else []
        weights = ["*.safetensors"] if need == "tensors" else weights
        if need == "convertible":
            names = HfApi().list_repo_files(repo_id, revision=revision)
            if not {prefix + WEIGHTS, prefix + WEIGHTS_INDEX} & set(names):
                weights = ["pytorch_model*.bin"]
        found = snapshot([*SMALL_FILES, *weights])
        if found.is_dir():
            return found
    except Exception as error:
        if cached is not None:
            return cached
        first, _, _ = str(error).strip().partition("\n")
        reason = f"{type(error).__name__}: {first}"
    raise InputError(
        f"{where} is {hub_id!r}: there is no such folder, and the hub gives nothing under that id "
        f"(revision {revision or 'main'}; {reason}). Check the name, or run where there is a "
        f"network: {FETCH}"
    )


def _looks_whole(folder: Path, need: Need) -> bool:
    """Whether a snapshot has what is needed."""
    if need == "tensors":
        return any(folder.glob("*.safetensors"))
    config = (folder / "config.json").is_file()
    tokenizer = any((folder / name).is_file() for name in TOKENIZERS)
    if need in ("config", "tokenizer"):
        return tokenizer and (config or need == "tokenizer")
    files = _listed_files("", folder, need)
    weights = bool(files) and all(path.is_file() for path in files)
    return weights and config and (tokenizer or need == "weights")


def _weight_files(where: str, folder: Path, need: Need) -> list[Path]:
    """The weights' files that transformers would load, sorted by name."""
    files = _listed_files(where, folder, need)
    for path in files:
        if not path.is_file():
            raise InputError(
                f"{where}: {path} is missing, but the index of {folder} names it. Copy or download "
                "the whole checkpoint."
            )
    if files:
        return files
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    if need == "convertible":
        raise InputError(
            f"{where}: {folder} holds no weights: expected {WEIGHTS} or {PICKLE}, or the index of "
            "several files and these. Copy or download the whole checkpoint."
        )
    if pickles:
        raise InputError(
            f"{where}: {folder} holds only pickled weights ({', '.join(pickles)}): expected "
            f"{WEIGHTS}. Convert them once: {FETCH}"
        )
    raise InputError(
        f"{where}: {folder} holds no weights: expected {WEIGHTS}, or {WEIGHTS_INDEX} and its "
        "files. Copy the whole checkpoint there, or name a hub id and bring it here once: "
        f"{FETCH}. For rows, tokens and bytes without weights there is plan --no-weights."
    )


def _listed_files(where: str, folder: Path, need: Need) -> list[Path]:
    """The one file of the weights, or those that an index lists, there or not; else none."""
    forms = [(WEIGHTS, WEIGHTS_INDEX), (PICKLE, PICKLE_INDEX)]
    for name, index in forms if need == "convertible" else forms[:1]:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / index).is_file():
            names = _read_json(where, folder / index).get("weight_map")
            if not isinstance(names, dict) or not names:
                raise InputError(
                    f"{where}: {folder / index} has no weight_map. Download the checkpoint again."
                )
            return [folder / name for name in sorted({str(each) for each in names.values()})]
    return []


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
