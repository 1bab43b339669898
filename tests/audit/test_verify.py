"""verify, status and info: all damage is found and named, none of it crashes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from handmade import (
    embedding,
    make_plan,
    samples_of,
    write_dataset,
    write_null,
    write_plan,
    write_unit,
    write_units,
)

from embed_precompute.audit.info import dataset_lines, read_status, sample_lines
from embed_precompute.audit.verify import verify
from embed_precompute.errors import InputError
from embed_precompute.samples import Sample, Status
from embed_precompute.store.commit import digest_file, replace_bytes
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import unit_paths
from embed_precompute.store.sealed import read_sealed, seal

TEXTS = ["a b c", None, "", "nan", "a b c", "d e", "f é", "a b c"]
STRIDE = 17
"""Of each file every 17th byte, its first and its last are changed; 1 takes minutes."""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "out", TEXTS)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One unit of three samples; whoever changes it changes it back."""
    folder = tmp_path_factory.mktemp("verify") / "out"
    write_dataset(folder, ["a b c", None, "nan"])
    return folder


def files_of(root: Path) -> list[str]:
    return sorted(str(p.relative_to(root)) for p in root.rglob("*") if p.is_file())


def problems(root: Path, level: Any = "full") -> list[str]:
    return verify(root, level).problems


# --- sound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["quick", "full"])
def test_sound_dataset(root: Path, level: Any) -> None:
    report = verify(root, level)
    assert (report.problems, report.notes) == ([], [])
    assert (report.num_units, report.num_missing, report.num_samples) == (3, 0, 8)
    assert "3 of 3 units, 8 samples, finalised" in report.summary()
    assert report.summary().endswith("no problems")


@pytest.mark.parametrize("level", ["quick", "full"])
def test_verify_changes_nothing(root: Path, level: Any) -> None:
    def state() -> list[tuple[str, int, bytes]]:
        return [(n, (root / n).stat().st_mtime_ns, (root / n).read_bytes()) for n in files_of(root)]

    before = state()
    verify(root, level)
    assert state() == before


@pytest.mark.parametrize("level", ["quick", "full"])
def test_captions_in_lists(tmp_path: Path, level: Any) -> None:
    plan = make_plan(num_rows=3, samples_per_shard=2, num_samples=5)
    write_plan(tmp_path, plan)
    write_null(tmp_path, plan)
    rows = [("0#0", 0), ("0#1", 0), ("1#0", 1)]
    write_unit(tmp_path, plan, 0, [Sample(name, row, f"text {name}") for name, row in rows])
    empty = Sample("2#0", 2, None, Status.EMPTY_LIST, "no captions")
    write_unit(tmp_path, plan, 1, [empty, Sample("2#1", 2, "x")])
    assert problems(tmp_path, level) == []
    finalize(tmp_path)
    assert problems(tmp_path, level) == []


def test_unfinished_dataset(tmp_path: Path) -> None:
    write_units(tmp_path, TEXTS)
    assert "not finalised" in verify(tmp_path).summary()
    os.unlink(unit_paths(tmp_path, 1).record)
    os.unlink(tmp_path / "null.json")
    report = verify(tmp_path)
    assert report.problems == []
    assert report.num_missing == 1
    assert "1 units lack a record, and so does the null embedding" in report.summary()
    assert sum("shard-000001" in note and "no record" in note for note in report.notes) == 2
    payload = bytearray(unit_paths(tmp_path, 2).shard.read_bytes())
    payload[-1] ^= 1
    unit_paths(tmp_path, 2).shard.write_bytes(payload)
    assert "shard-000002.safetensors: found sha256" in problems(tmp_path)[0]


def test_stray_files_are_notes(root: Path) -> None:
    strays = ["x", "shards/000/.tmp-shard-1", "shards/000/shard-000000.pt", "index/x.npy"]
    strays += ["shards/001/shard-000002.json", "shards/000/shard-000009.safetensors"]
    for name in strays:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    for name in ("logs", "_quarantine"):
        (root / name).mkdir()
        (root / name / "x").write_bytes(b"x")
    report = verify(root)
    assert report.problems == []
    assert len(report.notes) == len(strays)
    for name in strays:
        assert any(note.startswith(f"{root / name} ") for note in report.notes)
        assert str(root / name) in report.summary()


def test_no_dataset(tmp_path: Path) -> None:
    for call in (verify, read_status, dataset_lines):
        with pytest.raises(InputError, match="is not a folder"):
            call(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no dataset"):
        verify(tmp_path)
    with pytest.raises(InputError, match="not a dataset"):
        read_status(tmp_path)
    (tmp_path / "shards").mkdir()
    assert "plan.json: found No such file" in problems(tmp_path)[0]
    with pytest.raises(InputError, match="expected quick, full or deep"):
        verify(tmp_path, "deeper")  # type: ignore[arg-type]


# --- damaged bytes --------------------------------------------------------------------------------


def test_every_changed_byte_is_found(small: Path) -> None:
    flips = 0
    for name in files_of(small):
        path = small / name
        sound = path.read_bytes()
        offsets = {*range(0, len(sound), STRIDE), len(sound) - 1}
        for offset in sorted(offsets):
            damaged = bytearray(sound)
            damaged[offset] ^= 1 << (offset % 8)
            path.write_bytes(damaged)
            found = problems(small)
            assert any(path.name in line for line in found), f"{name} byte {offset}: {found}"
            flips += 1
        path.write_bytes(sound)
    assert flips > 12_000 // STRIDE
    assert problems(small) == []


@pytest.mark.parametrize("level", ["quick", "full"])
@pytest.mark.parametrize("change", ["missing", "empty", "cut", "longer", "folder", "unreadable"])
def test_every_file_matters(small: Path, level: Any, change: str) -> None:
    for name in files_of(small):
        path = small / name
        sound = path.read_bytes()
        path.unlink()
        if change == "folder":
            path.mkdir()
        elif change == "unreadable":
            os.mkfifo(path)  # opening it would block
        elif change != "missing":
            cut = {"empty": b"", "cut": sound[:-1], "longer": sound + b"\0"}
            path.write_bytes(cut[change])
        if name == "manifest.json" and change == "missing":
            assert not verify(small, level).finalised
        else:
            found = problems(small, level)
            assert any(path.name in line for line in found), f"{name}: {found}"
        if change == "folder":
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(sound)
    assert problems(small, level) == []


def test_two_shards_swapped(tmp_path: Path) -> None:
    write_dataset(tmp_path, ["a b", "c d"], samples_per_shard=1)
    first, second = (unit_paths(tmp_path, unit).shard for unit in (0, 1))
    payload = first.read_bytes()
    assert len(payload) == second.stat().st_size
    first.write_bytes(second.read_bytes())
    second.write_bytes(payload)
    for level in ("quick", "full"):
        found = problems(tmp_path, level)
        assert any("shard-000000.safetensors" in line for line in found)
        assert any("shard-000001.safetensors" in line for line in found)


@pytest.mark.parametrize("text", [b"{}", b"[]", b"null", b"{" * 5000, b"\xff", b'{"a":NaN}', b""])
@pytest.mark.parametrize("level", ["quick", "full"])
def test_json_of_any_content_is_a_problem(root: Path, text: bytes, level: Any) -> None:
    names = [name for name in files_of(root) if name.endswith(".json")]
    for name in names:
        (root / name).write_bytes(text)
    found = problems(root, level)
    for name in names:
        assert any(str(root / name) in line for line in found), name


# --- sealed again: only the meaning is wrong ------------------------------------------------------


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = read_sealed(path)
    change(content)
    replace_bytes(path, seal(content))


PLAN_CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "extra key": lambda plan: plan.update(x=1),
    "fewer rows": lambda plan: plan.update(num_rows=7),
    "more units": lambda plan: plan.update(num_units=4),
    "other samples": lambda plan: plan.update(num_samples=9),
    "other shard size": lambda plan: plan.update(samples_per_shard=4),
    "other input": lambda plan: plan["inputs"][0].update(rows=9),
    "other spec": lambda plan: plan["spec"]["encoders"]["t5"].update(x=1),
    "no column": lambda plan: plan.pop("columns"),
    "inputs": lambda plan: plan.update(inputs=[1]),
}


@pytest.mark.parametrize("name", PLAN_CHANGES)
@pytest.mark.parametrize("level", ["quick", "full"])
def test_plan_of_wrong_meaning(tmp_path: Path, name: str, level: Any) -> None:
    write_units(tmp_path, TEXTS)
    edit(tmp_path / "plan.json", PLAN_CHANGES[name])
    assert any("plan.json" in line for line in problems(tmp_path, level))


RECORD_CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "extra key": lambda record: record.update(x=1),
    "other unit": lambda record: record.update(unit=1),
    "other rows": lambda record: record.update(first_row=1),
    "other plan": lambda record: record.update(plan="0" * 64),
    "other status": lambda record: record["status"].update(ok=1, error=1),
    "other tokens": lambda record: record["encoders"]["t5"].update(tokens=1),
    "other texts": lambda record: record.update(rows_sha256="0" * 64),
    "path": lambda record: record["files"]["shard"].update(name="../x"),
}


@pytest.mark.parametrize("name", RECORD_CHANGES)
@pytest.mark.parametrize("finalised", [False, True])
def test_record_of_wrong_meaning(tmp_path: Path, name: str, finalised: bool) -> None:
    write_units(tmp_path, TEXTS)
    if finalised:
        finalize(tmp_path)
    edit(unit_paths(tmp_path, 0).record, RECORD_CHANGES[name])
    assert any("shard-000000" in line or "manifest" in line for line in problems(tmp_path))


MANIFEST_CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "extra key": lambda manifest: manifest.update(x=1),
    "missing key": lambda manifest: manifest.pop("environments"),
    "fingerprint": lambda manifest: manifest.update(fingerprint="0" * 64),
    "counts": lambda manifest: manifest["counts"].update(stored=1),
    "status": lambda manifest: manifest["counts"]["status"].update(ok=1),
    "records": lambda manifest: manifest.update(records_sha256="0" * 64),
    "environments": lambda manifest: manifest["environments"][0].update(units=1),
    "encoders": lambda manifest: manifest["encoders"]["t5"].update(dim=5),
    "path": lambda manifest: manifest["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
    "entry": lambda manifest: manifest["files"].update({"plan.json": 1}),
    "other file": lambda manifest: manifest["files"].pop("index/ok.npy"),
    "no files": lambda manifest: manifest.update(files=[]),
}


@pytest.mark.parametrize("name", MANIFEST_CHANGES)
@pytest.mark.parametrize("level", ["quick", "full"])
def test_manifest_of_wrong_meaning(root: Path, name: str, level: Any) -> None:
    edit(root / "manifest.json", MANIFEST_CHANGES[name])
    assert any("manifest.json" in line for line in problems(root, level))


def reseal(root: Path, name: str) -> None:
    """Puts the present size and digest of file `name` into manifest.json."""
    stored = digest_file(root / name)

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"bytes": stored.bytes, "sha256": stored.sha256}

    edit(root / "manifest.json", change)


INDEX = ("status", "shard", "index", "ok", "shards", "ids", "id_hash", "id_order")
PER_ENCODER = ("length_t5", "length_clip", "xxh3_t5", "xxh3_clip")


@pytest.mark.parametrize("name", [*INDEX, *PER_ENCODER])
def test_index_of_other_values(root: Path, name: str) -> None:
    path = root / "index" / f"{name}.npy"
    array = np.load(path)
    array.reshape(-1)[-1] ^= 1
    np.save(path, array)
    reseal(root, f"index/{name}.npy")
    found = problems(root)
    named = "id_hash" if name == "id_order" else name
    assert any(f"{named}.npy" in line for line in found), found


@pytest.mark.parametrize("column", ["sample_id", "row", "status", "t5_tokens", "text_sha256"])
def test_manifest_table_of_other_values(root: Path, column: str) -> None:
    path = root / "manifest.parquet"
    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    values[-1] = values[0] if values[0] != values[-1] else values[-1] * 2
    at = table.column_names.index(column)
    changed = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.types[at]))
    pq.write_table(changed, path, store_schema=False)
    reseal(root, "manifest.parquet")
    found = problems(root)
    assert len(found) == 1
    assert f"manifest.parquet: found other values of {column} in rows 6 to 7" in found[0]


def write_one(root: Path, samples: Sequence[Sample]) -> None:
    """A dataset that is not finalised: one unit of three rows with these samples."""
    plan = make_plan(num_rows=3, samples_per_shard=3)
    write_plan(root, plan)
    write_null(root, plan)
    write_unit(root, plan, 0, samples)


@pytest.mark.parametrize(
    ("rows", "finding"),
    [((0, 1), "last row"), ((0, 1, 1, 2), "4 samples"), ((0, 2, 2), "order"), ((1, 1, 2), "order")],
)
def test_rows_that_are_not_covered_once(tmp_path: Path, rows: Sequence[int], finding: str) -> None:
    write_one(tmp_path, [Sample(f"s{k}", row, "x") for k, row in enumerate(rows)])
    found = problems(tmp_path)
    assert any(finding in line and "shard-000000" in line for line in found), found


def test_equal_ids(tmp_path: Path) -> None:
    """Finalised or not, in one unit or in two."""
    plan = make_plan(num_rows=4, samples_per_shard=3)
    write_plan(tmp_path, plan)
    write_null(tmp_path, plan)
    write_unit(tmp_path, plan, 0, [*samples_of(["a", "b"]), Sample("s0", 2, "c")])
    write_unit(tmp_path, plan, 1, [Sample("s1", 3, "b")])
    for finish in (False, True):
        if finish:
            finalize(tmp_path)
        found = problems(tmp_path)
        assert len(found) == 2
        assert "shard-000000.rows.parquet: found sample id 's0'" in found[0]
        assert "shard-000001.rows.parquet: found sample id 's1'" in found[1]


def test_texts_that_contradict_the_status(tmp_path: Path) -> None:
    samples = samples_of(["a", "b", "c"])
    samples[1] = Sample("s1", 1, None, Status.NULL_TEXT, "text is null")
    samples[2] = Sample("s2", 2, "c", Status.OK, None)
    write_one(tmp_path, samples)
    path = unit_paths(tmp_path, 0).rows
    table = pq.read_table(path)
    at = table.column_names.index("text")
    texts = pa.array(["a", "no longer null", "C"], pa.string())
    pq.write_table(table.set_column(at, "text", texts).cast(table.schema), path, store_schema=False)
    stored = digest_file(path)

    def change(record: dict[str, Any]) -> None:
        record["files"]["rows"].update(bytes=stored.bytes, sha256=stored.sha256)

    edit(unit_paths(tmp_path, 0).record, change)
    found = problems(tmp_path)
    assert any("rows_sha256" in line for line in found)
    assert sum("text_sha256" in line for line in found) == 2


# --- status and info ------------------------------------------------------------------------------


def test_status_while_a_dataset_is_made(tmp_path: Path) -> None:
    plan = make_plan(num_rows=len(TEXTS), samples_per_shard=3)
    write_plan(tmp_path, plan)
    status = read_status(tmp_path)
    assert (status.complete, status.samples_done, status.null_done) == (False, 0, False)
    assert "none yet" in "\n".join(status.lines())
    samples = samples_of(TEXTS)
    write_unit(tmp_path, plan, 1, samples[3:6])
    status = read_status(tmp_path)
    assert (status.units_done, status.samples_done, status.failed_samples) == (1, 3, 1)
    assert not status.complete
    write_null(tmp_path, plan)
    write_unit(tmp_path, plan, 0, samples[:3])
    write_unit(tmp_path, plan, 2, samples[6:])
    status = read_status(tmp_path)
    assert (status.units_done, status.finalised, status.complete) == (3, False, False)
    assert "embed-precompute finalize" in status.lines()[-1]
    before = status.to_json()
    finalize(tmp_path)
    status = read_status(tmp_path)
    assert status.complete
    assert status.to_json() == {**before, "complete": True, "finalised": True}
    assert status.to_json()["status"] == {
        **{"ok": 6, "null_text": 1, "non_finite": 1},
        **{"invalid_text": 0, "empty_list": 0, "error": 0},
    }
    assert "complete, 3 of 3 units done" in status.lines()[0]


def test_status_does_not_trust_a_foreign_manifest(root: Path) -> None:
    edit(root / "manifest.json", lambda manifest: manifest.update(plan="0" * 64))
    assert not read_status(root).complete
    unit_paths(root, 0).record.unlink()
    assert (read_status(root).units_done, read_status(root).samples_done) == (2, 5)


def test_dataset_lines(root: Path) -> None:
    text = "\n".join(dataset_lines(root))
    for part in (
        read_status(root).fingerprint,
        "1 files, 8 rows, text column 'text', id column 'id'",
        "text_t5: one vector per token, width 4, bfloat16",
        "6 embeddings stored for 8 samples",
        "3 units made with device cpu, torch 2.0",
    ):
        assert part in text
    (root / "manifest.json").unlink()
    assert "not finalised" in "\n".join(dataset_lines(root))


@pytest.mark.parametrize("finalised", [True, False])
def test_sample_lines(root: Path, finalised: bool) -> None:
    if not finalised:
        (root / "manifest.json").unlink()
    text = "\n".join(sample_lines(root, "s6"))
    norm = float(embedding("clip", "f é").double().norm())
    for part in (
        "a.parquet, row 6",
        "status: ok",
        "encoded text: 'f é'",
        "shards/000/shard-000002.safetensors, row 0",
        "text_t5: 3 tokens, stored [3, 4] bfloat16",
        f"L2 norm {norm:.4f}, finite",
    ):
        assert part in text
    assert "status: null_text (text is null)" in sample_lines(root, "s1")
    assert "encoded text: none" in sample_lines(root, "s1")
    assert any("non_finite (text_" in line for line in sample_lines(root, "s3"))
    with pytest.raises(InputError, match=r"'s99' is not in .*any of its 3 units"):
        sample_lines(root, "s99")


def test_sample_lines_show_damage(root: Path) -> None:
    path = unit_paths(root, 2).shard
    payload = bytearray(path.read_bytes())
    payload[-1] ^= 1
    path.write_bytes(payload)
    assert any("DAMAGED" in line for line in sample_lines(root, "s7"))
    assert not any("DAMAGED" in line for line in sample_lines(root, "s6"))
