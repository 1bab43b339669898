"""Footers and page headers: what pyarrow says of sound files, and of damaged ones never a crash."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embed_precompute.captions.rows import MAX_PAGE_BYTES, MOST_BATCH_BYTES, RowCursor
from embed_precompute.captions.settings import CaptionsConfig
from embed_precompute.captions.table import CaptionTable
from embed_precompute.errors import InputError
from embed_precompute.parquet.chunks import Chunk, column_chunks
from embed_precompute.parquet.pages import (
    WINDOW_BYTES,
    PageTooLarge,
    ReadAt,
    read_pages,
    row_bytes,
)
from embed_precompute.parquet.thrift import (
    BINARY,
    DOUBLE,
    I8,
    I16,
    I32,
    I64,
    LIST,
    STRUCT,
    Compact,
    ParquetDamage,
)

COLUMNS = ["id", "text", "fps", "tags", "deep"]


def file_of(table: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def footer_of(payload: bytes) -> bytes:
    return payload[-8 - int.from_bytes(payload[-8:-4], "little") : -8]


def reading(payload: bytes) -> ReadAt:
    return lambda offset, size: payload[offset : offset + size]


def table_of(num_rows: int = 300) -> Any:
    texts = [None if i % 11 == 0 else f"caption {i % 40} " + "x" * (i % 7) for i in range(num_rows)]
    return pa.table(
        {
            "id": [f"s{i}" for i in range(num_rows)],
            "other": pa.array([{"a": i, "b": [str(i)]} for i in range(num_rows)]),
            "text": texts,
            "fps": pa.array([None if i % 5 == 0 else 24 for i in range(num_rows)], pa.int32()),
            "tags": [
                None if i % 13 == 0 else [f"t{k}" for k in range(i % 6)] for i in range(num_rows)
            ],
            "deep": [[[str(i)] * (i % 3), []] for i in range(num_rows)],
        }
    )


# --- sound files -------------------------------------------------------------------------------


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_chunks_and_pages_are_those_pyarrow_knows(
    codec: str, version: str, dictionary: bool, statistics: bool
) -> None:
    payload = file_of(
        table_of(),
        compression=codec,
        data_page_version=version,
        use_dictionary=dictionary,
        write_statistics=statistics,
        row_group_size=120,
        data_page_size=256,
        write_batch_size=16,
    )
    metadata = pq.ParquetFile(io.BytesIO(payload)).metadata
    groups = column_chunks(footer_of(payload), COLUMNS)
    assert len(groups) == metadata.num_row_groups == 3
    for number, chunks in enumerate(groups):
        group = metadata.row_group(number)
        known = [group.column(i) for i in range(group.num_columns)]
        known = [c for c in known if c.path_in_schema.split(".")[0] in COLUMNS]
        assert [chunk.leaf.path for chunk in chunks] == [c.path_in_schema for c in known]
        assert [chunk.leaf.max_repetition for chunk in chunks] == [0, 0, 0, 1, 2]
        for chunk, pyarrows in zip(chunks, known, strict=True):
            first = pyarrows.dictionary_page_offset if dictionary else pyarrows.data_page_offset
            size = pyarrows.total_compressed_size
            assert (chunk.begin, chunk.end) == (
                first or pyarrows.data_page_offset,
                chunk.begin + size,
            )
            assert chunk.num_bytes == pyarrows.total_uncompressed_size
            assert chunk.null_count == (pyarrows.statistics.null_count if statistics else None)
            _check_pages(payload, chunk, pyarrows)


def _check_pages(payload: bytes, chunk: Chunk, pyarrows: Any) -> None:
    """Pages follow each other without a gap and have all bytes and values of the chunk."""
    pages = list(read_pages(reading(payload), chunk))
    headers = pages[0].begin - chunk.begin
    for page, following in pairwise(pages):
        headers += following.begin - page.begin - page.packed_bytes
    assert pages[-1].begin + pages[-1].packed_bytes == chunk.end
    assert sum(page.bytes for page in pages) + headers == chunk.num_bytes
    data = [page for page in pages if page.kind != 2]
    assert sum(page.num_values for page in data) == pyarrows.num_values
    assert (len(data) < len(pages)) == pyarrows.has_dictionary_page
    encodings = set(pyarrows.encodings)
    assert {page.encoding for page in data} <= ({0, 8} if "RLE_DICTIONARY" in encodings else {0})


@pytest.mark.parametrize("name", ["a", "a.b", "c", "c.a", "c.a.list", "ab", "b", ""])
def test_a_column_is_selected_as_pyarrow_selects_it(name: str) -> None:
    table = pa.table({"a": [1], "a.b": [2], "ab": [3], "c": [{"a": [4], "b": 5}], "c.a": [6]})
    payload = file_of(table)
    chosen = column_chunks(footer_of(payload), [name])[0]
    read = pq.ParquetFile(io.BytesIO(payload)).read(columns=[name])
    assert sum(chunk.num_bytes > 0 for chunk in chosen) == len(read.flatten().column_names)


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
def test_rows_of_a_chunk_are_no_wider_than_their_bound(codec: str, version: str) -> None:
    options = {"compression": codec, "data_page_version": version, "data_page_size": 4096}
    values = ["x" * 1000, *["y"] * 5000]

    def bound(column: list[Any], **more: Any) -> int:
        payload = file_of(pa.table({"a": column}), **options, **more)
        return row_bytes(
            reading(payload), column_chunks(footer_of(payload), ["a"])[0][0], 1 << 30, 0
        )

    assert bound(values) == 1000  # of a dictionary: any row may be its longest
    assert bound(["x"] * 5000) <= 5
    assert bound(["x" * 1000] * 100, use_dictionary=False) in range(1000, 1100)
    assert bound(list(range(100_000)), use_dictionary=False) in range(8, 10)
    delta = {"use_dictionary": False, "column_encoding": {"a": "DELTA_BYTE_ARRAY"}}
    assert bound(["x" * 1000] * 100, **delta) >= 1000  # each may repeat the one before
    lists = [["x" * 1000], *[["y"] * (i % 7) for i in range(5000)]]
    assert bound(lists) == 6 * (1000 + 16)
    assert bound([[x, [], x] for x in lists]) == (2 * 6 + 1) * (1000 + 16)
    wide = bound([["y" * 50] * 2000, *[["z"]] * 2000], use_dictionary=False)
    assert wide >= 2000 * 50  # one list on many pages


def test_a_dictionary_with_no_wide_value_is_not_unpacked() -> None:
    payload = file_of(pa.table({"a": [f"value {i}" for i in range(100)] * 3}), compression="zstd")
    chunk = column_chunks(footer_of(payload), ["a"])[0][0]
    assert row_bytes(reading(payload), chunk, 1 << 30, 0) == len("value 99")
    size = next(read_pages(reading(payload), chunk)).bytes
    assert row_bytes(reading(payload), chunk, 1 << 30, 1 << 20) == size - 4 * 100


def test_page_headers_are_read_in_windows() -> None:
    payload = file_of(table_of(20_000), use_dictionary=False, data_page_size=512)
    reads: list[int] = []

    def noted(offset: int, size: int) -> bytes:
        reads.append(size)
        return payload[offset : offset + size]

    chunk = column_chunks(footer_of(payload), ["id"])[0][0]
    pages = list(read_pages(noted, chunk))
    assert set(reads) == {WINDOW_BYTES}
    assert len(pages) > len(reads)
    assert len(reads) <= 2 + (chunk.end - chunk.begin) // (WINDOW_BYTES // 2)


# --- damage ------------------------------------------------------------------------------------


def _answer(payload: bytes) -> None:
    """All that is asked of a file, or ParquetDamage; what is read for it is bounded."""

    def bounded(offset: int, size: int) -> bytes:
        assert offset >= 0
        assert 0 <= size <= MAX_PAGE_BYTES
        return payload[offset : offset + size]

    try:
        for group in column_chunks(footer_of(payload), COLUMNS):
            for chunk in group:
                assert 0 <= row_bytes(bounded, chunk, MAX_PAGE_BYTES, 0) <= MAX_PAGE_BYTES
    except ParquetDamage:
        pass  # any other exception is the test's failure


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_any_flipped_bit_gives_an_answer_or_damage(version: str) -> None:
    """Of the footer, and of the page headers and levels before it."""
    payload = file_of(table_of(40), compression="zstd", data_page_version=version)
    began = time.process_time()
    for bit in range(4 * 8, (len(payload) - 8) * 8, 5):
        flipped = bytearray(payload)
        flipped[bit // 8] ^= 1 << bit % 8
        single = time.process_time()
        _answer(bytes(flipped))
        assert time.process_time() - single < 1.0
    assert time.process_time() - began < 60


def test_a_footer_cut_anywhere_is_damage() -> None:
    footer = footer_of(file_of(table_of(10)))
    for size in range(len(footer)):
        with pytest.raises(ParquetDamage):
            column_chunks(footer[:size], COLUMNS)


FOREVER = b"\xff\xff\xff\xff\x07"  # 2**31 - 1


@pytest.mark.parametrize("kind", [1, 2, I8, I64, DOUBLE, BINARY, LIST, STRUCT])
def test_a_forged_count_ends_with_its_bytes(kind: int) -> None:
    """Two billion elements in ten thousand bytes: no loop beyond them."""
    began = time.process_time()
    with pytest.raises(ParquetDamage):
        Compact(bytes([0xF0 | kind]) + FOREVER + b"\x00" * 10_000).skip(LIST)
    with pytest.raises(ParquetDamage):
        column_chunks(b"\x29" + bytes([0xFC]) + FOREVER + b"\x00" * 10_000, ["text"])
    with pytest.raises(ParquetDamage):
        column_chunks(b"\x49" + bytes([0xFC]) + FOREVER + b"\x00" * 10_000, ["text"])
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"\x15\x02\x05\x02\x02\x00", "twice"),  # by a long field number
        (b"\x15\x80\x80\x80\x80\x20\x00", "32 bits"),
        (b"\x15" + b"\xff" * 10 + b"\x01", "64 bits"),
        (b"\x18\xff\xff\xff\xff\x7f", "claims"),
        (b"\x1d\x00", "unknown type 13"),
        (b"\x1c" * 100, "nested too deep"),
        (b"\x18\x05ab", "ends too early"),
        (b"\x05\x01\x02\x00", "out of range"),
    ],
)
def test_what_another_reader_might_read_otherwise_is_damage(payload: bytes, message: str) -> None:
    with pytest.raises(ParquetDamage, match=message):
        _read_struct(Compact(payload))


def _read_struct(cursor: Compact) -> None:
    for _, kind in cursor.fields():
        if kind in (I16, I32, I64):
            cursor.number(kind)
        else:
            cursor.skip(kind)


def test_flipped_footers_do_not_end_the_process(tmp_path: Path) -> None:
    """pyarrow's column chunk metadata throws where nothing catches: a process of its own."""
    path = tmp_path / "captions.parquet"
    fps = pa.array([24 if i % 7 else None for i in range(300)], pa.int64())
    columns = {"id": [f"s{i}" for i in range(300)], "text": ["x"] * 300, "fps": fps}
    pq.write_table(pa.table(columns), path, compression="zstd")
    found = subprocess.run(
        [sys.executable, "-c", _FLIPS, str(path)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]
    opened, refused = map(int, found.stdout.split())
    assert opened > 50
    assert refused > 50


_FLIPS = """
import sys
from pathlib import Path
from embed_precompute.captions.table import CaptionTable
from embed_precompute.captions.settings import CaptionsConfig, RecipeConfig
from embed_precompute.errors import InputError

path = Path(sys.argv[1])
sound = path.read_bytes()
size = int.from_bytes(sound[-8:-4], "little")
counts = [0, 0]
for bit in range(0, size * 8, 7):
    flipped = bytearray(sound)
    flipped[len(sound) - 8 - size + bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        CaptionTable.open(CaptionsConfig(str(path), recipe=RecipeConfig(kind="opensora")))
        counts[0] += 1
    except InputError:
        counts[1] += 1
print(*counts)
"""


# --- bombs -------------------------------------------------------------------------------------


MIB = 1 << 20


def repeated(indices: list[int], values: list[str]) -> Any:
    """A column that a parquet dictionary holds as it is: small, whatever it stands for."""
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(values))


def largest_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    sizes = [0]
    original = RowCursor._advance

    def noted(self: RowCursor) -> None:
        original(self)
        sizes.append(self._batch.nbytes)

    monkeypatch.setattr(RowCursor, "_advance", noted)
    table = CaptionTable.open(CaptionsConfig(str(path), id_column=None))
    reader = table.reader()
    for first in range(0, table.num_rows, 64):
        reader.read(first, min(64, table.num_rows - first))
    return max(sizes)


@pytest.mark.parametrize("encoding", ["RLE_DICTIONARY", "DELTA_BYTE_ARRAY"])
def test_rows_that_repeat_a_wide_value_come_few_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Narrow rows first, so that nothing read before warns of them."""
    path = tmp_path / "bomb.parquet"
    if encoding == "RLE_DICTIONARY":
        texts, options = repeated([0] * 3000 + [1] * 90, ["x", "y" * MIB]), {}
    else:
        texts = pa.array(["x"] * 3000 + ["y" * MIB] * 90)
        options = {"use_dictionary": False, "column_encoding": {"text": encoding}}
    pq.write_table(pa.table({"text": texts}), path, **options)
    assert path.stat().st_size < 3 * MIB
    assert largest_batch(path, monkeypatch) <= MOST_BATCH_BYTES + 2 * MIB


def test_a_page_of_gigabytes_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    """By what its own header claims: the footer's mean is that of captions."""
    path = tmp_path / "bomb.parquet"
    texts = pa.array(["x"] * 15_000 + ["y" * (2 * MIB)] * 80)
    pq.write_table(
        pa.table({"text": texts}),
        path,
        compression="zstd",
        use_dictionary=False,
        data_page_size=1 << 30,
    )
    assert path.stat().st_size < MIB
    table = CaptionTable.open(CaptionsConfig(str(path), id_column=None))
    with pytest.raises(InputError) as caught:
        table.reader().read(0, 10)
    message = str(caught.value)
    for part in (str(path), "column 'text' of row group 0 has a page of", "Name the column"):
        assert part in message
    assert str(MAX_PAGE_BYTES) in message
    cursor = RowCursor(table.row_map, ["text"], 100, max_page_bytes=1 << 30)
    assert [len(batch) for _, batch in cursor.batches(0, 10)] == [10]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_list_of_gigabytes_is_refused_before_it_is_decoded(tmp_path: Path, version: str) -> None:
    path = tmp_path / "bomb.parquet"
    values = repeated([0] * 1000 + [1] * 1000, ["x", "y" * MIB])
    texts = pa.ListArray.from_arrays(pa.array([*range(1001), 2000], pa.int32()), values)
    pq.write_table(pa.table({"text": texts}), path, data_page_version=version)
    assert path.stat().st_size < 3 * MIB
    table = CaptionTable.open(CaptionsConfig(str(path), id_column=None))
    with pytest.raises(
        InputError, match=r"column 'text\.list\.element' of row group 0 has rows of"
    ):
        table.reader().read(0, 1)


def test_too_large_is_said_of_what_is_too_large() -> None:
    payload = file_of(pa.table({"a": ["x" * 1000] * 10}), use_dictionary=False)
    chunk = column_chunks(footer_of(payload), ["a"])[0][0]
    with pytest.raises(PageTooLarge, match=r"a page of 10\d+ bytes \(compressed \d+\) with 10"):
        row_bytes(reading(payload), chunk, 10_000, 0)
