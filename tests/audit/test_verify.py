"""verify, status and info: all damage is found and named, none of it crashes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from breaking import flip
from handmade import (
    embedding,
    files_of,
    make_plan,
    paths_of,
    restate_derived,
    rewrite_json,
    samples_of,
    write_dataset,
    write_null,
    write_plan,
    write_samples,
    write_unit,
    write_units,
)
from jobs import dataset_bytes, execute, expect

from embed_precompute.audit import shares
from embed_precompute.audit.info import all_lines, dataset_lines, read_status
from embed_precompute.audit.sample import sample_lines
from embed_precompute.audit.shares import check_shares
from embed_precompute.audit.verify import verify
from embed_precompute.distributed import DistContext
from embed_precompute.errors import EmbedPrecomputeError, InputError
from embed_precompute.samples import Sample, Status
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import document_bytes, read_json, record_path

TEXTS = ["a b c", None, "", "nan", "a b c", "d e", "f é", "a b c"]
OTHERS: tuple[Any, ...] = (None, -1, 10**17, 1.5, "", "../../x", [], {}, [[1]], {"a": {}}, True)
STRIDE = 13
"""Of all changes of a JSON field every 13th is tried (12 for each field); 1 takes minutes."""


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


def problems(root: Path, level: Any = "full") -> list[str]:
    return verify(root, level).problems


# --- sound ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["quick", "full"])
def test_sound_dataset(root: Path, level: Any) -> None:
    before = dataset_bytes(root)
    report = verify(root, level)
    assert (report.problems, report.notes) == ([], [])
    assert (report.num_units, report.num_missing, report.num_samples) == (3, 0, 8)
    assert "3 of 3 units, 8 samples, finalised" in report.summary()
    assert report.summary().endswith("no problems")
    assert dataset_bytes(root) == before


def test_captions_in_lists(tmp_path: Path) -> None:
    plan = make_plan(num_rows=3, samples_per_shard=4, num_samples=5)
    assert plan.rows_per_unit == 2
    rows = [("0#0", 0), ("0#1", 0), ("1#0", 1)]
    empty = Sample("2#0", 2, None, Status.EMPTY_LIST, "no captions")
    first = [Sample(name, row, f"text {name}") for name, row in rows]
    write_samples(tmp_path, plan, first, [empty, Sample("2#1", 2, "x")])
    assert problems(tmp_path) == problems(tmp_path, "quick") == []
    finalize(tmp_path)
    assert problems(tmp_path) == problems(tmp_path, "quick") == []


def test_unfinished_dataset(tmp_path: Path) -> None:
    write_units(tmp_path, TEXTS)
    said = expect(5, "verify", tmp_path)  # as `status`
    assert f"run `embed-precompute finalize {tmp_path}`\n  no problems in what is c" in said
    record_path(tmp_path, 1).unlink()
    (tmp_path / "null.json").unlink()
    report = verify(tmp_path)
    assert (report.problems, report.notes, report.num_missing) == ([], [], 1)
    assert "incomplete: 1 unit without a record, and no null embedding" in report.summary()
    expect(5, "verify", tmp_path)
    path = paths_of(tmp_path, 2).shard
    flip(path)
    assert f"`embed-precompute repair {tmp_path}` moves" in expect(4, "verify", tmp_path)
    assert f"{path} is damaged: row" in problems(tmp_path)[0]
    record_path(tmp_path, 0).write_bytes(b"{}")
    (tmp_path / "plan.json").unlink()  # then each unit is judged by its own record
    found = problems(tmp_path)
    assert len(found) == 3
    assert "plan.json" in found[0]
    assert str(record_path(tmp_path, 0)) in found[1]
    assert str(path) in found[2]


def test_stray_files_are_notes(root: Path) -> None:
    strays = ["x", "shards/000/.tmp-shard-1", "shards/000/shard-000000.pt", "index/x.npy"]
    strays += ["shards/001/shard-000002.json", "shards/000/shard-000000.safetensors"]
    strays += ["shards/000/shard-000002-0123456789abcdef.safetensors", "shards/x/y"]
    strays += ["null-0123456789abcdef.safetensors", "shards/001/shard-000002-0123.safetensors"]
    for name in (*strays, "logs/x", "_quarantine/x"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    report = verify(root)
    assert report.problems == []
    assert {note.split(" ")[0] for note in report.notes} == {str(root / name) for name in strays}
    assert all(note in report.summary() for note in report.notes)


def test_no_dataset(tmp_path: Path) -> None:
    for call in (verify, read_status, dataset_lines):
        with pytest.raises(InputError, match="is not a folder"):
            call(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no dataset"):
        verify(tmp_path)
    with pytest.raises(InputError, match="not a dataset"):
        read_status(tmp_path)
    (tmp_path / "shards").mkdir()
    assert "no plan.json" in problems(tmp_path)[0]
    with pytest.raises(InputError, match="expected quick, full or deep"):
        verify(tmp_path, "deeper")  # type: ignore[arg-type]


def test_the_answer_does_not_depend_on_how_many_ask(tmp_path: Path) -> None:
    root = tmp_path / "out"
    write_dataset(root, TEXTS)
    flip(paths_of(root, 1).shard)
    flip(paths_of(root, 2).rows)
    (root / "manifest.parquet").write_bytes(b"")
    alone = verify(root)
    assert len(alone.problems) == 3
    shared = verify(root, share=functools.partial(check_shares, root, 2, DistContext()))
    assert (shared.problems, shared.summary()) == (alone.problems, alone.summary())
    assert shared.num_ok == alone.num_ok
    ranks = execute("verify", str(root), nproc=2)
    assert ranks.stdout == "\n".join([*alone.problems, alone.summary(), ""])
    assert ranks.returncode != 0
    srun = execute("verify", str(root), env={"RANK": "1", "WORLD_SIZE": "2"})
    assert srun.returncode == 2
    assert "Start it by torchrun" in srun.stderr


def test_a_rank_that_finds_no_dataset_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a node that lacks the mount: rank 0 checks that rank's units itself, and says so."""

    class Board(dict[str, str]):
        set = dict.__setitem__

        def wait(self, keys: list[str], _: object) -> None:
            assert self.keys() == set(keys)

    board, root = Board(), tmp_path / "out"
    write_dataset(root, TEXTS)
    flip(paths_of(root, 1).shard)
    monkeypatch.setattr(shares, "connect_store", lambda _: board)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert "rank 1 checks nothing, rank 0 does:" in expect(0, "verify", tmp_path / "absent")
    monkeypatch.setenv("RANK", "0")
    assert "is damaged: row" in expect(4, "verify", root)


# --- damaged bytes --------------------------------------------------------------------------------


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


# --- digests made right: only the meaning is wrong ------------------------------------------------


def test_index_of_other_values(root: Path) -> None:
    for path in sorted((root / "index").iterdir()):
        sound, manifest = path.read_bytes(), (root / "manifest.json").read_bytes()
        array = np.load(path)
        array.reshape(-1)[-1] ^= 1
        np.save(path, array)
        restate_derived(root, f"index/{path.name}")
        (found,) = problems(root)
        assert f"{path.name}: found other values" in found
        path.write_bytes(sound)
        (root / "manifest.json").write_bytes(manifest)


@pytest.mark.parametrize("column", ["sample_id", "row", "status", "t5_tokens", "text_sha256"])
def test_manifest_table_of_other_values(root: Path, column: str) -> None:
    path = root / "manifest.parquet"
    table = pq.read_table(path)
    values = table.column(column).to_pylist()
    values[-1] = values[0] if values[0] != values[-1] else values[-1] * 2
    at = table.column_names.index(column)
    changed = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.types[at]))
    pq.write_table(changed, path, store_schema=False)
    restate_derived(root, "manifest.parquet")
    (found,) = problems(root)
    assert f"manifest.parquet: found other values of {column} in rows 6 to 7" in found


def test_equal_ids(tmp_path: Path) -> None:
    """Finalised or not, in one unit or in two."""
    first = [*samples_of(["a", "b"]), Sample("s0", 2, "c")]
    write_samples(tmp_path, make_plan(4, 3), first, [Sample("s1", 3, "b")])
    for finish in (False, True):
        if finish:
            finalize(tmp_path)
        found = problems(tmp_path)
        assert len(found) == 2
        assert f"{paths_of(tmp_path, 0).rows}: found sample id 's0'" in found[0]
        assert f"{paths_of(tmp_path, 1).rows}: found sample id 's1'" in found[1]


def variants(value: Any) -> Iterator[Any]:
    """A JSON value with one value in it replaced by each of some others, or taken out."""
    keys: Any = value if isinstance(value, dict) else ()
    if isinstance(value, list):
        keys = range(len(value[:1]))
    for key in keys:
        for changed in (*OTHERS, *variants(value[key])):
            copy = value.copy()
            copy[key] = changed
            yield copy
        yield {k: v for k, v in value.items() if k != key} if isinstance(value, dict) else value[1:]


@pytest.mark.parametrize(
    "name", ["plan.json", "manifest.json", "null.json", "shards/000/shard-000000.json"]
)
def test_any_field_changed_with_digests_made_right(tmp_path: Path, name: str) -> None:
    """A forger can make the digest right: still no command breaks, and verify rejects it."""
    write_dataset(tmp_path, ["a b c", None, "nan", "d e"])
    path = tmp_path / name
    sound, before = path.read_bytes(), dataset_bytes(tmp_path)
    content = read_json(path)
    content.pop("digest")
    acts = [read_status, dataset_lines, DatasetIndex, finalize]
    for changed in list(variants(content))[::STRIDE]:
        if changed == content:
            continue
        path.write_bytes(document_bytes(changed))
        assert verify(tmp_path).problems, changed
        for act in acts[:-1] if name == "manifest.json" else acts:
            with contextlib.suppress(EmbedPrecomputeError):
                act(tmp_path)
    path.write_bytes(sound)
    finalize(tmp_path)
    assert dataset_bytes(tmp_path) == before


# --- status and info ------------------------------------------------------------------------------


def test_status_while_a_dataset_is_made(tmp_path: Path) -> None:
    plan, samples = make_plan(len(TEXTS), samples_per_shard=3), samples_of(TEXTS)
    write_plan(tmp_path, plan)
    status = read_status(tmp_path)
    assert (status.complete, status.null_committed, sum(status.samples.values())) == (0, 0, 0)
    assert "none yet" in "\n".join(status.lines())
    write_unit(tmp_path, plan, 1, samples[3:6])
    status = read_status(tmp_path)
    assert (status.units_committed, sum(status.samples.values())) == (1, 3)
    assert (status.failed_samples, status.complete) == (1, False)
    write_null(tmp_path, plan)
    write_unit(tmp_path, plan, 0, samples[:3])
    write_unit(tmp_path, plan, 2, samples[6:])
    status = read_status(tmp_path)
    assert (status.units_committed, status.finalised, status.complete) == (3, False, False)
    assert "embed-precompute finalize" in status.lines()[-1]
    before = status.to_json()
    finalize(tmp_path)
    status = read_status(tmp_path)
    assert status.to_json() == {**before, "complete": True, "finalised": True}
    counts = {"ok": 6, "null_text": 1, "non_finite": 1}
    assert status.to_json()["status"] == {each.label: counts.get(each.label, 0) for each in Status}
    assert "complete, 3 of 3 units committed" in status.lines()[0]


def test_status_does_not_trust_a_foreign_manifest(root: Path) -> None:
    rewrite_json(root / "manifest.json", lambda manifest: manifest.update(plan_id="0" * 64))
    assert not read_status(root).complete
    record_path(root, 0).unlink()
    status = read_status(root)
    assert (status.units_committed, sum(status.samples.values())) == (2, 5)


def test_info_is_what_a_person_wants(root: Path) -> None:
    logs = root / "logs"
    logs.mkdir()
    for rank, begin in enumerate((1000.0, 1003.0)):
        lines = [
            {"time": begin + 5, "unit": rank, "samples": 3, "seconds": 5.0, "device": "cuda"},
            {"time": begin + 7, "unit": -1, "samples": 1, "seconds": 2.0, "device": "cuda"},
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (logs / f"metrics-{rank:05d}.jsonl").write_text(text + '{"a crash cut')
    lines = dataset_lines(root)
    text = "\n".join(lines)
    for part in (
        "1 file, 8 rows, text column 'text', id column 'id'",
        "recipe       the caption as it is",
        "-> text_t5 [L, 4] bfloat16",
        "tokens (a caption: p5 ",
        "6 embeddings by each encoder",
        # 1000 to 1007 and 1003 to 1010
        "encoded in 10.0 s by 2 ranks, 0.004 GPU hours, 0.6 captions/s",
        "device cpu, torch 2.0 (3 units)",
        read_status(root).plan.fingerprint[:16],
    ):
        assert part in text
    assert len(lines) < 25
    assert f"fingerprint {read_status(root).plan.fingerprint}" in all_lines(root)
    assert "encoders.t5.kind: t5" in all_lines(root)
    shutil.rmtree(logs)
    (root / "manifest.json").unlink()
    text = "\n".join(dataset_lines(root))
    assert "not finalised" in text
    assert "time         not known" in text


@pytest.mark.parametrize("finalised", [True, False])
def test_the_id_of_a_row_with_several_captions(tmp_path: Path, finalised: bool) -> None:
    samples = [Sample(each, row, each) for row, each in enumerate(("v#0", "v#1", "w"))]
    write_samples(tmp_path, make_plan(3, 3), samples)
    if finalised:
        finalize(tmp_path)
    said = "'v' is not in .* The captions of a row .*: give one of v#0, v#1"
    with pytest.raises(InputError, match=said):
        sample_lines(tmp_path, "v")


@pytest.mark.parametrize("finalised", [True, False])
def test_sample_lines(root: Path, finalised: bool) -> None:
    if not finalised:
        (root / "manifest.json").unlink()
    text = "\n".join(sample_lines(root, "s6"))
    for part in (
        "a.parquet, row 6",
        "status: ok",
        "encoded text: 'f é'",
        f"{paths_of(root, 2).shard.relative_to(root)}, row 0",
        "text_t5: 3 tokens, stored [3, 4] bfloat16",
        f"L2 norm {float(embedding('clip', 'f é').double().norm()):.4f}, finite",
    ):
        assert part in text
    assert "status: null_text (text is null)" in sample_lines(root, "s1")
    assert "encoded text: none" in sample_lines(root, "s1")
    assert any("non_finite (text_" in line for line in sample_lines(root, "s3"))
    with pytest.raises(InputError, match=r"'s99' is not in .*any of its 3 units"):
        sample_lines(root, "s99")
    flip(paths_of(root, 2).shard)
    assert any("DAMAGED" in line for line in sample_lines(root, "s7"))
    assert not any("DAMAGED" in line for line in sample_lines(root, "s6"))
