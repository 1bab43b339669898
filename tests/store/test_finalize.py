"""finalize: every unit is checked, everything is counted, and what no record names is removed."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from breaking import flip, raiser
from handmade import (
    ENVIRONMENT,
    files_of,
    forge_rows,
    leftovers,
    make_plan,
    paths_of,
    restate,
    rewrite_json,
    samples_of,
    write_dataset,
    write_samples,
    write_unit,
    write_units,
)
from jobs import dataset_bytes

from embed_precompute.errors import IncompleteError, InputError, VerificationError
from embed_precompute.samples import Sample, Status
from embed_precompute.store import manifest
from embed_precompute.store.check import check_unit
from embed_precompute.store.commit import StagedFile, digest_file, replace_bytes
from embed_precompute.store.index import DatasetIndex, IndexWriter, read_manifest
from embed_precompute.store.manifest import finalize
from embed_precompute.store.plan import publish_plan, read_plan
from embed_precompute.store.records import TokenCounts, read_null_record, read_record, record_path
from embed_precompute.store.rows import StoredSample

# Three units of four samples: two that share a stored row, a null text and one more.
TEXTS = ["a b", None, "a b", "c", "d e f", None, "d e f", "c", "g", None, "g", "h i"]


# --- sound ----------------------------------------------------------------------------------------


def test_finalize(tmp_path: Path) -> None:
    write_units(tmp_path, TEXTS, samples_per_shard=4)
    (tmp_path / "shards/000/.tmp-shard-000000.json-host-1-ab").touch()
    done = finalize(tmp_path)
    assert leftovers(tmp_path) == []
    assert (done.removed_files, done.removed_bytes) == (0, 0)
    manifest = read_manifest(tmp_path)
    assert done.manifest == manifest
    counts = manifest.counts
    assert (counts.rows, counts.samples, counts.units, counts.stored) == (12, 12, 3, 6)
    assert counts.status == {s.label: {0: 9, 1: 3}.get(s, 0) for s in Status}
    tokens = sum(len(text.split()) + 1 for text in TEXTS if text)
    assert counts.encoders == {"clip": TokenCounts(tokens, 0), "t5": TokenCounts(tokens, 0)}
    assert counts.tensors == {"clip": 6, "t5": 3 + 2 + 4 + 2 + 2 + 3}
    assert [(made.environment, made.units) for made in manifest.environments] == [(ENVIRONMENT, 3)]
    digests = "".join(read_record(tmp_path, unit).digest + "\n" for unit in range(3))
    assert manifest.records_sha256 == hashlib.sha256(digests.encode()).hexdigest()
    for name, entry in manifest.files.items():
        stored = digest_file(tmp_path / name)
        assert (entry.bytes, entry.sha256) == (stored.bytes, stored.sha256)
    described = {name for name in files_of(tmp_path) if not name.startswith("shards/")}
    assert described == {*manifest.files, "manifest.json"}
    table = pq.read_table(tmp_path / "manifest.parquet")
    parts = [pq.read_table(paths_of(tmp_path, unit).rows) for unit in range(3)]
    expected = [row for part in parts for row in part.drop_columns("text").to_pylist()]
    assert table.to_pylist() == expected


def test_finalize_is_idempotent(tmp_path: Path) -> None:
    write_dataset(tmp_path, TEXTS)
    before = dataset_bytes(tmp_path)
    inodes = [(tmp_path / name).stat().st_ino for name in before]
    finalize(tmp_path)
    assert dataset_bytes(tmp_path) == before
    assert [(tmp_path / name).stat().st_ino for name in before] == inodes  # not written again
    for name in ("manifest.json", "manifest.parquet", "index/id_hash.npy"):
        (tmp_path / name).unlink()
    (tmp_path / "index/ids.npy").write_bytes(b"damaged")
    finalize(tmp_path)
    assert dataset_bytes(tmp_path) == before


# --- what no record names -------------------------------------------------------------------------


def test_nothing_is_removed_from_a_dataset_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no plan\.json"):
        finalize(tmp_path)
    write_dataset(tmp_path, TEXTS, samples_per_shard=4)
    stray = tmp_path / "shards/000/shard-000000-0123456789abcdef.safetensors"
    stray.touch()
    record_path(tmp_path, 1).unlink()
    with pytest.raises(IncompleteError, match="1 of 3 units have no record"):
        finalize(tmp_path)
    write_unit(tmp_path, read_plan(tmp_path), 1, samples_of(TEXTS[4:8], 4))
    null = (tmp_path / "null.json").rename(tmp_path / "aside")
    with pytest.raises(IncompleteError, match="null embedding is missing"):
        finalize(tmp_path)
    null.rename(tmp_path / "null.json")
    flip(paths_of(tmp_path, 1).rows)
    with pytest.raises(VerificationError):
        finalize(tmp_path)
    assert stray.exists()


# --- not sound ------------------------------------------------------------------------------------


def test_finalize_names_the_damaged_file(tmp_path: Path) -> None:
    write_dataset(tmp_path, TEXTS)
    before = threading.active_count()
    null = read_null_record(tmp_path).shard_path(tmp_path)
    for path in (*paths_of(tmp_path, 1), null):
        whole = path.read_bytes()
        changes = [whole[:-1], whole + b"x"]
        if path.suffix != ".safetensors" or path == null:  # a flip in a shard is for verify
            changes.append(whole[:9] + b"~" + whole[10:])
        for payload in changes:
            path.write_bytes(payload)
            with pytest.raises(VerificationError, match=path.name):
                finalize(tmp_path)
        path.unlink()
        with pytest.raises((VerificationError, IncompleteError)):
            finalize(tmp_path)
        path.write_bytes(whole)
    finalize(tmp_path)
    assert threading.active_count() == before


def test_stale_root_manifest_never_stands_beside_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path, TEXTS, samples_per_shard=4)
    record_path(tmp_path, 1).unlink()
    samples = [*samples_of(TEXTS[4:7], 4), Sample("n", 7, "other")]
    write_unit(tmp_path, read_plan(tmp_path), 1, samples)
    with monkeypatch.context() as patch:
        patch.setattr(StagedFile, "replace", raiser(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            finalize(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert leftovers(tmp_path) == []
    assert finalize(tmp_path).removed_files == 2
    assert DatasetIndex(tmp_path).find("n") == 7


def test_an_extension_that_comes_while_an_older_plan_is_finalised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not undone, and the files that it is writing stay."""
    root, temporary = tmp_path / "out", tmp_path / "out/shards/000/.tmp-shard-000003-a-1-0"
    plan = write_units(root, TEXTS, samples_per_shard=4)
    file = dataclasses.replace(
        plan.inputs.files[0], path="b.parquet", content_xxh3="1" * 32, rows=1
    )
    later = plan.extended([file], 13)

    def publish_and_write(*arguments: Any) -> None:
        replace_bytes(*arguments)
        publish_plan(root, later)
        temporary.touch()

    def extend(self: IndexWriter) -> Any:
        monkeypatch.undo()
        publish_plan(root, later)
        write_unit(root, later, 3, samples_of(["last"], 12))
        finalize(root)
        return self.finish()

    monkeypatch.setattr(manifest, "replace_bytes", publish_and_write)
    assert finalize(root).manifest.plan_id == plan.plan_id
    assert temporary.exists()
    (root / "plan-0001.json").unlink()
    monkeypatch.undo()
    monkeypatch.setattr(IndexWriter, "finish", extend)
    with pytest.raises(IncompleteError, match="extended it meanwhile"):
        finalize(root)
    assert len(DatasetIndex(root)) == 13
    assert leftovers(root) == []


# --- files that contradict one another, with digests that are right -------------------------------


def change(sample_number: int, **fields: Any) -> Callable[[list[StoredSample]], list[StoredSample]]:
    def apply(samples: list[StoredSample]) -> list[StoredSample]:
        samples[sample_number] = dataclasses.replace(samples[sample_number], **fields)
        return samples

    return apply


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (change(0, index=2), "an index that is not in the shard"),
        (change(0, index=-1), "an index that is not in the shard"),
        (change(0, index=None), "index null"),
        (change(1, tokens={"t5": 1}), "t5_tokens null"),
        (change(0, lengths={"clip": 1, "t5": 99}), "t5_length unlike"),
        (change(0, tokens={"clip": 4, "t5": 99}), "encoders is"),
        (change(0, truncated={"clip": False, "t5": True}), "encoders is"),
        (change(0, row=3), "rows out of order"),
        (change(0, row=5), "rows out of order"),
        (change(3, row=6), "last row"),
        (change(1, status=Status.EMPTY_LIST), "status is"),
        (lambda samples: samples[:3], "has 3 rows: expected 4"),
        (lambda samples: [samples[0], samples[0], *samples[2:]], "rows out of order"),
    ],
)
def test_rows_are_checked_against_shard_and_record(
    tmp_path: Path, forge: Any, message: str
) -> None:
    write_units(tmp_path, TEXTS, samples_per_shard=4)
    forge_rows(tmp_path, 1, forge)
    with pytest.raises(VerificationError, match=message) as caught:
        finalize(tmp_path)
    assert paths_of(tmp_path, 1).rows.name in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()
    assert leftovers(tmp_path) == []


def swap_digests(root: Path, unit: int) -> None:
    path = paths_of(root, unit).rows
    table = pq.read_table(path)
    at = table.column_names.index("text_sha256")
    swapped = table.column(at).take([3, 1, 2, 0])
    pq.write_table(table.set_column(at, table.schema.field(at), swapped), path, store_schema=False)
    restate(root, unit, "rows", path)


def flip_row(root: Path, unit: int, offset: int) -> None:
    flip(paths_of(root, unit).shard, offset)


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (partial(forge_rows, change=change(0, text="another")), "rows_sha256"),
        (partial(forge_rows, change=change(1, text="x")), "'s5' is null_text, with the text"),
        (partial(forge_rows, change=change(0, error="why")), "status of sample 's4' is ok"),
        (partial(forge_rows, change=change(0, text=None)), "status of sample 's4' is ok"),
        (swap_digests, "text_sha256 of sample 's4'"),
        (partial(flip_row, offset=-1), "row 1 of text_t5 does not have its checksum"),
        (partial(flip_row, offset=-1 - 8 * 6), "row 1 of text_clip does not have its checksum"),
    ],
)
def test_texts_and_values_are_checked_in_full(tmp_path: Path, forge: Any, message: str) -> None:
    """The digests of files are right: who changed a rows part changed the record, and the digest
    of a shard does not cover its rows but by their checksums."""
    plan = write_units(tmp_path, TEXTS, samples_per_shard=4)
    forge(tmp_path, 1)
    check_unit(tmp_path, plan, 1)
    with pytest.raises(VerificationError, match=message):
        check_unit(tmp_path, plan, 1, full=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fingerprint": "e" * 64}, r"shard-000001\.json"),
        ({"plan_id": "b" * 64}, r"shard-000001\.json"),
        ({"first_row": 5}, r"shard-000001\.json"),
        ({"num_rows": 3}, r"shard-000001\.json"),
        ({"encoders": {"t5": {"tokens": 9, "truncated": 0}}}, r"shard-000001\.json"),
        ({"tensors": {"t5": 9}}, r"shard-000001\.json"),
        ({"num_stored": 1}, r"shard-000001-\w+\.safetensors: stored rows is 2, expected 1"),
        ({"tensors": {"clip": 2, "t5": 5}}, r"shard-000001-\w+\.safetensors: vectors is"),
    ],
    ids=str,
)
def test_a_record_that_contradicts_plan_or_shard(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_units(tmp_path, TEXTS, samples_per_shard=4)
    rewrite_json(record_path(tmp_path, 1), lambda record: record.update(fields))
    with pytest.raises(VerificationError, match=message):
        finalize(tmp_path)


def test_a_null_embedding_that_contradicts_its_record(tmp_path: Path) -> None:
    write_units(tmp_path, TEXTS)
    rewrite_json(tmp_path / "null.json", lambda record: record["tensors"].update(t5=2))
    with pytest.raises(VerificationError, match=r"null-\w+\.safetensors: vectors is"):
        finalize(tmp_path)


@pytest.mark.parametrize(
    ("num_rows", "num_samples", "rows", "message"),
    [
        (2, 3, (0, 1), r"hold 2 samples, plan\.json says 3"),
        (3, 3, (0, 1, 1, 2), r"shard-000000\.json.*num_samples is 4"),
    ],
)
def test_units_that_do_not_make_up_the_plan(
    tmp_path: Path, num_rows: int, num_samples: int, rows: Sequence[int], message: str
) -> None:
    plan = make_plan(num_rows, 3, num_samples)
    write_samples(tmp_path, plan, [Sample(f"s{k}", row, "x") for k, row in enumerate(rows)])
    with pytest.raises(VerificationError, match=message):
        finalize(tmp_path)
