"""Rows parts, records, finalize and the index."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from store_case import (
    ENVIRONMENT,
    FINGERPRINT,
    SPEC,
    TENSORS,
    fail_at,
    flips,
    leftovers,
    make_dataset,
    make_null,
    make_plan,
    make_unit,
    make_units,
    raiser,
    samples_of,
    tree,
)

from embed_precompute.errors import (
    IncompleteError,
    InputError,
    StorageError,
    VerificationError,
)
from embed_precompute.samples import Status
from embed_precompute.store import committed, index, joined, manifest, records, rows
from embed_precompute.store.commit import StagedFile, digest_file, publish_bytes
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.manifest import (
    StoredSample,
    committed_units,
    finalize,
    is_sound_orphan,
    null_paths,
    read_record,
    read_samples,
    rows_digest,
    rows_part_bytes,
    stored_tensors,
    unit_paths,
)
from embed_precompute.store.sealed import read_sealed, seal
from embed_precompute.store.shards import ShardReader


def test_rows_part_round_trip(tmp_path: Path) -> None:
    samples = samples_of(3)
    path = tmp_path / "rows.parquet"
    payload = rows_part_bytes(3, ["t5", "clip"], samples)
    assert payload == rows_part_bytes(3, ["clip", "t5"], samples)
    path.write_bytes(payload)
    assert list(read_samples(path, ["clip", "t5"])) == samples
    table = pq.read_table(path)
    assert table.column("shard").to_pylist() == [3] * 4
    assert table.column("index").to_pylist() == [0, None, 0, 1]
    assert table.column("t5_length").to_pylist() == [5, None, 5, 3]
    text = "caption 12 é"
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert table.column("text_sha256").to_pylist() == [digest, None, digest, digest]
    lines = "".join(
        json.dumps([s.sample_id, s.text], ensure_ascii=False, separators=(",", ":")) + "\n"
        for s in samples
    )
    assert rows_digest(samples) == hashlib.sha256(lines.encode()).hexdigest()


def test_rows_part_is_split_by_rows_and_by_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embed_precompute.store.rows.ROW_GROUP_ROWS", 3)
    path = tmp_path / "x"
    path.write_bytes(rows_part_bytes(3, ["clip", "t5"], samples_of(3)))
    assert pq.ParquetFile(path).metadata.num_row_groups == 2
    assert list(read_samples(path, ["clip", "t5"])) == samples_of(3)
    monkeypatch.setattr("embed_precompute.store.rows.ROW_GROUP_TEXT_BYTES", 1)
    path.write_bytes(rows_part_bytes(3, ["clip", "t5"], samples_of(3)))
    assert pq.ParquetFile(path).metadata.num_row_groups >= 3
    assert list(read_samples(path, ["clip", "t5"])) == samples_of(3)


def test_orphaned_rows_part_is_ours_bit_for_bit_or_of_another_pyarrow(tmp_path: Path) -> None:
    """A flip in a page header or in the statistics reads the same, and is damage all the same."""
    encoders, samples = ["clip", "t5"], samples_of(3)
    whole = rows_part_bytes(3, encoders, samples)
    path = tmp_path / "x"
    path.write_bytes(whole)
    assert is_sound_orphan(path, whole, encoders, samples)
    version = pq.read_metadata(path).created_by.encode()
    digits = range(whole.index(version) * 8, (whole.index(version) + len(version)) * 8)
    reads_the_same = 0
    for bit in flips(path, whole, range(0, len(whole) * 8, 7)):
        with contextlib.suppress(VerificationError):
            reads_the_same += list(read_samples(path, encoders)) == samples
        assert bit in digits or not is_sound_orphan(path, whole, encoders, samples)
    assert reads_the_same > 100
    path.write_bytes(whole.replace(version, version.replace(b".", b"9", 1)))
    assert is_sound_orphan(path, whole, encoders, samples)
    assert not is_sound_orphan(path, whole, encoders, samples[:-1])
    path.unlink()
    assert not is_sound_orphan(path, whole, encoders, samples)


def test_damaged_rows_part(tmp_path: Path) -> None:
    whole = rows_part_bytes(3, ["clip", "t5"], samples_of(3))
    path = tmp_path / "x"
    for _ in flips(path, whole, range(0, len(whole) * 8, 13)):
        with contextlib.suppress(VerificationError):  # anything else is a failure here
            list(read_samples(path, ["clip", "t5"]))
    path.write_bytes(rows_part_bytes(3, ["clip"], samples_of(3)))
    with pytest.raises(VerificationError, match="has columns"):
        list(read_samples(path, ["clip", "t5"]))


@pytest.mark.parametrize("text", [True, False])
def test_a_forged_rows_part_is_decoded_a_bounded_piece_at_a_time(
    tmp_path: Path, text: bool
) -> None:
    """300 rows that repeat one value of 8 MiB are 2.4 GiB, in a file of some KiB."""
    path, encoders, count = tmp_path / "x", ["clip", "t5"], 300
    path.write_bytes(rows_part_bytes(3, encoders, samples_of(3)))
    table = pq.read_table(path).take([0] * count)
    column = "text" if text else "sample_id"
    value = pa.array(["x" * (8 << 20)])
    repeated = pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), value)
    field = pa.field(column, repeated.type, nullable=text)
    table = table.set_column(table.column_names.index(column), field, repeated)
    pq.write_table(table, path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 1 << 18
    sizes = [(len(b), b.nbytes) for b in rows.iter_batches(path, encoders, text=text)]
    assert sum(size for size, _ in sizes) == count
    assert max(nbytes for _, nbytes in sizes) <= rows.MOST_BATCH_BYTES + (1 << 20)


def test_a_page_of_a_forged_rows_part_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path, encoders = tmp_path / "x", ["clip", "t5"]
    path.write_bytes(rows_part_bytes(3, encoders, samples_of(3)))
    table = pq.read_table(path).take([0] * 20)
    at = table.column_names.index("text")
    texts = pa.array(["x" * (4 << 20)] * 20)
    table = table.set_column(at, "text", texts)
    pq.write_table(table, path, compression="zstd", store_schema=False, use_dictionary=False)
    with pytest.raises(VerificationError, match=r"x is damaged: a page of \d+ bytes"):
        list(rows.iter_batches(path, encoders))


def test_committed_units_is_a_listing(tmp_path: Path) -> None:
    assert committed_units(tmp_path) == set()
    for unit in (0, 7, 1000, 1_234_567):
        publish_bytes(unit_paths(tmp_path, unit).record, b"not read")
    publish_bytes(unit_paths(tmp_path, 5).shard, b"no record")
    (tmp_path / "shards/000/shard-001001.json").touch()  # in the wrong folder
    (tmp_path / "shards/000/shard-000007.json.bak").touch()
    (tmp_path / "shards/000/.tmp-shard-000008.json-h-1-a").touch()
    (tmp_path / "shards/stray").touch()
    assert committed_units(tmp_path) == {0, 7, 1000, 1_234_567}
    assert unit_paths(tmp_path, 1_234_567).record.parent.name == "1234"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": 1}, "it.unit is 1, expected 0"),
        ({"unit": True}, "it.unit is True"),
        ({"extra": 1}, "has keys"),
        ({"num_stored": -1}, "num_stored is -1"),
        ({"num_stored": 4}, "more rows stored"),
        ({"num_samples": 5}, "status does not add up"),
        ({"adopted_shard": 0}, "adopted_shard is 0, expected bool"),
        ({"rows_sha256": "x"}, "rows_sha256 is 'x'"),
        ({"environment": {"a": 1}}, "environment.a is 1"),
        ({"files": {"shard": {}, "rows": {}}}, "files.rows has keys"),
        ({"kind": "null"}, "kind 'null'"),
    ],
)
def test_record_is_checked(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    make_unit(tmp_path, 0)
    path = unit_paths(tmp_path, 0).record
    record = read_record(tmp_path, 0)
    path.write_bytes(seal({**record, **change}))
    with pytest.raises(VerificationError, match=message) as caught:
        read_record(tmp_path, 0)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["../shard-000000.safetensors", "/etc/passwd", "shard-000001", ""])
def test_no_path_in_a_record_is_followed(tmp_path: Path, name: str) -> None:
    make_unit(tmp_path, 0)
    record = read_record(tmp_path, 0)
    record["files"]["shard"]["name"] = name
    unit_paths(tmp_path, 0).record.write_bytes(seal(record))
    with pytest.raises(VerificationError, match=r"files\.shard\.name"):
        read_record(tmp_path, 0)


def test_absent_record_and_plan(tmp_path: Path) -> None:
    for unit in (0, None):
        with pytest.raises(IncompleteError, match="not committed yet"):
            read_record(tmp_path, unit)
    with pytest.raises(InputError, match=r"no plan\.json"):
        finalize(tmp_path)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"dtype": "bfloat16", "codec": "zstd"}, "codec 'zstd'"),
        ({"dtype": "int8", "codec": "raw"}, "dtype 'int8'"),
        ({"dtype": "bfloat16"}, "spec.output"),
    ],
)
def test_unknown_codec_or_dtype_is_refused(output: dict[str, str], message: str) -> None:
    assert stored_tensors(SPEC) == TENSORS
    bad: list[Any] = [{}, [], {"t5": 1}, {"t5": {"pooled": 1, "dim": 8}}, {"../t5": {}}]
    for encoders in bad:
        with pytest.raises(VerificationError, match="encoder"):
            stored_tensors({**SPEC, "encoders": encoders})
    with pytest.raises(VerificationError, match=message):
        stored_tensors({**SPEC, "output": output})


def test_finalize(tmp_path: Path) -> None:
    (tmp_path / "shards/000").mkdir(parents=True)
    (tmp_path / "shards/000/.tmp-shard-000000.json-host-1-ab").touch()
    root = make_dataset(tmp_path)
    assert leftovers(tmp_path) == []
    assert root == read_sealed(tmp_path / "manifest.json", "dataset")
    assert root["counts"] == {
        "rows": 12,
        "samples": 12,
        "units": 3,
        "stored": 6,
        "status": {status.label: {0: 9, 1: 3}.get(status, 0) for status in Status},
        "encoders": {
            "clip": {"tokens": 36, "truncated": 0, "stored_tokens": 6},
            "t5": {"tokens": 27, "truncated": 0, "stored_tokens": 18},
        },
    }
    assert root["environments"] == [{"environment": ENVIRONMENT, "units": 3}]
    digests = "".join(read_record(tmp_path, unit)["digest"] + "\n" for unit in range(3))
    assert root["records_sha256"] == hashlib.sha256(digests.encode()).hexdigest()
    for name, entry in root["files"].items():
        stored = digest_file(tmp_path / name)
        assert entry == {"bytes": stored.bytes, "sha256": stored.sha256}
    described = {name for name in tree(tmp_path) if not name.startswith("shards/")}
    assert described == {*root["files"], "manifest.json"}
    table = pq.read_table(tmp_path / "manifest.parquet")
    assert table.schema.equals(manifest.rows_schema(["clip", "t5"], text=False))
    parts = [pq.read_table(unit_paths(tmp_path, unit).rows) for unit in range(3)]
    expected = [row for part in parts for row in part.drop_columns("text").to_pylist()]
    assert table.to_pylist() == expected


@pytest.mark.parametrize(
    ("module", "name", "value"),
    [
        (committed, "HEAD_BYTES", 9),
        (committed, "SMALL_PART_BYTES", 9),
        (committed, "READ_ROWS", 1),
        (committed, "UNITS_PER_TASK", 1),
        (joined, "READ_ROWS", 1),
        (joined, "READ_ROWS", 6),
        (rows, "READ_ROWS", 3),
    ],
)
def test_how_much_is_read_at_once_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: int
) -> None:
    make_units(tmp_path, 5)
    expected = finalize(tmp_path)
    for path in ("manifest.json", "manifest.parquet"):
        (tmp_path / path).unlink()
    monkeypatch.setattr(module, name, value)
    assert finalize(tmp_path) == expected


def test_no_thread_outlives_a_finalize_that_fails(tmp_path: Path) -> None:
    make_units(tmp_path, 5)
    before = threading.active_count()
    unit_paths(tmp_path, 1).rows.write_bytes(b"damaged")
    with pytest.raises(VerificationError, match=r"shard-000001\.rows\.parquet"):
        finalize(tmp_path)
    assert threading.active_count() == before
    assert leftovers(tmp_path) == []


def test_a_shard_with_other_counts_than_its_record(tmp_path: Path) -> None:
    make_units(tmp_path, 2)
    paths, record = unit_paths(tmp_path, 1), read_record(tmp_path, 1)
    for change in (
        {"num_stored": 1},
        {
            "encoders": {
                **record["encoders"],
                "t5": {**record["encoders"]["t5"], "stored_tokens": 5},
            }
        },
    ):
        paths.record.write_bytes(seal({**record, **change}))
        with pytest.raises(VerificationError, match=r"shard-000001\.safetensors: it has 2 rows"):
            finalize(tmp_path)


def test_finalize_is_idempotent(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    before = tree(tmp_path)
    finalize(tmp_path)
    assert tree(tmp_path) == before  # inodes too: nothing was written again
    for name in ("manifest.json", "manifest.parquet", "index/id_hash.npy"):
        (tmp_path / name).unlink()
    (tmp_path / "index/ids.npy").write_bytes(b"damaged")
    finalize(tmp_path)
    assert {k: v[1] for k, v in tree(tmp_path).items()} == {k: v[1] for k, v in before.items()}


def test_finalize_refuses_an_incomplete_dataset(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    unit_paths(tmp_path, 1).record.unlink()
    with pytest.raises(IncompleteError, match="1 of 3 units have no record"):
        finalize(tmp_path)
    make_unit(tmp_path, 1)
    null_paths(tmp_path).record.unlink()
    with pytest.raises(IncompleteError, match="null embedding is missing"):
        finalize(tmp_path)


def test_stale_root_manifest_never_stands_beside_other_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path)
    for path in (tmp_path / "shards/000").glob("shard-000001.*"):
        path.unlink()
    sample = samples_of(1)[3]
    make_unit(tmp_path, 1, [*samples_of(1)[:3], StoredSample(**{**vars(sample), "sample_id": "n"})])
    monkeypatch.setattr(StagedFile, "replace", raiser(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        finalize(tmp_path)
    assert not (tmp_path / "manifest.json").exists()
    assert leftovers(tmp_path) == []
    monkeypatch.undo()
    finalize(tmp_path)
    assert DatasetIndex(tmp_path).find("n") == 7


def test_finalize_by_several_at_once(tmp_path: Path) -> None:
    make_dataset(tmp_path / "alone")
    expected = {name: content for name, (_, content) in tree(tmp_path / "alone").items()}
    root = tmp_path / "together"
    make_units(root, 3)
    code = (
        "import sys; from pathlib import Path\n"
        "from embed_precompute.store.manifest import finalize\n"
        "sys.stdin.readline()\n"
        "for _ in range(8): finalize(Path(sys.argv[1]))\n"
    )
    run = [sys.executable, "-c", code, str(root)]
    started = [subprocess.Popen(run, stdin=subprocess.PIPE) for _ in range(3)]
    for process in started:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()  # all are ready to start together
    assert [process.wait(120) for process in started] == [0, 0, 0]
    assert {name: content for name, (_, content) in tree(root).items()} == expected


def test_finalize_names_the_damaged_file(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    paths = unit_paths(tmp_path, 1)
    for path in (paths.shard, paths.rows, paths.record, null_paths(tmp_path).shard):
        before = path.read_bytes()
        for payload in (before[:-1], before + b"x", before[:9] + b"~" + before[10:]):
            path.write_bytes(payload)
            with pytest.raises(VerificationError, match=path.name):
                finalize(tmp_path)
        if path != paths.record:
            path.unlink()
            with pytest.raises(VerificationError, match=path.name):
                finalize(tmp_path)
        path.write_bytes(before)
    finalize(tmp_path)


@pytest.mark.parametrize("name", ["pwrite", "fsync", "replace"])
def test_disk_full_while_finalizing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    make_dataset(tmp_path, num_units=1)
    expected = tree(tmp_path)
    names = ["manifest.json", "manifest.parquet", *(f"index/{n}.npy" for n in ("ids", "id_hash"))]
    for n in (0, 1, 2, 3, 5, 8, 13, 21, 34, 55):
        for file in names:
            (tmp_path / file).unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            left = fail_at(patch, name, n)
            with contextlib.suppress(StorageError):  # anything else is a failure here
                finalize(tmp_path)
        assert left[0] >= 0 or not (tmp_path / "manifest.json").exists()
        assert leftovers(tmp_path) == []
        finalize(tmp_path)
        assert {k: v[1] for k, v in tree(tmp_path).items()} == {
            k: v[1] for k, v in expected.items()
        }


def _with(sample: StoredSample, **changes: Any) -> StoredSample:
    return StoredSample(**{**vars(sample), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: {"index": 2}}, "an index that is not in the shard"),
        ({0: {"index": None}}, "index null"),
        ({0: {"lengths": {"clip": 1, "t5": 99}}}, "t5_length unlike"),
        ({0: {"row": 3}}, "rows out of order"),
        ({0: {"row": 5}}, "rows out of order"),
        ({3: {"row": 6}}, "last row"),
    ],
)
def test_finalize_checks_rows_against_shard_and_record(
    tmp_path: Path, changes: dict[int, dict[str, Any]], message: str
) -> None:
    make_plan(tmp_path, 2)
    make_null(tmp_path)
    make_unit(tmp_path, 0)
    samples = [_with(sample, **changes.get(k, {})) for k, sample in enumerate(samples_of(1))]
    make_unit(tmp_path, 1, samples)
    with pytest.raises(VerificationError, match=message) as caught:
        finalize(tmp_path)
    assert unit_paths(tmp_path, 1).rows.name in str(caught.value)
    assert not (tmp_path / "manifest.json").exists()
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "e" * 64},
        {"plan": "b" * 64},
        {"first_row": 5},
        {"num_rows": 3},
        {"encoders": {"t5": {"tokens": 9, "truncated": 0, "stored_tokens": 6}}},
    ],
    ids=str,
)
def test_finalize_refuses_a_foreign_record(tmp_path: Path, change: dict[str, Any]) -> None:
    make_dataset(tmp_path)
    path = unit_paths(tmp_path, 1).record
    path.write_bytes(seal({**read_record(tmp_path, 1), **change}))
    with pytest.raises(VerificationError, match=path.name):
        finalize(tmp_path)


def test_finalize_compares_sums_with_the_record(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    record = read_record(tmp_path, 1)
    record["encoders"]["t5"]["tokens"] += 1
    unit_paths(tmp_path, 1).record.write_bytes(seal(record))
    with pytest.raises(VerificationError, match="encoders is"):
        finalize(tmp_path)


def test_index(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    opened = DatasetIndex(tmp_path)
    assert len(opened) == opened.num_samples == 12
    assert opened.encoders == ("clip", "t5")
    assert opened.status.tolist() == [0, 1, 0, 0] * 3
    assert opened.shard.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert opened.index.tolist() == [0, -1, 0, 1] * 3
    assert opened.lengths["t5"].tolist() == [2, 0, 2, 3, 3, 0, 3, 3, 4, 0, 4, 3]
    assert opened.lengths["clip"].tolist() == [1, 0, 1, 1] * 3
    assert opened.ok.tolist() == [0, 2, 3, 4, 6, 7, 8, 10, 11]
    assert opened.shards.tolist() == [[0, 4, 2], [4, 4, 2], [8, 4, 2]]
    for sample in opened.ok.tolist():
        unit = int(opened.shard[sample])
        reader = ShardReader(unit_paths(tmp_path, unit).shard, FINGERPRINT, unit, TENSORS)
        for name in opened.encoders:
            expected = reader.checksum(name, int(opened.index[sample]))
            assert int(opened.checksums[name][sample]) == expected
    assert opened.checksums["t5"][1] == 0
    for sample in range(12):
        assert opened.sample_id(sample) == f"id-{sample}"
        assert opened.find(f"id-{sample}") == sample
    assert opened.find("id-12") is None
    assert opened.find("") is None
    with pytest.raises(IndexError):
        opened.sample_id(-1)
    assert pickle.loads(pickle.dumps(opened)).find("id-7") == 7


def test_index_with_hash_collisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "id_hash", lambda sample_id: (len(sample_id) * 7) << 40)
    make_dataset(tmp_path)
    opened = DatasetIndex(tmp_path)
    hashes = np.load(tmp_path / "index/id_hash.npy")
    assert len(set(hashes.tolist())) == 2
    for sample in range(12):
        assert opened.find(f"id-{sample}") == sample
    assert opened.find("id-x") is None


@pytest.mark.parametrize("entries", [1, 3, 1 << 20])
def test_id_hashes_are_sorted_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int
) -> None:
    monkeypatch.setattr(index, "SORT_ENTRIES", entries)
    ids = [f"sample/{i}".encode() for i in range(50)] + [b""]
    columns: dict[str, Any] = {
        "status": np.zeros(51, np.uint8),
        "shard": np.zeros(51, np.int32),
        "index": np.zeros(51, np.int32),
    }
    with index.IndexWriter(tmp_path, []) as writer:
        for part in (slice(0, 20), slice(20, 51)):
            writer.append({name: column[part] for name, column in columns.items()}, ids[part])
        writer.add_unit(51, 1)
        for staged in writer.finish().values():
            staged.replace()
    hashes = np.array([index.id_hash(sample_id) for sample_id in ids], np.uint64)
    order = np.argsort(hashes, kind="stable")
    assert np.load(tmp_path / "id_hash.npy").tolist() == hashes[order].tolist()
    assert np.load(tmp_path / "id_order.npy").tolist() == order.tolist()
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"{name}.npy" for name in index.index_dtypes([])
    )


def test_damaged_index(tmp_path: Path) -> None:
    with pytest.raises(IncompleteError, match="not finished"):
        DatasetIndex(tmp_path)
    make_dataset(tmp_path)
    path = tmp_path / "index/length_t5.npy"
    before = path.read_bytes()
    for payload in (before[:-1], before.replace(b"<i4", b"<f4"), b"", b"\x80" * len(before)):
        path.write_bytes(payload)
        with pytest.raises(VerificationError, match="length_t5"):
            DatasetIndex(tmp_path)
    path.unlink()
    with pytest.raises(VerificationError, match="finalize"):
        DatasetIndex(tmp_path)


def test_listing_imports_no_torch() -> None:
    code = (
        "import sys; import embed_precompute.store.records, embed_precompute.store.index;"
        "assert 'torch' not in sys.modules and 'pyarrow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_records_module_reads_plan(tmp_path: Path) -> None:
    make_plan(tmp_path, 2)
    plan = records.read_plan(tmp_path)
    assert plan["num_units"] == 2
    (tmp_path / "plan.json").write_bytes(seal({**plan, "num_units": 3}))
    with pytest.raises(VerificationError, match="units do not hold"):
        records.read_plan(tmp_path)
    (tmp_path / "plan.json").write_bytes(seal({**plan, "spec": []}))
    with pytest.raises(VerificationError, match="spec"):
        records.read_plan(tmp_path)
