"""Shards: written in any order, read back by us and by safetensors; damage is found."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors import safe_open
from store_case import (
    FINGERPRINT,
    LENGTHS,
    TENSORS,
    flips,
    leftovers,
    values,
    write_shard,
)

from embed_precompute.errors import (
    InputError,
    InternalError,
    VerificationError,
)
from embed_precompute.store import commit
from embed_precompute.store.commit import (
    Outcome,
    digest_file,
)
from embed_precompute.store.shards import ShardReader, ShardWriter, StoredTensor


def test_shard_round_trip(tmp_path: Path) -> None:
    path, file = write_shard(tmp_path, 7)
    assert digest_file(path) == commit.StoredFile(file.name, file.bytes, file.sha256)
    assert file.kept == (0, 1, 2, 3, 4)
    raw = path.read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0
    rows = [values(7, row, length) for row, length in enumerate(LENGTHS)]
    with safe_open(path, framework="pt") as stored:
        metadata = json.loads(stored.metadata()["embed_precompute"])
        assert metadata == {"fingerprint": FINGERPRINT, "format_version": 1, "unit": 7}
        assert stored.get_tensor("text_t5_offsets").tolist() == [0, 3, 4, 8, 10, 16]
        assert torch.equal(stored.get_tensor("text_t5"), torch.cat([row[1] for row in rows]))
        assert torch.equal(stored.get_tensor("text_clip"), torch.stack([row[0] for row in rows]))
        for i, name in enumerate(("clip", "t5")):
            sums = stored.get_tensor(f"text_{name}_xxh3")
            assert sums.dtype == torch.uint64
            expected = [
                xxhash.xxh3_64_intdigest(row[i].view(torch.int16).numpy().tobytes()) for row in rows
            ]
            assert sums.tolist() == expected
    reader = ShardReader(path, FINGERPRINT, 7, TENSORS)
    assert reader.num_rows == 5
    for row, length in enumerate(LENGTHS):
        for i, name in enumerate(("clip", "t5")):
            assert torch.equal(reader.row(name, row), rows[row][i])
            assert reader.row(name, row).dtype == torch.bfloat16
            assert reader.check_row(name, row)
        assert reader.length("t5", row) == length
        assert reader.length("clip", row) == 1
    for row in (-1, 5):
        with pytest.raises(VerificationError, match="is asked for"):
            reader.row("t5", row)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_shard_dtypes(tmp_path: Path, dtype: str) -> None:
    tensors = (StoredTensor("a", False, 8, dtype), StoredTensor("b", True, 5, dtype))
    pooled, sequence = values(0, 0, 3, getattr(torch, dtype))
    with ShardWriter(tmp_path / "x", FINGERPRINT, 0, tensors, {"a": [3]}, num_rows=1) as writer:
        writer.write("a", 0, sequence)
        writer.write("b", 0, pooled)
        writer.finish()
        assert writer.publish() is Outcome.PUBLISHED
    reader = ShardReader(tmp_path / "x", FINGERPRINT, 0, tensors)
    assert torch.equal(reader.row("a", 0), sequence)
    assert torch.equal(reader.row("b", 0), pooled)
    with safe_open(tmp_path / "x", framework="pt") as stored:
        assert torch.equal(stored.get_tensor("text_a"), sequence)


@pytest.mark.parametrize("reject", [(0,), (4,), (1, 2), (0, 2, 4), (0, 1, 2, 3, 4)], ids=str)
def test_rejected_rows_leave_no_trace(
    tmp_path: Path, reject: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embed_precompute.store.shards.PIECE_BYTES", 24)
    path, file = write_shard(tmp_path / "a", 7, reject)
    kept = [row for row in range(5) if row not in reject]
    assert list(file.kept) == kept
    other = tmp_path / "b"
    tensors = {"t5": [LENGTHS[row] for row in kept]}
    with ShardWriter(other, FINGERPRINT, 7, TENSORS, tensors, num_rows=len(kept)) as writer:
        for i, row in enumerate(kept):
            pooled, sequence = values(7, row, LENGTHS[row])
            writer.write("clip", i, pooled)
            writer.write("t5", i, sequence)
        writer.finish()
        writer.publish()
    assert path.read_bytes() == other.read_bytes()
    assert leftovers(tmp_path) == []


def test_shard_without_rows(tmp_path: Path) -> None:
    path, file = write_shard(tmp_path, 0, lengths=[])
    assert file.kept == ()
    assert ShardReader(path, FINGERPRINT, 0, TENSORS).num_rows == 0
    with safe_open(path, framework="pt") as stored:
        assert stored.get_tensor("text_t5_offsets").tolist() == [0]
        assert tuple(stored.get_tensor("text_clip").shape) == (0, 5)
        assert tuple(stored.get_tensor("text_t5").shape) == (0, 8)
    pooled_only = TENSORS[:1]
    with ShardWriter(tmp_path / "x", FINGERPRINT, 0, pooled_only, {}, num_rows=0) as writer:
        writer.finish()
        writer.publish()
    assert ShardReader(tmp_path / "x", FINGERPRINT, 0, pooled_only).num_rows == 0


def test_writer_refuses_what_would_be_wrong(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "x", FINGERPRINT, 0, TENSORS, {"t5": [3]}, num_rows=1) as writer:
        pooled, sequence = values(0, 0, 3)
        for bad in (sequence[:2], sequence.float(), sequence.T.contiguous().T, pooled):
            with pytest.raises(InternalError, match="row 0 of t5"):
                writer.write("t5", 0, bad)
        writer.write("t5", 0, sequence)
        with pytest.raises(InternalError, match="row 0 of clip was not written"):
            writer.finish()
    with pytest.raises(InternalError, match="2 lengths of t5, not 1"):
        ShardWriter(tmp_path / "x", FINGERPRINT, 0, TENSORS, {"t5": [3, 1]}, num_rows=1)
    clash = (StoredTensor("a", False, 8, "float32"), StoredTensor("a_xxh3", True, 8, "float32"))
    with pytest.raises(InputError, match="text_a_xxh3: rename"):
        ShardWriter(tmp_path / "x", FINGERPRINT, 0, clash, {"a": [3]}, num_rows=1)
    assert list(tmp_path.iterdir()) == []


def test_reader_neither_warns_nor_writes_nor_keeps_descriptors(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, 0)
    before = path.read_bytes()
    descriptors = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = ShardReader(path, FINGERPRINT, 0, TENSORS)
        row = reader.row("t5", 2)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert row.data_ptr() == reader.row("t5", 2).data_ptr()
    del reader
    row.zero_()
    assert path.read_bytes() == before


def test_reader_refuses_other_shards(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, 7)
    wider = (TENSORS[0], StoredTensor("t5", False, 9, "bfloat16"))
    renamed = (TENSORS[0], StoredTensor("t6", False, 8, "bfloat16"))
    for fingerprint, unit, tensors, message in (
        ("e" * 64, 7, TENSORS, "fingerprint"),
        (FINGERPRINT, 8, TENSORS, "unit 7, expected 8"),
        (FINGERPRINT, None, TENSORS, "unit 7, expected None"),
        (FINGERPRINT, 7, TENSORS[:1], "header"),
        (FINGERPRINT, 7, wider, "text_t5"),
        (FINGERPRINT, 7, renamed, "text_t6"),
        (FINGERPRINT, 7, (*TENSORS, renamed[1]), "text_t6"),
    ):
        with pytest.raises(VerificationError, match=message) as caught:
            ShardReader(path, fingerprint, unit, tensors)
        assert str(path) in str(caught.value)
    with pytest.raises(VerificationError, match="missing"):
        ShardReader(tmp_path / "absent", FINGERPRINT, 7, TENSORS)


def test_reader_finds_every_damage_outside_the_values(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, 7)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    offsets = head + 6 * 8
    bad = tmp_path / "bad"
    payloads = [whole[:end] for end in (0, 4, 8, head - 1, head, len(whole) - 1)]
    for payload in [*payloads, whole + b"\0", whole * 2, b"\xff" * 100, bytes(100)]:
        bad.write_bytes(payload)
        with pytest.raises(VerificationError, match=str(bad)):
            ShardReader(bad, FINGERPRINT, 7, TENSORS)
    accepted = []
    for bit in flips(bad, whole, range(offsets * 8)):
        with contextlib.suppress(VerificationError):  # anything else is a failure here
            reader = ShardReader(bad, FINGERPRINT, 7, TENSORS)
            accepted.append(bit)
            # An inner offset may move and still rise: then the row checksums tell.
            assert not all(reader.check_row("t5", row) for row in range(5))
    assert accepted
    assert min(accepted) >= head * 8


def test_row_checksums_find_every_flip_in_values(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, 7)
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    bad = tmp_path / "bad"
    for _ in flips(bad, whole, range((head + 6 * 8) * 8, len(whole) * 8, 5)):
        reader = ShardReader(bad, FINGERPRINT, 7, TENSORS)
        assert sum(not reader.check_row(n, i) for n in ("t5", "clip") for i in range(5)) == 1
