"""The index: what is looked up is what the units hold, and a damaged array is refused."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from handmade import paths_of, write_dataset

from embed_precompute.errors import IncompleteError, VerificationError
from embed_precompute.store import index
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.plan import read_plan
from embed_precompute.store.shards import ShardReader

TEXTS = ["a b", None, "a b", "c", "d e f", None, "d e f", "c", "g", None, "g", "h i"]


def test_index(tmp_path: Path) -> None:
    write_dataset(tmp_path, TEXTS, samples_per_shard=4)
    plan, opened = read_plan(tmp_path), DatasetIndex(tmp_path)
    assert len(opened) == opened.num_samples == 12
    assert opened.tensors == ("clip", "t5")
    assert opened.status.tolist() == [0, 1, 0, 0] * 3
    assert opened.shard.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert opened.index.tolist() == [0, -1, 0, 1] * 3
    assert opened.lengths["t5"].tolist() == [3, 0, 3, 2, 4, 0, 4, 2, 2, 0, 2, 3]
    assert opened.lengths["clip"].tolist() == [1, 0, 1, 1] * 3
    assert opened.tokens["t5"].tolist() == opened.lengths["t5"].tolist()
    assert opened.tokens["clip"].tolist() == opened.lengths["t5"].tolist()
    assert opened.ok.tolist() == [0, 2, 3, 4, 6, 7, 8, 10, 11]
    assert opened.shards.tolist() == [[0, 4, 2], [4, 4, 2], [8, 4, 2]]
    for sample in opened.ok.tolist():
        unit = int(opened.shard[sample])
        path = opened.shard_path(unit)
        assert path == paths_of(tmp_path, unit).shard
        reader = ShardReader(path, plan.fingerprint, unit, plan.tensors)
        for name in opened.tensors:
            expected = int(reader.checksums(name)[int(opened.index[sample])])
            assert int(opened.checksums[name][sample]) == expected
    assert opened.checksums["t5"][1] == 0
    for unit in (-1, 3):
        with pytest.raises(VerificationError, match=f"holds unit {unit}"):
            opened.shard_path(unit)
    for sample in range(12):
        assert opened.sample_id(sample) == f"s{sample}"
        assert opened.find(f"s{sample}") == sample
    assert opened.find("s12") is None
    assert opened.find("") is None
    with pytest.raises(IndexError):
        opened.sample_id(-1)
    assert pickle.loads(pickle.dumps(opened)).find("s7") == 7


def test_index_with_hash_collisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def collide(sample_id: bytes) -> int:
        return (len(sample_id) * 7) << 40

    monkeypatch.setattr(index, "id_hash", collide)
    monkeypatch.setattr("embed_precompute.store.check.id_hash", collide)
    write_dataset(tmp_path, TEXTS)
    opened = DatasetIndex(tmp_path)
    hashes = np.load(tmp_path / "index/id_hash.npy")
    assert len(set(hashes.tolist())) == 2
    for sample in range(12):
        assert opened.find(f"s{sample}") == sample
    assert opened.find("s-") is None


def test_damaged_index(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="not finished"):
        DatasetIndex(tmp_path)
    write_dataset(tmp_path, TEXTS)
    for number, path in enumerate(sorted((tmp_path / "index").iterdir())):
        sound = path.read_bytes()
        payloads = [sound[:-1], b"", b"\x80" * len(sound)]
        for offset in range(number, 128, 7):  # the header
            payloads.append(sound[:offset] + bytes([sound[offset] ^ 1]) + sound[offset + 1 :])
        for payload in payloads:
            path.write_bytes(payload)
            with pytest.raises(VerificationError, match=path.name):
                DatasetIndex(tmp_path)
        path.unlink()
        with pytest.raises(VerificationError, match="finalize"):
            DatasetIndex(tmp_path)
        path.write_bytes(sound)
    assert DatasetIndex(tmp_path).status.dtype == np.uint8
