"""Caption files that come later: the same rows under other names, and `run --extend`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import dataset_bytes, edit, expect, write_job

from embed_precompute import EmbeddingDataset
from embed_precompute.store.plan import read_plan
from embed_precompute.store.records import record_path

TEXTS = [f"scene {i} with {'many ' * (i % 5)}people" for i in range(40)]


def write_file(folder: Path, name: str, first: int, end: int) -> Path:
    """Samples `first` to `end` - 1, with ids `s0`, `s1`, ..."""
    folder.mkdir(exist_ok=True)
    rows = {"id": [f"s{i}" for i in range(first, end)], "text": TEXTS[first:end]}
    schema = pa.schema({"id": pa.string(), "text": pa.string()})
    pq.write_table(pa.table(rows, schema), folder / name)
    return folder / name


@pytest.fixture
def job(tiny_clip: Path, tmp_path: Path) -> Path:
    """Two files of 7 and 5 rows, in units of 5, 5 and 2 rows."""
    write_file(tmp_path / "captions", "b.parquet", 0, 7)
    write_file(tmp_path / "captions", "c.parquet", 7, 12)
    return write_job(tmp_path, tmp_path / "captions", None, tiny_clip, samples_per_shard=5)


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    return tmp_path / "captions"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def ids(root: Path) -> list[str]:
    return [sample["id"] for sample in EmbeddingDataset(root)]


def test_files_under_other_names_are_the_same_input(job: Path, captions: Path, out: Path) -> None:
    """Also where the new names sort otherwise, and for files of equal content."""
    edit(job, "captions", id_column=None)
    shutil.copy(captions / "b.parquet", captions / "d.parquet")
    expect(0, "run", job)
    before = dataset_bytes(out)
    (captions / "b.parquet").rename(captions / "z.parquet")
    (captions / "d.parquet").rename(captions / "a.parquet")
    record_path(out, 1).unlink()
    expect(0, "run", job)
    assert dataset_bytes(out) == before
    assert "input, as named when planned: b.parquet, row 1 " in expect(0, "info", out, "--id", "1")
    size = (captions / "c.parquet").stat().st_size
    rows = {"id": [f"s{i}" for i in range(7, 12)], "text": [t.title() for t in TEXTS[7:12]]}
    pq.write_table(pa.table(rows), captions / "c.parquet")
    assert (captions / "c.parquet").stat().st_size == size
    assert "c.parquet: changed (same size, other content)" in expect(3, "run", job)
    write_file(captions, "c.parquet", 8, 14)
    now = (captions / "c.parquet").stat().st_size
    assert f"c.parquet: changed (bytes {size:,} -> {now:,})" in expect(3, "run", job)
    (captions / "a.parquet").unlink()
    assert "d.parquet: removed" in expect(3, "run", job, "--extend")


def test_added_files_are_refused_with_the_ways_on(job: Path, captions: Path) -> None:
    expect(0, "run", job)
    write_file(captions, "a.parquet", 12, 20)
    said = expect(3, "run", job)
    assert "a.parquet: added" in said
    assert "--extend" in said
    assert "--reuse" in said
    assert "EmbeddingDataset([" in said


def test_an_extension_keeps_every_byte_of_the_old_units(
    job: Path, captions: Path, out: Path, tmp_path: Path
) -> None:
    expect(0, "run", job, "--extend")  # the first time there is nothing to extend
    before = dataset_bytes(out)
    assert "no caption file was added" in expect(0, "run", job, "--extend")
    assert dataset_bytes(out) == before
    write_file(captions, "a.parquet", 12, 20)
    expect(0, "run", job, "--extend")
    after = dataset_bytes(out)
    kept = [name for name in before if name.startswith(("shards", "plan", "null"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert ids(out) == [f"s{i}" for i in range(20)]
    plan = read_plan(out)
    assert [plan.unit_rows(unit) for unit in range(plan.num_units)] == [
        *((0, 5), (5, 5), (10, 2), (12, 5), (17, 3))
    ]
    expect(0, "run", job)  # without --extend it is the dataset that it is
    for name, first, end in (("0.parquet", 20, 21), ("empty.parquet", 0, 0)):
        write_file(captions, name, first, end)
        expect(0, "run", job, "--extend")
    assert ids(out) == [f"s{i}" for i in range(21)]
    expect(0, "verify", out)
    assert "complete" in expect(0, "status", out)
    assert ", extended 3 times" in expect(0, "info", out)
    assert "0.parquet, row 0 (row 20" in expect(0, "info", out, "--id", "s20")
    at_once = tmp_path / "at once"
    expect(0, "run", job, "--output.path", at_once)
    whole, extended = EmbeddingDataset(at_once), EmbeddingDataset(out)
    for sample in whole:
        same = extended[extended.index_of(sample["id"])]
        assert sample["text_clip"].equal(same["text_clip"])


def test_an_extension_that_is_not_finished(job: Path, captions: Path, out: Path) -> None:
    """The dataset can be read as it was; a plain run goes on."""
    expect(0, "run", job)
    write_file(captions, "a.parquet", 12, 20)
    said = expect(0, "plan", job, "--extend", "--write")
    assert "1 file more, with 8 samples" in said
    assert "5 shards of up to 5 samples; 3 of 5 shards are there already, 28 files" in said
    assert "for the rest" in said
    assert ids(out) == [f"s{i}" for i in range(12)]
    said = expect(5, "status", out)
    assert "3 of 5 units committed" in said
    assert "first 12 samples can be read" in said
    assert "no problems in what is committed" in expect(5, "verify", out)
    expect(5, "repair", out)
    expect(5, "finalize", out)
    assert ids(out) == [f"s{i}" for i in range(12)]
    write_file(captions, "d.parquet", 20, 23)
    assert "d.parquet: added" in expect(3, "run", job)
    (captions / "d.parquet").unlink()
    expect(0, "run", job)
    assert ids(out) == [f"s{i}" for i in range(20)]
    whole = dataset_bytes(out)
    (out / "plan-0001.json").write_text("{}")
    assert "plan-0001.json" in expect(4, "verify", out)
    assert "--write --extend" in expect(5, "repair", out)
    expect(0, "run", job, "--extend")
    found = dataset_bytes(out)
    assert {name: found[name] for name in whole} == whole


def test_units_before_and_after_that_are_damaged_are_made_again(
    job: Path, captions: Path, out: Path
) -> None:
    expect(0, "run", job)
    write_file(captions, "a.parquet", 12, 20)
    expect(0, "run", job, "--extend")
    whole = dataset_bytes(out)
    for unit in (2, 3):
        record_path(out, unit).write_text("{}")
    expect(4, "verify", out)
    expect(5, "repair", out)
    expect(0, "run", job)
    found = dataset_bytes(out)
    assert {name: found[name] for name in whole} == whole


def test_an_extension_is_taken_back(job: Path, captions: Path, out: Path) -> None:
    expect(0, "run", job)
    before = dataset_bytes(out)
    added = write_file(captions, "a.parquet", 12, 20)
    expect(0, "plan", job, "--extend", "--write")
    write_file(captions, "b2.parquet", 20, 22)
    expect(0, "run", job, "--extend")  # while the first extension is not begun
    for name in ("plan-0001.json", "plan-0002.json"):
        (out / name).unlink()
    added.unlink()
    (captions / "b2.parquet").unlink()
    assert "only units below 3" in expect(4, "verify", out)
    said = expect(5, "status", out)
    assert f"plan is gone: `embed-precompute repair {out}` moves them away" in said
    assert "finalize" not in said
    said = expect(0, "repair", out)
    assert "moved away: 3 units (3, 4, 5), beyond the plan's last" in said
    assert "open again" not in said
    assert "complete" in expect(0, "status", out)
    expect(0, "run", job)
    found = dataset_bytes(out)
    assert {name: found.get(name) for name in before} == before
    assert "no problems" in expect(0, "verify", out)


@pytest.mark.parametrize("damage", [None, b"{}", b""])
def test_a_plan_that_was_extended_is_mended(
    job: Path, captions: Path, out: Path, damage: bytes | None
) -> None:
    """Nothing reads it until the extension is taken back."""
    expect(0, "run", job)
    before = dataset_bytes(out)
    added = write_file(captions, "a.parquet", 12, 20)
    expect(0, "run", job, "--extend")
    (out / "plan.json").unlink()
    if damage is not None:
        (out / "plan.json").write_bytes(damage)
    assert f"{out / 'plan.json'}: found no file, or a damaged one" in expect(4, "verify", out)
    expect(0, "repair", out)
    assert "no problems" in expect(0, "verify", out)
    (out / "plan-0001.json").unlink()
    added.unlink()
    expect(0, "repair", out)
    expect(0, "run", job)
    assert {name: dataset_bytes(out).get(name) for name in before} == before


def test_units_of_an_extension_whose_plan_is_gone(job: Path, captions: Path, out: Path) -> None:
    """They are not taken for those of another extension."""
    expect(0, "run", job)
    added = write_file(captions, "a.parquet", 12, 20)
    expect(0, "run", job, "--extend")
    (out / "plan-0001.json").unlink()
    added.unlink()
    write_file(captions, "d.parquet", 20, 28)
    said = expect(3, "run", job, "--extend")
    assert "units of another extension" in said
    assert f"`embed-precompute repair {out}`" in said
    expect(0, "repair", out)
    expect(0, "run", job, "--extend")
    assert ids(out) == [f"s{i}" for i in (*range(12), *range(20, 28))]


def test_what_cannot_be_an_extension(job: Path, captions: Path, out: Path) -> None:
    expect(2, "run", job, "--extend", "--limit", "3")
    expect(0, "run", job)
    write_file(captions, "a.parquet", 11, 20)
    said = expect(2, "run", job, "--extend")
    assert "a.parquet, row 0 (rows count from 0): column 'id' repeats id 's11'" in said
    write_file(captions, "a.parquet", 12, 20)
    words = ("--encoders.clip.max_length", "60")
    assert "max_length: 77 -> 60" in expect(3, "run", job, "--extend", *words)
    assert [path.name for path in out.glob("plan*")] == ["plan.json"]


def test_added_rows_of_another_padded_length_are_refused(
    captions: Path, tmp_path: Path, tiny_t5: Path
) -> None:
    captions.mkdir()
    fields = {"max_length": 24, "added_tokens": "added", "seq_align": 8}
    job = write_job(tmp_path, captions, tiny_t5, None, **fields)

    def write(name: str, rows: dict[str, int]) -> None:
        table = {"id": list(rows), "text": TEXTS[: len(rows)], "added": list(rows.values())}
        pq.write_table(pa.table(table), captions / name)

    write("b.parquet", {"one": 8, "two": 16})
    expect(0, "run", job)
    write("a.parquet", {"three": 9})
    assert "24 (2 rows), 31 (1 rows)" in expect(2, "run", job, "--extend")
    write("a.parquet", {"three": 24})
    expect(0, "run", job, "--extend")


def test_a_limited_dataset_is_not_extended(job: Path, captions: Path) -> None:
    expect(0, "run", job, "--limit", "3")
    write_file(captions, "a.parquet", 12, 20)
    said = expect(3, "run", job, "--extend")
    assert "limit: 3 -> null" in said
    assert "--reuse" in said


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_added_files_never_change_the_text_of_earlier_rows(
    job: Path, captions: Path, out: Path, name: str
) -> None:
    """In a table of text a column has one type: beside 24.5 each 24 would become 24.0."""

    def put(name: str, first: int, fps: str) -> None:
        if name.endswith(".csv"):
            text = "id,text,fps\n" + "".join(f"{i},x,{fps}\n" for i in range(first, first + 5))
        else:
            line = '{"id": %d, "text": "x", "fps": %s}\n'
            text = "".join(line % (i, fps) for i in range(first, first + 5))
        (captions / name).write_text(text)

    for path in captions.iterdir():
        path.unlink()
    edit(job, "captions", recipe={"kind": "template", "template": "{text} at {fps}"})
    put(name, 0, "24")
    expect(0, "run", job)
    put(f"b{name}", 5, "24.5")
    said = expect(3, "run", job, "--extend")
    assert "column 'fps' (captions.recipe) is double with the files that were added" in said
    put(f"b{name}", 5, "25")
    expect(0, "run", job, "--extend")
    dataset = EmbeddingDataset(out)
    assert [dataset.encoded_text(i) for i in (0, 9)] == ["x at 24", "x at 25"]
