"""What is said and refused before the first unit: free space, tokenizers, decisions of the plan."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import paths_of
from jobs import call, edit, expect, write_captions, write_job

from embed_precompute.captions.reader import CaptionReader, RowCursor
from embed_precompute.captions.recipes import CaptionsConfig
from embed_precompute.captions.table import CaptionTable
from embed_precompute.job import estimate, prepare, price
from embed_precompute.store.commit import UNLIMITED, free_space, this_host
from embed_precompute.store.plan import read_plan

TEXTS = [f"scene {i} with {'many ' * (i % 5)}people" for i in range(20)]


@pytest.fixture
def job(tiny_clip: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    return write_job(tmp_path, captions, None, tiny_clip, samples_per_shard=10)


@pytest.mark.parametrize(
    ("free", "code", "message"),
    [
        ((100, UNLIMITED), 74, "out: a shard needs about"),
        ((UNLIMITED, 2), 74, "out: a shard needs about"),
        ((20_000, 5), 0, "20,000 bytes and 5 files are free"),
    ],
)
def test_a_shard_that_does_not_fit_is_refused_and_a_dataset_warned_of(
    job: Path, monkeypatch: pytest.MonkeyPatch, free: tuple[int, int], code: int, message: str
) -> None:
    monkeypatch.setattr(prepare, "free_space", lambda root: free)
    assert message in expect(code, "run", job)


def test_free_space_of_a_folder_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(0 < free < UNLIMITED for free in free_space(tmp_path / "not" / "yet"))
    nothing = os.statvfs_result((4096, 4096, 0, 0, 0, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: nothing)
    assert free_space(tmp_path) == (UNLIMITED, UNLIMITED)


def test_what_a_killed_job_left_is_removed_before_space_is_looked_at(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = tmp_path / "out/shards/000" / f".tmp-shard-000000-{this_host()}-999999999-0123456789ab"
    dead.parent.mkdir(parents=True)
    dead.touch()
    monkeypatch.setattr(
        prepare, "free_space", lambda root: (0 if dead.exists() else UNLIMITED, UNLIMITED)
    )
    expect(0, "run", job)


def test_space_for_the_last_small_shard_is_enough(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = [str(job), "--output.samples_per_shard", "19"]
    expect(0, "run", *config)
    whole, last = (paths_of(tmp_path / "out", unit) for unit in (0, 1))
    free = (whole.shard.stat().st_size, 99)  # without its rows part and record
    last.record.unlink()
    monkeypatch.setattr(prepare, "free_space", lambda root: free)
    expect(0, "run", *config)


def test_plan_counts_what_is_left(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = expect(0, "plan", job)
    expect(0, "run", job)
    monkeypatch.setattr(price, "free_space", lambda root: (0, 0))
    said = expect(0, "plan", job)
    assert "2 of 2 shards are there already\n" in said
    assert "disk       nothing is lacking" in said
    assert "needed" not in said
    assert "lacking:" not in said
    paths_of(tmp_path / "out", 1).record.unlink()
    said = expect(0, "plan", job)
    assert "1 of 2 shards are there already, 24 files for the rest" in said  # and what comes last
    assert 0.6 * disk(whole) < disk(said) < 0.8 * disk(whole)
    assert "WARNING    24 files are needed, 0 are free" in said
    assert "already" not in expect(0, "plan", job, "--no-weights")


def test_the_sampled_captions_are_read_once(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the shard size, the free space and the report of `plan`."""
    reads: list[tuple[int, int]] = []
    original = CaptionReader.read

    def read(self: Any, first_row: int, num_rows: int) -> Any:
        reads.append((first_row, num_rows))
        return original(self, first_row, num_rows)

    monkeypatch.setattr(CaptionReader, "read", read)
    expect(0, "plan", job, "--output.samples_per_shard", "auto")
    assert reads == [(0, 20)]
    reads.clear()
    expect(0, "run", job, "--output.samples_per_shard", "auto")
    assert reads == [(0, 20)] * 2  # and the one unit


def test_the_first_captions_are_shown_as_they_are_encoded(job: Path) -> None:
    """A wrong recipe shows before the run."""
    template = ("--captions.recipe", "{kind: template, template: '<{text}>'}")
    for command, output in (("plan", 1), ("run", 2)):
        said = call(command, str(job), *template)[output]
        for text in TEXTS[:3]:
            assert f"encoded as '<{text}>'" in said
        assert TEXTS[3] not in said


MASKED = ("--encoders.t5.attention_mask", "padding", "--encoders.t5.max_length", "120")


def disk(said: str) -> float:
    """Bytes that a report of `plan` gives for the dataset."""
    number, unit = said.partition("disk       about ")[2].replace(" for", ",").split(",")[0].split()
    return float(number) * {"KiB": 1, "MiB": 1024, "GiB": 1024**2}[unit]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("num_files", [1, 3])
def test_a_table_sorted_by_length_is_estimated_right(
    tmp_path: Path, tiny_t5: Path, order: int, num_files: int
) -> None:
    """The first captions alone would give a tenth of it, or twice as much."""
    texts = ["ship " * max(1, i // 50) for i in range(6000)][::order]
    for k in range(num_files):
        some = texts[6000 * k // num_files : 6000 * (k + 1) // num_files]
        rows = {"id": [f"{k}-{i}" for i in range(len(some))], "text": some}
        pq.write_table(pa.table(rows), tmp_path / f"{k}.parquet", row_group_size=700)
    job = write_job(tmp_path, tmp_path, tiny_t5, None)
    words = ("plan", job, *MASKED, "--output.path", tmp_path.with_name("out"), "--sample")
    sampled, all_of_them = expect(0, *words, "500"), expect(0, *words, "0")
    assert disk(sampled) == pytest.approx(disk(all_of_them), rel=0.03)
    means = [float(said.partition("mean ")[2].split(",")[0]) for said in (sampled, all_of_them)]
    assert means[0] == pytest.approx(means[1], rel=0.03)
    assert "of 500 evenly spread samples: ok 500" in sampled
    assert "of all samples: ok 6,000" in all_of_them
    assert "max 120;" in sampled


def test_the_runs_lie_evenly_and_few_row_groups_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for num_rows, max_rows in ((151, 150), (10_001, 10_000), (2_000_000, 10_000), (10**9, 37)):
        runs = list(estimate.sampled_runs(num_rows, max_rows))
        assert runs == list(estimate.sampled_runs(num_rows, max_rows))
        assert 0.6 * max_rows < sum(rows for _, rows in runs) <= max_rows
        ends = [0, *(first + rows for first, rows in runs)]
        gaps = [first - end for (first, _), end in zip(runs, ends, strict=False)]
        assert min(gaps) >= 0
        assert max(gaps) <= 2 * num_rows / min(100, max_rows)  # each is in its hundredth
        assert ends[-1] <= num_rows
    assert list(estimate.sampled_runs(25_000, None))[-1] == (24_750, 250)
    captions = write_captions(tmp_path / "a.parquet", ["x"] * 20_000, row_group_size=20)
    opened: list[int] = []
    original = RowCursor._open_group

    def open_group(self: RowCursor, row: int) -> None:
        opened.append(row)
        original(self, row)

    monkeypatch.setattr(RowCursor, "_open_group", open_group)
    table = CaptionTable.open(CaptionsConfig(str(captions)))
    figures = estimate.SampledCaptions(table, (), 20_000, None).measure(1000)
    assert figures.samples == 1000
    assert len(opened) <= 200  # of 1,000; a run of ten rows touches at most two


def test_the_histogram_shows_lengths_and_what_is_cut(tmp_path: Path, tiny_clip: Path) -> None:
    texts = [*["a"] * 6, *["a b c d e f g h"] * 3, "a b " * 60]
    captions = write_captions(tmp_path / "captions.parquet", texts)
    said = expect(0, "plan", write_job(tmp_path, captions, None, tiny_clip))
    lines = [line.split() for line in said.splitlines() if " to " in line or "cut at" in line]
    shown = [(" ".join(words[:3]), *words[3:]) for words in lines if words[1] in ("to", "at")]
    full = "█" * estimate.BAR_CHARACTERS
    assert ("1 to 2", "0", "0.00", "%") in shown
    assert ("3 to 4", full, "6", "60.00", "%") in shown
    assert ("9 to 10", full[:15], "3", "30.00", "%") in shown
    assert ("cut at 77", full[:5], "1", "10.00", "%") in shown
    assert len(shown) <= 8
    assert "mean 12.5, p5 3, p50 3, p95 77, p99 77, max 77;" in said


def test_another_models_tokenizer_is_warned_of(
    tmp_path: Path, tiny_t5: Path, corpus: list[str]
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", corpus[:20])
    job = write_job(tmp_path, captions, tiny_t5, None)
    said = expect(0, "plan", job)
    ratio = float(said.partition(" characters per token")[0].rpartition(" ")[2])
    assert ratio > 2
    assert "WARNING" not in said
    letters = write_captions(tmp_path / "letters.parquet", ["zzqxjkvwq " * 2] * 3)
    words = ("--captions.path", str(letters))
    said = expect(0, "plan", job, *words)
    assert "WARNING    tokenizer " in said
    assert "it may be another model's tokenizer" in said
    assert "WARNING encoders.t5: tokenizer " in expect(0, "run", job, *words)


def test_a_plan_without_weights(job: Path, tmp_path: Path, tiny_clip: Path) -> None:
    """All but the fingerprint, from config.json and tokenizer."""
    whole = expect(0, "plan", job).splitlines()
    bare = shutil.copytree(tiny_clip, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    edit(job, "encoders.clip", pretrained=str(bare))
    said = expect(2, "plan", job)
    assert "holds no weights" in said
    assert "plan --no-weights" in said
    assert f"embed-precompute fetch {job}" in said
    found = expect(0, "plan", job, "--no-weights").splitlines()
    assert found[0].endswith("its id and fingerprint follow when the weights are there")
    same = [[line for line in lines[1:] if " free at " not in line] for lines in (found, whole)]
    assert same[0] == same[1]
    with pytest.raises(SystemExit) as ended:
        call("plan", str(job), "--no-weights", "--write")
    assert ended.value.code == 2
    assert not (tmp_path / "out").exists()


def test_all_encoders_that_are_missing_are_named(job: Path) -> None:
    """In the order of the configuration."""
    encoders = "{t5: {kind: t5, pretrained: /no/t5}, clip: {kind: clip, pretrained: /no/clip}}"
    said = expect(2, "plan", job, "--no-weights", "--encoders", encoders)
    named = "t5, clip cannot be opened. The first: encoders.t5.pretrained is '/no/t5': there is no"
    assert named in said


def test_a_rerun_takes_the_plans_implementation(job: Path, tmp_path: Path) -> None:
    option = "--encoders.clip.implementation"
    expect(0, "run", job, option, "hf")
    assert read_plan(tmp_path / "out").spec["encoders"]["clip"]["implementation"] == "hf"
    expect(0, "run", job, option, "auto")
    assert "clip.implementation: hf -> fused" in expect(3, "run", job, option, "fused")
