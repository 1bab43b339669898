"""A hand-made dataset, and faults, for the tests of the store."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from embed_precompute.samples import Status
from embed_precompute.store.commit import digest_file, publish_bytes
from embed_precompute.store.manifest import (
    StoredSample,
    finalize,
    null_paths,
    rows_digest,
    rows_part_bytes,
    unit_paths,
)
from embed_precompute.store.sealed import seal
from embed_precompute.store.shards import ShardWriter, StoredTensor

FINGERPRINT = "f" * 64
ENVIRONMENT = {"torch": "x", "device": "cpu"}
TENSORS = (StoredTensor("clip", True, 5, "bfloat16"), StoredTensor("t5", False, 8, "bfloat16"))
SPEC: dict[str, Any] = {
    "format_version": 1,
    "encoders": {"clip": {"pooled": True, "dim": 5}, "t5": {"pooled": False, "dim": 8}},
    "output": {"dtype": "bfloat16", "codec": "raw"},
}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".tmp-*")]


def flips(path: Path, payload: bytes, bits: Iterable[int]) -> Iterator[int]:
    """`path` with one bit of `payload` flipped, for each of `bits`."""
    path.write_bytes(payload)
    with path.open("r+b", buffering=0) as file:
        for bit in bits:
            os.pwrite(file.fileno(), bytes([payload[bit // 8] ^ 1 << bit % 8]), bit // 8)
            yield bit
            os.pwrite(file.fileno(), payload[bit // 8 : bit // 8 + 1], bit // 8)


def raiser(code: int) -> Any:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    return fail


def fail_at(patch: pytest.MonkeyPatch, name: str, n: int) -> list[int]:
    """The n-th call of os.<name> finds the disk full; below 0 once that has happened."""
    original, left = getattr(os, name), [n]

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args, **kwargs)

    patch.setattr(os, name, call)
    return left


def values(unit: int | None, row: int, length: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    generator = torch.Generator().manual_seed(1000 * (-1 if unit is None else unit) + row + 5000)
    pooled = torch.randn(5, generator=generator).to(dtype)
    return pooled, torch.randn(length, 8, generator=generator).to(dtype)


LENGTHS = [3, 1, 4, 2, 6]


def write_shard(
    root: Path, unit: int | None, reject: tuple[int, ...] = (), lengths: list[int] = LENGTHS
) -> tuple[Path, Any]:
    path = null_paths(root).shard if unit is None else unit_paths(root, unit).shard
    with ShardWriter(
        path, FINGERPRINT, unit, TENSORS, {"t5": lengths}, num_rows=len(lengths)
    ) as writer:
        for row in reversed(range(len(lengths))):
            writer.write("t5", row, values(unit, row, lengths[row])[1])
        for row in range(len(lengths)):
            if row in reject:
                writer.reject(row)
            else:
                writer.write("clip", row, values(unit, row, lengths[row])[0])
        file = writer.finish()
        writer.publish()
    return path, file


UNIT_ROWS = 4


def samples_of(unit: int) -> list[StoredSample]:
    """Four samples: two that share a stored row, a null text and one more."""
    first = unit * UNIT_ROWS
    tokens, no = {"clip": 4, "t5": 2 + unit}, {"clip": False, "t5": False}

    def sample(k: int, index: int, **more: Any) -> StoredSample:
        lengths = {"clip": 1, "t5": unit_lengths(unit)[index]}
        text = f"caption {first} é"
        return StoredSample(
            f"id-{first + k}", first + k, Status.OK, None, index, tokens, lengths, no, text
        )

    null = StoredSample(
        f"id-{first + 1}", first + 1, Status.NULL_TEXT, "text is null", None, {}, {}, {}, None
    )
    return [sample(0, 0), null, sample(2, 0), sample(3, 1)]


def unit_lengths(unit: int) -> list[int]:
    return [2 + unit, 3]


def file_entry(path: Path) -> dict[str, Any]:
    stored = digest_file(path)
    return {"name": stored.name, "bytes": stored.bytes, "sha256": stored.sha256}


def make_plan(root: Path, num_units: int) -> None:
    body = {
        "format_version": 1,
        "kind": "plan",
        "fingerprint": FINGERPRINT,
        "plan": "a" * 64,
        "spec": SPEC,
        "num_rows": num_units * UNIT_ROWS,
        "num_samples": num_units * UNIT_ROWS,
        "rows_per_unit": UNIT_ROWS,
        "num_units": num_units,
    }
    publish_bytes(root / "plan.json", seal(body))


def common(kind: str) -> dict[str, Any]:
    return {
        "format_version": 1,
        "kind": kind,
        "fingerprint": FINGERPRINT,
        "plan": "a" * 64,
        "environment": ENVIRONMENT,
    }


def make_null(root: Path) -> None:
    path, _ = write_shard(root, None, lengths=[2])
    encoders = {"clip": {"length": 1, "tokens": 2}, "t5": {"length": 2, "tokens": 2}}
    record = {**common("null"), "encoders": encoders, "files": {"shard": file_entry(path)}}
    publish_bytes(null_paths(root).record, seal(record))


def make_unit(root: Path, unit: int, samples: list[StoredSample] | None = None) -> None:
    samples = samples_of(unit) if samples is None else samples
    paths = unit_paths(root, unit)
    write_shard(root, unit, lengths=unit_lengths(unit))
    publish_bytes(paths.rows, rows_part_bytes(unit, ["clip", "t5"], samples))
    ok = [sample for sample in samples if sample.status is Status.OK]
    record = {
        **common("unit"),
        "unit": unit,
        "first_row": unit * UNIT_ROWS,
        "num_rows": UNIT_ROWS,
        "num_samples": len(samples),
        "num_stored": 2,
        "status": {s.label: sum(sample.status is s for sample in samples) for s in Status},
        "rows_sha256": rows_digest(samples),
        "encoders": {
            name: {
                "tokens": sum(sample.tokens[name] for sample in ok),
                "truncated": sum(sample.truncated[name] for sample in ok),
                "stored_tokens": sum(unit_lengths(unit)) if name == "t5" else 2,
            }
            for name in ("clip", "t5")
        },
        "files": {"shard": file_entry(paths.shard), "rows": file_entry(paths.rows)},
        "adopted_shard": False,
    }
    publish_bytes(paths.record, seal(record))


def make_units(root: Path, num_units: int) -> None:
    make_plan(root, num_units)
    make_null(root)
    for unit in range(num_units):
        make_unit(root, unit)


def make_dataset(root: Path, num_units: int = 3) -> dict[str, Any]:
    make_units(root, num_units)
    return finalize(root)


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(root)): (path.stat().st_ino, path.read_bytes())
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
