"""Documents: what is read is what was written, and is of its unit."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from handmade import (
    make_plan,
    output,
    paths_of,
    rewrite_json,
    samples_of,
    write_dataset,
    write_null,
    write_plan,
    write_unit,
    write_units,
)

from embed_precompute.documents import MismatchError, digest_of
from embed_precompute.errors import IncompleteError, InputError, VerificationError
from embed_precompute.store.commit import publish_bytes
from embed_precompute.store.index import read_manifest
from embed_precompute.store.plan import Inputs, Plan, match_files, read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    StoredTensor,
    committed_units,
    read_json,
    read_null_record,
    read_record,
    record_path,
    stored_tensors,
    unit_path,
    unnamed_files,
)

# --- documents ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 100_000,
        b"[]",
        b"NaN",
        b'{"format_version":1,"x":1e999}',
        b'{"format_version":1,"x":"\\ud800"}',
        b'{"format_version":2}',
        b'{"format_version":1,"format_version":1,"digest":""}',
        b'{"format_version":1,"n":' + b"9" * 5000 + b"}",
        b'"' + b"x" * (17 << 20),
    ],
    ids=range(9),
)
def test_hostile_json(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "x").write_bytes(payload)
    with pytest.raises(VerificationError):
        read_json(tmp_path / "x")


# --- what is stored -------------------------------------------------------------------------------


def test_stored_tensors() -> None:
    spec = copy.deepcopy(make_plan(1, 1).spec)
    hidden = {"suffix": "_hidden", "per": "token", "width": 9, "positions": "all"}
    spec["encoders"]["clip"]["outputs"].append(hidden)
    assert stored_tensors(spec) == (
        StoredTensor("clip", "clip", "caption", 3, "bfloat16"),
        StoredTensor("clip_hidden", "clip", "token", 9, "bfloat16", "all"),
        StoredTensor("t5", "t5", "token", 4, "bfloat16", "real"),
    )


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        ("output.codec", "zstd", "spec.output.codec is 'zstd'"),
        ("output.dtype", "int8", "spec.output.dtype is 'int8'"),
        ("encoders", {}, "no output"),
        ("encoders", {"../t5": {}}, "the key"),
        ("encoders.t5.outputs", [output("token", 0, "all")], "width is 0"),
        ("encoders.t5.outputs", [output("caption", 1, "real")], r"outputs\[0\].positions is real"),
        ("encoders.t5.outputs", [{**output("token", 1, "all"), "suffix": "/x"}], "suffix is '/x'"),
        ("encoders.a_xxh3", {"outputs": [output("token", 1, "all")]}, "makes text_a_xxh3"),
        ("encoders.t5.outputs", [output("token", 1, "all")] * 2, "makes text_t5"),
    ],
)
def test_spec_is_checked(where: str, value: Any, message: str) -> None:
    spec = copy.deepcopy(make_plan(1, 1).spec)
    *path, last = where.split(".")
    owner = spec
    for key in path:
        owner = owner[key]
    owner[last] = value
    with pytest.raises(MismatchError, match=message):
        stored_tensors(spec)


# --- plan -----------------------------------------------------------------------------------------


def test_plan(tmp_path: Path) -> None:
    plan = make_plan(10, 4)
    write_plan(tmp_path, plan)
    assert read_plan(tmp_path) == plan
    assert (plan.num_units, plan.unit_rows(1), plan.unit_rows(2)) == (3, (4, 4), (8, 2))
    assert plan.fingerprint == digest_of(plan.spec)
    assert make_plan(10, 5).plan_id != plan.plan_id
    assert make_plan(10, 5).fingerprint == plan.fingerprint
    (tmp_path / "plan.json").unlink()
    with pytest.raises(InputError, match=r"no plan\.json"):
        read_plan(tmp_path)
    with pytest.raises(InputError, match="is not a folder"):
        read_plan(tmp_path / "absent")


def test_an_extended_plan_has_the_earlier_ones() -> None:
    first = make_plan(10, 4)
    files = [
        dataclasses.replace(first.inputs.files[0], path=f"{rows}", rows=rows) for rows in (0, 5)
    ]
    second = first.extended(files[:1], 10)
    third = second.extended(files[1:], 7 + 10)
    assert [plan.num_units for plan in (first, second, third)] == [3, 3, 5]
    assert [third.unit_rows(unit) for unit in (2, 3, 4)] == [(8, 2), (10, 4), (14, 1)]
    ids = [plan.plan_id for plan in (first, first, third)]
    assert [third.plan_id_of(unit) for unit in (NULL_UNIT, 2, 3)] == ids
    assert [third.as_of(plan.plan_id) for plan in (first, second, third)] == [first, second, third]
    assert first.as_of(third.plan_id) is None
    assert third.file_name == "plan-0002.json"


def test_files_are_matched_by_content_one_to_one() -> None:
    file = make_plan(1, 1).inputs.files[0]
    a, b, c = (dataclasses.replace(file, path=name) for name in "abc")
    other = dataclasses.replace(a, content_xxh3="1" * 32)
    assert match_files([a, b], [c, b]) == ([0, 1], [])
    assert match_files([a, b], [b, a, c]) == ([1, 0], [2])
    assert match_files([a, b, c], [other, b]) == ([None, 1, None], [0])


def test_no_plan_with_names_that_clash() -> None:
    plan = make_plan(2, 1)
    spec = {**plan.spec, "encoders": {"a_mask": {"outputs": [output("token", 4, "real")]}}}
    with pytest.raises(InputError, match="text_a_mask"):
        Plan.make(spec, plan.inputs, samples_per_shard=1, num_rows=2, num_samples=2)
    empty = Inputs((), "text", None)
    with pytest.raises(InputError, match="num_rows is 2, and its inputs have 0"):
        Plan.make(plan.spec, empty, samples_per_shard=1, num_rows=2, num_samples=2)


PLAN_CHANGES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "there is no key x": lambda plan: plan.update(x=1),
    "num_rows is 9": lambda plan: plan.update(num_rows=9),
    "num_units is 4": lambda plan: plan.update(num_units=4),
    "plan_id is not": lambda plan: plan.update(samples_per_shard=5),
    "num_rows is 10": lambda plan: plan["inputs"]["files"][0].update(rows=11),
    "extends does not name": lambda plan: plan.update(
        extends=[{"plan_id": "0" * 64, "num_files": 1, "num_samples": 10}]
    ),
    "fingerprint is not": lambda plan: plan["spec"]["encoders"]["t5"].update(x=1),
    "inputs.text_column is missing": lambda plan: plan["inputs"].pop("text_column"),
    r"inputs.files\[0\] is 1": lambda plan: plan["inputs"].update(files=[1]),
}


@pytest.mark.parametrize("message", PLAN_CHANGES)
def test_plan_is_checked(tmp_path: Path, message: str) -> None:
    write_plan(tmp_path, make_plan(10, 4))
    rewrite_json(tmp_path / "plan.json", PLAN_CHANGES[message])
    with pytest.raises(VerificationError, match=rf"plan\.json is not as the format.*{message}"):
        read_plan(tmp_path)


# --- records --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": 1}, "files has the name"),
        ({"extra": 1}, "there is no key extra"),
        ({"num_stored": -1}, "num_stored is -1"),
        ({"num_stored": 4}, "num_stored is more than"),
        ({"num_samples": 5}, "status does not add up"),
        ({"num_rows": 5}, "num_samples is less"),
        ({"status": {"ok": 4}}, "status has keys"),
        ({"rows_sha256": "x"}, "rows_sha256 is 'x'"),
        ({"files": {"shard": {}}}, "files.shard.name is missing"),
        ({"kind": "null"}, "kind 'null'"),
    ],
)
def test_record_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    plan = make_plan(4, 4)
    write_unit(tmp_path, plan, 0, samples_of(["a", "b", None, "c"]))
    path = record_path(tmp_path, 0)
    rewrite_json(path, lambda record: record.update(change))
    with pytest.raises(VerificationError, match=message) as caught:
        read_record(tmp_path, 0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["../shard-000000.safetensors", "/etc/passwd", "shard-000001", ""])
def test_no_path_in_a_record_is_followed(tmp_path: Path, name: str) -> None:
    write_unit(tmp_path, make_plan(1, 1), 0, samples_of(["a"]))
    path = record_path(tmp_path, 0)
    rewrite_json(path, lambda record: record["files"]["shard"].update(name=name))
    with pytest.raises(VerificationError, match="files has the name"):
        read_record(tmp_path, 0)


def test_records(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match=r"shard-000001\.json.* not committed yet"):
        read_record(tmp_path, 1)
    with pytest.raises(IncompleteError, match=r"null\.json.* not committed yet"):
        read_null_record(tmp_path)
    plan = make_plan(3, 2)
    write_null(tmp_path, plan)
    record = write_unit(tmp_path, plan, 1, samples_of(["c"], 2))
    assert read_record(tmp_path, 1) == record
    assert record.shard_path(tmp_path).parent == tmp_path / "shards/000"
    assert all(path.is_file() for path in paths_of(tmp_path, 1))
    assert read_null_record(tmp_path).shard_path(tmp_path).is_file()
    shutil.copy(record_path(tmp_path, 1), record_path(tmp_path, 0))
    with pytest.raises(VerificationError, match="unit is 1, expected 0"):
        read_record(tmp_path, 0)


def test_manifest_lists_exactly_the_files_of_the_format(tmp_path: Path) -> None:
    write_dataset(tmp_path, ["a", "b"])
    path = tmp_path / "manifest.json"
    sound = path.read_bytes()
    for change in (
        lambda files: files.update({"../x": files["plan.json"]}),
        lambda files: files.update({f"null-{'0' * 16}.safetensors": files["plan.json"]}),
        lambda files: files.pop(next(name for name in files if name.startswith("null-"))),
        lambda files: files.pop("index/ok.npy"),
    ):
        path.write_bytes(sound)
        rewrite_json(path, lambda manifest, change=change: change(manifest["files"]))
        with pytest.raises(VerificationError, match=r"manifest\.json is not .* files has keys"):
            read_manifest(tmp_path)


# --- listings -------------------------------------------------------------------------------------


def test_committed_units_is_a_listing(tmp_path: Path) -> None:
    assert committed_units(tmp_path) == set()
    for unit in (0, 7, 1000, 1_234_567):
        publish_bytes(record_path(tmp_path, unit), b"not read")
    publish_bytes(unit_path(tmp_path, 5, "-0123456789abcdef.safetensors"), b"no record")
    (tmp_path / "shards/000/shard-001001.json").touch()  # in the wrong folder
    (tmp_path / "shards/000/shard-0000008.json").touch()
    (tmp_path / "shards/000/shard-000007.json.bak").touch()
    (tmp_path / "shards/000/.tmp-shard-000008.json-h-1-a").touch()
    (tmp_path / "shards/stray").touch()
    assert committed_units(tmp_path) == {0, 7, 1000, 1_234_567}
    assert record_path(tmp_path, 1_234_567).parent.name == "1234"
    assert record_path(tmp_path, NULL_UNIT) == tmp_path / "null.json"


def test_unnamed_files(tmp_path: Path) -> None:
    write_units(tmp_path, ["a", "b", "c", "d"], samples_per_shard=1)
    digest = "0123456789abcdef"
    strays = [
        tmp_path / f"null-{digest}.safetensors",
        tmp_path / f"shards/000/shard-000000-{digest}.rows.parquet",
        tmp_path / f"shards/000/shard-000001-{digest}.safetensors",
    ]
    for path in strays:
        path.touch()
    open_unit, damaged = paths_of(tmp_path, 2), paths_of(tmp_path, 3)
    open_unit.record.unlink()
    damaged.record.write_bytes(b"{}")  # what it named is not known
    for name in ("shard-000001.safetensors", "x", f"shard-001000-{digest}.safetensors"):
        (tmp_path / "shards/000" / name).touch()  # these are not ours
    damaged.shard.with_name(f"shard-000003-{digest}.safetensors").touch()
    assert set(unnamed_files(tmp_path)) == set(strays)
