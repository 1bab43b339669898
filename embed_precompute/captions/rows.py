"""A forward cursor over the rows of all files, as Arrow batches.

Guarantees: rows come in plan order whatever the row groups; reading ever higher rows decodes each
row group at most once (after a probe of how wide its first rows are), and going back starts its row
group again. Damage is an InputError that names file and row group, and so is, before it is decoded,
a page or a list of more than `max_page_bytes`.
Costs: one open file, one batch of at most `batch_rows` rows and a 1 MiB window per column, whatever
the number of rows. A range that starts inside a row group decodes that group from its first row.
The page headers of a row group are read once before it, see `pages`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embed_precompute.captions.files import InputFile, Source, one_line, open_parquet
from embed_precompute.errors import InputError
from embed_precompute.parquet.chunks import Chunk, ReadAt, column_chunks
from embed_precompute.parquet.pages import PageTooLarge, row_bytes
from embed_precompute.parquet.thrift import ParquetDamage

BATCH_BYTES = 4 << 20
"""Decoded bytes a batch aims at."""
MAX_PAGE_BYTES = 64 << 20
"""pyarrow decodes a page whole, and Python's text takes up to four times its bytes. Writers end a
page at 1 MiB, but look at its size only every so many rows."""
MOST_BATCH_BYTES = 8 * BATCH_BYTES
"""What a batch may come to where its rows are all as wide as the widest can be."""
PROBE_ROWS = (1, 16)
"""The first rows are read alone and a few together: eight captions of a forged file may stand for
gigabytes."""

Starts = np.ndarray[Any, np.dtype[np.int64]]


def starts_of(counts: Sequence[int]) -> Starts:
    """[0, counts[0], counts[0] + counts[1], ...]."""
    return np.concatenate([[0], np.cumsum(np.asarray(counts, np.int64))]).astype(np.int64)


@dataclass(frozen=True)
class CaptionFile:
    """A file of the table: 8 bytes per row group, nothing per row."""

    source: Source
    input: InputFile
    group_starts: Starts
    """[groups + 1] first row of each row group within the file."""


class RowMap:
    """Global row numbers to files: row 0 is the first row of the first file."""

    def __init__(self, files: Sequence[CaptionFile]) -> None:
        self.files = files
        self._starts = starts_of([file.input.rows for file in files])
        self.num_rows = int(self._starts[-1])

    def locate(self, row: int) -> tuple[int, int]:
        """(index of the file, row within it)."""
        index = int(np.searchsorted(self._starts, row, side="right")) - 1
        return index, row - int(self._starts[index])

    def place(self, row: int) -> str:
        """How messages name a row."""
        index, local = self.locate(row)
        return f"{self.files[index].source}, row {local} (the first is row 0)"


def chunks_of(
    source: Source, thrift: bytes, columns: Sequence[str], num_groups: int
) -> list[list[Chunk]]:
    """`column_chunks` of a file's footer; InputError that names the file where it is damaged."""
    try:
        groups = column_chunks(thrift, columns)
        if len(groups) != num_groups:
            raise ParquetDamage(f"it has {len(groups)} row groups, expected {num_groups}")
    except ParquetDamage as error:
        raise InputError(
            f"{source} has a damaged parquet footer ({error}). Copy or write it again."
        ) from error
    return groups


def _closed(offset: int, size: int) -> bytes:
    raise ValueError(f"{size} bytes at {offset} of a closed file")


class RowCursor:
    """Batches of `columns` for any range of global rows."""

    def __init__(
        self,
        row_map: RowMap,
        columns: Sequence[str],
        batch_rows: int,
        max_page_bytes: int = MAX_PAGE_BYTES,
    ) -> None:
        self._map = row_map
        self._columns = list(columns)
        self._batch_rows = batch_rows
        self._max_page_bytes = max_page_bytes
        self._file_index = -1
        self._parquet: Any = None
        self._read_at: ReadAt = _closed
        self._chunks: list[list[Chunk]] = []  # of each row group of the open file
        self._most_rows: dict[int, int] = {}  # row group of the open file -> rows a batch may have
        self._group = -1
        self._batch: Any = None
        self._batch_start = 0
        self._stream: Iterator[Any] = iter(())
        self._next_row = 0  # global row the stream gives next
        self._stream_end = 0  # global row behind the stream's row group
        self._row_bytes = 0.0  # decoded bytes per row of the latest batch; 0 before the first

    def batches(self, first_row: int, num_rows: int) -> Iterator[tuple[int, Any]]:
        """(global first row, record batch) that cover the rows in order, none across files."""
        row, end = first_row, first_row + num_rows
        while row < end:
            self._seek(row)
            offset = row - self._batch_start
            piece = self._batch.slice(offset, min(len(self._batch) - offset, end - row))
            yield row, piece
            row += len(piece)

    def close(self) -> None:
        if self._parquet is not None:
            self._parquet.close(force=True)
        self._parquet, self._batch, self._stream = None, None, iter(())
        self._read_at, self._chunks, self._most_rows = _closed, [], {}
        self._file_index, self._next_row, self._stream_end = -1, 0, 0

    def _seek(self, row: int) -> None:
        """Make the current batch the one that holds `row`."""
        if self._batch is not None and 0 <= row - self._batch_start < len(self._batch):
            return
        if not self._next_row <= row < self._stream_end:
            self._open_group(row)
        while self._next_row <= row:
            self._advance()

    def _open_group(self, row: int) -> None:
        index, local = self._map.locate(row)
        file = self._map.files[index]
        if index != self._file_index:
            self.close()
            self._open_file(index, file)
        self._group = int(np.searchsorted(file.group_starts, local, side="right")) - 1
        start, end = (int(n) for n in file.group_starts[self._group : self._group + 2])
        self._next_row, self._stream_end = row - local + start, row - local + end
        self._batch = None
        if self._group not in self._most_rows:
            self._most_rows[self._group] = self._rows_at_most()
        self._stream = self._stream_group(self._rows_per_batch())

    def _open_file(self, index: int, file: CaptionFile) -> None:
        opened = open_parquet(file.source, file.input)
        self._parquet, self._read_at = opened.parquet, opened.read_at
        self._file_index = index
        num_groups = len(file.group_starts) - 1
        self._chunks = chunks_of(file.source, opened.thrift, self._columns, num_groups)

    def _stream_group(self, batch_rows: int) -> Iterator[Any]:
        batches: Iterator[Any] = self._parquet.iter_batches(
            batch_size=batch_rows,
            row_groups=[self._group],
            columns=self._columns,
            use_threads=False,
        )
        return batches

    def _rows_at_most(self) -> int:
        """Rows that cannot make more than MOST_BATCH_BYTES whatever they repeat, by the pages.

        How wide the rows before were says nothing of these: each of them may be two bits that stand
        for the longest value of a dictionary.
        """
        total = 0
        for chunk in self._chunks[self._group]:
            try:
                enough = MOST_BATCH_BYTES // self._batch_rows
                total += row_bytes(self._read_at, chunk, self._max_page_bytes, enough)
            except PageTooLarge as error:
                file = self._map.files[self._file_index]
                raise InputError(
                    f"{file.source}: column {chunk.leaf.path!r} of row group {self._group} has "
                    f"{error}: expected at most {self._max_page_bytes} bytes. Name the column "
                    "of the captions, or write the file with smaller pages or without such values."
                ) from error
            except ParquetDamage as error:
                raise self._damage(f"column {chunk.leaf.path!r}: {error}") from error
            except (pa.ArrowException, OSError) as error:
                raise self._damage(one_line(error)) from error
        return max(1, MOST_BATCH_BYTES // max(1, total))

    def _rows_per_batch(self) -> int:
        """Rows that make BATCH_BYTES at the width seen last; the first group is probed for it.

        The footer's sizes would not do: they count a repeated value once, and a forged or damaged
        one may say anything.
        """
        if self._row_bytes == 0:
            for most in PROBE_ROWS:
                probe = self._next_of(self._stream_group(self._fitting(most)))
                self._row_bytes = probe.nbytes / len(probe)
        return self._fitting(self._batch_rows)

    def _fitting(self, most: int) -> int:
        fitting = int(BATCH_BYTES / max(1, self._row_bytes))
        return max(1, min(most, fitting, self._most_rows[self._group]))

    def _next_of(self, stream: Iterator[Any]) -> Any:
        try:
            batch = next(stream, None)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise self._damage(one_line(error)) from error
        if not batch or self._next_row + len(batch) > self._stream_end:
            raise self._damage("it has not the rows that its footer promises")
        return batch

    def _advance(self) -> None:
        batch = self._next_of(self._stream)
        self._batch, self._batch_start = batch, self._next_row
        self._row_bytes = batch.nbytes / len(batch)
        self._next_row += len(batch)

    def _damage(self, reason: str) -> InputError:
        file = self._map.files[self._file_index]
        first, end = (int(n) for n in file.group_starts[self._group : self._group + 2])
        row = first + self._next_row - (self._stream_end - (end - first))
        return InputError(
            f"{file.source}: row group {self._group} (rows {first} to {end - 1}) is damaged, "
            f"columns {', '.join(map(repr, self._columns))} cannot be read from row {row} on: "
            f"{reason}. Copy or write the file again; what is already done stays."
        )
