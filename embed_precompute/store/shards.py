"""Shards: safetensors files that hold the stored rows of one unit in a few packed tensors.

Guarantees: a shard's bytes are a function of its fingerprint, unit and rows alone; rows may come in
any order; a rejected row leaves no trace. A reader accepts exactly the header that the writer makes
for this fingerprint, unit and set of tensors, and a file of exactly the size it implies.
Costs: writing holds no row, only 17 bytes per stored row and tensor; a reject rewrites the file
once. Reading maps the file (no copy, no file descriptor kept); opening reads header and offsets.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import xxhash

from embed_precompute.errors import InternalError, VerificationError
from embed_precompute.store.commit import PIECE_BYTES, Outcome, StagedFile, StoredFile
from embed_precompute.store.layout import (
    CODES,
    MAX_HEADER_BYTES,
    METADATA_KEY,
    TORCH_DTYPES,
    Span,
    data_bytes,
    header_bytes,
    layout,
)
from embed_precompute.store.records import StoredTensor
from embed_precompute.store.sealed import FORMAT_VERSION

__all__ = ["ShardFile", "ShardReader", "ShardWriter", "StoredTensor"]


@dataclass(frozen=True)
class ShardFile(StoredFile):
    """A finished shard, and which of the writer's rows are in it, in order."""

    kept: tuple[int, ...]


def _byte_view(values: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, not copied (numpy has no bfloat16)."""
    return values.detach().reshape(-1).view(torch.uint8).numpy().data


class ShardWriter:
    """Writes one shard of `num_rows` stored rows, each at its own offset as it comes. One thread.

    `lengths` gives, for every encoder that is not pooled, the length of each stored row. Leaving
    the `with` block without `publish` drops everything.
    """

    def __init__(
        self,
        target: Path,
        fingerprint: str,
        unit: int | None,
        tensors: Sequence[StoredTensor],
        lengths: Mapping[str, Sequence[int]],
        *,
        num_rows: int,
    ) -> None:
        self._fingerprint, self._unit = fingerprint, unit
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._num_rows = num_rows
        self._starts: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
        for name, tensor in self._tensors.items():
            rows = [1] * num_rows if tensor.pooled else lengths[name]
            if len(rows) != num_rows:
                raise InternalError(f"{target}: {len(rows)} lengths of {name}, not {num_rows}.")
            self._starts[name] = np.concatenate(([0], np.cumsum(rows, dtype=np.int64)))
        self._checksums = {name: np.zeros(self._num_rows, np.uint64) for name in self._tensors}
        self._missing = {name: np.ones(self._num_rows, np.bool_) for name in self._tensors}
        self._rejected: set[int] = set()
        self._plan_bytes()
        self._staged = StagedFile(target, len(self._head) + data_bytes(self._spans))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.discard()

    def write(self, name: str, row: int, values: torch.Tensor) -> None:
        """Stores row `row` of encoder `name`: [length, dim], or [dim] when pooled."""
        tensor = self._tensors[name]
        length = int(self._starts[name][row + 1] - self._starts[name][row])
        shape = (tensor.dim,) if tensor.pooled else (length, tensor.dim)
        if (
            values.dtype != TORCH_DTYPES[tensor.dtype]
            or tuple(values.shape) != shape
            or values.device.type != "cpu"
            or not values.is_contiguous()
        ):
            raise InternalError(
                f"{self._staged.target}: row {row} of {name} is {values.dtype} "
                f"{tuple(values.shape)} on {values.device}: expected contiguous {tensor.dtype} "
                f"{shape} on cpu."
            )
        payload = _byte_view(values)
        self._staged.pwrite(payload, self._position(name, row))
        self._checksums[name][row] = xxhash.xxh3_64_intdigest(payload)
        self._missing[name][row] = False

    def reject(self, row: int) -> None:
        """Leaves row `row` out of the shard; it need not be written for the other encoders."""
        if not 0 <= row < self._num_rows:
            raise InternalError(f"{self._staged.target}: there is no row {row} to reject.")
        self._rejected.add(row)

    def finish(self) -> ShardFile:
        """Completes the file, digests it, syncs it; only `publish` or `discard` may follow."""
        kept = [row for row in range(self._num_rows) if row not in self._rejected]
        for name, missing in self._missing.items():
            if missing[kept].any():
                row = kept[int(missing[kept].argmax())]
                raise InternalError(f"{self._staged.target}: row {row} of {name} was not written.")
        if self._rejected:
            self._rewrite(kept)
        self._staged.pwrite(self._head, 0)
        for name, tensor in self._tensors.items():
            if not tensor.pooled:
                self._put(f"text_{name}_offsets", self._starts[name].astype("<i8"))
            self._put(f"text_{name}_xxh3", self._checksums[name].astype("<u8"))
        stored = self._staged.digest()
        self._staged.sync()
        return ShardFile(stored.name, stored.bytes, stored.sha256, tuple(kept))

    def read_back(self) -> ShardReader:
        """The finished shard before it has its name, mapped from its temporary file."""
        tensors = list(self._tensors.values())
        return ShardReader(self._staged.path, self._fingerprint, self._unit, tensors)

    def publish(self) -> Outcome:
        """Gives the finished shard its name; the first wins. As `StagedFile.publish`."""
        return self._staged.publish()

    def discard(self) -> None:
        """Drops the temporary file; does nothing once it is published."""
        self._staged.discard()

    def _plan_bytes(self) -> None:
        """Header and spans for the present rows."""
        totals = {name: int(starts[-1]) for name, starts in self._starts.items()}
        self._spans = layout(list(self._tensors.values()), self._num_rows, totals)
        self._head = header_bytes(self._fingerprint, self._unit, self._spans)

    def _position(self, name: str, row: int) -> int:
        tensor = self._tensors[name]
        row_bytes = tensor.dim * CODES[tensor.dtype][1]
        begin = self._spans[f"text_{name}"].begin
        return len(self._head) + begin + int(self._starts[name][row]) * row_bytes

    def _put(self, key: str, values: np.ndarray[Any, Any]) -> None:
        self._staged.pwrite(values.data, len(self._head) + self._spans[key].begin)

    def _rewrite(self, kept: list[int]) -> None:
        """A new temporary file with only the `kept` rows, copied in pieces; the old one goes."""
        # Consecutive rows are consecutive bytes: each run is one copy.
        runs = [
            [row for _, row in run] for _, run in groupby(enumerate(kept), lambda p: p[1] - p[0])
        ]
        sources = {
            name: [
                (self._position(name, run[0]), self._position(name, run[-1] + 1)) for run in runs
            ]
            for name in self._tensors
        }
        for name, starts in self._starts.items():
            self._starts[name] = np.concatenate(([0], np.cumsum(np.diff(starts)[kept])))
            self._checksums[name] = self._checksums[name][kept]
            self._missing[name] = self._missing[name][kept]
        self._num_rows = len(kept)
        self._rejected = set()
        self._plan_bytes()
        old = self._staged
        with old:
            self._staged = StagedFile(old.target, len(self._head) + data_bytes(self._spans))
            for name, spans in sources.items():
                position = self._position(name, 0)
                for begin, end in spans:
                    for offset in range(begin, end, PIECE_BYTES):
                        piece = old.pread(min(PIECE_BYTES, end - offset), offset)
                        position += self._staged.pwrite(piece, position)


class ShardReader:
    """The rows of one shard, mapped from the file.

    Opening checks everything but the rows' values: those have checksums (`check_row`), and the
    whole file has a sha256 in its record. Raises VerificationError naming the file.
    """

    def __init__(
        self, path: Path, fingerprint: str, unit: int | None, tensors: Sequence[StoredTensor]
    ) -> None:
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in tensors}
        data = self._map()
        raw = data.numpy()
        size = int.from_bytes(raw[:8].tobytes(), "little")
        if data.numel() < 8 or not 0 < size <= min(MAX_HEADER_BYTES, data.numel() - 8):
            raise self._damaged(f"no shard header in {data.numel()} bytes")
        head = raw[: 8 + size].tobytes()
        spans = self._check_header(head, fingerprint, unit)
        expected = len(head) + data_bytes(spans)
        if data.numel() != expected:
            raise self._damaged(f"found {data.numel()} bytes, its header describes {expected}")
        body = data[len(head) :]
        self.num_rows = spans[f"text_{next(iter(self._tensors))}_xxh3"].shape[0]
        self._values: dict[str, torch.Tensor] = {}
        self._starts: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
        self._checksums: dict[str, np.ndarray[Any, np.dtype[np.uint64]]] = {}
        for name, tensor in self._tensors.items():
            span = spans[f"text_{name}"]
            flat = body[span.begin : span.end].view(TORCH_DTYPES[tensor.dtype])
            self._values[name] = flat.view(span.shape)
            self._checksums[name] = _array(body, spans[f"text_{name}_xxh3"], np.dtype("<u8"))
            if not tensor.pooled:
                self._starts[name] = self._offsets(name, body, spans)

    def row(self, name: str, i: int) -> torch.Tensor:
        """Stored row `i` of encoder `name`: [length, dim], or [dim] when pooled. Not copied.

        The tensor shares the mapping. Writing to it never reaches the file, but is seen by whoever
        reads the row from this reader later: clone it first.
        """
        self._check_index(name, i)
        values = self._values[name]
        if self._tensors[name].pooled:
            return values[i]
        starts = self._starts[name]
        return values[int(starts[i]) : int(starts[i + 1])]

    def length(self, name: str, i: int) -> int:
        """Length of stored row `i` of encoder `name`; 1 when pooled."""
        self._check_index(name, i)
        if self._tensors[name].pooled:
            return 1
        return int(self._starts[name][i + 1] - self._starts[name][i])

    def lengths(self, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Lengths of all stored rows of encoder `name`, int64 [n]."""
        if self._tensors[name].pooled:
            return np.ones(self.num_rows, np.int64)
        return np.diff(self._starts[name])

    def checksums(self, name: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Stored checksums of all rows of encoder `name`, uint64 [n], read-only."""
        return self._checksums[name]

    def checksum(self, name: str, i: int) -> int:
        """Stored checksum of row `i`."""
        self._check_index(name, i)
        return int(self._checksums[name][i])

    def check_row(self, name: str, i: int) -> bool:
        """Whether the bytes of row `i` have its stored checksum; reads the row."""
        digest: int = xxhash.xxh3_64_intdigest(_byte_view(self.row(name, i)))
        return digest == self.checksum(name, i)

    def _check_index(self, name: str, i: int) -> None:
        if not 0 <= i < self.num_rows:
            # Rows are asked for as an index or a rows part says: then one of the two is damaged.
            raise self._damaged(f"row {i} of {name} is asked for, and it has {self.num_rows}")

    def _map(self) -> torch.Tensor:
        """The file as uint8, mapped copy-on-write.

        Torch then has nothing to warn about, and a write to a row is neither a crash nor a damaged
        dataset. Unlike mmap.mmap this keeps no descriptor: thousands of shards can stay open.
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

    def _check_header(self, head: bytes, fingerprint: str, unit: int | None) -> dict[str, Span]:
        """The spans, if `head` is byte for byte the header we would write."""
        first = next(iter(self._tensors))
        try:
            entries = json.loads(head[8:])
            totals = {
                name: _extent(entries[f"text_{name}"])
                for name, tensor in self._tensors.items()
                if not tensor.pooled
            }
            num_rows = _extent(entries[f"text_{first}_xxh3"])
            identity = json.loads(entries["__metadata__"][METADATA_KEY])
            found = {key: identity[key] for key in ("format_version", "fingerprint", "unit")}
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            reason = f"its header is not that of a shard of {sorted(self._tensors)} ({error!r})"
            raise self._damaged(reason) from error
        wanted = {"format_version": FORMAT_VERSION, "fingerprint": fingerprint, "unit": unit}
        for key, value in wanted.items():
            if found[key] != value:
                raise self._damaged(f"it has {key} {found[key]!r}, expected {value!r}")
        spans = layout(list(self._tensors.values()), num_rows, totals)
        expected = header_bytes(fingerprint, unit, spans)
        if expected != head:
            differing = [k for k, v in json.loads(expected[8:]).items() if entries.get(k) != v]
            raise self._damaged(f"its header is not as the writer makes it {differing}")
        return spans

    def _offsets(
        self, name: str, body: torch.Tensor, spans: Mapping[str, Span]
    ) -> np.ndarray[Any, np.dtype[np.int64]]:
        starts = _array(body, spans[f"text_{name}_offsets"], np.dtype("<i8"))
        total = spans[f"text_{name}"].shape[0]
        if starts[0] != 0 or starts[-1] != total or (np.diff(starts) < 0).any():
            raise self._damaged(f"text_{name}_offsets does not rise from 0 to {total}")
        return starts

    def _damaged(self, reason: str) -> VerificationError:
        return VerificationError(f"{self.path} is not the shard it should be: {reason}.")


def _extent(entry: Mapping[str, Any]) -> int:
    """The first extent of a tensor in a header."""
    extent = entry["shape"][0]
    if type(extent) is not int or extent < 0:
        raise ValueError(f"a tensor with {extent!r} rows")
    return extent


def _array(body: torch.Tensor, span: Span, dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    values = body[span.begin : span.end].numpy().view(dtype)
    values.flags.writeable = False
    return values
