"""Caption tables that F15 makes: bombs, and damage aimed at footers and page headers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

BOMBS = (
    "wide", "lists", "deep lists", "one id", "not UTF-8", "dictionary", "dictionary in a list",
    "prefixes", "page",
)  # fmt: skip
FORGED = (  # numbers as thrift has them: 0, -1, 2**30, 2**31 - 1, -(2**31), 2**63 - 1, no end
    b"\0", b"\1", b"\x80\x80\x80\x80\x08", b"\xfe\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x0f",
    b"\xfe" + b"\xff" * 8 + b"\1", b"\xff" * 20,
)  # fmt: skip


def captions_other(root: Path, captions: Path, rng: random.Random) -> str:
    """The input: a bomb, or a table of other types."""
    way = rng.choice(BOMBS)
    write_captions(captions, rng, way)
    return f"captions: {way}"


def captions_footer(root: Path, captions: Path, rng: random.Random) -> str:
    """The input's footer: bits flipped, or a number or a count forged."""
    payload = bytearray(captions.read_bytes())
    size = int.from_bytes(payload[-8:-4], "little")
    begin = len(payload) - 8 - size
    way = rng.choice(("flip", "flip", "forge"))
    if way == "flip":
        for _ in range(rng.choice((1, 1, 2, 8))):
            payload[begin + rng.randrange(size)] ^= 1 << rng.randrange(8)
    else:
        forged = rng.choice(FORGED)
        at = begin + rng.randrange(size)
        payload[at : at + 1] = forged
        payload[-8:-4] = (size - 1 + len(forged)).to_bytes(4, "little")
    captions.write_bytes(payload)
    return f"captions: footer {way}"


def captions_pages(root: Path, captions: Path, rng: random.Random) -> str:
    """A page header of the input: bits flipped, or a size or a number of values forged."""
    from embed_precompute.parquet.chunks import column_chunks
    from embed_precompute.parquet.pages import read_pages

    payload = bytearray(captions.read_bytes())
    footer = bytes(payload[-8 - int.from_bytes(payload[-8:-4], "little") : -8])
    chunk = rng.choice(column_chunks(footer, ["id", "text", "fps"])[0])
    pages = read_pages(lambda at, size: bytes(payload[at : at + size]), chunk)
    begin = chunk.begin
    headers = []
    for page in pages:
        headers.append((begin, page.begin))
        begin = page.begin + page.packed_bytes
    begin, end = rng.choice(headers)
    way = rng.choice(("flip", "forge"))
    if way == "flip":
        payload[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    else:
        fields = [at + 1 for at in range(begin, end) if payload[at] == 0x15]  # of 32 bits
        at = rng.choice(fields)
        after = next(i for i in range(at, len(payload)) if payload[i] < 128) + 1
        payload[at:after] = rng.choice(FORGED)
    captions.write_bytes(payload)
    return f"captions: page header {way}"


def write_captions(path: Path, rng: random.Random, way: str = "sound") -> None:
    num_rows, options = 200, {}
    texts: Any = pa.array([f"caption {i}" for i in range(num_rows)])
    ids: Any = pa.array([f"s{i}" for i in range(num_rows)])
    if way == "wide":
        texts = pa.array(["x" * rng.choice((1 << 20, 24 << 20))] * 8)
        ids = ids.slice(0, 8)
    elif way == "lists":
        texts = pa.array([["x"] * 2000] * num_rows)
    elif way == "deep lists":
        texts = pa.array([[[1]]] * num_rows)
    elif way == "one id":
        ids = pa.array(["same"] * num_rows)
    elif way == "not UTF-8":
        ids, texts = pa.array([rng.randbytes(8)] * num_rows), pa.array([b"\xff\xfe"] * num_rows)
    elif way == "dictionary":
        texts, ids = _narrow_then_wide(300), pa.array([f"s{i}" for i in range(500)])
        if rng.random() < 0.3:
            ids = texts
    elif way == "dictionary in a list":
        offsets = [*range(num_rows), 500]
        texts = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), _narrow_then_wide(300))
    elif way == "prefixes":
        texts = pa.array(["x"] * 150 + ["y" * (1 << 20)] * 50)
        options = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    elif way == "page":
        texts = pa.array(["x"] * 15_000 + ["y" * (2 << 20)] * rng.choice((24, 80)))
        ids = pa.array([str(i) for i in range(len(texts))])
        options = {"use_dictionary": False, "data_page_size": 1 << 30}
    fps = pa.array([24 if i % 7 else None for i in range(len(ids))], pa.int64())
    table = pa.table({"id": ids, "text": texts, "fps": fps})
    pq.write_table(table, path, compression="zstd", **options)


def _narrow_then_wide(num_wide: int) -> Any:
    """200 short values, then a megabyte again and again: a dictionary of two."""
    indices = pa.array([0] * 200 + [1] * num_wide, pa.int32())
    return pa.DictionaryArray.from_arrays(indices, pa.array(["x", "y" * (1 << 20)]))
