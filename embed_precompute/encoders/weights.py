"""The weights of a checkpoint as values: where they lie in its files, cast to the dtype that is
computed in, and the digest that names them.

Guarantees: the digest depends on what the encoder computes with, and on nothing else: the values in
the model's dtype, their names and shapes, and the values of config.json that the family names. A
copy in another dtype of equal values, in one file or several, with or without the decoder, has the
same digest. numpy casts as torch does; NaN stays NaN.
Costs: every weight is read and hashed once, in blocks of half a million numbers (about 10 MiB of
memory in each thread). The hashes are remembered in the cache folder for as long as a file's path,
size, mtime, ctime and inode stay. The cache only saves time: without a sound entry the file is read
again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import struct
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from embed_precompute.documents import canonical_json, digest_of
from embed_precompute.encoders.checkpoint import (
    Checkpoint,
    cache_home,
    not_as_written,
    read_origin,
)
from embed_precompute.encoders.families.base import EncoderConfig, Family
from embed_precompute.errors import InputError, one_line
from embed_precompute.steps import BYTES, Work

CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The dtypes a model may have, by their names in a safetensors header."""
CODE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
"""The dtypes that are cast, and their sizes. A tensor of another dtype is left as it is."""
BLOCK_NUMBERS = 1 << 19
"""How many numbers are read, cast and hashed at a time."""
MAX_THREADS = 8

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the encoder, as a file of the checkpoint holds it."""

    path: Path
    name: str
    canonical: str
    """Its name in the encoder alone."""
    code: str
    """Its dtype, as a safetensors header names it."""
    target: str
    """The dtype that the model holds it in."""
    shape: tuple[int, ...]
    num_bytes: int
    """Its size in the file."""
    read: Callable[[int, int], Array]
    """(first byte, number of bytes) -> these bytes of the weight, [n] uint8."""
    offset: int | None = None
    """Where it begins in its file; None if the file is no safetensors."""

    @property
    def target_bytes(self) -> int:
        """Its size in the model."""
        if self.code == self.target:
            return self.num_bytes
        return CODE_BYTES[self.target] * math.prod(self.shape)

    def blocks(self) -> Iterator[Array]:
        """Its bytes in the target dtype, block after block."""
        step = BLOCK_NUMBERS * CODE_BYTES.get(self.code, 8)
        for start in range(0, self.num_bytes, step):
            block = self.read(start, min(step, self.num_bytes - start))
            yield cast(block, self.code, self.target)


def stored_weights(
    checkpoint: Checkpoint, family: Family[Any], options: EncoderConfig | None, dtype: str
) -> list[StoredWeight]:
    """The weights that a model of `dtype` (float32, bfloat16, float16) loads; reads headers only.

    `options` None: all weights of the encoder, whatever is run of them. Raises InputError: a file
    is damaged or cannot be read.
    """
    found = []
    for path in checkpoint.files:
        for name, entry, begin in _header(checkpoint.where, path):
            canonical = family.canonical_name(name)
            if canonical is None:
                continue
            if options is not None and family.is_other_part(options, checkpoint, name):
                continue
            found.append(_stored(path, name, canonical, entry, begin, dtype, family))
    return found


def extra_weights(
    checkpoint: Checkpoint, family: Family[Any], options: EncoderConfig, dtype: str
) -> list[StoredWeight]:
    """The weights that the encoder takes from other files than its checkpoint's."""
    found = []
    for canonical, (path, wanted) in family.extra_weights(options, checkpoint).items():
        for name, entry, begin in _header(checkpoint.where, path):
            if name == wanted:
                found.append(_stored(path, name, canonical, entry, begin, dtype, family))
    return found


def _stored(
    path: Path,
    name: str,
    canonical: str,
    entry: Mapping[str, Any],
    begin: int,
    dtype: str,
    family: Family[Any],
) -> StoredWeight:
    code, (first, end) = entry["dtype"], entry["data_offsets"]
    return StoredWeight(
        path,
        name,
        canonical,
        code,
        target_code(family, name, code, dtype),
        tuple(entry["shape"]),
        end - first,
        functools.partial(_read, path, begin),
        begin,
    )


def _read(path: Path, begin: int, start: int, count: int) -> Array:
    block = np.fromfile(path, np.uint8, count=count, offset=begin + start)
    if len(block) != count:
        raise InputError(f"{path} became shorter while it was read. Run again when it is complete.")
    return block


def target_code(family: Family[Any], name: str, code: str, dtype: str) -> str:
    """The dtype that a model of `dtype` holds a weight in; what is no float stays as it is."""
    if code not in CODE_BYTES:
        return code
    return "F32" if family.keeps_float32(name, dtype) else CODES[dtype]


def _header(where: str, path: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    """(name, entry, offset in the file) of each tensor of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):  # checks the whole header, and that the file is as long
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)[:300]
        raise InputError(
            f"{where}: {path} cannot be read ({reason}). Copy or download the checkpoint again."
        ) from error
    header.pop("__metadata__", None)
    for name, entry in header.items():
        yield name, entry, 8 + length + entry["data_offsets"][0]


# --- casting --------------------------------------------------------------------------------------


@np.errstate(over="ignore", invalid="ignore")  # too large is inf, as in torch
def cast(block: Array, code: str, target: str) -> Array:
    """The numbers in `block` (bytes, uint8, of dtype `code`) as bytes of dtype `target`.

    Rounds to nearest, ties to even, by way of float32, as torch does.
    """
    if code == target:
        return block
    values = _as_float32(block, code)
    if target in ("F32", "F64"):
        return values.astype(f"<f{CODE_BYTES[target]}", copy=False).view(np.uint8)
    if target == "F16":
        return values.astype("<f2").view(np.uint8)
    assert target == "BF16", target
    bits = values.view("<u4")
    rounded: Array = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype("<u2").view(np.uint8)


def _as_float32(block: Array, code: str) -> Array:
    if code == "BF16":
        return (block.view("<u2").astype("<u4") << 16).view("<f4")
    if code == "F8_E5M2":  # the upper half of a float16
        return (block.astype("<u2") << 8).view("<f2").astype("<f4")
    if code == "F8_E4M3":
        return _float8_e4m3()[block]
    return block.view({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[code]).astype("<f4")


def _float8_e4m3() -> Array:
    """The number of each byte: a sign, 4 bits of exponent, 3 of mantissa, no inf."""
    byte = np.arange(256)
    exponent, mantissa = byte >> 3 & 15, byte & 7
    size = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10)
    )
    size[byte & 127 == 127] = math.nan
    signed: Array = np.where(byte >> 7, -size, size).astype("<f4")
    return signed


# --- the digest -----------------------------------------------------------------------------------


def weights_digest(checkpoint: Checkpoint, family: Family[Any], options: EncoderConfig) -> str:
    """The name of what the encoder computes with. Raises InputError: a file cannot be read, two
    tensors are the same weight with different values, or a copy has others than `fetch` wrote."""
    digest = checkpoint_digest(checkpoint, family, options)
    from_elsewhere = extra_weights(checkpoint, family, options, options.dtype)
    size = sum(weight.num_bytes for weight in from_elsewhere)
    with Work(f"{checkpoint.where}: digesting other files", size, BYTES) as work:
        others = [_hashes(each.path, [each], work.add).values() for each in from_elsewhere]
    extra = {
        weight.canonical: [weight.target, list(weight.shape), *values]
        for weight, values in zip(from_elsewhere, others, strict=True)
    }
    return digest_of({"encoder": digest, "extra": extra}) if extra else digest


def checkpoint_digest(checkpoint: Checkpoint, family: Family[Any], options: EncoderConfig) -> str:
    """The same without what comes from other files than the checkpoint's."""
    stored = stored_weights(checkpoint, family, options, options.dtype)
    by_file: dict[Path, list[StoredWeight]] = {}
    for weight in stored:
        by_file.setdefault(weight.path, []).append(weight)
    hashed: dict[str, str] = {}
    size = sum(weight.num_bytes for weight in stored)
    with Work(f"{checkpoint.where}: digesting weights", size, BYTES) as work:
        for path, weights in by_file.items():
            hashed |= _hashes(path, weights, work.add)
    return digest_of_values(checkpoint, family, stored, hashed)


def digest_of_values(
    checkpoint: Checkpoint,
    family: Family[Any],
    stored: Sequence[StoredWeight],
    hashed: Mapping[str, str],
) -> str:
    """The digest of `stored`; `hashed`: name -> sha256 of the values in the target dtype."""
    tensors: dict[str, list[Any]] = {}
    # Of what is cast on the way the values that were written are not known.
    written = (read_origin(checkpoint.folder) or {}).get("values", {})
    for weight in stored:
        same = weight.code != weight.target or written.get(weight.name) == hashed[weight.name]
        if written and not same:
            damage = f"{weight.name} in {weight.path} has other values than fetch wrote"
            raise not_as_written(checkpoint.where, checkpoint.folder, damage)
        value = [weight.target, list(weight.shape), hashed[weight.name]]
        if tensors.setdefault(weight.canonical, value) != value:
            raise InputError(
                f"{checkpoint.where}: {weight.path} has {weight.name} with other values than the "
                f"same weight under another name ({weight.canonical}). Remove the wrong one, or "
                "convert the checkpoint again."
            )
    return digest_of({"config": family.config_values(checkpoint), "tensors": tensors})


def _hashes(
    path: Path, weights: Sequence[StoredWeight], more: Callable[[int], None]
) -> dict[str, str]:
    """Name -> sha256 of the values, remembered for this file and these dtypes. `more` is told how
    many bytes were read."""
    entry = _entry(path, weights)
    # No entry, or a damaged one: the file is read.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(entry.read_bytes())
        if known["digest"] == digest_of(known["sha256"]):
            return dict(known["sha256"])
    with ThreadPoolExecutor(num_threads()) as pool:
        sums = list(pool.map(lambda weight: _sha256(weight, more), weights))
    if _entry(path, weights) != entry:
        raise InputError(f"{path} changed while it was read. Run again when it is complete.")
    hashed = {weight.name: each for weight, each in zip(weights, sums, strict=True)}
    remember(path, weights, hashed)
    return hashed


def remember(path: Path, weights: Sequence[StoredWeight], hashed: Mapping[str, str]) -> None:
    """Keep name -> sha256 of the values of `weights`, which are all in this file."""
    held = {weight.name: hashed[weight.name] for weight in weights}
    with contextlib.suppress(OSError):  # a cache that cannot be written only costs time
        entry = _entry(path, weights)
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=entry.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(canonical_json({"sha256": held, "digest": digest_of(held)}))
        os.replace(temporary, entry)


def num_threads() -> int:
    """How many threads read weights at a time."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def _sha256(weight: StoredWeight, more: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    for block in weight.blocks():
        digest.update(block.data)
        more(len(block) * CODE_BYTES.get(weight.code, 1) // CODE_BYTES.get(weight.target, 1))
    return digest.hexdigest()


def _entry(path: Path, weights: Sequence[StoredWeight]) -> Path:
    """The cache's file for these weights of a file as it is now."""
    real = path.resolve()
    status = real.stat()
    key = {
        # ctime: tools that copy files in place set the mtime to that of their source.
        "file": [str(real), status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns],
        "weights": {weight.name: weight.target for weight in weights},
    }
    return cache_home() / "weights" / f"{digest_of(key)}.json"
