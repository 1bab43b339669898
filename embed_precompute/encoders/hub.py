"""The model hub: what its cache has on this machine, and downloads into it.

Guarantees: `cached` never uses the network. `download` brings the files that are asked for and no
others. An error says whether the name is wrong, the repository gated, or the hub out of reach.
A folder whose download began and did not end counts as nothing.
Costs: huggingface_hub downloads. A connection that breaks is taken up where it broke; whole files
stay for the next start.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from embed_precompute.errors import InputError, StorageError, one_line
from embed_precompute.steps import BYTES, Work

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)*")
"""owner/name, or owner/name/folder: a folder of a pipeline's repository, such as text_encoder."""
COMMIT = re.compile("[0-9a-f]{40}")
ASK_S = 10.0
"""How long the hub may take to say which commit a branch is at."""
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def split_hub_id(hub_id: str) -> tuple[str, str]:
    """Repository and folder in it: ("owner/name", "text_encoder"); "" for its top level."""
    owner, *rest = hub_id.split("/", 2)
    return "/".join([owner, *rest[:1]]), "/".join(rest[1:])


def cached(hub_id: str, revision: str | None) -> Path | None:
    """The folder in the hub's cache; None: nothing of it is there, or a download has not ended."""
    from huggingface_hub import snapshot_download

    repo_id, folder = split_hub_id(hub_id)
    # Some releases refuse a snapshot that lacks files of the repository. We want few of them.
    nothing: list[str] = []
    with contextlib.suppress(Exception):  # its errors share no base class in all releases
        path = snapshot_download(
            repo_id, revision=revision, allow_patterns=nothing, local_files_only=True
        )
        found = Path(path, folder)
        begun = _begun(_place(repo_id), Path(path).name, folder)
        return found if found.is_dir() and not begun.exists() else None
    return None


def _place(repo_id: str) -> Path:
    """The repository's folder in the hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{repo_id.replace('/', '--')}")


def _begun(place: Path, commit: str, folder: str) -> Path:
    """A file that is there from the beginning of a download to its end."""
    return place / "begun" / "--".join([commit, *folder.split("/")])


def commit_of(folder: Path) -> str | None:
    """The commit of a folder in the hub's cache; None: it lies elsewhere."""
    found = re.search("/snapshots/([0-9a-f]{40})(?:/|$)", str(folder))
    return found[1] if found else None


def moved_to(hub_id: str, revision: str | None, commit: str | None) -> str | None:
    """The commit that a branch has now; None: it has `commit`, or the hub cannot be asked."""
    from huggingface_hub import HfApi

    if commit is None or COMMIT.fullmatch(revision or ""):
        return None
    with contextlib.suppress(Exception):
        repo_id, _ = split_hub_id(hub_id)
        newest = str(HfApi().model_info(repo_id, revision=revision, timeout=ASK_S).sha)
        return newest if newest != commit else None
    return None


def download(
    where: str,
    hub_id: str,
    revision: str | None,
    wanted: Callable[[Iterable[str]], Iterable[str]],
) -> Path:
    """The folder in the hub's cache, with the files that `wanted` chooses of the folder's names.

    `where`: the configuration's key that names it. Raises InputError: no such repository, revision
    or folder, no access, no network; StorageError: too little space.
    """
    from huggingface_hub import HfApi, hf_hub_download

    repo_id, folder = split_hub_id(hub_id)
    prefix = f"{folder}/" if folder else ""
    with _explained(where, repo_id, revision):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, timeout=ASK_S)
        within = {
            each.rfilename.removeprefix(prefix): each
            for each in info.siblings or ()
            if each.rfilename.startswith(prefix)
        }
        files = {name: each for name, each in within.items() if "/" not in name}
        if not files:
            at = f"{repo_id} (revision {revision or 'main'})"
            raise InputError(f"{where}: {at} has no files in {folder or 'its top level'!r}.")
        names = list(wanted(files))
        if lacking := sorted({*names} - files.keys()):
            raise InputError(
                f"{where}: {repo_id} has no {prefix}{lacking[0]}, which its index of weights "
                "names. Choose another revision, or tell its owner."
            )
        place, commit = _place(repo_id), str(info.sha)
        here, begun = place / "snapshots" / commit / folder, _begun(place, commit, folder)
        missing = [name for name in names if not (here / name).exists()]
        blobs = place / "blobs"
        size = sum(_missing_bytes(blobs, files[name]) for name in missing)
        _require_space(place.parent, size)
        if missing:
            begun.parent.mkdir(parents=True, exist_ok=True)
            begun.touch()
        with _shown(blobs, repo_id, size):
            # One by one, in this thread: a Ctrl-C would wait for all threads of snapshot_download.
            for name in missing:
                hf_hub_download(repo_id, prefix + name, revision=commit)
        begun.unlink(missing_ok=True)
        if names and commit != revision:  # as the client notes which commit a branch has
            ref = place / "refs" / (revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit, encoding="utf-8")
    return here


def _missing_bytes(blobs: Path, file: Any) -> int:
    """How much of a file is still to come: huggingface_hub 0.36 goes on with the part of it."""
    name, part = file.lfs.sha256 if file.lfs else file.blob_id, 0
    with contextlib.suppress(OSError):
        part = (blobs / f"{name}.incomplete").stat().st_size
    return max(0, (file.size or 0) - part)


@contextlib.contextmanager
def _explained(where: str, repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn the hub client's errors into what to do."""
    from huggingface_hub import constants, errors, get_token

    who = "with the token given" if get_token() else "without a token"
    at = f"{where}: the hub's {repo_id}"
    try:
        yield
    except (InputError, StorageError):
        raise
    except errors.GatedRepoError as error:
        raise InputError(
            f"{at} is gated, and cannot be read {who}. Accept its licence at "
            f"{constants.ENDPOINT}/{repo_id}, log in as the user who did (hf auth login, or "
            "HF_TOKEN=...), and run fetch again."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{at}: there is no such repository, or it is private and cannot be read {who}. Check "
            "the name; for a private one log in first (hf auth login, or HF_TOKEN=...)."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{at} has no revision {revision!r}. Expected a branch, a tag, or a commit of 40 "
            "digits."
        ) from error
    # Not one base class in all releases of the client, nor one library for the network.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"{at} is not on this machine, and HF_HUB_OFFLINE forbids to download it. Unset "
                "it, or run fetch where there is a network."
            ) from error
        raise InputError(
            f"{at} could not be downloaded from {constants.ENDPOINT} ({type(error).__name__}: "
            f"{one_line(error)[:300]}). Check the network, and run fetch again: what is whole is "
            "not downloaded again."
        ) from error


def _require_space(home: Path, needed: int) -> None:
    above = next(each for each in (home, *home.absolute().parents) if each.is_dir())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise StorageError(
            f"{home}: the download needs {needed:,} bytes, {free:,} are free. Free some space, or "
            "set HF_HUB_CACHE to a folder on another disk."
        )


@contextlib.contextmanager
def _shown(blobs: Path, repo_id: str, total: int) -> Iterator[None]:
    """Shows how much of `total` bytes has come, in place of the client's own bars, a file each."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    def size() -> int:
        with contextlib.suppress(OSError):
            return sum(each.stat().st_size for each in os.scandir(blobs))
        return 0

    before, disabled = size(), are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with Work(f"downloading {repo_id}", total, BYTES, lambda: size() - before):
            yield
    finally:
        if not disabled:
            enable_progress_bars()
