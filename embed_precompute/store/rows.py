"""Rows parts: what became of each sample of a unit, with the text that was encoded.

Guarantees: every sample of a unit is one row, in input order; equal samples give equal bytes (one
version of pyarrow). What a forged part would decode to is bounded before it is decoded. Page
checksums are written and checked, but they leave out page headers and the footer: only the sha256
in the unit's record covers the whole part.
Costs: a part is made in memory (a unit's texts, compressed); reading holds one batch of rows, and
parses the footer and page headers once more than pyarrow does.
"""

from __future__ import annotations

import functools
import hashlib
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embed_precompute.documents import canonical_json
from embed_precompute.errors import VerificationError
from embed_precompute.parquet.chunks import column_chunks, footer_bytes
from embed_precompute.parquet.pages import row_bytes
from embed_precompute.parquet.thrift import ParquetDamage
from embed_precompute.samples import Status

ROW_GROUP_ROWS = 4096
ROW_GROUP_TEXT_BYTES = 64 << 20
_WRITER = re.compile(r"parquet-cpp-arrow version [0-9.]+(-SNAPSHOT)?")
READ_ROWS = 4096
READ_TEXT_ROWS = 256
MAX_PAGE_BYTES = ROW_GROUP_TEXT_BYTES + (4 << 20)
"""No row group of ours has more text than that, or one caption; a page is decoded whole."""
MOST_BATCH_BYTES = 32 << 20
"""What a batch may come to where its rows are all as wide as the widest can be."""


@dataclass(frozen=True)
class StoredSample:
    """What became of one sample, and where it is."""

    sample_id: str
    row: int
    """Input row."""
    status: Status
    error: str | None
    index: int | None
    """Stored row in the unit's shard; None unless status is OK."""
    tokens: Mapping[str, int]
    """Per encoder the real tokens; this and the next two are stored only when status is OK."""
    lengths: Mapping[str, int]
    """Per encoder the vectors stored; 1 when pooled."""
    truncated: Mapping[str, bool]
    text: str | None
    """The encoded text; None where there is none."""


def rows_schema(encoders: Sequence[str], *, text: bool = True) -> pa.Schema:
    """Columns of a rows part; without `text`, of manifest.parquet."""
    return _schema(tuple(encoders), text)


@functools.lru_cache(16)
def _schema(encoders: tuple[str, ...], text: bool) -> pa.Schema:
    fields = [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("index", pa.int32()),
    ]
    for name in sorted(encoders):
        fields += [
            pa.field(f"{name}_tokens", pa.int32()),
            pa.field(f"{name}_length", pa.int32()),
            pa.field(f"{name}_truncated", pa.bool_()),
        ]
    fields.append(pa.field("text_sha256", pa.string()))
    if text:
        fields.append(pa.field("text", pa.string()))
    return pa.schema(fields)


def rows_digest(samples: Iterable[StoredSample]) -> str:
    """sha256 over the canonical JSON of [sample_id, text] and a newline, for every sample."""
    sha = hashlib.sha256()
    for sample in samples:
        sha.update(canonical_json([sample.sample_id, sample.text]) + b"\n")
    return sha.hexdigest()


def rows_part_bytes(unit: int, encoders: Sequence[str], samples: Sequence[StoredSample]) -> bytes:
    """The rows part of a unit."""
    schema = rows_schema(encoders)
    sink = pa.BufferOutputStream()
    with parquet_writer(sink, schema) as writer:
        for group in _row_groups(samples):
            writer.write_batch(_batch(unit, encoders, group, schema))
    return bytes(sink.getvalue())


def parquet_writer(sink: Any, schema: pa.Schema) -> pq.ParquetWriter:
    """The one way this format writes Parquet; every option that changes bytes is fixed here."""
    return pq.ParquetWriter(
        sink,
        schema,
        version="2.6",
        compression="zstd",
        compression_level=3,
        use_dictionary=["status", "error"],
        write_statistics=["sample_id", "row", "status", "shard", "index"],
        data_page_version="1.0",
        store_schema=False,
        write_page_checksum=True,
    )


def _row_groups(samples: Sequence[StoredSample]) -> Iterator[Sequence[StoredSample]]:
    """Runs of samples with bounded rows and text: a reader decodes a row group's page at a time,
    but an Arrow string array ends at 2 GiB."""
    first = text_bytes = 0
    for i, sample in enumerate(samples):
        text_bytes += len(sample.text or "") * 4
        if i - first == ROW_GROUP_ROWS or (text_bytes > ROW_GROUP_TEXT_BYTES and i > first):
            yield samples[first:i]
            first, text_bytes = i, len(sample.text or "") * 4
    if first < len(samples):
        yield samples[first:]


def _batch(
    unit: int, encoders: Sequence[str], samples: Sequence[StoredSample], schema: pa.Schema
) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {
        "sample_id": [s.sample_id for s in samples],
        "row": [s.row for s in samples],
        "status": [s.status.label for s in samples],
        "error": [s.error for s in samples],
        "shard": [unit] * len(samples),
        "index": [s.index if s.status is Status.OK else None for s in samples],
        "text_sha256": [_text_sha256(s.text) for s in samples],
        "text": [s.text for s in samples],
    }
    for name in encoders:
        values = [_encoder_values(s, name) for s in samples]
        for i, column in enumerate(("tokens", "length", "truncated")):
            columns[f"{name}_{column}"] = [value[i] for value in values]
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _encoder_values(sample: StoredSample, name: str) -> tuple[Any, Any, Any]:
    if sample.status is not Status.OK:
        return None, None, None
    return sample.tokens[name], sample.lengths[name], sample.truncated[name]


def _text_sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def iter_batches(
    path: Path,
    encoders: Sequence[str],
    *,
    text: bool = True,
    num_rows: int | None = None,
    payload: bytes | None = None,
) -> Iterator[pa.RecordBatch]:
    """A rows part in batches of at most 4,096 rows, with or without the text column.

    `num_rows` is what its record says: a few bytes can stand for millions of rows, which are then
    not decoded. `payload` is the part's bytes, where they were read already. VerificationError
    naming the file when it is missing, damaged, or has other columns or another number of rows.
    """
    try:
        if payload is None and not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no regular file")  # pyarrow would wait for a pipe's other end
        with (
            pa.OSFile(str(path)) if payload is None else pa.BufferReader(payload) as source,
            pq.ParquetFile(
                source,
                page_checksum_verification=True,
                pre_buffer=False,
                buffer_size=0 if payload is not None else 1 << 20,
            ) as file,
        ):
            schema = rows_schema(encoders)
            if not file.schema_arrow.equals(schema):
                raise VerificationError(
                    f"{path} has columns {file.schema_arrow.names}: expected {schema.names}, with "
                    "the types of the format."
                )
            if num_rows is not None and file.metadata.num_rows != num_rows:
                raise VerificationError(
                    f"{path} has {file.metadata.num_rows:,} rows: expected {num_rows:,}, as its "
                    "record says."
                )
            names = rows_schema(encoders, text=text).names
            rows = READ_TEXT_ROWS if text else READ_ROWS
            rows = rows_at_once(path, source, names, rows)
            if file.metadata.num_rows <= rows:  # the same, with half the calls
                yield from file.read(names, use_threads=False).to_batches()
                return
            yield from file.iter_batches(rows, columns=names, use_threads=False)
    except FileNotFoundError:
        raise VerificationError(f"{path} is missing, though its unit is committed.") from None
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: names not in UTF-8
        raise VerificationError(f"{path} is damaged: {error}.") from error


def rows_at_once(path: Path, source: Any, columns: Sequence[str], rows: int) -> int:
    """At most `rows`, fewer where a batch of them could decode to more than MOST_BATCH_BYTES.

    `source` is the open Arrow file of `path`. A few bytes of a dictionary can stand for long texts,
    as often as there are rows. VerificationError where one page alone is too large.
    """
    enough = MOST_BATCH_BYTES // rows
    most = rows

    def read_at(offset: int, size: int) -> bytes:
        return bytes(source.read_at(size, offset))

    try:
        for group in column_chunks(footer_bytes(read_at, source.size()), columns):
            bounds = [row_bytes(read_at, chunk, MAX_PAGE_BYTES, enough) for chunk in group]
            most = min(most, MOST_BATCH_BYTES // max(1, sum(bounds)))
    except ParquetDamage as error:
        raise VerificationError(f"{path} is damaged: {error}.") from error
    return max(1, most)


def read_samples(
    path: Path, encoders: Sequence[str], num_rows: int | None = None
) -> Iterator[StoredSample]:
    """The samples of a rows part, in order; `num_rows` and errors as `iter_batches`."""
    statuses = {status.label: status for status in Status}
    for batch in iter_batches(path, encoders, num_rows=num_rows):
        try:
            entries = batch.to_pylist()
        except UnicodeDecodeError as error:
            raise VerificationError(f"{path} is damaged: {error}.") from error
        for entry in entries:
            status = statuses.get(entry["status"])
            if status is None:
                raise VerificationError(f"{path} has unknown status {entry['status']!r}.")
            ok = status is Status.OK
            yield StoredSample(
                sample_id=entry["sample_id"],
                row=entry["row"],
                status=status,
                error=entry["error"],
                index=entry["index"],
                tokens={name: entry[f"{name}_tokens"] for name in encoders} if ok else {},
                lengths={name: entry[f"{name}_length"] for name in encoders} if ok else {},
                truncated={name: entry[f"{name}_truncated"] for name in encoders} if ok else {},
                text=entry["text"],
            )


def is_sound_orphan(
    path: Path, rows: bytes, encoders: Sequence[str], samples: Sequence[StoredSample]
) -> bool:
    """Whether the rows part that a dead writer left may stay where `rows` were to go.

    Only another pyarrow writes equal samples as other bytes. From our own, other bytes are damage,
    even where they still read the same: page headers and statistics have no checksum.
    """
    try:
        if path.read_bytes() == rows:
            return True
        theirs = pq.read_metadata(path.absolute()).created_by
        ours = pq.read_metadata(pa.BufferReader(rows)).created_by
        foreign = theirs != ours and _WRITER.fullmatch(theirs) is not None
        return foreign and list(read_samples(path, encoders, len(samples))) == list(samples)
    except (VerificationError, pa.ArrowException, OSError, ValueError):
        return False


def ok_columns(root: Path, names: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
    """Columns of manifest.parquet for the samples whose status is ok, READ_ROWS rows at a time."""
    path = root / "manifest.parquet"
    try:
        with pq.ParquetFile(path, pre_buffer=False, page_checksum_verification=True) as file:
            columns = ["status", *names]
            for batch in file.iter_batches(READ_ROWS, columns=columns, use_threads=False):
                ok = pc.equal(batch.column("status"), Status.OK.label)
                yield {name: batch.column(name).filter(ok).to_pylist() for name in names}
    except (pa.ArrowException, OSError, LookupError, ValueError) as error:
        raise VerificationError(
            f"{path} is damaged: {error}. `embed-precompute finalize {root}` makes it again."
        ) from error
