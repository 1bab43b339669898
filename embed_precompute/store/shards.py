"""Shards: safetensors files that hold the stored rows of one unit in a few packed tensors.

Guarantees: a shard's bytes are a function of its fingerprint, unit and rows alone. Rows may come in
any order, and a rejected row leaves no trace. A reader accepts exactly the header that the writer
makes for this fingerprint, unit and set of tensors, and a file of exactly the size it implies.
The digest of a shard is that of its head, which holds the checksum of every row: so each byte is
hashed once, on its way to the file.
Costs: writing holds the tensors per caption, and of the others 17 bytes per stored row; a reject
rewrites the file once. Reading maps the file (no copy, no file descriptor kept); opening reads
header and offsets.

Every number is little-endian, as on every machine torch runs on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from embed_precompute.documents import canonical_json
from embed_precompute.errors import InternalError, VerificationError
from embed_precompute.store.commit import PIECE_BYTES, StagedFile, open_file
from embed_precompute.store.records import (
    FORMAT_VERSION,
    NULL_UNIT,
    Per,
    StoredShard,
    StoredTensor,
)

METADATA_KEY = "embed_precompute"
MAX_HEADER_BYTES = 4 << 20
ALIGNMENT = 64
NO_BYTES = xxhash.xxh3_64_intdigest(b"")
"""Checksum of a row without a vector."""
TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
# name in a safetensors header, bytes per element
_CODES = {
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float32": ("F32", 4),
    "int64": ("I64", 8),
    "uint64": ("U64", 8),
}

Array = np.ndarray[Any, np.dtype[Any]]


# --- layout ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Span:
    """A tensor's place in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def _identity(fingerprint: str, unit: int) -> dict[str, Any]:
    number = None if unit == NULL_UNIT else unit
    return {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "unit": number}


class _Layout:
    """Header and spans of a shard: a pure function, so a shard has exactly one right header."""

    def __init__(
        self,
        fingerprint: str,
        unit: int,
        tensors: Sequence[StoredTensor],
        num_rows: int,
        totals: Mapping[str, int],
    ) -> None:
        """`totals`: for each per-token tensor, the number of its vectors in the shard."""
        by_name = sorted(tensors, key=lambda tensor: tensor.name)
        packed = [t for t in by_name if not t.per_caption]
        parts: list[tuple[str, str, tuple[int, ...]]] = []
        parts += [(f"text_{t.name}_offsets", "int64", (num_rows + 1,)) for t in packed]
        parts += [(f"text_{t.name}_xxh3", "uint64", (num_rows,)) for t in by_name]
        parts += [
            (f"text_{t.name}", t.dtype, (num_rows, t.width)) for t in by_name if t.per_caption
        ]
        parts += [(f"text_{t.name}", t.dtype, (totals[t.name], t.width)) for t in packed]
        self.head_keys = [key for key, dtype, _ in parts if dtype in ("int64", "uint64")]
        """The arrays before the first stored row."""
        self.spans: dict[str, _Span] = {}
        position = 0
        for key, dtype, shape in parts:
            size = _CODES[dtype][1] * math.prod(shape)
            self.spans[key] = _Span(dtype, shape, position, position + size)
            position += size
        identity = canonical_json(_identity(fingerprint, unit)).decode()
        entries: dict[str, Any] = {"__metadata__": {METADATA_KEY: identity}}
        for key, span in self.spans.items():
            entries[key] = {
                "dtype": _CODES[span.dtype][0],
                "shape": list(span.shape),
                "data_offsets": [span.begin, span.end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self.header = struct.pack("<Q", len(text)) + text
        """Length prefix and JSON, padded with spaces: the data begins at a multiple of 64."""
        self.file_bytes = len(self.header) + position

    def begin(self, key: str) -> int:
        """Offset of a tensor in the file."""
        return len(self.header) + self.spans[key].begin


def shard_bytes(
    fingerprint: str,
    unit: int,
    tensors: Sequence[StoredTensor],
    num_rows: int,
    totals: Mapping[str, int],
) -> dict[str, int]:
    """Bytes of a shard that was not written, by tensor, with its offsets and checksums; "": those
    of the header. `totals` as in a layout: for each per-token tensor, its number of vectors."""
    layout = _Layout(fingerprint, unit, tensors, num_rows, totals)
    sizes = {"": len(layout.header), **dict.fromkeys((t.name for t in tensors), 0)}
    for key, span in layout.spans.items():
        name = key.removeprefix("text_")
        name = name.rpartition("_")[0] if key in layout.head_keys else name
        sizes[name] += span.end - span.begin
    return sizes


# --- writing --------------------------------------------------------------------------------------


def _byte_view(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied (numpy has no bfloat16)."""
    return values.detach().reshape(-1).view(torch.uint8).numpy().data


def _row_bytes(tensor: StoredTensor) -> int:
    """Number of bytes of one vector."""
    return tensor.width * _CODES[tensor.dtype][1]


class ShardWriter:
    """Writes one shard of `num_rows` stored rows, each at its own offset as it comes. For one
    thread at a time.

    `target` is the shard's path without a digest; `unit` may be NULL_UNIT. `lengths` holds, for
    every per-token tensor, the length of each stored row. Leaving the `with` block without
    `publish` drops everything.
    """

    def __init__(
        self,
        target: Path,
        fingerprint: str,
        unit: int,
        tensors: Sequence[StoredTensor],
        lengths: Mapping[str, Sequence[int]],
        *,
        num_rows: int,
    ) -> None:
        self._fingerprint, self._unit = fingerprint, unit
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._num_rows = num_rows
        self._starts: dict[str, Array] = {}
        self._checksums: dict[str, Array] = {}
        self._missing: dict[str, Array] = {}
        self._vectors: dict[str, Array] = {}
        """The rows of tensors per caption, which are small, and written all at once."""
        for name, tensor in self._tensors.items():
            rows = [1] * num_rows if tensor.per_caption else lengths[name]
            if len(rows) != num_rows:
                raise InternalError(f"{target}: {len(rows)} lengths of {name}, not {num_rows}.")
            self._starts[name] = np.concatenate(([0], np.cumsum(rows, dtype=np.int64)))
            self._checksums[name] = np.full(num_rows, NO_BYTES, np.uint64)
            self._missing[name] = np.diff(self._starts[name]) > 0  # else there is nothing to write
            if tensor.per_caption:
                self._vectors[name] = np.empty((num_rows, _row_bytes(tensor)), np.uint8)
        self._rejected: set[int] = set()
        self._stage(target)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._staged.discard()

    def write(
        self, name: str, rows: Sequence[int], values: torch.Tensor | Sequence[torch.Tensor]
    ) -> None:
        """Stores the rows `rows` of tensor `name`: entry i of `values` is row `rows[i]`.

        `values` is [B, length, width] or [B, width] if per caption, or a list of [length, width].
        """
        if not rows:
            return
        tensor, starts = self._tensors[name], self._starts[name]
        batch = isinstance(values, torch.Tensor)
        parts: Sequence[torch.Tensor] = [values] if isinstance(values, torch.Tensor) else values
        for i, part in enumerate(parts):
            some = rows if batch else rows[i : i + 1]
            lengths = {int(starts[row + 1] - starts[row]) for row in some}
            shape = (tensor.width,) if tensor.per_caption else (*lengths, tensor.width)
            if batch:
                shape = (len(rows), *shape)
            if (
                part.dtype != TORCH_DTYPES[tensor.dtype]
                or tuple(part.shape) != shape
                or part.device.type != "cpu"
                or not part.is_contiguous()
            ):
                raise InternalError(
                    f"{self._staged.target}: row {rows[i]} of {name} is {part.dtype} "
                    f"{tuple(part.shape)} on {part.device}: expected contiguous {tensor.dtype} "
                    f"{shape} on cpu."
                )
            self._write(name, some, _byte_view(part))

    def _write(self, name: str, rows: Sequence[int], payload: memoryview) -> None:
        """`payload`: the bytes of the rows, which are of one length, end to end."""
        size = len(payload) // max(1, len(rows))
        self._checksums[name][rows] = [
            xxhash.xxh3_64_intdigest(payload[i * size : (i + 1) * size]) for i in range(len(rows))
        ]
        self._missing[name][rows] = False
        if name in self._vectors:
            self._vectors[name][rows] = np.frombuffer(payload, np.uint8).reshape(len(rows), size)
            return
        # Neighbours in the batch that are neighbours in the file, too, are one write.
        ends = [i + 1 for i, row in enumerate(rows) if rows[i + 1 : i + 2] != [row + 1]]
        for first, end in zip([0, *ends], ends, strict=False):
            self._staged.pwrite(
                payload[first * size : end * size], self._position(name, rows[first])
            )

    def reject(self, row: int) -> None:
        """Leaves row `row` out of the shard; the row need not be written for the other tensors."""
        self._rejected.add(row)

    def publish(self) -> tuple[StoredShard, list[int]]:
        """Completes the file and names it by its content.

        Returns the file, and the numbers that its rows had before rejected rows were left out.
        """
        kept = [row for row in range(self._num_rows) if row not in self._rejected]
        for name, missing in self._missing.items():
            if missing[kept].any():
                row = kept[int(missing[kept].argmax())]
                raise InternalError(f"{self._staged.target}: row {row} of {name} was not written.")
        if self._rejected:
            self._rewrite(kept)
        head = bytearray(self._layout.header)
        for key in self._layout.head_keys:
            name = key.removeprefix("text_").rpartition("_")[0]
            arrays = self._checksums if key.endswith("_xxh3") else self._starts
            head += arrays[name].tobytes()
        self._staged.pwrite(head, 0)
        for name, vectors in self._vectors.items():
            self._staged.pwrite(vectors.data, self._position(name, 0))
        digest = hashlib.sha256(head).hexdigest()
        name = self._staged.publish_by_content(digest, lambda path: self._is_same(path, digest))
        return StoredShard(name, self._layout.file_bytes, digest), kept

    def _is_same(self, path: Path, digest: str) -> bool:
        """Whether `path` is a sound shard of this content."""
        try:
            reader = ShardReader(path, self._fingerprint, self._unit, list(self._tensors.values()))
            return reader.head_sha256() == digest and reader.first_damaged() is None
        except VerificationError:
            return False

    def _stage(self, target: Path) -> None:
        """Begins a temporary file for `_num_rows` rows that begin at `_starts`."""
        totals = {name: int(starts[-1]) for name, starts in self._starts.items()}
        tensors = list(self._tensors.values())
        self._layout = _Layout(self._fingerprint, self._unit, tensors, self._num_rows, totals)
        self._staged = StagedFile(target, self._layout.file_bytes)

    def _position(self, name: str, row: int) -> int:
        start = int(self._starts[name][row]) * _row_bytes(self._tensors[name])
        return self._layout.begin(f"text_{name}") + start

    def _rewrite(self, kept: list[int]) -> None:
        """Copies the `kept` rows, one by one, into a new temporary file and removes the old
        file."""
        sources = {
            name: [(self._position(name, row), self._position(name, row + 1)) for row in kept]
            for name in self._tensors
            if name not in self._vectors
        }
        for name, starts in self._starts.items():
            self._starts[name] = np.concatenate(([0], np.cumsum(np.diff(starts)[kept])))
            self._checksums[name] = self._checksums[name][kept]
        self._vectors = {name: vectors[kept] for name, vectors in self._vectors.items()}
        self._num_rows = len(kept)
        with self._staged as old:
            self._stage(old.target)
            for name, spans in sources.items():
                position = self._position(name, 0)
                for begin, end in spans:
                    position += self._staged.pwrite(old.pread(end - begin, begin), position)


# --- reading --------------------------------------------------------------------------------------


class ShardReader:
    """The rows of one shard, mapped from the file; `unit` may be NULL_UNIT.

    Opening checks everything but the rows' values, which have checksums (`check_row`,
    `first_damaged`), and the checksums, which have a digest in the unit's record (`head_sha256`).
    Raises VerificationError naming the file.
    """

    def __init__(
        self, path: Path, fingerprint: str, unit: int, tensors: Sequence[StoredTensor]
    ) -> None:
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in tensors}
        data = self._map()
        self.file_bytes = data.numel()
        size = int.from_bytes(data[:8].numpy().tobytes(), "little")
        if self.file_bytes < 8 or not 0 < size <= min(MAX_HEADER_BYTES, self.file_bytes - 8):
            raise self._damaged(f"no shard header in {self.file_bytes} bytes")
        header = data[: 8 + size].numpy().tobytes()
        layout = self._check_header(header, fingerprint, unit)
        if self.file_bytes != layout.file_bytes:
            raise self._damaged(
                f"found {self.file_bytes} bytes, its header describes {layout.file_bytes}"
            )
        self._header, self._body, self._spans = header, data[len(header) :], layout.spans
        self._values: dict[str, torch.Tensor] = {}
        self._starts: dict[str, Array] = {}
        self._checksums: dict[str, Array] = {}
        for name, tensor in self._tensors.items():
            span = layout.spans[f"text_{name}"]
            flat = self._body[span.begin : span.end].view(TORCH_DTYPES[tensor.dtype])
            self._values[name] = flat.view(span.shape)
            self._checksums[name] = self._array(f"text_{name}_xxh3", "<u8")
            if not tensor.per_caption:
                self._starts[name] = self._offsets(name)
        self.num_rows = len(next(iter(self._checksums.values())))

    def row(self, name: str, i: int) -> torch.Tensor:
        """Stored row `i` of tensor `name`: [length, width], or [width] per caption. Not copied.

        The tensor shares the mapping. Writing to it never changes the file, but changes the row for
        later reads from this reader: clone the tensor first.
        """
        if not 0 <= i < self.num_rows:
            # The row number comes from an index or a rows part: that file or this shard is damaged.
            raise self._damaged(f"row {i} of {name} is asked for, and it has {self.num_rows}")
        values = self._values[name]
        if self._tensors[name].per_caption:
            return values[i]
        starts = self._starts[name]
        return values[int(starts[i]) : int(starts[i + 1])]

    def length(self, name: str, i: int) -> int:
        """Number of vectors in stored row `i` of tensor `name`, 1 if per caption; `i` is
        unchecked."""
        starts = self._starts.get(name)
        return 1 if starts is None else int(starts[i + 1] - starts[i])

    def lengths(self, name: str) -> Array:
        """Lengths of all stored rows of tensor `name`, int64 [n]."""
        if self._tensors[name].per_caption:
            return np.ones(self.num_rows, np.int64)
        return np.diff(self._starts[name])

    def checksums(self, name: str) -> Array:
        """Stored checksums of all rows of tensor `name`, uint64 [n], read-only."""
        return self._checksums[name]

    def head_sha256(self) -> str:
        """sha256 of the file's bytes before the first stored row: the shard's digest."""
        rows = min(span.begin for key, span in self._spans.items() if key[5:] in self._tensors)
        head = self._header + self._body[:rows].numpy().tobytes()
        return hashlib.sha256(head).hexdigest()

    def first_damaged(self) -> tuple[str, int] | None:
        """(tensor, row) of the first row whose bytes do not have its checksum, None if all have.

        Every byte is read from the file, not through the mapping: a thread that reads lets others
        run, one that waits for a page of a mapping does not.
        """
        with open(open_file(self.path), "rb", buffering=0) as file:
            for name, tensor in self._tensors.items():
                starts = np.concatenate(([0], np.cumsum(self.lengths(name)))) * _row_bytes(tensor)
                begin = len(self._header) + self._spans[f"text_{name}"].begin
                row = self._first_damaged(file.fileno(), name, starts, begin)
                if row is not None:
                    return name, row
        return None

    def _first_damaged(self, fd: int, name: str, starts: Array, begin: int) -> int | None:
        """`starts`: where each row begins, counted from `begin`; the last entry is the end."""
        first = 0
        while first < self.num_rows:
            # As many whole rows as fit in a piece, one at least.
            end = int(np.searchsorted(starts, starts[first] + PIECE_BYTES, side="right")) - 1
            end = max(end, first + 1)
            places = (starts[first : end + 1] - starts[first]).tolist()
            piece = memoryview(os.pread(fd, places[-1], begin + int(starts[first])))
            expected = self._checksums[name][first:end].tolist()
            for i, checksum in enumerate(expected):
                if xxhash.xxh3_64_intdigest(piece[places[i] : places[i + 1]]) != checksum:
                    return first + i
            first = end
        return None

    def check_row(self, name: str, i: int) -> bool:
        """Whether the bytes of row `i` have its stored checksum; reads the row."""
        digest: int = xxhash.xxh3_64_intdigest(_byte_view(self.row(name, i)))
        return digest == int(self._checksums[name][i])

    def _map(self) -> torch.Tensor:
        """The file as uint8, mapped copy-on-write.

        torch warns about a read-only mapping, and a write to a row would crash. In a shared mapping
        a write would change the file. Unlike mmap.mmap this keeps no descriptor: thousands of
        shards can stay open.
        """
        try:
            size = self.path.stat().st_size
            storage = torch.UntypedStorage.from_file(str(self.path), False, size) if size else None
        except FileNotFoundError:
            raise self._damaged("it is missing") from None
        except (OSError, RuntimeError) as error:
            raise self._damaged(f"it cannot be read ({error})") from error
        empty = torch.empty(0, dtype=torch.uint8)
        # torch's own stubs do not know that from_file returns an UntypedStorage
        return empty if storage is None else empty.set_(storage)  # type: ignore[arg-type]

    def _check_header(self, header: bytes, fingerprint: str, unit: int) -> _Layout:
        """The layout, if `header` is byte for byte the header that the writer makes."""
        try:
            entries = json.loads(header[8:])
            totals = {
                name: _extent(entries[f"text_{name}"])
                for name, tensor in self._tensors.items()
                if not tensor.per_caption
            }
            num_rows = _extent(entries[f"text_{next(iter(self._tensors))}_xxh3"])
            identity = json.loads(entries["__metadata__"][METADATA_KEY])
            found = {key: identity[key] for key in _identity(fingerprint, unit)}
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            reason = f"its header is not that of a shard of {sorted(self._tensors)} ({error!r})"
            raise self._damaged(reason) from error
        for key, value in _identity(fingerprint, unit).items():
            if found[key] != value:
                raise self._damaged(f"it has {key} {found[key]!r}, expected {value!r}")
        layout = _Layout(fingerprint, unit, list(self._tensors.values()), num_rows, totals)
        if layout.header != header:
            expected = json.loads(layout.header[8:])
            differing = [key for key, value in expected.items() if entries.get(key) != value]
            raise self._damaged(f"its header is not as the writer makes it {differing}")
        return layout

    def _offsets(self, name: str) -> Array:
        starts = self._array(f"text_{name}_offsets", "<i8")
        total = self._spans[f"text_{name}"].shape[0]
        if starts[0] != 0 or starts[-1] != total or (starts[1:] < starts[:-1]).any():
            raise self._damaged(f"text_{name}_offsets does not rise from 0 to {total}")
        return starts

    def _array(self, key: str, dtype: str) -> Array:
        span = self._spans[key]
        values: Array = self._body[span.begin : span.end].numpy().view(np.dtype(dtype))
        values.flags.writeable = False
        return values

    def _damaged(self, reason: str) -> VerificationError:
        return VerificationError(f"{self.path} is not the shard it should be: {reason}.")


def open_alone(path: Path) -> ShardReader:
    """Opens a shard by what its header says: for a file whose plan or record is lost."""
    try:
        with open(open_file(path), "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(min(size, MAX_HEADER_BYTES)))
        identity = json.loads(entries.pop("__metadata__")[METADATA_KEY])
        dtypes = {code: dtype for dtype, (code, _) in _CODES.items()}
        tensors = []
        for key in [key for key in entries if f"{key}_xxh3" in entries]:
            name, entry = key.removeprefix("text_"), entries[key]
            per: Per = "token" if f"{key}_offsets" in entries else "caption"
            dtype: Any = dtypes[entry["dtype"]]
            tensors.append(StoredTensor(name, name, per, int(entry["shape"][1]), dtype))
        unit = NULL_UNIT if identity["unit"] is None else int(identity["unit"])
        return ShardReader(path, str(identity["fingerprint"]), unit, tensors)
    except (OSError, ValueError, TypeError, LookupError, RecursionError, StopIteration) as error:
        raise VerificationError(f"{path} is not a shard: {error!r}.") from error


def _extent(entry: Mapping[str, Any]) -> int:
    """The first dimension of a tensor, by its entry in a safetensors header."""
    extent = entry["shape"][0]
    if type(extent) is not int or extent < 0:
        raise ValueError(f"a tensor with {extent!r} rows")
    return extent
