"""A caption table with every column that Open-Sora reads, and finished datasets of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from jobs import call, write_job

ROWS = 30
NULL_ROWS = (4, 11)
RECIPE = ("--captions.recipe.kind", "opensora", "--captions.recipe.fps_max", "24")


def captions_table() -> pa.Table:
    """Rows 4 and 11 have no caption; the integer FPS column has a null, in row 4."""
    texts = [f"a short film, take {i}, of {'very ' * (i % 5)}old ships" for i in range(ROWS)]
    texts[2], texts[7] = "ships", texts[6]
    return pa.table(
        {
            "id": [f"s{i}" for i in range(ROWS)],
            "text": [None if i in NULL_ROWS else text for i, text in enumerate(texts)],
            "path": [f"/videos/{i}.mp4" for i in range(ROWS)],
            "num_frames": [33] * ROWS,
            "height": [256] * ROWS,
            "width": [256] * ROWS,
            "fps": pa.array([None if i == 4 else 15 for i in range(ROWS)], pa.int64()),
            "tags": [["x"] * (i % 3) for i in range(ROWS)],
            "text_t5_path": ["old"] * ROWS,
        }
    )


def make(
    folder: Path, table: pa.Table, t5: Path, clip: Path, *words: str, **t5_fields: Any
) -> Path:
    """A finished dataset of `table` in folder/out, six rows to a unit."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "captions.parquet", row_group_size=7)
    job = write_job(folder, folder / "captions.parquet", t5, clip, samples_per_shard=6, **t5_fields)
    code, _, said = call("run", str(job), *words)
    assert code == 0, said
    return folder / "out"


def with_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    """The table with one column replaced or added."""
    if name in table.column_names:
        return table.set_column(table.column_names.index(name), name, pa.array(values))
    return table.append_column(name, pa.array(values))
