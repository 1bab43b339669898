"""Rows parts: every sample comes back, damage is a VerificationError."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from breaking import flips
from handmade import columns_of, make_plan

from embed_precompute.documents import canonical_json
from embed_precompute.errors import VerificationError
from embed_precompute.samples import Status
from embed_precompute.store import rows
from embed_precompute.store.rows import StoredSample, iter_batches, read_samples, rows_part_bytes

TENSORS = make_plan(1, 1).tensors
FIRST = StoredSample(
    "id-0", 12, Status.OK, None, 0, {"clip": 4, "t5": 5}, {"clip": False, "t5": True},
    {"clip": 1, "t5": 5}, "caption 12 é",
)  # fmt: skip
SAMPLES = [
    FIRST,
    StoredSample("id-1", 13, Status.NULL_TEXT, "text is null"),
    StoredSample(**{**vars(FIRST), "sample_id": "id-2", "row": 14}),
    StoredSample(**{**vars(FIRST), "sample_id": "id-3", "row": 15, "index": 1, "text": "x"}),
]


def test_rows_part_is_split_by_rows_and_by_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "ROW_GROUP_ROWS", 3)
    monkeypatch.setattr(rows, "READ_TEXT_ROWS", 1)
    path = tmp_path / "x"
    for text_bytes, groups in ((64 << 20, 2), (1, 4)):
        monkeypatch.setattr(rows, "ROW_GROUP_TEXT_BYTES", text_bytes)
        path.write_bytes(rows_part_bytes(3, TENSORS, columns_of(SAMPLES)))
        assert pq.ParquetFile(path).metadata.num_row_groups == groups
        assert list(read_samples(path, TENSORS)) == SAMPLES


def test_damaged_rows_part(tmp_path: Path) -> None:
    whole = rows_part_bytes(3, TENSORS, columns_of(SAMPLES))
    path = tmp_path / "x"
    for _ in flips(path, whole, range(0, len(whole) * 8, 13)):
        with contextlib.suppress(VerificationError):  # anything else is a failure here
            list(read_samples(path, TENSORS))
    path.write_bytes(rows_part_bytes(3, TENSORS[:1], columns_of(SAMPLES)))
    with pytest.raises(VerificationError, match="has columns"):
        list(read_samples(path, TENSORS))
    path.write_bytes(whole)
    with pytest.raises(VerificationError, match="has 4 rows: expected 5"):
        list(iter_batches(path, TENSORS, num_rows=5))
    path.unlink()
    with pytest.raises(VerificationError, match="is missing"):
        list(read_samples(path, TENSORS))


def test_a_digested_row_is_canonical_json() -> None:
    every = "".join(map(chr, [*range(0x100), 0x2028, 0xFEFF, 0x1F600, 0xFFFF]))
    for sample_id, text in (("a", None), (every, every), ('"\\', ""), ("null", "null")):
        expected = canonical_json([sample_id, text]) + b"\n"
        assert rows.digested_row(sample_id, text) == expected
