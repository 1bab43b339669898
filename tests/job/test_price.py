"""What `plan` says a dataset takes, against what a run of it takes."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import call, edit, expect, write_captions, write_job

from embed_precompute.captions.reader import RowCursor
from embed_precompute.config.files import load_config
from embed_precompute.job import calibrate, estimate, prepare, price
from embed_precompute.job.prepare import prepare as prepared_of
from embed_precompute.store.manifest import MANIFEST

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def sizes(said: str) -> dict[str, float]:
    """The table of bytes in a report of `plan`."""
    rows = re.findall(r"^ {11}(\w[\w ,]*?) {2,}([\d.,]+) (\w+)", said, re.MULTILINE)
    return {name: float(number.replace(",", "")) * UNITS[unit] for name, number, unit in rows}


def hours(said: str, of: str = "GPU") -> float:
    return float(said.partition(f" {of} hours")[0].rpartition(" ")[2].replace(",", ""))


def write_rate(said: str) -> float:
    """Files a second."""
    (rate,) = re.findall(r"must take .* and ([\d.]+) files/s at ", said)
    return float(rate)


def files_per_s(rank_hours: float) -> float:
    """Of one rank that makes the 8 units of the job."""
    return 3 * 8 / rank_hours / 3600


@pytest.fixture
def job(tiny_t5: Path, tiny_clip: Path, tmp_path: Path, corpus: list[str]) -> Path:
    """300 captions, nearly all of them twice in a row, an empty one and a null."""
    texts = [text for text in corpus for _ in (0, 1)][:298]
    captions = write_captions(tmp_path / "captions.parquet", [*texts, "", None])
    return write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=40)


@pytest.mark.parametrize("case", ["padded", "masked", "umt5"])
def test_the_bytes_are_those_on_disk(case: str, job: Path, tmp_path: Path, tiny_umt5: Path) -> None:
    """All of them within 1 %, and each tensor's."""
    if case != "padded":
        edit(job, "encoders.t5", attention_mask="padding", max_length=60)
    if case == "umt5":
        edit(job, "encoders.t5", pretrained=str(tiny_umt5), keep="real+1")
        edit(job, "output", dtype="bfloat16")
    said = expect(0, "plan", job)
    promised = sizes(said)
    log = expect(0, "run", job)
    files = [
        path
        for path in (tmp_path / "out").rglob("*")
        if path.is_file() and path.parent.name != "logs"
    ]
    found = {path: path.stat().st_size for path in files}
    assert promised["in all"] == pytest.approx(sum(found.values()), rel=0.01)
    assert f", {len(files)} files; bytes by all of them made in memory" in said
    (needed,) = re.findall(r"disk +about ([\d,.]+ \w+), .* free at", said)
    assert f"price: {needed} in {len(files)} files to write" in log
    parts = sum(size for path, size in found.items() if path.name.endswith(".rows.parquet"))
    assert promised["rows parts"] == pytest.approx(parts, rel=0.01)
    shards = sum(size for path, size in found.items() if path.name.startswith("shard-"))
    of_shards = promised["text_t5"] + promised["text_clip"] + promised["records, headers"]
    assert of_shards == pytest.approx(shards - parts, rel=0.01)
    null = sum(size for path, size in found.items() if path.name.startswith("null"))
    assert promised["null embedding"] == pytest.approx(null, rel=0.15)
    assert (tmp_path / "out" / MANIFEST).exists()


def test_the_bytes_of_a_sample_are_within_the_stated_error(job: Path) -> None:
    """Some of many small shards, in a table whose texts become longer."""
    texts = [f"{i // 3} " + "ship " * (i // 200) for i in range(6000)]
    write_captions(job.parent / "captions.parquet", texts, row_group_size=500)
    edit(job, "encoders.t5", attention_mask="padding", max_length=40)
    config = load_config(str(job), [])
    ready = prepared_of(config)
    exact = price.price_of(ready.sampled, ready.plan, "float32")
    figures = ready.sampled.measure(600)
    sampled = price.price_of(ready.sampled, ready.plan, "float32", figures, num_samples=400)
    assert (exact.error, exact.measured_units, sampled.measured_units) == (0, 150, 10)
    assert 0 < sampled.error < 0.1
    assert abs(sampled.total / exact.total - 1) < sampled.error
    assert sampled.saved / exact.saved == pytest.approx(1, abs=0.1)
    assert sampled.flops["t5"] / exact.flops["t5"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("case", ["sorted files", "a period", "nulls"])
def test_the_stated_error_holds_in_tables_that_repeat_themselves(
    case: str, job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are each sorted by length, long captions at one place of each hundredth of the
    table, stretches without captions: what lies evenly may meet one kind of them alone."""
    chance, rows = random.Random(3), 6000

    def caption(words: int) -> str:
        return " ".join(chance.choices(["ship", "sea", "red", "fox"], k=words))

    if case == "sorted files":
        files = ([1 + int(chance.expovariate(1 / 12)) for _ in range(60)] for _ in range(100))
        texts = [caption(words) for file in files for words in sorted(file)]
    elif case == "a period":
        texts = [caption(60 if i % 60 < 10 else 2) for i in range(rows)]
    else:
        texts = [None if i // 100 % 3 == 1 else caption(10) for i in range(rows)]
    write_captions(job.parent / "captions.parquet", texts, row_group_size=1000)
    edit(job, "output", samples_per_shard=20)
    edit(job, "encoders.t5", attention_mask="padding", max_length=128)
    monkeypatch.setattr(estimate, "SAMPLED_ROWS", 1000)
    ready = prepared_of(load_config(str(job), []))
    sampled = price.price_of(ready.sampled, ready.plan, "float32", num_samples=2000)
    whole = ready.sampled.measure(None)
    exact = price.price_of(ready.sampled, ready.plan, "float32", whole, num_samples=rows)
    assert (exact.error, sampled.figures.samples) == (0, 1000)
    assert abs(sampled.total / exact.total - 1) < sampled.error < 0.35
    assert abs(sampled.flops["t5"] / exact.flops["t5"] - 1) < 1.5 * sampled.error


def test_hours_follow_from_a_rate_a_peak_or_this_device(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = ("--rate", "0.1", "--ranks")
    said = expect(0, "plan", job, *rate, "4", "--runtime.device", "auto")
    assert "at 0.1 captions/s of one GPU, as --rate says" in said
    (share,) = re.findall(r"saves .* \((\d+\.\d) %\)", said)  # equal texts are encoded once
    assert 25 < float(share) < 55
    whole = hours(said)
    assert whole == pytest.approx(299 / 0.1 / 3600 / 2, rel=0.05)
    (wall,) = re.findall(r"; ([\d.]+) hours at 4 ranks \(--ranks\)", said)
    assert float(wall) == pytest.approx(whole / 4, rel=0.01)
    assert write_rate(said) == pytest.approx(4 * files_per_s(whole), rel=0.02)
    said = expect(0, "plan", job, *rate, "7", "--runtime.device", "auto")
    assert f"; {wall} hours at 7 ranks" in said  # 8 shards: one rank makes two

    said = expect(
        0, "plan", job, "--gpu", "A100", "--share", "0.5", "--encoders.t5.dtype", "bfloat16"
    )
    assert (
        "at 50 % (assumed) of the peak of A100 (20 TFLOP/s in float32 and 312 TFLOP/s in b" in said
    )
    assert hours(said) < hours(expect(0, "plan", job, "--gpu", "A100", "--share", "0.5"))
    mistake = expect(2, "plan", job, "--gpu", "T4", "--encoders.t5.dtype", "bfloat16")
    assert re.search(r"--gpu T4: it has no bfloat16\. Known are H100, .*\. Name one", mistake)
    assert not {"T4", "V100"} & set(re.findall(r"[\w ]+", mistake.partition("Known are")[2]))
    mistake = expect(2, "plan", job, "--gpu", "Abacus")
    assert "--gpu Abacus: its peak in float32 is not known. Known are H100, " in mistake
    assert "encoded as" not in mistake  # nothing was read before

    monkeypatch.setattr(calibrate, "SECONDS", 0.01)
    said = expect(0, "plan", job, "--calibrate")
    assert re.search(r"as measured on this .*: clip \d.*FLOP/s \(\d+ captions? in \d", said)
    assert hours(said, "CPU process") > 0
    assert "--calibrate and --no-weights" in expect(2, "plan", job, "--calibrate", "--no-weights")


def test_no_hours_of_a_gpu_for_a_job_on_cpus(job: Path) -> None:
    said = expect(0, "plan", job)
    assert "encoding " in said
    assert "no hours are assumed of a CPU (runtime.device): give --calibrate, --rate N" in said
    for word in ("hours,", "H100", "must take"):
        assert word not in said
    step = ("plan", job, "--training-flops", "1e9")
    assert "training   not compared: there are no hours, see encoding" in expect(0, *step)
    said = expect(0, *step, "--rate", "0.1")
    assert "at 0.1 captions/s of one CPU process, as --rate says" in said
    assert hours(said, "CPU process") > 0
    assert "GPU" not in said
    assert hours(expect(0, "plan", job, "--gpu", "H100")) > 0


def test_ranks_without_a_shard_are_not_counted(job: Path) -> None:
    rate = ("plan", job, "--rate", "0.1", "--runtime.device", "auto", "--ranks")
    said = expect(0, *rate, "16")
    (wall,) = re.findall(r"; ([\d.]+) hours at 8 of 16 ranks \(--ranks\)", said)
    assert float(wall) == pytest.approx(hours(said) / 8, rel=0.01)
    assert write_rate(said) == pytest.approx(8 * files_per_s(hours(said)), rel=0.02)
    hint = "8 shards for 16 ranks: 8 would have no work. output.samples_per_shard 18 (not 40) has"
    assert hint in said
    assert "no work" in expect(0, "plan", job, "--ranks", "16")  # whether hours are known or not
    said = expect(0, *rate, "16", "--output.samples_per_shard", "18")
    assert "hours at 16 ranks" in said
    assert "no work" not in said
    said = expect(0, "plan", job, "--rate", "100")
    assert "; less than a minute at 8 ranks (--ranks), loading left out" in said
    assert "must take" not in said  # a mean over seconds says nothing


def test_what_is_left_of_a_begun_dataset_is_priced(job: Path, tmp_path: Path) -> None:
    whole = hours(expect(0, "plan", job, "--rate", "0.1"), "CPU process")
    expect(0, "run", job)
    words = ("plan", job, "--rate", "0.1", "--ranks", "4", "--training-flops", "1e9")
    said = expect(0, *words)
    assert "; 8 of 8 shards are there already\n" in said
    assert said.splitlines()[-1].startswith("disk       nothing is lacking")
    for record in sorted(tmp_path.glob("out/**/*.json")):
        if re.search(r"shard-0*[01]\.", record.name):
            record.unlink()
    (tmp_path / "out" / MANIFEST).unlink()
    said = expect(0, *words)
    assert "; 6 of 8 shards are there already, " in said
    rest = hours(said, "CPU process")
    assert rest == pytest.approx(whole * 80 / 300, rel=0.05)
    assert f" for the rest ({whole:.3g} for all), " in said
    assert " hours at 2 of 4 ranks (--ranks)" in said
    assert "2 shards for 4 ranks: 2 would have no work; 2 ranks will do\n" in said


def test_what_is_left_is_not_like_what_is_there(job: Path, tmp_path: Path) -> None:
    """Captions that are much longer follow in another file."""
    (tmp_path / "table").mkdir()
    write_captions(tmp_path / "table" / "a.parquet", ["a", "b c"] * 100)
    edit(job, "captions", path=str(tmp_path / "table"), id_column=None)
    edit(job, "encoders.t5", attention_mask="padding", max_length=128)
    expect(0, "run", job)
    shards = tmp_path / "out" / "shards"
    before = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file())
    texts = [f"{i} {'a sea ' * 60}" for i in range(200)]
    write_captions(tmp_path / "table" / "b.parquet", texts)
    said = expect(0, "plan", job, "--extend", "--rate", "0.1")
    ((rest, whole),) = re.findall(r" ([\d.]+) CPU process hours for the rest \(([\d.]+) for", said)
    assert float(rest) / float(whole) > 0.8
    ((size, unit),) = re.findall(r"disk +about ([\d.]+) (\w+) for the rest", said)
    ready = prepared_of(load_config(str(job), []), extend=True)
    left = range(5, 10)
    exact = price.price_of(ready.sampled, ready.plan, "float32")
    sampled = price.price_of(
        ready.sampled, ready.plan, "float32", ready.sampled.measure(200), num_samples=80
    )
    assert (exact.error, sampled.measured_units) == (0, 2)
    assert exact.bytes_by_unit.sum() == pytest.approx(sum(exact.unit_bytes.values()))
    assert sampled.needed(left)[0] == pytest.approx(exact.needed(left)[0], rel=0.1)
    assert sampled.flops_of(left)["t5"] == pytest.approx(exact.flops_of(left)["t5"], rel=0.1)
    assert f"price: {size} {unit} in " in expect(0, "run", job, "--extend")
    added = sum(path.stat().st_size for path in shards.rglob("*") if path.is_file()) - before
    assert exact.bytes_by_unit[5:].sum() == pytest.approx(added, rel=0.01)
    assert float(size) * UNITS[unit] == pytest.approx(added, rel=0.1)  # with what is written last


def test_advice_is_given_where_it_applies(job: Path) -> None:
    words = ("plan", job, "--encoders.t5.max_length", "512")
    said = expect(0, *words)
    assert re.search(r"t5: real tokens alone \(attention_mask padding\) would take \d+ % of", said)
    assert re.search(r"t5: max_length \d+ would cut [\d.]+ % of the captions and take", said)
    assert "output.dtype bfloat16 instead of float32 saves" in said
    assert "not for" not in said
    preset = ("--encoders.t5.reference", "their/trainer@1 file.py:2")
    assert "it is another embedding: not for their/trainer\n" in expect(0, *words, *preset)
    masked = ("--encoders.t5.attention_mask", "padding", "--output.dtype", "bfloat16")
    assert "\nadvice" not in expect(0, *words, *masked)


def test_what_is_copied_costs_no_operations(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = expect(0, "run", job)
    assert re.search(r"; \d[\d.]* [MG]FLOP to compute", log)
    words = (job, "--output.path", tmp_path / "other", "--reuse", tmp_path / "out")
    monkeypatch.setattr(prepare, "QUICK_FROM_ROWS", 1)
    said = expect(0, "plan", *words)
    assert "first answer" not in said  # it knows nothing of the copies
    assert "; 0 MFLOP to compute" in expect(0, "run", *words)


def test_storing_is_compared_with_encoding_in_the_loop(job: Path) -> None:
    said = expect(0, "plan", job)
    assert "training " not in said
    flops = float(re.findall(r"encoding +([\d.]+) MFLOP a caption", said)[0]) * 1e6
    gpu = ("--gpu", "H100")
    step = ("plan", job, "--training-flops", f"{10 * flops:.0f}", "--ranks", "2", *gpu)
    said = expect(0, *step, "--epochs", "4")
    assert "encoding in the loop adds 10 % to it" in said
    assert "storing saves " in said
    assert "don't store" not in said
    assert "GPU hours in the loop for each epoch" in expect(0, *step)
    said = expect(0, *step, "--epochs", "0.25")
    assert "don't store: over 0.25 epochs that saves no GPU hour" in said
    step = ("plan", job, "--training-flops", f"{1000 * flops:.0f}", *gpu)
    cheap = expect(0, *step, "--epochs", "4")
    assert "don't store: encoders below 1 % of a step hardly pay for" in cheap
    assert "--epochs is given without --training-flops" in expect(2, "plan", job, "--epochs", "2")


def test_a_large_table_has_a_first_answer_from_footers(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No id is looked at, no file digested, no row before a run decoded."""
    monkeypatch.setattr(prepare, "QUICK_FROM_ROWS", 1000)
    monkeypatch.setattr(estimate, "QUICK_ROWS", 400)
    rows = {"id": ["same"] * 2000, "text": [f"scene {i}" for i in range(2000)]}
    (tmp_path / "table").mkdir()
    for name in ("a", "b"):
        pq.write_table(pa.table(rows), tmp_path / "table" / f"{name}.parquet", row_group_size=100)
    starts: list[int] = []
    original = RowCursor._open_group

    def open_group(self: RowCursor, row: int) -> None:
        starts.append(row)
        original(self, row)

    monkeypatch.setattr(RowCursor, "_open_group", open_group)
    edit(job, "captions", path=str(tmp_path / "table"))
    code, said, mistake = call("plan", str(job))
    assert code == 2
    assert "repeats id 'same'" in mistake
    assert said.startswith("A first answer, from 400 captions at the beginnings of row groups:\n")
    assert "input      2 files, 4,000 rows, 4,000 samples" in said
    assert "text_t5" in said
    assert said.rstrip().endswith("when every file and id is checked:")
    assert starts[:40] == list(range(0, 4000, 100))
    found, plan = prepare.quick_plan(load_config(str(job), [])) or pytest.fail("no first answer")
    assert {file.content_xxh3 for file in plan.inputs.files} == {""}
    assert found.figures.samples == 400

    lists = {"text": [["a", "b", "c"]] * 3000}
    for name in ("a", "b"):
        pq.write_table(pa.table(lists), tmp_path / "table" / f"{name}.parquet")
    edit(job, "captions", id_column=None)
    _, plan = prepare.quick_plan(load_config(str(job), [])) or pytest.fail("no first answer")
    assert (plan.num_rows, plan.num_samples) == (6000, 18_000)
    (tmp_path / "t.csv").write_text("id,text\n" + "".join(f"{i},x\n" for i in range(2000)))
    edit(job, "captions", path=str(tmp_path / "t.csv"))
    assert prepare.quick_plan(load_config(str(job), [])) is None  # it would have to be parsed
