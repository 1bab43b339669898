"""Caption tables for F15: of other types than the configuration says, and with damaged footers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ODD = ("lists", "deep lists", "one id", "not UTF-8")
FORGED = (  # numbers as thrift has them: 0, -1, 2**30, 2**31 - 1, -(2**31), 2**63 - 1, no end
    b"\0", b"\1", b"\x80\x80\x80\x80\x08", b"\xfe\xff\xff\xff\x0f", b"\xff\xff\xff\xff\x0f",
    b"\xfe" + b"\xff" * 8 + b"\1", b"\xff" * 20,
)  # fmt: skip


def captions_other(root: Path, captions: Path, rng: random.Random) -> str:
    """The input: a table of other types, or with ids that cannot be."""
    way = rng.choice(ODD)
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


def write_captions(path: Path, rng: random.Random, way: str = "sound") -> None:
    num_rows = 200
    texts: Any = pa.array([f"caption {i}" for i in range(num_rows)])
    ids: Any = pa.array([f"s{i}" for i in range(num_rows)])
    if way == "lists":
        texts = pa.array([["x"] * 2000] * num_rows)
    elif way == "deep lists":
        texts = pa.array([[[1]]] * num_rows)
    elif way == "one id":
        ids = pa.array(["same"] * num_rows)
    elif way == "not UTF-8":
        ids, texts = pa.array([rng.randbytes(8)] * num_rows), pa.array([b"\xff\xfe"] * num_rows)
    fps = pa.array([24 if i % 7 else None for i in range(num_rows)], pa.int64())
    pq.write_table(pa.table({"id": ids, "text": texts, "fps": fps}), path, compression="zstd")
