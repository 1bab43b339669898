"""The table Open-Sora's data set class reads: the input's columns, and where each embedding is.

Guarantees: one row per exported sample, in input order, so that pandas numbers the rows from 0; no
null in `text`, `latents_path` and the two text paths, which its collate cannot stack; an FPS column
that pandas saw as float when the captions were encoded is float here too. A CSV that pandas would
read back as other values is refused. The memory-efficient parts are cut and named so that its
arithmetic finds each row. A finished file replaces the former one whole.
Costs: streams, a batch of rows at a time; the memory-efficient split reads the table once more.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from embed_precompute.captions.reader import column_type
from embed_precompute.captions.recipes import INTEGER
from embed_precompute.errors import InputError, StorageError, VerificationError
from embed_precompute.opensora.source import CaptionRows, Entry
from embed_precompute.store.commit import TEMP_PREFIX, Sink, StagedFile, StoredFile, remove_file

SAMPLE_ID, LATENTS, TEXT = "sample_id", "latents_path", "text"
NO_LATENTS = "no-latents"
"""latents_path where there is none: a CSV cannot hold an empty string."""
PATHS = {"t5": "text_t5_path", "clip": "text_clip_path"}
HOT_COLUMNS = ("path", "num_frames", "height", "width", "aspect_ratio", "fps", "resolution")
"""What Open-Sora keeps in memory with memory_efficient=True (datasets/utils.py: read_file)."""
SAMPLER_COLUMNS = ("path", "num_frames", "height", "width", "fps")
NUM_PARTS = 10_000
"""K in Open-Sora's datasets.py: a row's part is its number // ceil(rows / K)."""
_PART = re.compile(r"[0-9]{5}\.parquet")
# What pandas.read_csv takes for a missing value.
CSV_NULLS = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"),
    *("<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}


class TrainerTable:
    """Assembles the rows; `path_of` gives an entry's file for "t5" and "clip", None: no columns."""

    def __init__(
        self,
        captions: CaptionRows,
        recipe: Mapping[str, Any],
        path_of: Callable[[str, Entry], str] | None,
    ) -> None:
        self.filled_latents = 0
        """Rows whose latents_path was missing: now `NO_LATENTS`."""
        self._captions, self._path_of = captions, path_of
        text = captions.text_column
        if SAMPLE_ID in captions.schema.names and captions.id_column != SAMPLE_ID:
            raise InputError(
                f"the captions have a column {SAMPLE_ID!r} that is not their id column "
                f"({captions.id_column!r}): the export needs that name. Rename the column."
            )
        self.replaced = [n for n in PATHS.values() if n in captions.schema.names]
        if TEXT in captions.schema.names and text != TEXT:
            self.replaced.append(TEXT)
        own = (SAMPLE_ID, LATENTS, *PATHS.values(), TEXT, text)
        kept = [self._input_field(f, recipe) for f in captions.schema if f.name not in own]
        order = {name: i for i, name in enumerate(captions.schema.names)}
        texts = [pa.field(name, pa.string()) for name in dict.fromkeys((text, TEXT))]
        kept += texts
        kept.sort(key=lambda field: order.get(field.name, len(order)))
        added = [pa.field(SAMPLE_ID, pa.string()), pa.field(LATENTS, pa.string())]
        if path_of is not None:
            added += [pa.field(name, pa.string()) for name in PATHS.values()]
        self.schema = pa.schema(kept + added)

    def batch(
        self, rows: pa.RecordBatch, entries: Sequence[Entry], texts: Sequence[str]
    ) -> pa.RecordBatch:
        """Rows of the trainer's table for rows of the input."""
        made: dict[str, Any] = {
            self._captions.text_column: pa.array(texts, pa.string()),
            TEXT: pa.array(texts, pa.string()),
            SAMPLE_ID: pa.array([entry.sample_id for entry in entries], pa.string()),
            LATENTS: self._latents(rows),
        }
        if self._path_of is not None:
            for kind, name in PATHS.items():
                paths = [self._path_of(kind, entry) for entry in entries]
                made[name] = pa.array(paths, pa.string())
        columns = [
            made[field.name] if field.name in made else rows.column(field.name).cast(field.type)
            for field in self.schema
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self.schema)

    def _input_field(self, field: pa.Field, recipe: Mapping[str, Any]) -> pa.Field:
        """pandas reads an integer column with a null as float, and Open-Sora then writes "24.0
        FPS"; left-out rows may have held that null, so the type says it now."""
        was_float = recipe.get("fps_format") == "float" and recipe.get("fps_column") == field.name
        if was_float and column_type(field.type) == INTEGER:
            return pa.field(field.name, pa.float64())
        return field

    def _latents(self, rows: pa.RecordBatch) -> pa.Array:
        if LATENTS not in rows.schema.names:
            self.filled_latents += rows.num_rows
            return pa.array([NO_LATENTS] * rows.num_rows, pa.string())
        column = rows.column(LATENTS).cast(pa.string())
        self.filled_latents += column.null_count
        return pc.fill_null(column, NO_LATENTS)


class TableFile(Protocol):
    """A table that is being written under a temporary name."""

    def __enter__(self) -> TableFile: ...

    def __exit__(self, *exception: object) -> None: ...

    def write(self, batch: pa.RecordBatch, places: Sequence[str]) -> None:
        """Appends rows; `places` says where each is from."""
        ...

    def finish(self) -> StoredFile:
        """Completes the file and puts it in place of the former one."""
        ...


def open_table(target: Path, schema: pa.Schema) -> TableFile:
    """A new table; its name says whether it is parquet or CSV."""
    return CsvTable(target, schema) if target.suffix == ".csv" else ParquetTable(target, schema)


class ParquetTable:
    """Read by pandas, dask and fastparquet: snappy, plain types, no index of its own."""

    def __init__(self, target: Path, schema: pa.Schema) -> None:
        self._staged = StagedFile(target)
        self._writer = pq.ParquetWriter(
            Sink(self._staged), schema, version="2.6", compression="snappy", store_schema=False
        )

    def __enter__(self) -> ParquetTable:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(StorageError, pa.ArrowException):  # a footer for nobody
            self._writer.close()
        self._staged.discard()

    def write(self, batch: pa.RecordBatch | pa.Table, places: Sequence[str] = ()) -> None:
        rows = pa.Table.from_batches([batch]) if isinstance(batch, pa.RecordBatch) else batch
        self._writer.write_table(rows)

    def finish(self) -> StoredFile:
        self._writer.close()
        stored = self._staged.digest()
        self._staged.replace()
        return stored


class CsvTable:
    """As pandas.read_csv reads it back: a float always has a point, and no string looks missing."""

    def __init__(self, target: Path, schema: pa.Schema) -> None:
        nested = [f.name for f in schema if pa.types.is_nested(f.type)]
        if nested:
            raise InputError(
                f"columns {nested} hold lists or structs, which CSV cannot: export parquet, or "
                "drop them from the captions."
            )
        self._strings = [f.name for f in schema if pa.types.is_string(f.type)]
        self._staged = StagedFile(target)
        self._write_rows([schema.names])

    def __enter__(self) -> CsvTable:
        return self

    def __exit__(self, *exception: object) -> None:
        self._staged.discard()

    def write(self, batch: pa.RecordBatch, places: Sequence[str]) -> None:
        for name in self._strings:
            for place, value in zip(places, batch.column(name).to_pylist(), strict=True):
                if value is not None and (value in CSV_NULLS or _changes(name, value)):
                    raise InputError(
                        f"{place}: column {name!r} is {value!r}, which pandas reads from a CSV as "
                        "something else (missing, or a number). Export parquet."
                    )
        columns = [column.to_pylist() for column in batch.columns]
        self._write_rows(zip(*columns, strict=True))

    def finish(self) -> StoredFile:
        stored = self._staged.digest()
        self._staged.replace()
        return stored

    def _write_rows(self, rows: Iterable[Iterable[Any]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows(rows)  # floats by repr: 24.0, never 24
        self._staged.write(text.getvalue().encode())


def _changes(column: str, value: str) -> bool:
    """Whether an id would come back as a number that is not written like it: 007, 1e5."""
    if column != SAMPLE_ID:
        return False
    try:
        number = float(value)
    except ValueError:
        return False
    return not number.is_integer() or value != str(int(value) if value.isdecimal() else number)


def check_table(path: Path, num_rows: int, memory_efficient: bool) -> dict[str, int]:
    """Read the finished table back; nulls per column. VerificationError when it is not as written.

    Of a CSV only the rows are counted.
    """
    rows, nulls = 0, dict[str, int]()
    for batch in _batches(path):
        rows += batch.num_rows
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            nulls[name] = nulls.get(name, 0) + column.null_count
    never = [TEXT, SAMPLE_ID, LATENTS, *PATHS.values()]
    empty = [name for name in never if nulls.get(name, 0)]
    if rows != num_rows or empty:
        raise VerificationError(
            f"{path} has {rows} rows and nulls in {empty}: expected {num_rows} rows and none. "
            "Remove it and run again."
        )
    if memory_efficient and nulls["path"]:
        raise InputError(
            f"{path}: {nulls['path']} rows have no path, by which Open-Sora joins the parts of a "
            "memory-efficient table. Drop those rows from the captions, or export without."
        )
    return nulls


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".csv":
        options = pa.csv.ParseOptions(newlines_in_values=True)
        with pa.csv.open_csv(path, parse_options=options) as reader:
            yield from reader
        return
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(use_threads=False)


def write_parts(table: Path, num_rows: int) -> int:
    """Open-Sora's memory-efficient split beside `table`, in the folder of its name; parts written.

    Part k (`%05d.parquet`, from 1) holds rows [k * size, (k + 1) * size), all columns but those it
    keeps in memory, and `path`, which it compares. The folder holds nothing else: it goes by the
    sorted listing.
    """
    folder = parts_folder(table)
    size = -(-num_rows // NUM_PARTS)
    names = [f"{k + 1:05d}.parquet" for k in range(-(-num_rows // size))]
    clear_parts(table, frozenset(names))
    with pq.ParquetFile(table) as file:
        columns = [n for n in file.schema_arrow.names if n == "path" or n not in HOT_COLUMNS]
        batches = file.iter_batches(columns=columns, use_threads=False)
        for name, rows in zip(names, _cut(batches, size), strict=True):
            with ParquetTable(folder / name, rows.schema) as part:
                part.write(rows)
                part.finish()
    found = sorted(os.listdir(folder))
    if found != names:
        raise VerificationError(
            f"{folder} holds {len(found):,} files, expected {len(names):,} parts and nothing else: "
            "remove the others and run again."
        )
    return len(names)


def _cut(batches: Iterator[pa.RecordBatch], size: int) -> Iterator[pa.Table]:
    """The rows in tables of `size`, the last one shorter."""
    waiting: list[pa.RecordBatch] = []
    num_waiting = 0
    for batch in batches:
        waiting.append(batch)
        num_waiting += batch.num_rows
        first = 0
        if num_waiting >= size:
            rows = pa.Table.from_batches(waiting)
            while num_waiting >= size:
                yield rows.slice(first, size)
                first, num_waiting = first + size, num_waiting - size
            waiting = rows.slice(first).to_batches()
    if num_waiting:
        yield pa.Table.from_batches(waiting)


def parts_folder(table: Path) -> Path:
    return table.with_suffix("")


def clear_parts(table: Path, keep: frozenset[str] = frozenset()) -> None:
    """Removes an earlier export's parts, except `keep`; the folder too, when it is empty then."""
    folder = parts_folder(table)
    if not folder.is_dir():
        return
    for name in os.listdir(folder):
        if name not in keep and (_PART.fullmatch(name) or name.startswith(TEMP_PREFIX)):
            remove_file(folder / name)
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()
