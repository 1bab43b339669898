"""Small caption tables for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embed_precompute.captions.recipes import CaptionsConfig
from embed_precompute.captions.table import CaptionTable
from embed_precompute.samples import Sample


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def rows(count: int, first: int = 0) -> dict[str, Any]:
    numbers = range(first, first + count)
    return {"id": [f"c{i}" for i in numbers], "text": [f"caption {i}" for i in numbers]}


def utf8(values: list[bytes | None]) -> Any:
    """A string array with these bytes, valid or not."""
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(array), array.buffers())


def opened(path: Path | str, integer_columns: tuple[str, ...] = (), **fields: Any) -> CaptionTable:
    return CaptionTable.open(CaptionsConfig(str(path), **fields), integer_columns)


def samples_of(path: Path | str, **fields: Any) -> list[Sample]:
    table = opened(path, **fields)
    return table.reader().read(0, table.num_rows)
