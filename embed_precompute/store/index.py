"""What a reader of a finished dataset opens: manifest.json, and index/*.npy, arrays it can map.

Guarantees: the arrays are a function of the units' rows and records alone. A look-up by id compares
the stored id, so two ids with one hash are not confused.
Costs: making the index keeps 24 bytes per sample in memory, to sort the hashes of ids. A look-up by
id is a binary search in the mapped arrays.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash

from embed_precompute.documents import Count, Hex64, MismatchError
from embed_precompute.errors import IncompleteError, VerificationError
from embed_precompute.samples import Status
from embed_precompute.store.commit import NAME_DIGITS, StagedFile, content_name, open_file
from embed_precompute.store.records import (
    PLAN_NAME,
    SHARD,
    Document,
    Per,
    StoredDType,
    StoredTensor,
    TokenCounts,
    check_status,
    read_document,
    stored_tensors,
    unit_path,
)

TABLE = "manifest.parquet"
NPY_HEADER_BYTES = 128
_NULL_NAME = re.compile(r"null-[0-9a-f]{16}\.safetensors")
Array = np.ndarray[Any, np.dtype[Any]]

# --- manifest.json --------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorEntry:
    """A tensor `text_<name>` as the manifest describes it."""

    encoder: str
    per: Per
    width: int
    dtype: StoredDType


@dataclass(frozen=True)
class Counts:
    """Sums over all units."""

    rows: Count
    """Input rows."""
    samples: Count
    units: Count
    stored: Count
    """Stored rows: equal texts of a unit share one."""
    status: dict[str, Count]
    noted: dict[str, Count]
    encoders: dict[str, TokenCounts]
    tensors: dict[str, Count]


@dataclass(frozen=True)
class EnvironmentCount:
    environment: dict[str, str]
    units: Count


@dataclass(frozen=True)
class FileEntry:
    bytes: Count
    sha256: Hex64


@dataclass(frozen=True, kw_only=True)
class Manifest(Document):
    """manifest.json: with it, and only with it, a dataset is finished."""

    kind: Literal["dataset"] = "dataset"
    fingerprint: Hex64
    plan_id: Hex64
    spec: dict[str, Any]
    tensors: dict[str, TensorEntry]
    counts: Counts
    environments: list[EnvironmentCount]
    records_sha256: Hex64
    files: dict[str, FileEntry]
    """All files except those of units, by path below the root."""

    def __post_init__(self) -> None:
        check_status(self.counts.status, self.counts.samples)
        if self.tensors != tensor_entries(stored_tensors(self.spec)):
            raise MismatchError("tensors are not those of its spec.")
        names = {"null.json", "manifest.parquet"}
        names |= {f"index/{name}.npy" for name in index_dtypes(self.tensors)}
        for pattern in (PLAN_NAME, _NULL_NAME):  # one file each
            names.add(next(filter(pattern.fullmatch, sorted(self.files)), pattern.pattern))
        if self.files.keys() != names:
            raise MismatchError(f"files has keys {sorted(self.files)}: expected other names.")


def index_dtypes(tensors: Mapping[str, TensorEntry]) -> dict[str, str]:
    """Every array of the index and its dtype; the file is index/<name>.npy."""
    dtypes = {"status": "|u1", "shard": "<i4", "index": "<i4"}
    for encoder in sorted({tensor.encoder for tensor in tensors.values()}):
        dtypes[f"tokens_{encoder}"] = "<i4"
    for name in sorted(tensors):
        dtypes |= {f"length_{name}": "<i4", f"xxh3_{name}": "<u8"}
    return dtypes | {
        "ids": "|u1",
        "id_offsets": "<i8",
        "id_hash": "<u8",
        "id_order": "<i8",
        "ok": "<i8",
        "shards": "<i8",
        "shard_digest": "<u8",
    }


def index_bytes(
    tensors: Sequence[StoredTensor], *, samples: int, ok: int, units: int, id_bytes: int
) -> int:
    """Bytes of all arrays of a dataset; `ok`: samples of this status; `id_bytes`: of all ids."""
    dtypes = index_dtypes(tensor_entries(tensors))
    sizes = {"ids": id_bytes, "id_offsets": samples + 1, "ok": ok}
    sizes |= {"shards": 3 * units, "shard_digest": units}
    return sum(
        NPY_HEADER_BYTES + np.dtype(dtype).itemsize * sizes.get(name, samples)
        for name, dtype in dtypes.items()
    )


def tensor_entries(tensors: Sequence[StoredTensor]) -> dict[str, TensorEntry]:
    """The tensors as the manifest describes them."""
    return {t.name: TensorEntry(t.encoder, t.per, t.width, t.dtype) for t in tensors}


def read_manifest(root: Path) -> Manifest:
    """Reads manifest.json. Raises FileNotFoundError while the dataset is not finalised."""
    try:
        return read_document(root / "manifest.json", Manifest)
    except VerificationError as error:
        raise VerificationError(
            f"{error} `embed-precompute finalize {root}` makes it again."
        ) from error


# --- writing the index ----------------------------------------------------------------------------


def id_hash(sample_id: bytes) -> int:
    """XXH3-64, seed 0, of an id's UTF-8 bytes."""
    digest: int = xxhash.xxh3_64_intdigest(sample_id)
    return digest


@dataclass(frozen=True)
class UnitColumns:
    """What a unit adds to the index."""

    unit: int
    num_stored: int
    shard_digest: int
    """The digits in the shard's name, as a number."""
    ids: list[bytes]
    id_hashes: Array
    status: Array
    """Number of each sample's status, uint8."""
    index: Array
    """Stored row of each sample; -1 unless its status is ok."""
    tokens: Mapping[str, Array]
    """For each encoder, the number of tokens of each sample; 0 unless its status is ok."""
    lengths: Mapping[str, Array]
    """For each tensor, the number of stored vectors of each sample; 0 unless its status is ok."""
    checksums: Mapping[str, Array]
    """For each tensor, the checksum of each sample's stored row; 0 unless its status is ok."""


class IndexBuilder:
    """Turns units, one after another, into the pieces that the arrays consist of."""

    def __init__(self) -> None:
        self._num_samples = self._id_bytes = 0
        self._id_hashes: list[Array] = []

    def add(self, unit: UnitColumns) -> dict[str, Array]:
        """What the next unit adds to each array."""
        first, count = self._num_samples, len(unit.ids)
        ends = self._id_bytes + np.cumsum([len(each) for each in unit.ids], dtype=np.int64)
        self._num_samples += count
        self._id_bytes = int(ends[-1]) if count else self._id_bytes
        self._id_hashes.append(unit.id_hashes)
        return {
            "status": unit.status,
            "shard": np.full(count, unit.unit, np.int32),
            "index": unit.index,
            **{f"tokens_{name}": values for name, values in unit.tokens.items()},
            **{f"length_{name}": values for name, values in unit.lengths.items()},
            **{f"xxh3_{name}": values for name, values in unit.checksums.items()},
            "ids": np.frombuffer(b"".join(unit.ids), np.uint8),
            "id_offsets": ends,
            "ok": np.flatnonzero(unit.status == Status.OK) + first,
            "shards": np.array([first, count, unit.num_stored], np.int64),
            "shard_digest": np.array([unit.shard_digest], np.uint64),
        }

    def last(self) -> dict[str, Array]:
        """What comes after the last unit: the hashes of all ids, sorted."""
        hashes = np.concatenate([np.zeros(0, np.uint64), *self._id_hashes])
        order = np.argsort(hashes, kind="stable")  # equal hashes stay in input order
        return {"id_hash": hashes[order], "id_order": order}


class IndexWriter:
    """Writes the arrays of the index, unit by unit, in input order."""

    def __init__(self, folder: Path, tensors: Mapping[str, TensorEntry]) -> None:
        self._builder = IndexBuilder()
        self._dtypes = index_dtypes(tensors)
        self._sizes = dict.fromkeys(self._dtypes, 0)
        self._files: dict[str, StagedFile] = {}
        try:
            for name in self._dtypes:
                self._files[name] = StagedFile(folder / f"{name}.npy")
            self._append({"id_offsets": np.zeros(1, np.int64)})
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        """Drops every array that was not given its name."""
        for file in self._files.values():
            file.discard()

    def add(self, unit: UnitColumns) -> None:
        self._append(self._builder.add(unit))

    def finish(self) -> dict[str, StagedFile]:
        """The finished arrays, staged, by name."""
        self._append(self._builder.last())
        for name, file in self._files.items():
            size = self._sizes[name]
            shape = (size // 3, 3) if name == "shards" else (size,)
            file.pwrite(_npy_header(self._dtypes[name], shape), 0)
        return self._files

    def _append(self, pieces: Mapping[str, Array]) -> None:
        for name, piece in pieces.items():
            values = np.ascontiguousarray(piece, self._dtypes[name])
            offset = NPY_HEADER_BYTES + self._sizes[name] * values.itemsize
            self._files[name].pwrite(values.data, offset)
            self._sizes[name] += values.size


def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file, version 1.0, filled up to 128 bytes."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(NPY_HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


# --- reading the index ----------------------------------------------------------------------------


class DatasetIndex:
    """A finalised dataset's index, mapped: nothing is loaded until it is asked for.

    Opening checks manifest.json, and compares each array's size, dtype and shape with it;
    `verify` checks the digests. Samples are numbered in input order, those without an embedding
    too. A pickle holds the folder's path only; unpickling opens the index again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self.manifest = read_manifest(root)
        except FileNotFoundError:
            raise IncompleteError(
                f"{root} is not finished: no manifest.json. Run the job again, or "
                f"`embed-precompute finalize {root}` when `embed-precompute status {root}` shows "
                "no unit left."
            ) from None
        counts = self.manifest.counts
        self.tensors = tuple(sorted(self.manifest.tensors))
        self.num_samples, self.num_units = n, units = counts.samples, counts.units
        shapes: dict[str, tuple[int, ...] | None] = {
            "id_offsets": (n + 1,),
            "ids": None,
            "ok": (counts.status[Status.OK.label],),
            "shards": (units, 3),
            "shard_digest": (units,),
        }
        self.arrays = {
            name: self._open(name, dtype, shapes.get(name, (n,)))
            for name, dtype in index_dtypes(self.manifest.tensors).items()
        }
        """Every array, by name. The attributes below are some of these arrays."""
        self.status, self.shard = self.arrays["status"], self.arrays["shard"]
        self.index, self.ok = self.arrays["index"], self.arrays["ok"]
        self.shards = self.arrays["shards"]
        encoders = {tensor.encoder for tensor in self.manifest.tensors.values()}
        self.tokens = {name: self.arrays[f"tokens_{name}"] for name in sorted(encoders)}
        self.lengths = {name: self.arrays[f"length_{name}"] for name in self.tensors}
        self.checksums = {name: self.arrays[f"xxh3_{name}"] for name in self.tensors}

    def __reduce__(self) -> tuple[type[DatasetIndex], tuple[Path]]:
        return DatasetIndex, (self.root,)

    def __len__(self) -> int:
        return self.num_samples

    def shard_path(self, unit: int) -> Path:
        if not 0 <= unit < self.num_units:
            where = self.root / "index" / "shard.npy"
            raise VerificationError(f"{where} holds unit {unit}: there are {self.num_units}.")
        path = unit_path(self.root, unit, SHARD)
        digest = f"{int(self.arrays['shard_digest'][unit]):0{NAME_DIGITS}x}"
        return path.with_name(content_name(path.name, digest))

    def sample_id(self, sample: int) -> str:
        try:
            return self._id_bytes(sample).decode()
        except UnicodeDecodeError as error:
            raise VerificationError(f"{self.root / 'index'}: id {sample}: {error}.") from error

    def find(self, sample_id: str) -> int | None:
        """The sample number of an id, or None."""
        # A lone surrogate gives bytes that no stored id has.
        wanted = sample_id.encode(errors="surrogatepass")
        # A Python int here would make numpy convert the whole array.
        for sample in self.of_hash(np.uint64(id_hash(wanted))):
            if self._id_bytes(sample) == wanted:
                return sample
        return None

    def of_hash(self, hashed: np.uint64) -> Iterator[int]:
        """The samples whose ids have this hash: one, but for collisions."""
        hashes, order = self.arrays["id_hash"], self.arrays["id_order"]
        at = int(np.searchsorted(hashes, hashed))
        while at < self.num_samples and hashes[at] == hashed:
            sample = int(order[at])
            if not 0 <= sample < self.num_samples:
                where = self.root / "index" / "id_order.npy"
                raise VerificationError(f"{where} holds {sample} of {self.num_samples} samples.")
            yield sample
            at += 1

    def captions_of(self, row_id: str, text_column: str | Sequence[str]) -> Iterator[int]:
        """The samples of a row with several captions: its id, # and a number or a column."""
        names = map(str, count()) if isinstance(text_column, str) else text_column
        for name in names:
            if (sample := self.find(f"{row_id}#{name}")) is None:
                return
            yield sample

    def _id_bytes(self, sample: int) -> bytes:
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"{self.root}: no sample {sample}; it has {self.num_samples}.")
        offsets = self.arrays["id_offsets"]
        return self.arrays["ids"][int(offsets[sample]) : int(offsets[sample + 1])].tobytes()

    def _open(self, name: str, dtype: str, shape: tuple[int, ...] | None) -> Array:
        """The mapped array; `shape` None: one dimension, of any length."""
        path = self.root / "index" / f"{name}.npy"
        try:
            expected = self.manifest.files[f"index/{name}.npy"].bytes
            if path.stat().st_size != expected:
                raise ValueError(f"{path.stat().st_size} bytes, manifest.json says {expected}")
            shape = (expected - NPY_HEADER_BYTES,) if shape is None else shape
            with open(open_file(path), "rb") as file:
                if file.read(NPY_HEADER_BYTES) != _npy_header(dtype, shape):
                    raise ValueError(f"another header than that of {dtype} {shape}")
            size = np.dtype(dtype).itemsize * math.prod(shape) + NPY_HEADER_BYTES
            if size != expected:
                raise ValueError(f"{expected} bytes, {dtype} {shape} has {size}")
            if 0 in shape:  # an empty array cannot be mapped
                return np.empty(shape, dtype)
            array = np.memmap(path, dtype, "r", NPY_HEADER_BYTES, shape)
        except (OSError, ValueError, LookupError) as error:
            raise VerificationError(
                f"{path} is not the array it should be: {error}. `embed-precompute finalize` makes "
                "it again."
            ) from error
        return np.asarray(array)  # indexing a plain array is faster than numpy's memmap class
