"""Rows parts: what became of each sample of a unit, with the text that was encoded.

Guarantees: every sample of a unit is one row, in input order. Equal samples give equal bytes within
one version of pyarrow. Page checksums are written and checked, but they leave out page headers and
the footer: only the sha256 in the unit's record covers the whole part.
Costs: a part is made in memory (a unit's texts, compressed); reading holds one batch of rows.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embed_precompute.errors import InputError, VerificationError
from embed_precompute.samples import Status
from embed_precompute.store.commit import read_file
from embed_precompute.store.records import StoredTensor

ROW_GROUP_ROWS = 4096
ROW_GROUP_TEXT_BYTES = 64 << 20
READ_ROWS = 4096
READ_TEXT_ROWS = 256

Tensors = tuple[StoredTensor, ...]


@dataclass(frozen=True)
class StoredSample:
    """What became of one sample, and where it is."""

    sample_id: str
    row: int
    """Input row."""
    status: Status
    error: str | None
    index: int | None = None
    """Stored row in the unit's shard; None unless status is OK."""
    tokens: Mapping[str, int] = field(default_factory=dict)
    """Number of tokens, by encoder, without pads. Empty unless status is OK, like the next two."""
    truncated: Mapping[str, bool] = field(default_factory=dict)
    """For each encoder, whether tokens were cut off."""
    lengths: Mapping[str, int] = field(default_factory=dict)
    """Number of stored vectors, by tensor; 1 for a tensor with one vector per caption."""
    text: str | None = None
    """The encoded text; None if there is none."""


@dataclass(frozen=True)
class SampleColumns:
    """What became of a unit's samples, in input order: entry i of each sequence is sample i.

    The fields are those of `StoredSample`. A unit has thousands of samples, and one object for each
    takes longer than all that is done with it.
    """

    sample_id: Sequence[str]
    row: Sequence[int]
    status: Sequence[Status]
    error: Sequence[str | None]
    index: Sequence[int | None]
    tokens: Mapping[str, Sequence[int | None]]
    truncated: Mapping[str, Sequence[bool | None]]
    lengths: Mapping[str, Sequence[int | None]]
    text: Sequence[str | None]


def encoder_names(tensors: Tensors) -> list[str]:
    """The names of the encoders that make the tensors, sorted."""
    return sorted({tensor.encoder for tensor in tensors})


@functools.lru_cache(16)
def rows_schema(tensors: Tensors, *, text: bool = True) -> pa.Schema:
    """Columns of a rows part; without `text`, of manifest.parquet."""
    fields = [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("index", pa.int32()),
    ]
    for name in encoder_names(tensors):
        fields.append(pa.field(f"{name}_tokens", pa.int32()))
        fields.append(pa.field(f"{name}_truncated", pa.bool_()))
    fields += [pa.field(f"{tensor.name}_length", pa.int32()) for tensor in tensors]
    fields.append(pa.field("text_sha256", pa.string()))
    if text:
        fields.append(pa.field("text", pa.string()))
    return pa.schema(fields)


def rows_digest(samples: SampleColumns) -> str:
    """sha256 of the canonical JSON of [sample_id, text] and a newline, for every sample."""
    sha = hashlib.sha256()
    for sample_id, text in zip(samples.sample_id, samples.text, strict=True):
        sha.update(digested_row(sample_id, text))
    return sha.hexdigest()


def digested_row(sample_id: str, text: str | None) -> bytes:
    """One sample's bytes in the input of the digest `rows_sha256`."""
    # As `canonical_json` would write it, at a quarter of the time: this runs once per sample.
    quoted = "null" if text is None else encode_basestring(text)
    return f"[{encode_basestring(sample_id)},{quoted}]\n".encode()


def text_sha256(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


# --- writing --------------------------------------------------------------------------------------


def rows_part_bytes(unit: int, tensors: Tensors, samples: SampleColumns) -> bytes:
    """The rows part of a unit."""
    schema = rows_schema(tensors)
    columns = _columns(unit, tensors, samples)
    sink = pa.BufferOutputStream()
    with parquet_writer(sink, schema) as writer:
        for first, end in _row_groups(samples.text):
            group = {name: values[first:end] for name, values in columns.items()}
            writer.write_batch(pa.RecordBatch.from_pydict(group, schema))
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


def table_bytes(tensors: Tensors, parts: Iterator[tuple[bytes, int]]) -> int:
    """Bytes that the samples of these rows parts, each with its number of rows, take together in a
    table without texts, as manifest.parquet is; it is made in memory."""
    schema, sink = rows_schema(tensors, text=False), pa.BufferOutputStream()
    with parquet_writer(sink, schema) as writer:
        batches = [
            batch
            for part, num_rows in parts
            for batch in iter_batches(
                Path("rows"), tensors, text=False, num_rows=num_rows, payload=part
            )
        ]
        table = pa.Table.from_batches(batches, schema).combine_chunks()
        writer.write_table(table, max(1, table.num_rows))
    return int(sink.getvalue().size)


def _row_groups(texts: Sequence[str | None]) -> Iterator[tuple[int, int]]:
    """Yields (first, end) of groups of neighbouring samples, limited in rows and text: an Arrow
    string array holds at most 2 GiB."""
    first = text_bytes = 0
    for i, text in enumerate(texts):
        size = len(text or "") * 4
        if i - first == ROW_GROUP_ROWS or (text_bytes + size > ROW_GROUP_TEXT_BYTES and i > first):
            yield first, i
            first, text_bytes = i, 0
        text_bytes += size
    if texts:
        yield first, len(texts)


def _columns(unit: int, tensors: Tensors, samples: SampleColumns) -> dict[str, Sequence[Any]]:
    labels = {status: status.label for status in Status}
    nothing = [None] * len(samples.text)
    columns: dict[str, Sequence[Any]] = {
        "sample_id": samples.sample_id,
        "row": samples.row,
        "status": [labels[status] for status in samples.status],
        "error": samples.error,
        "shard": [unit] * len(samples.text),
        "index": samples.index,
        "text_sha256": [text_sha256(text) for text in samples.text],
        "text": samples.text,
    }
    for name in encoder_names(tensors):
        columns[f"{name}_tokens"] = samples.tokens.get(name, nothing)
        columns[f"{name}_truncated"] = samples.truncated.get(name, nothing)
    for tensor in tensors:
        columns[f"{tensor.name}_length"] = samples.lengths.get(tensor.name, nothing)
    return columns


# --- reading --------------------------------------------------------------------------------------


def iter_batches(
    path: Path,
    tensors: Tensors,
    *,
    text: bool = True,
    num_rows: int | None = None,
    payload: bytes | None = None,
) -> Iterator[pa.RecordBatch]:
    """Yields a rows part in batches of at most 4,096 rows, with or without the text column.

    `num_rows` is the number of rows in the unit's record: a small damaged file may claim millions
    of rows, and is then rejected before they are decoded. `payload` is the part's bytes, if they
    were read already. Raises VerificationError, naming the file, if it is missing or damaged, or
    has other columns or another number of rows.
    """
    try:
        source = pa.BufferReader(read_file(path) if payload is None else payload)
        with open_parquet(path, source, rows_schema(tensors), num_rows) as file:
            names = rows_schema(tensors, text=text).names
            rows = READ_TEXT_ROWS if text else READ_ROWS
            if file.metadata.num_rows <= rows:  # the same, with half the calls
                yield from file.read(names, use_threads=False).to_batches()
            else:
                yield from file.iter_batches(rows, columns=names, use_threads=False)
    except FileNotFoundError:
        raise VerificationError(f"{path} is missing, though its unit is committed.") from None
    # pyarrow raises ValueError if a column's name is not UTF-8.
    except (pa.ArrowException, OSError, ValueError) as error:
        raise VerificationError(f"{path} is damaged: {error}.") from error


def open_parquet(
    path: Path, source: pa.NativeFile, schema: pa.Schema, num_rows: int | None
) -> pq.ParquetFile:
    """Opens a Parquet file of ours; VerificationError unless it has these columns and `num_rows`
    rows.

    pyarrow checks the pages' checksums, and reads nothing ahead: to read ahead, it would have to
    trust the sizes in the footer.
    """
    file = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
    if not file.schema_arrow.equals(schema):
        raise VerificationError(
            f"{path} has columns {file.schema_arrow.names}: expected {schema.names}, with the "
            "types of the format."
        )
    if num_rows is not None and file.metadata.num_rows != num_rows:
        raise VerificationError(
            f"{path} has {file.metadata.num_rows:,} rows: expected {num_rows:,}."
        )
    return file


def read_samples(
    path: Path, tensors: Tensors, num_rows: int | None = None
) -> Iterator[StoredSample]:
    """The samples of a rows part, in order; `num_rows` and errors as for `iter_batches`."""
    statuses, encoders = {status.label: status for status in Status}, encoder_names(tensors)
    for batch in iter_batches(path, tensors, num_rows=num_rows):
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
                truncated={name: entry[f"{name}_truncated"] for name in encoders} if ok else {},
                lengths={t.name: entry[f"{t.name}_length"] for t in tensors} if ok else {},
                text=entry["text"],
            )


def columns_of(
    root: Path, tensors: Tensors, names: Sequence[str], status: Status = Status.OK
) -> Iterator[dict[str, list[Any]]]:
    """Columns of manifest.parquet for the samples whose status is ok, or is another one that is
    given, READ_ROWS rows at a time."""
    path, schema = root / "manifest.parquet", rows_schema(tensors, text=False)
    if absent := sorted(set(names) - set(schema.names)):
        raise InputError(f"{path} has no columns {absent}: it has {', '.join(schema.names)}.")
    try:
        with open_parquet(path, pa.OSFile(str(path)), schema, None) as file:
            columns = ["status", *names]
            for batch in file.iter_batches(READ_ROWS, columns=columns, use_threads=False):
                chosen = pc.equal(batch.column("status"), status.label)
                yield {name: batch.column(name).filter(chosen).to_pylist() for name in names}
    except (pa.ArrowException, OSError, ValueError) as error:
        raise VerificationError(
            f"{path} is damaged: {error}. `embed-precompute finalize {root}` makes it again."
        ) from error
