"""Whether this machine and an output folder can do what a run asks of them.

Guarantees: each finding says what to do. What is broken (torch, a driver, a file system) is a
finding, never the end of the search. The files that are written for a try are removed.
Costs: seconds; where layers are compiled, a minute.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from embed_precompute.encoders.checkpoint import ORIGIN, cache_home
from embed_precompute.errors import StorageError, one_line, refuse_file
from embed_precompute.steps import counted
from embed_precompute.store.commit import UNLIMITED, StagedFile, free_space, sync_folder

Level = Literal["ok", "warn", "fail"]
DISTRIBUTION = "embed-precompute"
GB = 10**9
FAR_OFFSET = 8 << 20
LEAST_BYTES, LEAST_FILES = 1 << 30, 10
"""One shard of the size that `samples_per_shard: auto` aims at, and the files of a few units."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Level
    what: str
    found: str
    advice: str = ""
    """What to do; empty where nothing need be done."""

    def line(self) -> str:
        return f"{self.level:<4}  {self.what}: {self.found}{self.advice and '. ' + self.advice}"


def examine(folder: Path) -> Iterator[Finding]:
    """All findings, the quick ones first. `folder`: where a dataset is to be; it need not exist.

    Raises InputError where `folder` is a file, or below one.
    """
    refuse_file(folder, "DIR")
    yield Finding("ok", "Python", f"{platform.python_version()}, {platform.platform()}")
    if _version(DISTRIBUTION):  # not so in a checkout
        yield from _packages()
    yield from _output(folder)
    try:
        from embed_precompute.encoders.trial import try_implementations
    except Exception as error:  # a library of another CUDA, a part that is missing: of many kinds
        yield Finding("fail", "libraries", _said(error), "Install torch and transformers again.")
        return
    yield _cache()
    yield _gpu()
    for each in try_implementations():
        if each.problem is None:
            yield Finding("ok", each.what, f"as transformers on {each.where}")
            continue
        level: Level = "warn" if each.compiled else "fail"
        advice = "Leave compile false." if each.compiled else "Set another implementation."
        yield Finding(level, each.what, f"on {each.where}: {each.problem}", advice)


def collected_environment() -> str:
    """What torch asks for in bug reports; takes seconds."""
    try:
        from torch.utils.collect_env import get_pretty_env_info

        return str(get_pretty_env_info())  # type: ignore[no-untyped-call]
    except Exception as error:  # it calls a dozen programs
        return f"torch.utils.collect_env: {_said(error)}"


def _said(error: Exception) -> str:
    kind = "" if isinstance(error, StorageError) else f"{type(error).__name__}: "
    return f"{kind}{one_line(error)[:400]}"


def _packages() -> Iterator[Finding]:
    """Every library that this program requires, by its own list; ftfy and bs4 are optional."""
    good = [f"tokenizers {_version('tokenizers')}"]
    for line in importlib.metadata.requires(DISTRIBUTION) or []:
        each = Requirement(line)
        if each.marker is not None and not each.marker.evaluate({"extra": "text"}):
            continue
        version = _version(each.name)
        if version is not None and each.specifier.contains(version, prereleases=True):
            good.append(f"{each.name} {version}")
            continue
        optional = each.marker is not None and not each.marker.evaluate({"extra": ""})
        found = f"{version or 'not installed'}, expected {each.specifier}"
        advice = "Only presets with text_steps need it: " if optional else ""
        advice += f"pip install '{each.name}{each.specifier}'"
        yield Finding("warn" if optional else "fail", each.name, found, advice)
    yield Finding("ok", "packages", ", ".join(sorted(good)))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cache() -> Finding:
    from huggingface_hub import constants

    home, hub = cache_home(), Path(constants.HF_HUB_CACHE)
    copies = len(list(home.glob(f"checkpoints/*/{ORIGIN}")))
    models = len(list(hub.glob("models--*")))
    found = f"{home}, {counted(copies, 'checkpoint')} by fetch, {free_space(home)[0] / GB:,.0f} GB "
    found += f"free; the hub's {hub}, {counted(models, 'model')}"
    found += ", HF_HUB_OFFLINE is set" * bool(constants.HF_HUB_OFFLINE)
    if os.access(_existing(home), os.W_OK):
        return Finding("ok", "model cache", found)
    advice = "Set EMBED_PRECOMPUTE_HOME to a folder that you may write and all nodes see."
    return Finding("warn", "model cache", f"not writable: {found}", advice)


def _existing(folder: Path) -> Path:
    """The folder, or the first above it that is there."""
    return next(each for each in (folder, *folder.absolute().parents) if os.path.isdir(each))


def _output(folder: Path) -> Iterator[Finding]:
    """The file system of `folder`, by files that are written there and removed."""
    above = _existing(folder)
    free, files = free_space(above)
    room = [f"{free / GB:,.1f} GB" if free < UNLIMITED else "bytes not told"]
    room.append(f"{files:,} files" if files < UNLIMITED else "files not limited")
    level: Level = "fail" if free < LEAST_BYTES or files < LEAST_FILES else "ok"
    advice = "`embed-precompute plan CONFIG` says what a dataset takes; quotas are not seen here."
    yield Finding(level, "free space", f"{above}: {', '.join(room)}", advice)
    try:
        probe = Path(tempfile.mkdtemp(prefix=".tmp-doctor-", dir=above))
    except OSError as error:
        yield Finding("fail", "write", f"{above}: {error.strerror}", "Choose another folder.")
        return
    try:
        for what, attempt in ATTEMPTS.items():
            (own := probe / what.replace(" ", "-")).mkdir()
            try:
                weaker = attempt(own)
                yield Finding("warn" if weaker else "ok", what, weaker or "works")
            except (OSError, StorageError) as error:
                yield Finding("fail", what, _said(error), "Choose an output.path elsewhere.")
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _makes_once(folder: Path) -> str:
    _only_once(lambda: (folder / "a").touch(exist_ok=False))
    return ""


def _links(folder: Path) -> str:
    (folder / "a").touch()
    try:
        _only_once(lambda: os.link(folder / "a", folder / "b"))
    except OSError as error:
        with StagedFile(folder / "c") as staged:  # raises where a run would
            staged.publish()
        return f"{error.strerror}: a run renames. Let no two jobs of other libraries write there"
    return ""


def _only_once(make: Callable[[], None]) -> None:
    make()
    try:
        make()
    except FileExistsError:
        return
    raise StorageError("it replaces a file that is there.")


def _renames(folder: Path) -> str:
    (folder / "a").write_bytes(b"new")
    (folder / "b").write_bytes(b"old")
    os.replace(folder / "a", folder / "b")
    if (folder / "b").read_bytes() != b"new" or (folder / "a").exists():
        raise StorageError("it does not replace the file.")
    return ""


def _syncs(folder: Path) -> str:
    with open(folder / "a", "wb") as file:
        file.write(b"bytes")
        file.flush()
        os.fsync(file.fileno())
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        sync_folder(folder)  # raises where a run would
        return f"a folder: {error.strerror}. After a power cut run `verify` and `repair`"
    finally:
        os.close(descriptor)
    return ""


def _names(folder: Path) -> str:
    with StagedFile(folder / "shard-000042.safetensors") as staged:
        staged.write(b"bytes")
        staged.publish_by_content()
    return ""


def _writes_anywhere(folder: Path) -> str:
    """As a shard is written: rows first, its head last. Mounts of buckets often cannot."""
    with StagedFile(folder / "a") as staged:
        staged.pwrite(b"rows", FAR_OFFSET)
        staged.pwrite(b"head", 0)
        if staged.pread(4, FAR_OFFSET) != b"rows":
            raise StorageError("bytes behind a gap are lost.")
    return ""


ATTEMPTS: dict[str, Callable[[Path], str]] = {
    "write anywhere": _writes_anywhere,
    "exclusive create": _makes_once,
    "hard link": _links,
    "rename": _renames,
    "fsync": _syncs,
    "long names": _names,
}
"""Each raises where a run would fail, and gives what is weaker there than it should be."""


def _gpu() -> Finding:
    import torch

    built_for, driver = torch.version.cuda, ""
    if (path := Path("/proc/driver/nvidia/version")).is_file():
        found = re.search(r" (\d+\.\d+(?:\.\d+)?) ", path.read_text(errors="replace"))
        driver = found[1] if found else "of an unknown version"
    what = f"torch {torch.__version__}, {f'CUDA {built_for}' if built_for else 'without CUDA'}"
    what += f", NVIDIA driver {driver}" if driver else ", no NVIDIA driver"
    if torch.cuda.is_available():
        every = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        names = [f"{each.name} ({each.total_memory / GB:.0f} GB)" for each in every]
        return Finding("ok", "GPU", f"{', '.join(names)}; {what}")
    if driver and not built_for:
        advice = "Install a CUDA build of torch."
    elif driver:
        advice = "Check CUDA_VISIBLE_DEVICES, and that torch's CUDA is not newer than the driver."
    else:
        advice = "Large encoders need a GPU; `fetch`, `plan` and `verify` do not."
    return Finding("warn", "GPU", f"none; {what}", advice)
