"""What `run` does at its edges: odd inputs, odd outputs, failures, stray files, exit codes."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import edit, expect, write_captions, write_job

from embed_precompute import EmbeddingDataset
from embed_precompute.store.records import read_record

TEXTS = [f"scene {i} of a film" for i in range(30)]


@pytest.fixture
def job(tiny_t5: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    return write_job(tmp_path, captions, tiny_t5, None)


def counts(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "manifest.json").read_text())["counts"]
    return found


def test_only_bad_captions_make_a_dataset_without_samples(job: Path, tmp_path: Path) -> None:
    write_captions(tmp_path / "captions.parquet", [None] * 25)
    expect(0, "run", job)
    assert len(EmbeddingDataset(tmp_path / "out")) == 0
    assert counts(tmp_path / "out")["status"]["null_text"] == 25
    expect(0, "verify", tmp_path / "out")


def test_a_row_with_a_list_is_a_sample_per_caption(job: Path, tmp_path: Path) -> None:
    lists = [["a", "b"], [], None, ["c"], ["d", None, "e", "f"]] * 4
    table = {"id": list(range(20)), "text": pa.array(lists, pa.list_(pa.string()))}
    pq.write_table(pa.table(table), tmp_path / "captions.parquet", row_group_size=3)
    edit(job, "output", samples_per_shard=5)
    expect(0, "run", job)
    found = counts(tmp_path / "out")
    assert (found["rows"], found["samples"]) == (20, 36)
    expected = {"ok": 24, "null_text": 8, "empty_list": 4}
    assert {k: v for k, v in found["status"].items() if v} == expected
    dataset = EmbeddingDataset(tmp_path / "out")
    assert [s["id"] for s in dataset][:4] == ["0#0", "0#1", "3#0", "4#0"]
    shutil.rmtree(tmp_path / "out")
    expect(0, "run", job, "--limit", "6")
    assert counts(tmp_path / "out")["samples"] == 6


@pytest.mark.parametrize("name", ["made/exp:3", "./~job", "~", "made/name with % and spaces"])
def test_output_folders_with_odd_names(
    name: str, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    expect(0, "run", job, "--output.path", name)
    expect(0, "verify", os.path.expanduser(name))


def test_an_output_that_cannot_be_is_refused_before_the_scan(job: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    for where, message in ((taken, "not a folder"), ("s3://bucket/out", "not a URI")):
        assert message in expect(2, "run", job, "--output.path", where)
    for command in ("run", "plan"):
        said = expect(2, command, job, "--output.path", tmp_path)
        assert "holds no dataset, but captions.parquet, job.yaml, taken: expected a new or" in said
    assert not (tmp_path / "logs").exists()
    expect(2, "run", job, "--runtime.device", "cuda:99")
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_what_runs_leave_is_no_other_folder(job: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in ("logs", "lost+found", ".snapshots", "shards/000"):
        (out / name).mkdir(parents=True)
    for name in (".tmp-plan.json-host-1-2", "null-0123456789abcdef.safetensors"):
        (out / name).touch()
    expect(0, "run", job)
    (out / "notes.txt").touch()
    expect(0, "run", job)  # it is a dataset, whatever else is there
    (out / "plan.json").unlink()
    expect(0, "run", job)


def test_logs_that_cannot_be_written_do_not_stop_the_job(job: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/logs").write_text("in the way")
    error = expect(0, "run", job)
    assert "Traceback" not in error
    assert "not written" in error


def test_records_beyond_the_plan_are_not_counted(job: Path, tmp_path: Path) -> None:
    expect(0, "run", job)
    folder = tmp_path / "out/shards/000"
    shutil.copy(folder / "shard-000000.json", folder / "shard-000099.json")
    for left in folder.glob("shard-000001*"):
        left.unlink()
    expect(0, "run", job)
    assert (folder / "shard-000001.json").exists()


@pytest.mark.parametrize("left", ["units", "null"])
def test_units_of_another_plan_are_refused_at_the_start(
    job: Path, tmp_path: Path, left: str
) -> None:
    expect(0, "run", job)
    (tmp_path / "out/plan.json").unlink()
    if left == "null":
        shutil.rmtree(tmp_path / "out/shards")
    edit(job, "encoders.t5", max_length=20)
    assert "its units belong to another plan" in expect(3, "run", job)
    assert not (tmp_path / "out/plan.json").exists()


def add_column(job: Path, added: list[int]) -> None:
    table = {"id": list(range(len(added))), "text": TEXTS[: len(added)], "added": added}
    pq.write_table(pa.table(table), job.with_name("captions.parquet"))
    edit(job, "encoders.t5", added_tokens="added", seq_align=8)


def test_a_column_of_added_tokens_gives_the_padded_length(job: Path, tmp_path: Path) -> None:
    add_column(job, [1003, 11, 19])
    expect(0, "run", job)
    dataset = EmbeddingDataset(tmp_path / "out")
    assert dataset[0]["text_t5"].shape[0] == 29  # 24 tokens, until 3 more is a multiple of 8
    assert dataset.null["text_t5"].shape[0] == 24
    edit(job, "encoders.t5", attention_mask="padding", added_tokens=0, seq_align=1)
    assert "encoders.t5.added_tokens: added -> 0" in expect(3, "run", job)


def test_a_plan_without_the_column_is_a_conflict(job: Path) -> None:
    add_column(job, [8, 16])
    edit(job, "encoders.t5", attention_mask="padding", added_tokens=0, seq_align=1)
    expect(0, "plan", job, "--write")
    edit(job, "encoders.t5", attention_mask="none", added_tokens="added", seq_align=8)
    assert "encoders.t5.attention_mask: padding -> none" in expect(3, "run", job)


def test_several_padded_lengths_are_listed_and_refused(job: Path, tmp_path: Path) -> None:
    add_column(job, [8, 9, 16])
    assert "24 (2 rows), 31 (1 rows)" in expect(2, "run", job)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["plan.json", "null.json"])
def test_a_damaged_root_file_is_named(name: str, job: Path, tmp_path: Path) -> None:
    expect(0, "run", job)
    path = tmp_path / "out" / name
    path.write_bytes(path.read_bytes()[:-20])
    assert name in expect(4, "run", job)


def test_nothing_is_written_through_a_link(job: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("shards", "shards/000", "index", "logs"):
        link = tmp_path / "out" / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(elsewhere)
        assert "is a link" in expect(2, "run", job)
        link.unlink()
    assert list(elsewhere.iterdir()) == []


def test_a_caption_of_absurd_length_is_a_fact_of_the_input(job: Path, tmp_path: Path) -> None:
    write_captions(tmp_path / "captions.parquet", ["a", "b " * (1 << 20), "c"])
    expect(0, "run", job)
    record = read_record(tmp_path / "out", 0)
    assert (record.status["ok"], record.status["invalid_text"]) == (2, 1)
