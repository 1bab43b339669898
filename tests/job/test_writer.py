"""A unit's writer: the first record stays; what is not finite is not stored."""

from __future__ import annotations

from pathlib import Path

import handmade
import numpy as np
import pytest
import torch
from handmade import (
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
from embed_precompute.store.records import NULL_UNIT, UnitRecord, unnamed_files
from embed_precompute.store.rows import read_samples

TEXTS = ["a", None, "b c", "a"]


def test_committed_twice_is_committed_once(tmp_path: Path) -> None:
    plan = make_plan(4, 4)
    first = write_unit(tmp_path, plan, 0, samples_of(TEXTS))
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in files_of(tmp_path)}
    assert write_unit(tmp_path, plan, 0, samples_of(TEXTS)) == first
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in files_of(tmp_path)} == before


def test_other_bytes_are_a_bug_or_of_another_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What another environment makes has no record; in one environment nothing may differ."""
    plan = make_plan(4, 4)
    first = write_unit(tmp_path, plan, 0, samples_of(TEXTS))
    write_null(tmp_path, plan)
    kept = [path.read_bytes() for path in paths_of(tmp_path, 0)]
    monkeypatch.setattr(handmade, "embedding", lambda *a: embedding(*a) * (1 + 2**-7))
    with pytest.raises(InternalError, match=r"shard-000000.* made twice in one environment"):
        write_unit(tmp_path, plan, 0, samples_of(TEXTS))
    with pytest.raises(InternalError, match=r"null.* made twice in one environment"):
        write_null(tmp_path, plan)
    late = {**ENVIRONMENT, "device": "another"}
    assert write_unit(tmp_path, plan, 0, samples_of(TEXTS), late) == first
    assert [path.read_bytes() for path in paths_of(tmp_path, 0)] == kept
    assert {path.suffix for path in unnamed_files(tmp_path)} == {".safetensors"}


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
