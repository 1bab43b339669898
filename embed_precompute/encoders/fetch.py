"""`fetch`: encoders of a configuration as safetensors, in the dtype that is computed in.

Guarantees: a copy has the encoder's weights alone, of a decoder only the layers that are run, with
config, tokenizer, and the digest of what it was made from, so the same fingerprint. All that is the
hub's is of one commit of its repository. It has been loaded once, as `run` loads it. It appears
whole or not at all: it is written under another name and renamed. `run` and `plan` with the same
pretrained, revision, kind, dtype, layers and tokenizer find the copy. They ask no hub, and refuse a
copy whose files or values are not those that were written; `fetch` replaces it.
Costs: reads the checkpoint twice, once for the sha256 of its files. The memory is a few blocks for
each thread; the pages of a pickle are mapped from its file. A pickle of before torch 1.6 cannot be
mapped: it is loaded whole.

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
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embed_precompute.documents import canonical_json
from embed_precompute.encoders import hub
from embed_precompute.encoders.checkpoint import (
    ORIGIN,
    SMALL_FILES,
    TOKENIZER,
    WEIGHTS,
    Checkpoint,
    Origin,
    bring,
    damage_of,
    fetched_folder,
    find_fetched,
    is_copy_of,
    is_hub_id,
    is_variant,
    locate,
    open_checkpoint,
    origin_of,
    read_origin,
    state_of,
    tokenizer_in,
)
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.families.base import EncoderConfig, Family
from embed_precompute.encoders.resolve import open_encoder, open_encoders
from embed_precompute.encoders.weights import (
    CODES,
    Array,
    StoredWeight,
    checkpoint_digest,
    digest_of_values,
    num_threads,
    remember,
    stored_weights,
    target_code,
)
from embed_precompute.errors import InputError, StorageError, one_line, refuse_file
from embed_precompute.steps import steps

if TYPE_CHECKING:
    import torch

ALIGNMENT = 64
"""A weight begins at a multiple of this in the file, so that it can stay mapped (see `loading`)."""
TEMPORARY = ".fetch-"
SYNC_BYTES = 16 << 20
"""A weight as large as this is synced when it is written: nobody waits long at the end, and what
waits to be written stays small."""
READ_MIB = 4
MIB, MB = 1 << 20, 1e6


def fetch(encoders: Mapping[str, EncoderConfig], output: Path | None = None) -> Iterator[str]:
    """Convert each encoder's checkpoint, and yield lines about it as it goes.

    The copy of encoder NAME goes to `output`/NAME, or where `run` and `plan` look for it. A
    projection comes into the hub's cache. Raises InputError: no such checkpoint, damaged or not the
    encoder's; StorageError: too little space.
    """
    if output is not None:
        refuse_file(output, "--output")
    places = dict[str, tuple[Origin, Path]]()
    for name, options in sorted(encoders.items()):
        for key, path in options.other_files.items():
            if not Path(path).expanduser().exists():
                locate(f"encoders.{name}.{key}", path, None, "tensors", online=True)
        kind, dtype = options.kind, options.dtype
        origin = origin_of(
            *(options.pretrained, options.revision, kind, dtype, options.part, options.tokenizer)
        )
        target = fetched_folder(origin) if output is None else output / name
        places[name], found = (origin, target), read_origin(target)
        damaged = output is None and found is None and target.is_dir()
        if target.exists() and not damaged and (found is None or not is_copy_of(found, origin)):
            what = f"{options.pretrained} in {options.dtype}"
            what += f", {options.part}" if options.part else ""
            what += f", with {origin['tokenizer']}" if origin["tokenizer"] else ""
            raise InputError(f"{target} exists, and is no copy of {what}. Choose another folder.")
        if damaged:
            yield f"{name}: making it again: {target / ORIGIN} cannot be read"
    # Before gigabytes come: all that is wrong with names, kinds, options, widths and tokenizers.
    smalls = {
        name: _bring_small(name, options, {})
        for name, options in encoders.items()
        if find_fetched(*places[name]) is None
    }
    of_small = {name: small.options for name, small in smalls.items()}
    open_encoders(of_small, with_weights=False, copies=False)
    for name, (origin, target) in places.items():
        options, found = encoders[name], read_origin(target)
        if name in smalls:
            commit = yield from _fetch(name, options, origin, target, smalls[name])
        else:
            assert found is not None
            if (damage := _damage(name, options, target, found)) is None:
                open_encoder(name, replace(options, pretrained=str(target), revision=None))
                yield f"{name}: already there: {target}"
                commit = found["commit"]
            else:
                yield f"{name}: making it again: {damage}"
                small = _bring_small(name, options, found)
                open_encoder(name, small.options, with_weights=False, copies=False)
                commit = yield from _fetch(name, options, origin, target, small)
        if newest := hub.moved_to(options.pretrained, options.revision, commit):
            yield (
                f"{name}: {origin['revision']} of {options.pretrained} has moved on the hub: this "
                f"copy is of commit {commit}, and stays. For the newest set "
                f"encoders.{name}.revision to {newest} and run fetch again."
            )


def _damage(
    name: str, options: EncoderConfig, folder: Path, found: Mapping[str, Any]
) -> str | None:
    """What of a copy is not as it was written; None: nothing. Its values are hashed once."""
    if damage := damage_of(folder, found):
        return damage
    family = FAMILIES[options.kind]
    checkpoint = open_checkpoint(
        f"encoders.{name}.pretrained", str(folder), None, options.kind, family.models
    )
    try:
        checkpoint_digest(checkpoint, family, options)
    except InputError:
        return f"the values in {folder / WEIGHTS} are not those that fetch wrote"
    return None


@dataclass(frozen=True)
class _Small:
    """Config and tokenizer, which come before the weights."""

    options: EncoderConfig
    """With the folders in which they are."""
    revision: str | None
    """Where the weights are to be taken; of the hub, the commit."""
    tokenizer: Path | None
    """The folder of a tokenizer of the hub that the configuration names."""


def _bring_small(name: str, options: EncoderConfig, earlier: Mapping[str, Any]) -> _Small:
    """`earlier`: fetched.json of a copy that was damaged; all is of the same commits then."""
    where, small = f"encoders.{name}", options
    revision, tokenizer = options.revision, None
    if is_hub_id(options.pretrained):
        folder = bring(f"{where}.pretrained", options.pretrained, earlier.get("commit") or revision)
        revision = hub.commit_of(folder)
        small = replace(small, pretrained=str(folder), revision=None)
    if options.tokenizer is not None and is_hub_id(options.tokenizer):
        ids = (options.pretrained, options.tokenizer)
        same = len({hub.split_hub_id(each)[0] for each in ids}) == 1
        pinned = revision if same else earlier.get("tokenizer_commit")
        tokenizer = tokenizer_in(Path(small.pretrained), options.tokenizer)  # of another copy
        tokenizer = tokenizer or bring(f"{where}.tokenizer", options.tokenizer, pinned)
        small = replace(small, tokenizer=str(tokenizer))
    return _Small(small, revision, tokenizer)


def _fetch(
    name: str, options: EncoderConfig, origin: Origin, target: Path, small: _Small
) -> Generator[str, None, str | None]:
    """Returns the commit that the copy is of, if it is the hub's."""
    family, where = FAMILIES[options.kind], f"encoders.{name}"
    checkpoint = open_checkpoint(
        f"{where}.pretrained",
        options.pretrained,
        small.revision,
        options.kind,
        family.models,
        need="convertible",
        online=True,
    )
    source, commit = checkpoint.folder, hub.commit_of(checkpoint.folder)
    state = state_of(source)
    weights = list(_weights(checkpoint, family, options))
    # A checkpoint may hold a weight under both of its names; one is written.
    written = list({weight.canonical: weight for weight in reversed(weights)}.values())
    size = sum(weight.target_bytes for weight in written)
    at = f" (commit {commit})" if commit else ""
    part = f", {options.part}" if options.part else ""
    yield f"{name}: converting {source}{at}: {size / MB:,.1f} MB in {options.dtype}{part}"
    first = checkpoint.files[0].name
    if is_variant(first):
        yield f"{name}: {source} has no other weights than the variant {first}: rounded already"
    with _temporary_folder(target) as folder:
        free = shutil.disk_usage(folder).free
        if free < size:
            raise StorageError(
                f"{target.parent}: the copy needs {size:,} bytes, {free:,} are free. Free some "
                "space, or choose another place with --output (or EMBED_PRECOMPUTE_HOME)."
            )
        hashed = _write(name, folder / WEIGHTS, weights, written)
        digest_of_values(checkpoint, family, weights, hashed)  # raises if two names disagree
        copied = {path.name: path for path in _small_files(source)}
        if small.tokenizer is not None:
            (folder / TOKENIZER).mkdir()
            copied |= {f"{TOKENIZER}/{path.name}": path for path in _small_files(small.tokenizer)}
        for file, path in copied.items():
            shutil.copyfile(path, folder / file)
        sources = _sha256(name, sorted({*checkpoint.files, *copied.values()}))
        if state_of(source) != state:
            raise InputError(f"{source} changed while it was read. Run fetch again.")
        digests = {file: sources[path] for file, path in copied.items()}
        files = {file: [(folder / file).stat().st_size, digests[file]] for file in copied}
        document: dict[str, Any] = {
            **origin,
            "commit": commit,
            "tokenizer_commit": small.tokenizer and hub.commit_of(small.tokenizer),
            "state": state,
            "sha256": {**digests, **{path.name: sources[path] for path in checkpoint.files}},
            "files": {**files, WEIGHTS: [(folder / WEIGHTS).stat().st_size, None]},
            "values": {weight.name: hashed[weight.name] for weight in written},
        }
        if options.part is not None:
            document["layers"] = family.layers_run(options, checkpoint)
        (folder / ORIGIN).write_bytes(canonical_json(document) + b"\n")
        copy = _check(name, options, folder, source)
        _publish(folder, target)
    # The ranks of a job need not all hash what was hashed just now.
    copy = replace(copy, folder=target, files=(target / WEIGHTS,))
    kept = stored_weights(copy, family, options, options.dtype)
    remember(target / WEIGHTS, kept, hashed)
    yield f"{name}: {len(written)} weights: {target}"
    return commit


def _small_files(folder: Path) -> list[Path]:
    """Config, tokenizer and chat template."""
    found = {path for pattern in SMALL_FILES for path in folder.glob(pattern)}
    return sorted(path for path in found if ".index." not in path.name and path.name != ORIGIN)


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


def _weights(
    checkpoint: Checkpoint, family: Family[Any], options: EncoderConfig
) -> Iterator[StoredWeight]:
    """The weights of the encoder, from safetensors or from pickles: those of its part, or all,
    whatever is run of them: configurations share the copy."""
    needed, dtype = options if options.part is not None else None, options.dtype
    if all(path.suffix == ".safetensors" for path in checkpoint.files):
        yield from stored_weights(checkpoint, family, needed, dtype)
        return
    import torch

    codes = {getattr(torch, name): code for name, code in CODES.items()}
    for path in checkpoint.files:
        for name, tensor in _unpickled(checkpoint.where, path).items():
            canonical = family.canonical_name(name)
            if canonical is None:
                continue
            if needed is not None and family.is_other_part(needed, checkpoint, name):
                continue
            if tensor.dtype not in codes:
                raise InputError(
                    f"{checkpoint.where}: {path} has {name} in {tensor.dtype}: expected weights in "
                    f"{', '.join(CODES)}."
                )
            code, shape = codes[tensor.dtype], tuple(tensor.shape)
            target = target_code(family, name, code, dtype)
            read = functools.partial(_slice, tensor.detach())
            yield StoredWeight(path, name, canonical, code, target, shape, tensor.nbytes, read)


def _slice(tensor: torch.Tensor, start: int, count: int) -> Array:
    """Bytes of a tensor, in its own order. One that was saved transposed is copied row by row: a
    whole copy would not fit into the memory that is promised."""
    import torch

    first, end = (place // tensor.element_size() for place in (start, start + count))
    if not tensor.is_contiguous():
        row = tensor[0].numel()
        top = first // row
        tensor = tensor[top : -(-end // row)].contiguous()
        first, end = first - top * row, end - top * row
    block: Array = tensor.reshape(-1)[first:end].view(torch.uint8).numpy()
    return block


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
    encoder: str,
    path: Path,
    weights: Sequence[StoredWeight],
    written: Sequence[StoredWeight],
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
        if begin is not None and weight.target_bytes >= SYNC_BYTES:
            os.fdatasync(file.fileno())
        return digest.hexdigest()

    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(first + end)
        file.flush()
        with ThreadPoolExecutor(num_threads()) as pool:
            made = pool.map(convert, weights)
            hashes = list(steps(made, len(weights), f"{encoder}: converting", " weights"))
    return {weight.name: each for weight, each in zip(weights, hashes, strict=True)}


def _write_at(handle: int, block: Array, offset: int) -> None:
    left = block.data
    while len(left):
        count = os.pwrite(handle, left, offset)
        left, offset = left[count:], offset + count


def _sha256(encoder: str, paths: Sequence[Path]) -> dict[Path, str]:
    """File -> sha256. Raises InputError: the hub's cache has a file that was damaged."""
    digests = {path: hashlib.sha256() for path in paths}

    def blocks() -> Iterator[int]:
        for path in paths:
            with path.open("rb") as file:
                while block := file.read(READ_MIB * MIB):
                    digests[path].update(block)
                    yield len(block)

    def mib(size: int) -> int:
        return -(-size // MIB)

    total = sum(mib(path.stat().st_size) for path in paths)
    for _ in steps(blocks(), total, f"{encoder}: sha256 of the source", " MiB", mib):
        pass
    for path in paths:
        blob, found = path.resolve(), digests[path].hexdigest()
        # The hub's cache names a large file by its sha256, and does not look whether it has it.
        if re.fullmatch("[0-9a-f]{64}", blob.name) and blob.name != found:
            raise InputError(
                f"{path} is damaged: its sha256 is {found}, and the hub's {blob.name}. Remove "
                f"{blob}, and run fetch again."
            )
    return {path: digest.hexdigest() for path, digest in digests.items()}


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
    for path in (*folder.rglob("*"), folder):
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
