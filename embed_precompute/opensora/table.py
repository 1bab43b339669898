"""The captions of a dataset, read again, and the table that Open-Sora's dataset class reads.

`CaptionRows` renders each caption again with the dataset's recipe. A row whose id or text is not
the one that was encoded is a ConflictError that names it, so a table can never be joined to the
embeddings of another. Further columns may have been added or changed since.

`TrainerTable` has one row per exported sample, in input order, all columns of the input, and the
paths of the exported files. `text`, `latents_path` and the two text paths are never null, for
Open-Sora's collate cannot stack nulls. A column that pandas read as float when the captions were
encoded is float in this table.

Both go through the table once, a batch of rows at a time.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from embed_precompute.captions.recipes import CaptionsConfig, PlainRecipe, recipe_of
from embed_precompute.captions.table import CaptionTable
from embed_precompute.errors import ConflictError, InputError, StorageError, VerificationError
from embed_precompute.opensora.dataset import FPS, SAMPLE_ID, TEXT
from embed_precompute.samples import Status
from embed_precompute.store.commit import Sink, StagedFile, StoredFile
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.plan import read_plan
from embed_precompute.train.dataset import EmbeddingDataset

LATENTS = "latents_path"
NO_LATENTS = "no-latents"
PATHS = {"text_t5": "text_t5_path", "text_clip": "text_clip_path"}
SAMPLER_COLUMNS = ("path", "num_frames", "height", "width", "fps")
"""What Open-Sora's sampler reads of each row; a null is allowed in fps only."""


@dataclass(frozen=True)
class Entry:
    """One row of the exported table."""

    number: int
    """The sample's number, over all samples of the dataset in input order."""
    index: int
    """Its index in the EmbeddingDataset."""
    sample_id: str
    row: int
    """Input row."""
    caption: str
    """Normalised as for encoding, before the recipe."""


class CaptionRows:
    """The caption table of a finished dataset. `path`: where it is now, if it has moved."""

    def __init__(self, dataset: EmbeddingDataset, root: Path, path: str | None) -> None:
        plan = read_plan(root)
        captions = plan.spec["captions"]
        self.recipe = recipe_of(captions["recipe"])
        self.text_column, self.id_column = plan.inputs.text_column, plan.inputs.id_column
        config = CaptionsConfig(
            path=path or _captions_path(root),
            text_column=self.text_column,
            id_column=self.id_column,
            recipe=self.recipe,
            normalize=tuple(captions["normalize"]),
        )
        table = CaptionTable.open(config)
        if table.num_rows < plan.num_rows or (
            plan.inputs.limit is None and table.num_rows > plan.num_rows
        ):
            raise ConflictError(
                f"{config.path} has {table.num_rows:,} rows: the dataset was made of "
                f"{plan.num_rows:,}. Name the captions that were encoded with --captions."
            )
        self._num_rows = plan.num_rows
        plain = CaptionTable(config, table.row_map, PlainRecipe(), table.is_list, ())
        self._encoded, self._captions = (
            each.reader(plan.num_rows, plan.last_row_samples) for each in (table, plain)
        )
        self.schema = table.schema()
        self.place = table.row_map.place
        """How messages name an input row."""
        self._rows = table.rows(self.schema.names)
        self._dataset, self._index = dataset, DatasetIndex(root)
        self.not_ok: Counter[str] = Counter()
        """Samples without an embedding that were met, by status."""

    def batches(self, limit: int | None) -> Iterator[tuple[pa.RecordBatch, list[Entry]]]:
        """The input's columns and entries of the first `limit` samples that have an embedding."""
        digests = (d for part in self._dataset.columns("text_sha256") for d in part["text_sha256"])
        numbers, indexes = count(), count()
        left = len(self._dataset) + 1 if limit is None else limit
        for first, rows in self._rows.batches(0, self._num_rows):
            encoded = self._encoded.read(first, len(rows))
            captions = self._captions.read(first, len(rows))
            entries: list[Entry] = []
            for sample, caption in zip(encoded, captions, strict=True):
                number = next(numbers)
                found, stored = sample.sample_id, self._stored_id(number)
                if found != stored:
                    raise self._conflict(sample.row, f"sample {found!r}", f"sample {stored!r}")
                status = Status(int(self._index.status[number]))
                if status is not Status.OK:
                    self.not_ok[status.label] += 1
                    continue
                index, text = next(indexes), str(sample.text)
                if hashlib.sha256(text.encode()).hexdigest() != next(digests):
                    stored = self._dataset.encoded_text(index)
                    said = f"the text {text!r:.200} for sample {found!r}"
                    raise self._conflict(sample.row, said, f"{stored!r:.200}")
                entries.append(Entry(number, index, found, sample.row, str(caption.text)))
                if len(entries) == left:
                    break
            if entries:
                picked = pa.array([entry.row - first for entry in entries])
                yield rows.take(picked), entries
            left -= len(entries)
            if left == 0:
                return
        if (number := next(numbers)) < len(self._index):
            last = self._num_rows - 1
            raise self._conflict(last, "no more samples", f"sample {self._stored_id(number)!r}")

    def _stored_id(self, number: int) -> str | None:
        return self._index.sample_id(number) if number < len(self._index) else None

    def _conflict(self, row: int, found: str, stored: str) -> ConflictError:
        return ConflictError(
            f"{self.place(row)}: the captions have {found}, but what was encoded is {stored}. Name "
            "the captions that were encoded with --captions."
        )


def _captions_path(root: Path) -> str:
    """captions.path of the run that made the dataset, from its config.yaml."""
    try:
        loaded = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
        return str(loaded["captions"]["path"])
    except (OSError, yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError) as error:
        raise InputError(
            f"{root / 'config.yaml'} does not say where the captions are ({error}): name them with "
            "--captions PATH, as captions.path was when the dataset was made."
        ) from error


class TrainerTable:
    """Writes the table. `path_of(tensor, entry)` gives the path of an exported file; None: the
    table has no such paths."""

    def __init__(self, captions: CaptionRows, path_of: Callable[[str, Entry], str] | None) -> None:
        self.filled_latents = 0
        """Rows whose latents_path was missing: now NO_LATENTS."""
        self.nulls: Counter[str] = Counter()
        """Nulls of each of SAMPLER_COLUMNS."""
        self._captions, self._path_of = captions, path_of
        names = captions.schema.names
        if SAMPLE_ID in names and captions.id_column != SAMPLE_ID:
            raise InputError(
                f"the captions have a column {SAMPLE_ID!r} that is not their id column "
                f"({captions.id_column!r}): the export needs that name. Rename the column."
            )
        own = captions.text_column
        self._text_columns = {TEXT, own} if isinstance(own, str) else {TEXT}
        """Columns with the sample's caption; where several columns have captions, these stay."""
        made = [*sorted(self._text_columns), SAMPLE_ID, LATENTS]
        made += [] if path_of is None else PATHS.values()
        self.replaced = [n for n in made if n in names and n not in (own, SAMPLE_ID, LATENTS)]
        """Columns of the captions that have other values now."""
        floats = {*captions.recipe.float_columns()}
        if FPS in names and pa.types.is_null(captions.schema.field(FPS).type):
            floats.add(FPS)  # images have none: pandas would read None, at which the sampler fails
        fields = {f.name: pa.float64() if f.name in floats else f.type for f in captions.schema}
        self.schema = pa.schema(list({**fields, **dict.fromkeys(made, pa.string())}.items()))

    @contextlib.contextmanager
    def writing(self, target: Path) -> Iterator[None]:
        """Open the table; unless `finish` completes it, the former one stays."""
        with StagedFile(target) as self._staged:
            sink = Sink(self._staged)
            self._writer = pq.ParquetWriter(sink, self.schema, store_schema=False)
            try:
                yield
            finally:  # a writer that is not closed would write its footer when it is collected
                with contextlib.suppress(StorageError, pa.ArrowException):
                    self._writer.close()

    def write(self, rows: pa.RecordBatch, entries: Sequence[Entry]) -> None:
        """Append the rows of these entries."""
        captions = pa.array([entry.caption for entry in entries], pa.string())
        made: dict[str, Any] = {
            **dict.fromkeys(self._text_columns, captions),
            SAMPLE_ID: pa.array([entry.sample_id for entry in entries], pa.string()),
            LATENTS: self._latents(rows),
        }
        if self._path_of is not None:
            for tensor, name in PATHS.items():
                paths = [self._path_of(tensor, entry) for entry in entries]
                made[name] = pa.array(paths, pa.string())
        for field in self.schema:
            if field.name not in made:
                absent = field.name not in rows.schema.names
                column = pa.nulls(len(rows), field.type) if absent else rows.column(field.name)
                made[field.name] = column.cast(field.type)
        batch = pa.RecordBatch.from_pydict(made, schema=self.schema)
        try:
            batch.validate(full=True)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"{self._captions.place(entries[0].row)}, or a row after it, cannot be exported: "
                f"{error}. Repair or drop the column."
            ) from error
        for name in set(SAMPLER_COLUMNS) & made.keys():
            self.nulls[name] += made[name].null_count
        self._writer.write_batch(batch)

    def _latents(self, rows: pa.RecordBatch) -> pa.Array:
        if LATENTS not in rows.schema.names:
            self.filled_latents += len(rows)
            return pa.array([NO_LATENTS] * len(rows), pa.string())
        column = rows.column(LATENTS).cast(pa.string())
        self.filled_latents += column.null_count
        return pc.fill_null(column, NO_LATENTS)

    def finish(self, num_rows: int) -> StoredFile:
        """Complete the file, put it in place of the former one and read it back."""
        self._writer.close()
        stored = self._staged.digest()
        self._staged.replace()
        path = self._staged.target
        try:
            with pq.ParquetFile(path) as file:
                rows = sum(len(batch) for batch in file.iter_batches(use_threads=False))
        except (pa.ArrowException, OSError) as error:
            raise VerificationError(f"{path} cannot be read back: {error}. Run again.") from error
        if rows != num_rows:
            raise VerificationError(f"{path} has {rows} rows: expected {num_rows}. Run again.")
        return stored
