"""index/*.npy: the columns a reader needs for every sample, each a flat array it can map.

Guarantees: the arrays are a function of the units' rows alone; a look-up by id compares the stored
id, so two ids with one hash are told apart.
Costs: writing streams, and sorts the id hashes in parts of about a million; reading maps the
arrays, a look-up by id is a binary search and loads no table.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import xxhash

from embed_precompute.errors import IncompleteError, VerificationError
from embed_precompute.samples import Status
from embed_precompute.store.commit import StagedFile
from embed_precompute.store.records import ENCODER_NAME, read_manifest

NPY_HEADER_BYTES = 128
SORT_ENTRIES = 1 << 20
UNITS_PER_WRITE = 4096

Array = np.ndarray[Any, np.dtype[Any]]


def index_dtypes(encoders: Sequence[str]) -> dict[str, str]:
    """Every array of the index and its dtype; the file is index/<name>.npy."""
    dtypes = {"status": "|u1", "shard": "<i4", "index": "<i4"}
    for name in sorted(encoders):
        dtypes |= {f"length_{name}": "<i4", f"xxh3_{name}": "<u8"}
    return dtypes | {
        "ids": "|u1",
        "id_offsets": "<i8",
        "id_hash": "<u8",
        "id_order": "<i8",
        "ok": "<i8",
        "shards": "<i8",
    }


def id_hash(sample_id: bytes) -> int:
    """XXH3-64, seed 0, of an id's UTF-8 bytes."""
    digest: int = xxhash.xxh3_64_intdigest(sample_id)
    return digest


class _ArrayFile:
    """A .npy file that grows; its header, of fixed size, is written at the end."""

    def __init__(self, target: Path, dtype: str, columns: int = 0) -> None:
        self.staged = StagedFile(target)
        self._dtype = np.dtype(dtype)
        self._descr, self._columns = dtype, columns
        self._size = 0

    def append(self, values: Array) -> None:
        values = np.ascontiguousarray(values, self._dtype)
        self.put(values, self._size)
        self._size += values.size

    def put(self, values: Array, first: int) -> None:
        """Writes values at element `first`, in place."""
        self.staged.pwrite(values.data, NPY_HEADER_BYTES + first * self._dtype.itemsize)

    def read(self, first: int, count: int) -> Array:
        size = self._dtype.itemsize
        raw = self.staged.pread(count * size, NPY_HEADER_BYTES + first * size)
        return np.frombuffer(raw, self._dtype)

    def finish(self, size: int | None = None) -> StagedFile:
        """Writes the header for `size` elements (those appended, if not given)."""
        size = self._size if size is None else size
        shape = (size // self._columns, self._columns) if self._columns else (size,)
        self.staged.pwrite(_npy_header(self._descr, shape), 0)
        return self.staged


def _npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """The header of a .npy file, version 1.0, filled up to 128 bytes."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(NPY_HEADER_BYTES - 11) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


class IndexWriter:
    """Streams samples, in input order, into the arrays of the index."""

    def __init__(self, folder: Path, encoders: Sequence[str]) -> None:
        self._files: dict[str, _ArrayFile] = {}
        self._num_samples = self._id_bytes = 0
        self._units: list[tuple[int, int, int]] = []
        self._unit_start = 0
        self._bins = np.zeros(1 << 16, np.int64)
        self._unsorted = _ArrayFile(folder / "id_hash.unsorted", "<u8")
        try:
            for name, dtype in index_dtypes(encoders).items():
                columns = 3 if name == "shards" else 0
                self._files[name] = _ArrayFile(folder / f"{name}.npy", dtype, columns)
            self._files["id_offsets"].append(np.zeros(1))
        except BaseException:
            self.discard()
            raise

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    def append(self, columns: Mapping[str, Array], ids: Sequence[bytes]) -> None:
        """A batch of samples: status, shard, index, length_<name>, xxh3_<name>, and their ids."""
        for name, values in columns.items():
            self._files[name].append(values)
        ok = np.flatnonzero(columns["status"] == Status.OK)
        self._files["ok"].append(ok + self._num_samples)
        self._files["ids"].append(np.frombuffer(b"".join(ids), np.uint8))
        ends = self._id_bytes + np.cumsum([len(sample_id) for sample_id in ids])
        self._files["id_offsets"].append(ends)
        hashes = np.fromiter(map(id_hash, ids), np.uint64, len(ids))
        self._unsorted.append(hashes)
        np.add.at(self._bins, _bin(hashes), 1)  # far fewer samples than there are bins
        self._num_samples += len(ids)
        self._id_bytes = int(ends[-1])

    def add_unit(self, num_samples: int, num_stored: int) -> None:
        """The next unit; those of all samples follow one another."""
        self._units.append((self._unit_start, num_samples, num_stored))
        self._unit_start += num_samples
        if len(self._units) == UNITS_PER_WRITE:
            self._write_units()

    def _write_units(self) -> None:
        self._files["shards"].append(np.array(self._units, np.int64).reshape(-1))
        self._units.clear()

    def finish(self) -> dict[str, StagedFile]:
        """The finished arrays, staged, by name."""
        self._write_units()
        self._sort_ids()
        sorted_size = {name: self._num_samples for name in ("id_hash", "id_order")}
        return {name: file.finish(sorted_size.get(name)) for name, file in self._files.items()}

    def discard(self) -> None:
        """Drops every array that was not given its name."""
        for file in (*self._files.values(), self._unsorted):
            file.staged.discard()

    def _sort_ids(self) -> None:
        """id_hash and id_order: deal the hashes to ranges of values, then sort each range."""
        starts = np.concatenate(([0], np.cumsum(self._bins)))
        # Bins are consecutive values, so a range of bins is a range of the sorted array.
        _, range_of_bin, sizes = np.unique(
            starts[:-1] // SORT_ENTRIES, return_inverse=True, return_counts=True
        )
        first_bins = np.concatenate(([0], np.cumsum(sizes)))
        bounds = starts[first_bins]
        hash_file, order_file = self._files["id_hash"], self._files["id_order"]
        cursors = bounds[:-1].copy()
        for first in range(0, self._num_samples, SORT_ENTRIES):
            count = min(SORT_ENTRIES, self._num_samples - first)
            hashes = self._unsorted.read(first, count)
            ranges = range_of_bin[_bin(hashes)]
            order = np.argsort(ranges, kind="stable")
            counts = np.bincount(ranges, minlength=cursors.size)
            ends = np.cumsum(counts)
            for k in np.flatnonzero(counts):
                picked = order[ends[k] - counts[k] : ends[k]]
                hash_file.put(hashes[picked], int(cursors[k]))
                order_file.put(picked + first, int(cursors[k]))
            cursors += counts
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            hashes = hash_file.read(begin, end - begin)
            order = np.argsort(hashes, kind="stable")  # equal hashes stay in input order
            samples = order_file.read(begin, end - begin)
            hash_file.put(hashes[order], begin)
            order_file.put(samples[order], begin)


def _bin(hashes: Array) -> Array:
    """The top 16 bits of each hash."""
    bins: Array = (hashes >> np.uint64(48)).astype(np.int64)
    return bins


class DatasetIndex:
    """A finalised dataset's index, mapped: nothing is loaded until it is asked for.

    Opening checks the root manifest, and each array's bytes, dtype and shape against it; `verify`
    checks the digests. Sample numbers count all samples in input order, whatever their status.
    Pickles as its folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self.manifest = read_manifest(root)
        except FileNotFoundError:
            raise IncompleteError(
                f"{root} has no manifest.json: the dataset is not finished. Run the job again, or "
                "`embed-precompute finalize` when every unit is there."
            ) from None
        try:
            self.encoders = tuple(sorted(self.manifest["encoders"]))
            counts = self.manifest["counts"]
            self.num_samples, self.num_units = int(counts["samples"]), int(counts["units"])
            num_ok = int(counts["status"][Status.OK.label])
            if not all(ENCODER_NAME.fullmatch(name) for name in self.encoders):
                raise ValueError(f"encoders named {ENCODER_NAME.pattern}")  # they are in file names
        except (LookupError, TypeError, ValueError) as error:
            raise VerificationError(f"{root / 'manifest.json'} lacks {error}.") from error
        n = self.num_samples
        shapes = {"id_offsets": (n + 1,), "ok": (num_ok,), "shards": (self.num_units, 3)}
        arrays = {
            name: self._open(name, dtype, shapes.get(name, (n,)) if name != "ids" else None)
            for name, dtype in index_dtypes(self.encoders).items()
        }
        self.status, self.shard, self.index = arrays["status"], arrays["shard"], arrays["index"]
        self.ok, self.shards = arrays["ok"], arrays["shards"]
        self.lengths = {name: arrays[f"length_{name}"] for name in self.encoders}
        self.checksums = {name: arrays[f"xxh3_{name}"] for name in self.encoders}
        self._ids, self._id_offsets = arrays["ids"], arrays["id_offsets"]
        self._id_hash, self._id_order = arrays["id_hash"], arrays["id_order"]

    def __reduce__(self) -> tuple[type[DatasetIndex], tuple[Path]]:
        return DatasetIndex, (self.root,)

    def __len__(self) -> int:
        return self.num_samples

    def sample_id(self, sample: int) -> str:
        """The id of sample number `sample`."""
        try:
            return self._id_bytes(sample).decode()
        except UnicodeDecodeError as error:
            raise VerificationError(f"{self.root / 'index'}: id {sample}: {error}.") from error

    def find(self, sample_id: str) -> int | None:
        """The sample number of an id, or None."""
        wanted = sample_id.encode(errors="surrogatepass")  # not UTF-8: then no stored id is equal
        # A Python int here would make numpy convert the whole array.
        hashed = np.uint64(id_hash(wanted))
        at = int(np.searchsorted(self._id_hash, hashed))
        while at < self.num_samples and self._id_hash[at] == hashed:
            sample = int(self._id_order[at])
            if not 0 <= sample < self.num_samples:
                where = self.root / "index" / "id_order.npy"
                raise VerificationError(f"{where} holds {sample} of {self.num_samples} samples.")
            if self._id_bytes(sample) == wanted:
                return sample
            at += 1
        return None

    def _id_bytes(self, sample: int) -> bytes:
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"{self.root}: no sample {sample}; it has {self.num_samples}.")
        first, last = int(self._id_offsets[sample]), int(self._id_offsets[sample + 1])
        return self._ids[first:last].tobytes()

    def _open(self, name: str, dtype: str, shape: tuple[int, ...] | None) -> Array:
        """The mapped array; `shape` None: one dimension, of any length."""
        path = self.root / "index" / f"{name}.npy"
        try:
            expected = self.manifest["files"][f"index/{name}.npy"]["bytes"]
            if path.stat().st_size != expected:
                raise ValueError(f"{path.stat().st_size} bytes, manifest.json says {expected}")
            shape = (expected - NPY_HEADER_BYTES,) if shape is None else shape
            with path.open("rb") as file:
                if file.read(NPY_HEADER_BYTES) != _npy_header(dtype, shape):
                    raise ValueError(f"another header than that of {dtype} {shape}")
            size = np.dtype(dtype).itemsize * math.prod(shape) + NPY_HEADER_BYTES
            if size != expected:
                raise ValueError(f"{expected} bytes, {dtype} {shape} has {size}")
            if 0 in shape:  # it cannot be mapped
                return np.empty(shape, dtype)
            array = np.memmap(path, dtype, "r", NPY_HEADER_BYTES, shape)
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise VerificationError(
                f"{path} is not the array it should be: {error}. `embed-precompute finalize` makes "
                "it again."
            ) from error
        return np.asarray(array)  # indexing a plain array is faster than numpy's memmap class
