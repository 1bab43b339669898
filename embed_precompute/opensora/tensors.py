"""Embeddings as Open-Sora reads them: one `.pt` file per tensor and sample.

Guarantees: a file under its final name is whole (staged, synced, linked) and holds one tensor with
storage of its own, never a slice that drags its shard along; a unit's record is published only
after every file of it was loaded back, as Open-Sora loads it, and compared bit for bit with the row
of the shard, which was checked against its checksum. A rerun skips units with a record, and
whatever files are already there and equal.
Costs: each file is serialised once and read back once (from the page cache, as a rule); one unit's
files are in flight on `THREADS` threads; three folder levels of at most 1,000 entries each.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from embed_precompute.documents import digest_of
from embed_precompute.errors import StorageError, VerificationError
from embed_precompute.opensora.source import Entry
from embed_precompute.opensora.text_pair import TextPair
from embed_precompute.store.check import CheckedUnit
from embed_precompute.store.commit import publish_bytes, replace_bytes
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import FORMAT_VERSION, document_bytes, read_json

THREADS = 8
FILES_PER_FOLDER = 1000
KINDS = ("t5", "clip")
SPARE_BYTES = 64 << 20
"""Left free for the table and records."""


@dataclass
class Written:
    """What `TensorFiles` did."""

    files: int = 0
    bytes: int = 0
    skipped_units: int = 0
    """Units that an earlier run had written and verified."""


def tensor_path(kind: str, number: int) -> str:
    """Relative path of sample `number`'s file, the same whatever subset is exported."""
    thousands = number // FILES_PER_FOLDER
    folder = f"{thousands // 1000:03d}/{thousands % 1000:03d}"
    return f"{kind}/{folder}/{number:09d}.pt"


def null_path(kind: str) -> str:
    """Relative path of what stands in for samples without an embedding."""
    return f"{kind}/null.pt"


def pt_bytes(values: torch.Tensor) -> bytes:
    """`values` as torch.save writes it, with a storage of exactly its own bytes."""
    file = io.BytesIO()
    torch.save(values.detach().clone(memory_format=torch.contiguous_format), file)
    return file.getvalue()


def load_pt(path: Path) -> torch.Tensor:
    """The tensor in a file, by the call Open-Sora makes; VerificationError when there is none."""
    try:
        loaded = torch.load(path, map_location=torch.device("cpu"), weights_only=True)
    except Exception as error:  # torch raises nearly anything for a damaged file
        raise VerificationError(
            f"{path} cannot be loaded: {error}. Remove it, run again."
        ) from error
    if not isinstance(loaded, torch.Tensor):
        raise VerificationError(f"{path} holds {type(loaded).__name__}: expected a tensor.")
    return loaded


def check_pt(path: Path, expected: torch.Tensor, what: str) -> None:
    """VerificationError unless the file holds exactly `expected`, and no other storage."""
    found = load_pt(path)
    same = (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.untyped_storage().nbytes() == expected.nbytes
        and torch.equal(_as_bytes(found), _as_bytes(expected))
    )
    if not same:
        raise VerificationError(
            f"{path} holds {found.dtype!s} {list(found.shape)}, not the embedding of {what} "
            f"({expected.dtype} {list(expected.shape)}, bit for bit). Remove it and run again."
        )


def _as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().reshape(-1).view(torch.uint8)


def replace_pt(path: Path, values: torch.Tensor, what: str) -> None:
    """Write a derived file (a null embedding) in place of what is there, and check it."""
    replace_bytes(path, pt_bytes(values))
    check_pt(path, values, what)


class TensorFiles:
    """Writes and verifies the files of one export, unit by unit."""

    def __init__(self, out: Path, plan: Plan, pair: TextPair, recheck: bool) -> None:
        self.written = Written()
        self._out, self._plan, self._pair, self._recheck = out, plan, pair, recheck

    def record_path(self, unit: int) -> Path:
        return self._out / "records" / f"{unit // 1000:03d}" / f"unit-{unit:06d}.json"

    def write_unit(self, unit: CheckedUnit, entries: Sequence[Entry]) -> None:
        """The files of a unit's entries that have an embedding, verified, then its record."""
        stored = [entry for entry in entries if entry.stored is not None]
        number = unit.record.unit
        path = self.record_path(number)
        names = digest_of([entry.number for entry in stored])
        if not self._recheck and self._is_done(path, names, stored):
            self.written.skipped_units += 1
            return
        with ThreadPoolExecutor(THREADS, "export") as pool:
            sizes = list(pool.map(lambda entry: self._write(unit, entry), stored))
        record: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "kind": "export_unit",
            "plan": self._plan.plan_id,
            "unit": number,
            "files": len(KINDS) * len(stored),
            "bytes": sum(sizes),
            "samples_sha256": names,
        }
        replace_bytes(path, document_bytes(record))
        self.written.files += record["files"]
        self.written.bytes += record["bytes"]

    def _is_done(self, path: Path, names: str, stored: Sequence[Entry]) -> bool:
        """Whether an earlier run verified exactly these files, and all are there in full size."""
        try:
            record = read_json(path, "export_unit")
        except (FileNotFoundError, VerificationError):
            return False
        if record["plan"] != self._plan.plan_id or record["samples_sha256"] != names:
            return False
        total = 0
        for entry in stored:
            for kind in KINDS:
                try:
                    total += os.stat(self._out / tensor_path(kind, entry.number)).st_size
                except OSError:
                    return False
        if total != record["bytes"]:
            return False
        self.written.files += record["files"]
        self.written.bytes += total
        return True

    def _write(self, unit: CheckedUnit, entry: Entry) -> int:
        """Both files of one sample, read back; their bytes."""
        assert entry.stored is not None
        size = 0
        for kind, values in self._values(unit, entry).items():
            path = self._out / tensor_path(kind, entry.number)
            payload = pt_bytes(values)
            what = f"sample {entry.sample_id!r}"
            ours = publish_bytes(path, payload)
            check_pt(path, values, what)
            # Another version of torch may have written the same tensor with other bytes.
            size += len(payload) if ours else path.stat().st_size
        return size

    def _values(self, unit: CheckedUnit, entry: Entry) -> dict[str, torch.Tensor]:
        assert entry.stored is not None
        names = {"t5": self._pair.t5, "clip": self._pair.clip}
        for name in names.values():
            if not unit.shard.check_row(name, entry.stored):
                raise VerificationError(
                    f"{unit.shard.path} is damaged: text_{name} of sample {entry.sample_id!r} does "
                    "not have its checksum. `embed-precompute verify` checks all of it."
                )
        values = {kind: unit.shard.row(name, entry.stored) for kind, name in names.items()}
        return {**values, "t5": self._pair.sequence(values["t5"])}


def require_room(out: Path, bytes_per_sample: int, num_samples: int) -> None:
    """StorageError before the first file when space or inodes cannot hold what is still to come."""
    space = os.statvfs(out)
    needed = bytes_per_sample * num_samples + SPARE_BYTES
    free = space.f_bavail * space.f_frsize
    if needed > free:
        raise StorageError(
            f"{out}: {num_samples:,} samples need about {needed:,} bytes, {free:,} are free on its "
            "file system. Free some, export a subset (--limit, --ids), or train from the shards "
            "directly with embed_precompute.opensora.dataset, which needs no copy."
        )
    inodes = num_samples * len(KINDS)
    if space.f_files and inodes > space.f_favail:
        raise StorageError(
            f"{out}: {inodes:,} files are needed, its file system has {space.f_favail:,} inodes "
            "free. Train from the shards directly with embed_precompute.opensora.dataset instead."
        )
