"""Shards: written in any order, read back by us and by safetensors; damage is found."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from breaking import flips
from handmade import leftovers, open_below
from safetensors import safe_open

from embed_precompute.errors import InternalError, VerificationError
from embed_precompute.store.records import NULL_UNIT, SHARD, StoredTensor, unit_path
from embed_precompute.store.shards import ShardReader, ShardWriter, open_alone

FINGERPRINT = "f" * 64
CLIP = StoredTensor("clip", "clip", "caption", 5, "bfloat16")
T5 = StoredTensor("t5", "t5", "token", 8, "bfloat16")
TENSORS = (CLIP, T5)
LENGTHS = [3, 1, 4, 2, 6]


def values(unit: int, row: int, length: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    generator = torch.Generator().manual_seed(1000 * unit + row + 5000)
    pooled = torch.randn(5, generator=generator).to(dtype)
    return pooled, torch.randn(length, 8, generator=generator).to(dtype)


def write_shard(
    root: Path, unit: int, reject: Sequence[int] = (), lengths: Sequence[int] = LENGTHS
) -> tuple[Path, list[int]]:
    """The shard's path and the rows in it; the last row is written first."""
    target = unit_path(root, unit, SHARD)
    with ShardWriter(
        target, FINGERPRINT, unit, TENSORS, {"t5": lengths}, num_rows=len(lengths)
    ) as writer:
        for row in reversed(range(len(lengths))):
            writer.write("t5", [row], [values(unit, row, lengths[row])[1]])
        for row in range(len(lengths)):
            if row in reject:
                writer.reject(row)
            else:
                writer.write("clip", [row], [values(unit, row, lengths[row])[0]])
        file, kept = writer.publish()
    return target.with_name(file.name), kept


def test_shard_round_trip(tmp_path: Path) -> None:
    path, kept = write_shard(tmp_path, 7)
    assert kept == [0, 1, 2, 3, 4]
    # offsets, then the checksums of clip and of t5
    head = 8 + int.from_bytes(path.read_bytes()[:8], "little") + 6 * 8 + 2 * 5 * 8
    digest = hashlib.sha256(path.read_bytes()[:head]).hexdigest()
    assert path.name == f"shard-000007-{digest[:16]}.safetensors"
    rows = [values(7, row, length) for row, length in enumerate(LENGTHS)]
    with safe_open(path, framework="pt") as stored:
        assert stored.get_tensor("text_t5_offsets").tolist() == [0, 3, 4, 8, 10, 16]
        assert torch.equal(stored.get_tensor("text_t5"), torch.cat([row[1] for row in rows]))
        assert torch.equal(stored.get_tensor("text_clip"), torch.stack([row[0] for row in rows]))
    reader = ShardReader(path, FINGERPRINT, 7, TENSORS)
    assert (reader.num_rows, reader.head_sha256(), reader.first_damaged()) == (5, digest, None)
    assert open_alone(path).head_sha256() == digest
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
def test_dtypes_and_two_outputs_of_one_encoder(tmp_path: Path, dtype: Any) -> None:
    tensors = (
        StoredTensor("clip", "clip", "caption", 5, dtype),
        StoredTensor("clip_hidden", "clip", "token", 8, dtype),
    )
    pooled, sequence = values(0, 0, 3, getattr(torch, dtype))
    target, lengths = tmp_path / "x.y", {"clip_hidden": [3]}
    with ShardWriter(target, FINGERPRINT, 0, tensors, lengths, num_rows=1) as writer:
        writer.write("clip", [0], [pooled])
        writer.write("clip_hidden", [0], [sequence])
        path = tmp_path / writer.publish()[0].name
    reader = ShardReader(path, FINGERPRINT, 0, tensors)
    assert torch.equal(reader.row("clip", 0), pooled)
    assert torch.equal(reader.row("clip_hidden", 0), sequence)
    with safe_open(path, framework="pt") as stored:
        assert torch.equal(stored.get_tensor("text_clip_hidden"), sequence)


@pytest.mark.parametrize("reject", [(0,), (4,), (1, 2), (0, 2, 4), (0, 1, 2, 3, 4)], ids=str)
def test_rejected_rows_leave_no_trace(tmp_path: Path, reject: tuple[int, ...]) -> None:
    path, kept = write_shard(tmp_path / "a", 7, reject)
    assert kept == [row for row in range(5) if row not in reject]
    lengths = {"t5": [LENGTHS[row] for row in kept]}
    target = unit_path(tmp_path / "b", 7, SHARD)
    with ShardWriter(target, FINGERPRINT, 7, TENSORS, lengths, num_rows=len(kept)) as writer:
        for i, row in enumerate(kept):
            pooled, sequence = values(7, row, LENGTHS[row])
            writer.write("clip", [i], [pooled])
            writer.write("t5", [i], [sequence])
        assert writer.publish()[0].name == path.name
    assert leftovers(tmp_path) == []


def test_a_batch_is_written_as_its_rows_are(tmp_path: Path) -> None:
    """Rows of one length, in any order; neighbours go to the file together."""
    rows = torch.randn(6, 4, 8).bfloat16()
    names = set()
    for order in ([0, 1, 2, 3, 4, 5], [4, 5, 0, 2, 3, 1]):
        target = unit_path(tmp_path, 1, SHARD)
        with ShardWriter(target, FINGERPRINT, 1, (T5,), {"t5": [4] * 6}, num_rows=6) as writer:
            writer.write("t5", order[:4], rows[order[:4]])
            writer.write("t5", order[4:], rows[order[4:]])
            names.add(writer.publish()[0].name)
    (name,) = names
    reader = ShardReader(target.with_name(name), FINGERPRINT, 1, (T5,))
    assert all(torch.equal(reader.row("t5", row), rows[row]) for row in range(6))


def test_a_damaged_file_of_the_name_is_replaced(tmp_path: Path) -> None:
    """The digest in a name does not cover the rows by itself: their checksums are compared."""
    path, _ = write_shard(tmp_path, 7)
    sound = path.read_bytes()
    for damaged in (sound[:-1] + b"\xff", sound[:-1], b""):
        path.write_bytes(damaged)
        assert write_shard(tmp_path, 7)[0] == path
        assert path.read_bytes() == sound
    before = path.stat().st_ino
    write_shard(tmp_path, 7)
    assert path.stat().st_ino == before


def test_shard_without_rows(tmp_path: Path) -> None:
    path, kept = write_shard(tmp_path, NULL_UNIT, lengths=[])
    assert kept == []
    assert path.parent == tmp_path
    assert ShardReader(path, FINGERPRINT, NULL_UNIT, TENSORS).num_rows == 0
    with safe_open(path, framework="pt") as stored:
        assert stored.get_tensor("text_t5_offsets").tolist() == [0]
        assert tuple(stored.get_tensor("text_clip").shape) == (0, 5)
        assert tuple(stored.get_tensor("text_t5").shape) == (0, 8)


def test_writer_refuses_what_would_be_wrong(tmp_path: Path) -> None:
    target = tmp_path / "x.y"
    with ShardWriter(target, FINGERPRINT, 0, TENSORS, {"t5": [3]}, num_rows=1) as writer:
        pooled, sequence = values(0, 0, 3)
        for bad in (sequence[:2], sequence.float(), sequence.T.contiguous().T, pooled):
            with pytest.raises(InternalError, match="row 0 of t5"):
                writer.write("t5", [0], [bad])
        writer.write("t5", [0], [sequence])
        with pytest.raises(InternalError, match="row 0 of clip was not written"):
            writer.publish()
    with pytest.raises(InternalError, match="2 lengths of t5, not 1"):
        ShardWriter(target, FINGERPRINT, 0, TENSORS, {"t5": [3, 1]}, num_rows=1)
    assert list(tmp_path.iterdir()) == []


def test_reader_neither_warns_nor_writes_nor_keeps_descriptors(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, 0)
    before = path.read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = ShardReader(path, FINGERPRINT, 0, TENSORS)
        row = reader.row("t5", 2)
    assert open_below(tmp_path) == []
    assert row.data_ptr() == reader.row("t5", 2).data_ptr()
    del reader
    row.zero_()
    assert path.read_bytes() == before


def test_reader_refuses_other_shards(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, 7)
    wider = (CLIP, StoredTensor("t5", "t5", "token", 9, "bfloat16"))
    renamed = StoredTensor("t6", "t6", "token", 8, "bfloat16")
    for fingerprint, unit, tensors, message in (
        ("e" * 64, 7, TENSORS, "fingerprint"),
        (FINGERPRINT, 8, TENSORS, "unit 7, expected 8"),
        (FINGERPRINT, NULL_UNIT, TENSORS, "unit 7, expected None"),
        (FINGERPRINT, 7, TENSORS[:1], "header"),
        (FINGERPRINT, 7, wider, "text_t5"),
        (FINGERPRINT, 7, (CLIP, renamed), "text_t6"),
        (FINGERPRINT, 7, (*TENSORS, renamed), "text_t6"),
    ):
        with pytest.raises(VerificationError, match=message) as caught:
            ShardReader(path, fingerprint, unit, tensors)
        assert str(path) in str(caught.value)
    with pytest.raises(VerificationError, match="missing"):
        ShardReader(tmp_path / "absent", FINGERPRINT, 7, TENSORS)


def test_reader_finds_every_damage(tmp_path: Path) -> None:
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
    for _ in flips(bad, whole, range(offsets * 8, len(whole) * 8, 5)):
        reader = ShardReader(bad, FINGERPRINT, 7, TENSORS)
        places = [(name, row) for name in ("clip", "t5") for row in range(5)]
        (damaged,) = [place for place in places if not reader.check_row(*place)]
        assert reader.first_damaged() == open_alone(bad).first_damaged() == damaged
