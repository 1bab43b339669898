"""The bytes on disk are the specification (docs/format.md).

Everything expected here is built from struct, json and hashlib by the written rules, or stands as
a literal; none of it comes from the store. A change that breaks one of these tests changes the
format: it needs a new format version, not a new golden value. Parquet is held to its schema and
values, since its bytes differ between versions of pyarrow.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from handmade import columns_of

from embed_precompute.samples import Status
from embed_precompute.store.commit import publish_bytes, publish_bytes_by_content
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import (
    NULL_UNIT,
    ROWS,
    SHARD,
    document_bytes,
    record_path,
    stored_tensors,
    unit_path,
)
from embed_precompute.store.rows import StoredSample, rows_digest, rows_part_bytes
from embed_precompute.store.shards import ShardWriter

SPEC: dict[str, Any] = {
    "format_version": 1,
    "encoders": {
        "clip": {"outputs": [{"suffix": "", "per": "caption", "width": 2, "positions": None}]},
        "t5": {"outputs": [{"suffix": "", "per": "token", "width": 4, "positions": "real"}]},
    },
    "output": {"codec": "raw", "dtype": "bfloat16"},
}
TENSORS = stored_tensors(SPEC)
# Stored rows of unit 0: a vector of clip, and a sequence of t5, by value.
CLIP = [[1.0, -2.0], [0.5, 3.0]]
T5 = [[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]], [[-1.0, 0.0, 0.25, 96.0]]]
SAMPLES = [
    StoredSample(
        "a", 0, Status.OK, None, 0, {"clip": 3, "t5": 2}, {"clip": False, "t5": True},
        {"clip": 1, "t5": 2}, "one caption",
    ),
    StoredSample("b", 1, Status.NULL_TEXT, "text is null"),
    StoredSample(
        "ü", 2, Status.OK, None, 1, {"clip": 4, "t5": 1}, {"clip": False, "t5": False},
        {"clip": 1, "t5": 1}, 'zwei "ü"',
    ),
]  # fmt: skip

FILE = {"path": "c.parquet", "bytes": 9, "rows": 3}
FILE |= {"footer_sha256": "0" * 64, "content_xxh3": "0" * 32}
INPUTS = {"files": [FILE], "text_column": "text", "id_column": "id", "limit": None}

HEAD_SHA256 = "4fb7a7618eee455162282f8cf186ecf33e1f4ac32329c0c4007db1b4322dda1b"
NULL_HEAD_SHA256 = "da324859c97e88653f048ecacaa5b8ef45330a41f9e3c461e5d9481a22a4f675"
ROOT_FILES_SHA256 = "009a7ec3237a2ac2a2b1389000095bf09f01fb123c5afeaa219b7acfa1b89863"


def canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


def document(body: dict[str, Any]) -> bytes:
    return canonical({**body, "digest": digest(body)}) + b"\n"


def digest(value: Any) -> str:
    return hashlib.sha256(canonical(value)).hexdigest()


FINGERPRINT = digest(SPEC)
CONTENT = {name: value for name, value in FILE.items() if name != "path"}
IDENTITY = {"fingerprint": FINGERPRINT, "samples_per_shard": 4, "extends": []}
PLAN_ID = digest({**IDENTITY, "inputs": {**INPUTS, "files": [CONTENT]}})


def bf16(values: list[float]) -> bytes:
    """bfloat16 is the upper half of float32; every value here is exact in it."""
    return b"".join(struct.pack("<f", value)[2:] for value in values)


def described(payload: bytes) -> dict[str, Any]:
    return {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}


def named_shard(stem: str, shard: bytes, head_bytes: int) -> dict[str, Any]:
    """A shard's entry in a record: its name has the first 16 digits of its head's sha256."""
    digest = hashlib.sha256(shard[:head_bytes]).hexdigest()
    name = f"{stem}-{digest[:16]}.safetensors"
    return {"name": name, "bytes": len(shard), "head_sha256": digest}


def shard_bytes(
    unit: int | None, clip: list[list[float]], t5: list[list[list[float]]], header: str
) -> bytes:
    clip_rows = [bf16(row) for row in clip]
    t5_rows = [b"".join(bf16(vector) for vector in row) for row in t5]
    starts = [0]
    for row in t5:
        starts.append(starts[-1] + len(row))
    data = struct.pack(f"<{len(starts)}q", *starts)
    for rows in (clip_rows, t5_rows):
        data += struct.pack(f"<{len(rows)}Q", *(xxhash.xxh3_64_intdigest(row) for row in rows))
    data += b"".join(clip_rows) + b"".join(t5_rows)
    text = header.encode()
    text += b" " * (-(8 + len(text)) % 64)
    return struct.pack("<Q", len(text)) + text + data


def header(unit: str, entries: str) -> str:
    metadata = '{\\"fingerprint\\":\\"%s\\",\\"format_version\\":1,\\"unit\\":%s}'
    metadata %= (FINGERPRINT, unit)
    return '{"__metadata__":{"embed_precompute":"' + metadata + '"},' + entries + "}"


UNIT_HEADER = header(
    "0",
    '"text_t5_offsets":{"dtype":"I64","shape":[3],"data_offsets":[0,24]},'
    '"text_clip_xxh3":{"dtype":"U64","shape":[2],"data_offsets":[24,40]},'
    '"text_t5_xxh3":{"dtype":"U64","shape":[2],"data_offsets":[40,56]},'
    '"text_clip":{"dtype":"BF16","shape":[2,2],"data_offsets":[56,64]},'
    '"text_t5":{"dtype":"BF16","shape":[3,4],"data_offsets":[64,88]}',
)
NULL_HEADER = header(
    "null",
    '"text_t5_offsets":{"dtype":"I64","shape":[2],"data_offsets":[0,16]},'
    '"text_clip_xxh3":{"dtype":"U64","shape":[1],"data_offsets":[16,24]},'
    '"text_t5_xxh3":{"dtype":"U64","shape":[1],"data_offsets":[24,32]},'
    '"text_clip":{"dtype":"BF16","shape":[1,2],"data_offsets":[32,36]},'
    '"text_t5":{"dtype":"BF16","shape":[1,4],"data_offsets":[36,44]}',
)
UNIT_SHARD = shard_bytes(0, CLIP, T5, UNIT_HEADER)
NULL_SHARD = shard_bytes(None, CLIP[1:], T5[1:], NULL_HEADER)

RECORD_HEAD = {
    "format_version": 1,
    "fingerprint": FINGERPRINT,
    "plan_id": PLAN_ID,
    "environment": {"device": "cpu", "torch": "2.5.1"},
}


def write_shard(
    root: Path, unit: int, clip: list[list[float]], t5: list[list[list[float]]]
) -> None:
    """Through the store, last row first."""
    target, lengths = unit_path(root, unit, SHARD), {"t5": [len(row) for row in t5]}
    with ShardWriter(target, FINGERPRINT, unit, TENSORS, lengths, num_rows=len(t5)) as writer:
        for row in reversed(range(len(t5))):
            writer.write("t5", [row], [torch.tensor(t5[row], dtype=torch.bfloat16)])
            writer.write("clip", [row], [torch.tensor(clip[row], dtype=torch.bfloat16)])
        writer.publish()


def plan_body() -> dict[str, Any]:
    return {
        **{"format_version": 1, "kind": "plan", "fingerprint": FINGERPRINT, "plan_id": PLAN_ID},
        **{"spec": SPEC, "inputs": INPUTS, "samples_per_shard": 4, "rows_per_unit": 4},
        "extends": [],
        **{"num_rows": 3, "num_samples": 3, "last_row_samples": None, "num_units": 1},
    }


def record_body(rows: bytes) -> dict[str, Any]:
    lines = b'["a","one caption"]\n["b",null]\n' + '["ü","zwei \\"ü\\""]\n'.encode()
    counts = {"ok": 2, "null_text": 1}
    digest = hashlib.sha256(rows).hexdigest()[:16]
    labels = ("ok", "null_text", "invalid_text", "empty_list", "non_finite")
    return {
        **RECORD_HEAD,
        **{"kind": "unit", "unit": 0, "first_row": 0},
        **{"num_rows": 3, "num_samples": 3, "num_stored": 2},
        "status": {label: counts.get(label, 0) for label in labels},
        "noted": {},
        "rows_sha256": hashlib.sha256(lines).hexdigest(),
        "encoders": {"clip": {"tokens": 7, "truncated": 0}, "t5": {"tokens": 3, "truncated": 1}},
        "tensors": {"clip": 2, "t5": 3},
        "files": {
            # Its rows, of 8 and 24 bytes, are at its end.
            "shard": named_shard("shard-000000", UNIT_SHARD, len(UNIT_SHARD) - 32),
            "rows": {"name": f"shard-000000-{digest}.rows.parquet", **described(rows)},
        },
    }


def null_body() -> dict[str, Any]:
    return {
        **RECORD_HEAD,
        "kind": "null",
        "encoders": {"clip": {"tokens": 2, "truncated": 0}, "t5": {"tokens": 1, "truncated": 0}},
        "tensors": {"clip": 1, "t5": 1},
        "files": {"shard": named_shard("null", NULL_SHARD, len(NULL_SHARD) - 12)},
    }


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("golden")
    publish_bytes(root / "plan.json", document_bytes(plan_body()))
    write_shard(root, 0, CLIP, T5)
    write_shard(root, NULL_UNIT, CLIP[1:], T5[1:])
    rows = rows_part_bytes(0, TENSORS, columns_of(SAMPLES))
    publish_bytes_by_content(unit_path(root, 0, ROWS), rows)
    publish_bytes(record_path(root, 0), document_bytes(record_body(rows)))
    publish_bytes(record_path(root, NULL_UNIT), document_bytes(null_body()))
    finalize(root)
    return root


def rows_bytes(dataset: Path) -> bytes:
    """The rows part, whose bytes are pyarrow's."""
    (path,) = (dataset / "shards/000").glob("*.rows.parquet")
    return path.read_bytes()


def test_files(dataset: Path) -> None:
    files = sorted(str(p.relative_to(dataset)) for p in dataset.rglob("*") if p.is_file())
    names = (
        "id_hash id_offsets id_order ids index length_clip length_t5 ok shard shard_digest shards "
        "status tokens_clip tokens_t5 xxh3_clip xxh3_t5"
    )
    rows = hashlib.sha256(rows_bytes(dataset)).hexdigest()[:16]
    ends = (f"{HEAD_SHA256[:16]}.safetensors", f"{rows}.rows.parquet")
    assert files == [
        *(f"index/{name}.npy" for name in names.split()),
        *("manifest.json", "manifest.parquet"),
        *(f"null-{NULL_HEAD_SHA256[:16]}.safetensors", "null.json", "plan.json"),
        *sorted(f"shards/000/shard-000000-{end}" for end in ends),
        "shards/000/shard-000000.json",
    ]


def test_shard(dataset: Path) -> None:
    raw = (dataset / f"shards/000/shard-000000-{HEAD_SHA256[:16]}.safetensors").read_bytes()
    assert raw == UNIT_SHARD
    assert hashlib.sha256(raw[:-32]).hexdigest() == HEAD_SHA256
    raw = (dataset / f"null-{NULL_HEAD_SHA256[:16]}.safetensors").read_bytes()
    assert raw == NULL_SHARD
    assert hashlib.sha256(raw[:-12]).hexdigest() == NULL_HEAD_SHA256


def test_documents(dataset: Path) -> None:
    rows = rows_bytes(dataset)
    assert (dataset / "plan.json").read_bytes() == document(plan_body())
    assert (dataset / "shards/000/shard-000000.json").read_bytes() == document(record_body(rows))
    assert (dataset / "null.json").read_bytes() == document(null_body())
    assert rows_digest(columns_of(SAMPLES)) == record_body(rows)["rows_sha256"]
    literal = b'{"a":["\xc3\xbc\\n",null,1,true],"format_version":1,"kind":"x"}'
    expected_digest = "bdeb0696fcf619a42ebc2ab7e25b4a99d608cce11b7bf6956e8b4e2910ef50fc"
    assert hashlib.sha256(literal).hexdigest() == expected_digest
    expected = b'{"a":["\xc3\xbc\\n",null,1,true],"digest":"%s",' % expected_digest.encode()
    body = {"kind": "x", "format_version": 1, "a": ["ü\n", None, 1, True]}
    assert document_bytes(body) == expected + b'"format_version":1,"kind":"x"}\n'


def npy(descr: str, shape: str, data: bytes) -> bytes:
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}"
    return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n" + data


def test_index(dataset: Path) -> None:
    sums = {
        "clip": [xxhash.xxh3_64_intdigest(bf16(row)) for row in CLIP],
        "t5": [xxhash.xxh3_64_intdigest(bf16([v for t in row for v in t])) for row in T5],
    }
    ids = [b"a", b"b", "ü".encode()]
    hashed = sorted((xxhash.xxh3_64_intdigest(each), k) for k, each in enumerate(ids))
    expected = {
        "status": npy("|u1", "(3,)", bytes([0, 1, 0])),
        "shard": npy("<i4", "(3,)", struct.pack("<3i", 0, 0, 0)),
        "index": npy("<i4", "(3,)", struct.pack("<3i", 0, -1, 1)),
        "tokens_clip": npy("<i4", "(3,)", struct.pack("<3i", 3, 0, 4)),
        "tokens_t5": npy("<i4", "(3,)", struct.pack("<3i", 2, 0, 1)),
        "length_clip": npy("<i4", "(3,)", struct.pack("<3i", 1, 0, 1)),
        "length_t5": npy("<i4", "(3,)", struct.pack("<3i", 2, 0, 1)),
        "ids": npy("|u1", "(4,)", "abü".encode()),
        "id_offsets": npy("<i8", "(4,)", struct.pack("<4q", 0, 1, 2, 4)),
        "id_hash": npy("<u8", "(3,)", struct.pack("<3Q", *(h for h, _ in hashed))),
        "id_order": npy("<i8", "(3,)", struct.pack("<3q", *(k for _, k in hashed))),
        "ok": npy("<i8", "(2,)", struct.pack("<2q", 0, 2)),
        "shards": npy("<i8", "(1, 3)", struct.pack("<3q", 0, 3, 2)),
        "shard_digest": npy("<u8", "(1,)", struct.pack("<Q", int(HEAD_SHA256[:16], 16))),
    }
    for name, (first, second) in sums.items():
        expected[f"xxh3_{name}"] = npy("<u8", "(3,)", struct.pack("<3Q", first, 0, second))
    for name, payload in expected.items():
        assert (dataset / f"index/{name}.npy").read_bytes() == payload, name


def test_root_manifest(dataset: Path) -> None:
    names = [str(p.relative_to(dataset)) for p in dataset.rglob("*") if p.is_file()]
    files = {
        name: described((dataset / name).read_bytes())
        for name in names
        if name != "manifest.json" and not name.startswith("shards/")
    }
    record = record_body(rows_bytes(dataset))
    counts = {"rows": 3, "samples": 3, "units": 1, "stored": 2}
    body = {
        **{"format_version": 1, "kind": "dataset", "fingerprint": FINGERPRINT, "plan_id": PLAN_ID},
        "spec": SPEC,
        "tensors": {
            "clip": {"encoder": "clip", "per": "caption", "width": 2, "dtype": "bfloat16"},
            "t5": {"encoder": "t5", "per": "token", "width": 4, "dtype": "bfloat16"},
        },
        "counts": {
            **counts,
            **{name: record[name] for name in ("status", "noted", "encoders", "tensors")},
        },
        "environments": [{"environment": RECORD_HEAD["environment"], "units": 1}],
        "records_sha256": hashlib.sha256(f"{digest(record)}\n".encode()).hexdigest(),
        "files": files,
    }
    assert (dataset / "manifest.json").read_bytes() == document(body)
    del files["manifest.parquet"]
    assert digest(files) == ROOT_FILES_SHA256


def test_parquet(dataset: Path) -> None:
    texts = ["one caption", None, 'zwei "ü"']
    digests = [text and hashlib.sha256(text.encode()).hexdigest() for text in texts]
    columns: dict[str, tuple[pa.DataType, bool, list[Any]]] = {
        "sample_id": (pa.string(), False, ["a", "b", "ü"]),
        "row": (pa.int64(), False, [0, 1, 2]),
        "status": (pa.string(), False, ["ok", "null_text", "ok"]),
        "error": (pa.string(), True, [None, "text is null", None]),
        "shard": (pa.int32(), False, [0, 0, 0]),
        "index": (pa.int32(), True, [0, None, 1]),
        "clip_tokens": (pa.int32(), True, [3, None, 4]),
        "clip_truncated": (pa.bool_(), True, [False, None, False]),
        "t5_tokens": (pa.int32(), True, [2, None, 1]),
        "t5_truncated": (pa.bool_(), True, [True, None, False]),
        "clip_length": (pa.int32(), True, [1, None, 1]),
        "t5_length": (pa.int32(), True, [2, None, 1]),
        "text_sha256": (pa.string(), True, digests),
    }
    text = {"text": (pa.string(), True, texts)}
    for path, expected in (
        ("manifest.parquet", columns),
        (next((dataset / "shards/000").glob("*.rows.parquet")), {**columns, **text}),
    ):
        table = pq.ParquetFile(dataset / path, page_checksum_verification=True).read()
        fields = [pa.field(name, kind, null) for name, (kind, null, _) in expected.items()]
        assert table.schema.equals(pa.schema(fields), check_metadata=True)
        assert table.to_pydict() == {name: values for name, (_, _, values) in expected.items()}
        first = pq.ParquetFile(dataset / path).metadata.row_group(0).column(0)
        assert first.compression == "ZSTD"
