"""The head of a committed shard: lengths and checksums of its rows, without their values.

Guarantees: the file has exactly the size and the header that its record implies; what is wrong is
said as `ShardReader` says it.
Costs: one small read; 16 bytes per stored row and tensor. No mapping is made, which on a network
file system is a round trip less, and for many small shards most of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embed_precompute.errors import VerificationError
from embed_precompute.store.layout import data_bytes, header_bytes, layout
from embed_precompute.store.records import StoredTensor
from embed_precompute.store.sealed import FileStart, read_start
from embed_precompute.store.shards import ShardReader

Array = np.ndarray[Any, np.dtype[Any]]


class ShardHead:
    """Lengths and checksums of the rows of unit `unit`, as many as `record` says there are.

    `start` has the first bytes of the file; where they do not reach, more are read.
    VerificationError naming the file that is not as the record has it.
    """

    def __init__(
        self,
        path: Path,
        start: FileStart,
        fingerprint: str,
        unit: int,
        tensors: Sequence[StoredTensor],
        record: Mapping[str, Any],
    ) -> None:
        self.num_rows: int = record["num_stored"]
        totals = {name: sums["stored_tokens"] for name, sums in record["encoders"].items()}
        spans = layout(tensors, self.num_rows, totals)
        expected = header_bytes(fingerprint, unit, spans)
        size = len(expected) + data_bytes(spans)
        if start.size != size or size != record["files"]["shard"]["bytes"]:
            raise _explained(path, fingerprint, unit, tensors, record)
        end = max(span.end for key, span in spans.items() if key.endswith(("_offsets", "_xxh3")))
        end += len(expected)
        head = start.payload if len(start.payload) >= end else _read(path, end)
        if len(head) < end or not head.startswith(expected):
            raise _explained(path, fingerprint, unit, tensors, record)
        self.lengths: dict[str, Array] = {}
        """Per encoder the vectors of each stored row, int64 [n]; ones when pooled."""
        self.checksums: dict[str, Array] = {}
        """Per encoder the stored checksums, uint64 [n]."""
        for tensor in tensors:
            begin = len(expected) + spans[f"text_{tensor.name}_xxh3"].begin
            self.checksums[tensor.name] = np.frombuffer(head, "<u8", self.num_rows, begin)
            if tensor.pooled:
                self.lengths[tensor.name] = np.ones(self.num_rows, np.int64)
                continue
            begin = len(expected) + spans[f"text_{tensor.name}_offsets"].begin
            starts = np.frombuffer(head, "<i8", self.num_rows + 1, begin)
            lengths = starts[1:] - starts[:-1]
            if starts[0] != 0 or starts[-1] != totals[tensor.name] or (lengths < 0).any():
                raise _explained(path, fingerprint, unit, tensors, record)
            self.lengths[tensor.name] = lengths


def _read(path: Path, end: int) -> bytes:
    try:
        return read_start(path, end).payload
    except OSError as error:
        raise VerificationError(
            f"{path} cannot be read, though its unit is committed: {error.strerror}."
        ) from error


def _explained(
    path: Path,
    fingerprint: str,
    unit: int,
    tensors: Sequence[StoredTensor],
    record: Mapping[str, Any],
) -> VerificationError:
    """What is wrong with a shard that is not as its record says."""
    size, expected = path.stat().st_size, record["files"]["shard"]["bytes"]
    if size != expected:
        return VerificationError(f"{path}: bytes is {size!r}, expected {expected!r}.")
    try:
        reader = ShardReader(path, fingerprint, unit, tensors)
    except VerificationError as error:
        return error
    found = {tensor.name: int(reader.lengths(tensor.name).sum()) for tensor in tensors}
    wanted = {tensor.name: record["encoders"][tensor.name]["stored_tokens"] for tensor in tensors}
    return VerificationError(
        f"{path}: it has {reader.num_rows} rows of {found} vectors, expected "
        f"{record['num_stored']} of {wanted}, as its record says."
    )
