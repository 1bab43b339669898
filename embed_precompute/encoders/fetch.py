"""`fetch`: encoders of a configuration as safetensors, in the dtype that is computed in.

Guarantees: a copy has the encoder's weights alone, config and tokenizer, and the digest of what it
was made from, so the same fingerprint. It has been loaded once, as `run` loads it. It appears whole
or not at all: it is written under another name and renamed. `run` and `plan` with the same
pretrained, revision, kind and dtype find the copy and ask no hub.
Costs: reads the checkpoint once. The memory is a few blocks for each thread; the pages of a pickle
are mapped from its file. A pickle of before torch 1.6 cannot be mapped: it is loaded whole.

This is the only module that reads pickles, and only weights: `weights_only=True` runs no code.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from embed_precompute.documents import canonical_json
from embed_precompute.encoders.checkpoint import (
    ORIGIN,
    SMALL_FILES,
    WEIGHTS,
    Checkpoint,
    fetched_folder,
    find_fetched,
    open_checkpoint,
    origin_of,
    read_origin,
    state_of,
)
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.families.base import EncoderConfig, Family
from embed_precompute.encoders.resolve import open_encoder
from embed_precompute.encoders.weights import (
    CODES,
    Array,
    StoredWeight,
    digest_of_values,
    num_threads,
    remember,
    stored_weights,
    target_code,
)
from embed_precompute.errors import InputError, StorageError, one_line, refuse_file

ALIGNMENT = 64
"""A weight begins at a multiple of this in the file, so that it can stay mapped (see `loading`)."""
TEMPORARY = ".fetch-"
MB = 1e6


def fetch(encoders: Mapping[str, EncoderConfig], output: Path | None = None) -> Iterator[str]:
    """Convert each encoder's checkpoint, and yield lines about it as it goes.

    The copy of encoder NAME goes to `output`/NAME, or where `run` and `plan` look for it. Raises
    InputError: no such checkpoint, damaged or not the encoder's; StorageError: too little space.
    """
    if output is not None:
        refuse_file(output, "--output")
    for name, options in sorted(encoders.items()):
        origin = origin_of(options.pretrained, options.revision, options.kind, options.dtype)
        target = fetched_folder(origin) if output is None else output / name
        if find_fetched(origin, target) is not None:
            yield f"{name}: already there: {target}"
            continue
        found = read_origin(target)
        if target.exists() and (found is None or not found.items() >= origin.items()):
            raise InputError(
                f"{target} exists, and is no copy of {options.pretrained} in {options.dtype}. "
                "Choose another folder."
            )
        yield from _fetch(name, options, origin, target)


def _fetch(
    name: str, options: EncoderConfig, origin: dict[str, str], target: Path
) -> Iterator[str]:
    family, where = FAMILIES[options.kind], f"encoders.{name}"
    checkpoint = open_checkpoint(
        f"{where}.pretrained",
        options.pretrained,
        options.revision,
        options.kind,
        family.models,
        need="convertible",
    )
    state = state_of(checkpoint.folder)
    weights = list(_weights(checkpoint, family, options.dtype))
    # A checkpoint may hold a weight under both of its names; one is written.
    written = list({weight.canonical: weight for weight in reversed(weights)}.values())
    size = sum(weight.target_bytes for weight in written)
    yield f"{name}: converting {checkpoint.folder}: {size / MB:,.1f} MB in {options.dtype}"
    with _temporary_folder(target) as folder:
        free = shutil.disk_usage(folder).free
        if free < size:
            raise StorageError(
                f"{target.parent}: the copy needs {size:,} bytes, {free:,} are free. Free some "
                "space, or choose another place with --output (or EMBED_PRECOMPUTE_HOME)."
            )
        hashed = _write(folder / WEIGHTS, weights, written)
        digest_of_values(checkpoint, family, weights, hashed)  # raises if two names disagree
        small = [path for pattern in SMALL_FILES for path in checkpoint.folder.glob(pattern)]
        small = [path for path in small if not path.name.endswith((".index.json", ORIGIN))]
        for path in small:
            shutil.copyfile(path, folder / path.name)
        copy = _check(name, options, folder, checkpoint.folder)
        if state_of(checkpoint.folder) != state:
            raise InputError(f"{checkpoint.folder} changed while it was read. Run fetch again.")
        sources = {path.name: _sha256(path) for path in sorted({*checkpoint.files, *small})}
        *_, commit = (None, *re.findall("/snapshots/([^/]+)", str(checkpoint.folder)))
        document = {**origin, "commit": commit, "state": state, "sha256": sources}
        (folder / ORIGIN).write_bytes(canonical_json(document) + b"\n")
        _publish(folder, target)
    # The ranks of a job need not all hash what was hashed just now.
    copy = replace(copy, folder=target, files=(target / WEIGHTS,))
    kept = stored_weights(copy, family, options, options.dtype)
    remember(target / WEIGHTS, kept, hashed)
    yield f"{name}: {len(written)} weights: {target}"


def _check(name: str, options: EncoderConfig, folder: Path, source: Path) -> Checkpoint:
    """Open the copy in `folder` and load it, which maps its weights. Raises what `run` would."""
    import torch

    from embed_precompute.encoders.loading import Source, load_model

    try:
        opened = open_encoder(name, replace(options, pretrained=str(folder), revision=None))
        model_source = Source(opened.checkpoint, FAMILIES[options.kind], options)
        load_model(model_source, getattr(torch, options.dtype))
        return opened.checkpoint
    except InputError as error:
        raise InputError(str(error).replace(str(folder), str(source))) from error


# --- the weights ----------------------------------------------------------------------------------


def _weights(checkpoint: Checkpoint, family: Family[Any], dtype: str) -> Iterator[StoredWeight]:
    """All weights of the encoder, from safetensors or from pickles."""
    if all(path.suffix == ".safetensors" for path in checkpoint.files):
        yield from stored_weights(checkpoint, family, None, dtype)
        return
    import torch

    codes = {getattr(torch, name): code for name, code in CODES.items()}
    for path in checkpoint.files:
        for name, tensor in _unpickled(checkpoint.where, path).items():
            canonical = family.canonical_name(name)
            if canonical is None:
                continue
            if tensor.dtype not in codes:
                raise InputError(
                    f"{checkpoint.where}: {path} has {name} in {tensor.dtype}: expected weights in "
                    f"{', '.join(CODES)}."
                )
            code, shape = codes[tensor.dtype], tuple(tensor.shape)
            flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
            target, read = target_code(family, name, code, dtype), functools.partial(_slice, flat)
            yield StoredWeight(path, name, canonical, code, target, shape, tensor.nbytes, read)


def _slice(array: Array, start: int, count: int) -> Array:
    return array[start : start + count]


def _unpickled(where: str, path: Path) -> dict[str, Any]:
    """The tensors of a pickle; nothing else is let in."""
    import torch

    mapped = zipfile.is_zipfile(path)  # torch 1.6 and later
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # of many kinds
        raise InputError(
            f"{where}: {path} cannot be read as weights ({type(error).__name__}: "
            f"{one_line(error)[:300]}). It is damaged, or holds more than weights, which is never "
            "loaded. Download it again, or find a copy in safetensors."
        ) from error
    if not isinstance(found, dict) or not all(torch.is_tensor(each) for each in found.values()):
        raise InputError(
            f"{where}: {path} holds no table of weights, name by name, as transformers saves it."
        )
    return found


def _write(
    path: Path, weights: Sequence[StoredWeight], written: Sequence[StoredWeight]
) -> dict[str, str]:
    """Write `written` as safetensors; name -> sha256 of the values of each of `weights`."""
    # safetensors has no gaps: what ends in the middle of 64 bytes comes last.
    order = sorted(written, key=lambda each: (each.target_bytes % ALIGNMENT != 0, each.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for weight in order:
        begins[weight.name], end = end, end + weight.target_bytes
        header[weight.name] = {
            "dtype": weight.target,
            "shape": list(weight.shape),
            "data_offsets": [begins[weight.name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    first = 8 + len(text)

    def convert(weight: StoredWeight) -> str:
        digest, begin = hashlib.sha256(), begins.get(weight.name)
        for block in weight.blocks():
            digest.update(block.data)
            if begin is not None:
                _write_at(file.fileno(), block, first + begin)
                begin += len(block)
        return digest.hexdigest()

    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(first + end)
        file.flush()
        with ThreadPoolExecutor(num_threads()) as pool:
            hashes = list(pool.map(convert, weights))
    return {weight.name: each for weight, each in zip(weights, hashes, strict=True)}


def _write_at(handle: int, block: Array, offset: int) -> None:
    left = block.data
    while len(left):
        count = os.pwrite(handle, left, offset)
        left, offset = left[count:], offset + count


def _sha256(path: Path) -> str:
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name  # the hub's cache names a large file by its sha256
    digest = hashlib.sha256()
    with real.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# --- publishing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _temporary_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, removed at the end; those of processes that died are removed too.

    A living process holds a lock on its folder.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(
            f"{error.filename} is no folder: choose another place with --output (or "
            "EMBED_PRECOMPUTE_HOME)."
        ) from None
    prefix = f"{TEMPORARY}{target.name}-"
    for left in (each for each in target.parent.iterdir() if each.name.startswith(prefix)):
        with contextlib.suppress(OSError), _lock(left):
            shutil.rmtree(left, ignore_errors=True)
    folder = target.with_name(prefix + secrets.token_hex(4))
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # a file system without locks
            stack.enter_context(_lock(folder))
        yield folder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Raises OSError: another process has the lock."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _publish(folder: Path, target: Path) -> None:
    """Sync the folder's files and give it its name; a copy of an older state gives way."""
    for path in (*folder.iterdir(), folder):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    old = folder.with_name(f"{folder.name}-old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(target, old)
    try:
        os.rename(folder, target)
    except OSError:
        # Another fetch published meanwhile: of the same files its copy is as good.
        if read_origin(folder) != read_origin(target):
            raise
    shutil.rmtree(old, ignore_errors=True)
