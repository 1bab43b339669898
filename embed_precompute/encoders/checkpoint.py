"""A checkpoint: where its folder is, what its config says, and the digest that names its weights.

Only safetensors is ever read. The digest depends on the weights' bytes and on the config's values,
never on a folder's name or place. What is on this machine is used before the hub is asked.

A file is hashed once (about 1 GB/s) and its digest remembered in XDG_CACHE_HOME/embed_precompute,
for as long as its path, size, mtime and inode stay. The cache only saves time: a file without a
readable entry is hashed again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embed_precompute.documents import canonical_json, digest_of
from embed_precompute.errors import InputError, one_line

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
BOOKKEEPING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures")
"""Keys of config.json that say how the model was saved, not what it computes."""
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Checkpoint:
    """An encoder's weights on this machine; nothing of them is loaded."""

    where: str
    """The configuration's key of this checkpoint; errors begin with it."""
    folder: Path
    config: dict[str, Any]
    """config.json."""
    files: tuple[Path, ...]
    """The safetensors files, sorted by name."""

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
        return getattr(config, "text_config", config)

    @functools.cached_property
    def weights(self) -> str:
        """Digest of the weights and the config. Raises InputError: a file cannot be read."""
        try:
            digests = [file_sha256(path) for path in self.files]
        except OSError as error:
            raise InputError(
                f"{self.where}: cannot read {error.filename}: {error.strerror}."
            ) from error
        return digest_of({"config": _without_bookkeeping(self.config), "files": digests})


def open_checkpoint(
    where: str, pretrained: str, revision: str | None, kind: str, models: Mapping[str, str]
) -> Checkpoint:
    """The checkpoint in a folder or under a hub id; reads no weights.

    `models`: model_type -> transformers class of the family `kind`. Raises InputError: nothing
    there, no config.json, another kind of model, no safetensors.
    """
    folder = locate(where, pretrained, revision)
    config = _read_json(where, folder / "config.json")
    model_type = str(config.get("model_type"))
    if model_type not in models:
        raise InputError(
            f"{where}: {folder / 'config.json'} has model_type {model_type!r}: an encoder of kind "
            f"{kind} takes {', '.join(models)}. Choose another checkpoint or kind."
        )
    files = _weight_files(where, pretrained, folder, models[model_type])
    return Checkpoint(where, folder, config, tuple(files))


def locate(where: str, pretrained: str, revision: str | None) -> Path:
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
            "Expected a checkpoint folder or an id such as owner/name."
        )
    return _snapshot(where, pretrained, revision)


def _snapshot(where: str, repo_id: str, revision: str | None) -> Path:
    """A hub repository's top-level files: from the local cache if whole, else downloaded."""
    from huggingface_hub import snapshot_download

    def snapshot(local_files_only: bool) -> Path:
        path = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=HUB_PATTERNS,
            ignore_patterns=["*/*"],  # subfolders: other formats, other models of a pipeline
            local_files_only=local_files_only,
        )
        return Path(path)

    # The hub client's errors share no base class in all its versions, hence the two broad excepts.
    cached: Path | None = None
    with contextlib.suppress(Exception):
        cached = snapshot(local_files_only=True)
    if cached is not None and _looks_whole(cached):
        return cached
    try:
        return snapshot(local_files_only=False)
    except Exception as error:
        if cached is not None:
            return cached
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{where} is {repo_id!r}: there is no such folder, and the hub gives nothing under "
            f"that id (revision {revision or 'main'}; {type(error).__name__}: {reason}). Check the "
            "name, or download it where there is a network and give its folder."
        ) from error


def _looks_whole(folder: Path) -> bool:
    """Whether a snapshot is complete: it has all shards of the weights, or a tokenizer."""
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        return all((folder / name).is_file() for name in _shards("", index))
    if (folder / "config.json").is_file():
        return (folder / WEIGHTS).is_file()
    names = (WEIGHTS, "tokenizer.json", "spiece.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


def _weight_files(where: str, pretrained: str, folder: Path, model_class: str) -> list[Path]:
    """The safetensors files of a checkpoint that transformers would load, sorted by name."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / WEIGHTS_INDEX
    if index.is_file():
        files = [folder / name for name in _shards(where, index)]
        for path in files:
            if not path.is_file():
                raise InputError(
                    f"{where}: {path} is missing, but {index.name} names it. Copy or download the "
                    "whole checkpoint."
                )
        return files
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    found = f"only pickled weights ({', '.join(pickles)})" if pickles else "no weights"
    convert = (
        f"from transformers import AutoTokenizer as T, {model_class} as M; "
        f"M.from_pretrained('{pretrained}', torch_dtype='auto').save_pretrained('NEW_FOLDER'); "
        f"T.from_pretrained('{pretrained}').save_pretrained('NEW_FOLDER')"
    )
    raise InputError(
        f"{where}: {folder} holds {found}: expected {WEIGHTS}, or {WEIGHTS_INDEX} and its files. "
        "Pickles are never loaded, for they can run code. If you trust the checkpoint, "
        f'convert it once with python -c "{convert}" and set {where} to NEW_FOLDER.'
    )


def _shards(where: str, index: Path) -> list[str]:
    names = _read_json(where, index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{where}: {index} has no weight_map. Download the checkpoint again.")
    return sorted({str(name) for name in names.values()})


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


def file_sha256(path: Path) -> str:
    """sha256 of a file, remembered as long as its path, size, mtime and inode stay."""
    real = path.resolve()
    if real.parent.name == "blobs" and SHA256.fullmatch(real.name):
        return real.name  # the hub's cache names a large file by its sha256
    status = real.stat()
    key = [str(real), status.st_size, status.st_mtime_ns, status.st_ino]
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    entry = Path(home).expanduser() / "embed_precompute" / "sha256" / f"{digest_of(key)}.json"
    # No entry, or a damaged one: the file is hashed.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_bytes())
        if known["file"] == key and SHA256.fullmatch(known["sha256"]):
            return str(known["sha256"])
    digest = hashlib.sha256()
    with real.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    after = real.stat()
    if [after.st_size, after.st_mtime_ns, after.st_ino] != key[1:]:
        raise InputError(f"{real} changed while it was read. Run again when it is complete.")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=entry.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(canonical_json({"file": key, "sha256": digest.hexdigest()}))
        os.replace(temporary, entry)
    return digest.hexdigest()


def _without_bookkeeping(config: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in BOOKKEEPING}
    nested = {k: _without_bookkeeping(v) for k, v in kept.items() if isinstance(v, dict)}
    return {**kept, **nested}


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
