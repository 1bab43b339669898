"""A unit's writer: the first record stays; what is not finite is not stored."""

from __future__ import annotations

from pathlib import Path

import handmade
import numpy as np
import pytest
import torch
from handmade import (
    DIMS,
    ENVIRONMENT,
    embedding,
    files_of,
    make_plan,
    paths_of,
    samples_of,
    write_null,
    write_unit,
)

from embed_precompute.errors import InputError, InternalError
from embed_precompute.job.writer import is_finite
from embed_precompute.samples import Sample
from embed_precompute.store.records import NULL_UNIT, UnitRecord, read_record, unnamed_files
from embed_precompute.store.rows import read_samples
from embed_precompute.store.shards import ShardReader

TEXTS = ["a", None, "b c", "a"]


def other_values(patch: pytest.MonkeyPatch) -> None:
    """The encoders round otherwise."""
    patch.setattr(handmade, "embedding", lambda *a: embedding(*a) * (1 + 2**-7))


def test_a_unit_as_it_is_read_back(tmp_path: Path) -> None:
    plan = make_plan(4, 4)
    record = write_unit(tmp_path, plan, 0, samples_of(TEXTS))
    assert record == read_record(tmp_path, 0)
    shard, rows, _ = paths_of(tmp_path, 0)
    samples = list(read_samples(rows, plan.tensors))
    assert [s.index for s in samples] == [0, None, 1, 0]
    assert [s.status.label for s in samples] == ["ok", "null_text", "ok", "ok"]
    assert samples[2].tokens == {"clip": 3, "t5": 3}
    assert samples[2].lengths == {"clip": 1, "t5": 3}
    reader = ShardReader(shard, plan.fingerprint, 0, plan.tensors)
    for name in DIMS:
        for row, text in enumerate(("a", "b c")):
            assert torch.equal(reader.row(name, row), embedding(name, text))


def test_committed_twice_is_committed_once(tmp_path: Path) -> None:
    plan = make_plan(4, 4)
    first = write_unit(tmp_path, plan, 0, samples_of(TEXTS))
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files_of(tmp_path)}
    assert write_unit(tmp_path, plan, 0, samples_of(TEXTS)) == first
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files_of(tmp_path)} == before


def test_other_bytes_in_one_environment_are_a_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(4, 4)
    write_unit(tmp_path, plan, 0, samples_of(TEXTS))
    write_null(tmp_path, plan)
    other_values(monkeypatch)
    with pytest.raises(InternalError, match=r"shard-000000.* made twice in one environment"):
        write_unit(tmp_path, plan, 0, samples_of(TEXTS))
    with pytest.raises(InternalError, match=r"null.* made twice in one environment"):
        write_null(tmp_path, plan)


def test_other_bytes_in_another_environment_stay_without_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(4, 4)
    first = write_unit(tmp_path, plan, 0, samples_of(TEXTS))
    kept = [path.read_bytes() for path in paths_of(tmp_path, 0)]
    other_values(monkeypatch)
    late = {**ENVIRONMENT, "device": "another"}
    assert write_unit(tmp_path, plan, 0, samples_of(TEXTS), late) == first
    assert [path.read_bytes() for path in paths_of(tmp_path, 0)] == kept
    (garbage,) = unnamed_files(tmp_path)
    assert garbage.suffix == ".safetensors"


def test_what_is_not_finite_is_not_stored(tmp_path: Path) -> None:
    plan = make_plan(4, 4)
    record = write_unit(tmp_path, plan, 0, samples_of(["a", "nan", "b", "nan"]))
    assert isinstance(record, UnitRecord)
    assert (record.num_stored, record.status["ok"], record.status["non_finite"]) == (2, 2, 2)
    samples = list(read_samples(paths_of(tmp_path, 0).rows, plan.tensors))
    assert [s.index for s in samples] == [0, None, 1, None]
    assert samples[1].error == "text_clip holds inf or nan"
    assert (samples[1].text, samples[1].tokens) == ("nan", {})
    with pytest.raises(InputError, match="the empty caption failed: text_clip holds inf"):
        write_unit(tmp_path, plan, NULL_UNIT, [Sample("", 0, "nan")])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_finite(dtype: torch.dtype) -> None:
    """As torch says, for half-precision numbers of every exponent, and for the edges of each."""
    edges = [0.0, -0.0, torch.finfo(dtype).max, torch.finfo(dtype).min, torch.finfo(dtype).tiny]
    wrong = [torch.inf, -torch.inf, torch.nan, -torch.nan]
    values = torch.tensor([*edges, *wrong], dtype=dtype)
    if dtype.itemsize == 2:
        every = torch.arange(0, 1 << 16, 29, dtype=torch.int32).to(torch.int16).view(dtype)
        values = torch.cat((values, every))
    for value in values:
        row = torch.tensor([1.0, 0.0, -2.0], dtype=dtype)
        row[1] = value
        assert is_finite(row.view(3, 1)) is bool(torch.isfinite(value))
    assert is_finite(torch.empty(0, 4, dtype=dtype))
    assert is_finite(torch.from_numpy(np.zeros(3, np.float32)))
