"""Where everything is in a shard: its header and the spans of its tensors, from counts alone.

Guarantees: pure functions of fingerprint, unit, tensors and row counts; a shard has exactly one
right header, so a reader compares bytes and need not trust what a file says of itself.
Costs: a few dozen microseconds of JSON.

Every number is little-endian, as on every machine torch runs on.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from embed_precompute.documents import canonical_json
from embed_precompute.errors import InputError
from embed_precompute.store.records import StoredTensor
from embed_precompute.store.sealed import FORMAT_VERSION

METADATA_KEY = "embed_precompute"
MAX_HEADER_BYTES = 4 << 20
ALIGNMENT = 64

TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
# name in a safetensors header, bytes per element
CODES = {
    "bfloat16": ("BF16", 2),
    "float16": ("F16", 2),
    "float32": ("F32", 4),
    "int64": ("I64", 8),
    "uint64": ("U64", 8),
}


@dataclass(frozen=True)
class Span:
    """A tensor's place in the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def layout(
    tensors: Sequence[StoredTensor], num_rows: int, totals: Mapping[str, int]
) -> dict[str, Span]:
    """Every tensor of a shard in file order; `totals`: rows of each sequence tensor."""
    by_name = sorted(tensors, key=lambda tensor: tensor.name)
    parts: list[tuple[str, str, tuple[int, ...]]] = []
    parts += [(f"text_{t.name}_offsets", "int64", (num_rows + 1,)) for t in by_name if not t.pooled]
    parts += [(f"text_{t.name}_xxh3", "uint64", (num_rows,)) for t in by_name]
    parts += [(f"text_{t.name}", t.dtype, (num_rows, t.dim)) for t in by_name if t.pooled]
    parts += [(f"text_{t.name}", t.dtype, (totals[t.name], t.dim)) for t in by_name if not t.pooled]
    spans: dict[str, Span] = {}
    position = 0
    for key, dtype, shape in parts:
        if key in spans:
            raise InputError(f"two encoders would both make tensor {key}: rename one of them.")
        size = CODES[dtype][1]
        for extent in shape:
            size *= extent
        spans[key] = Span(dtype, shape, position, position + size)
        position += size
    return spans


def header_bytes(fingerprint: str, unit: int | None, spans: Mapping[str, Span]) -> bytes:
    """Length prefix and JSON, padded with spaces: the data section starts at a multiple of 64."""
    identity = {"fingerprint": fingerprint, "format_version": FORMAT_VERSION, "unit": unit}
    entries: dict[str, Any] = {"__metadata__": {METADATA_KEY: canonical_json(identity).decode()}}
    for key, span in spans.items():
        entries[key] = {
            "dtype": CODES[span.dtype][0],
            "shape": list(span.shape),
            "data_offsets": [span.begin, span.end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def data_bytes(spans: Mapping[str, Span]) -> int:
    return max(span.end for span in spans.values())
