"""What the column chunks of a parquet file decode to, by their page headers.

Guarantees: whatever the bytes, an answer or ParquetDamage. A bound of decoded bytes follows from
the sizes by which pages are decompressed and from the values that a page may repeat, not from the
footer's claims.
Costs: some 30 microseconds a page and one read of 16 KiB (pages so small that several share it cost
one); a dictionary of more than some KiB is decompressed once more, and so are the pages of lists
where they are of version 1.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embed_precompute.parquet.chunks import Chunk, ReadAt
from embed_precompute.parquet.thrift import I32, Compact, CutShort, ParquetDamage, Path

WINDOW_BYTES = 16 << 10
MAX_HEADER_BYTES = 16 << 20
"""pyarrow's own limit: a page header may hold the least and the greatest value."""
MAX_DICTIONARY_BYTES = 2 << 20
"""Writers stop at 1 MiB; in a larger one a single value is taken to be all of it."""
_SHORT_HEADER = 64
"""Most are longer, by their statistics: with less than this left of a window a new one is read."""
VALUE_BYTES = 16
"""What a value takes beside its bytes, in offsets, levels and views."""
_MAX_LEVELS = 8 << 20
_BYTE_ARRAY, _FIXED_BYTES = 6, 7
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_PLAIN_DICTIONARY, _RLE, _DELTA_LENGTH, _DELTA_BYTES, _RLE_DICTIONARY = 2, 3, 6, 7, 8
_CODECS = {0: "", 1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


class PageTooLarge(ParquetDamage):
    """It may be sound, but what it decodes to are no captions."""


@dataclass(frozen=True)
class Page:
    """A page header, and where its payload is."""

    kind: int
    begin: int
    bytes: int
    """Decompressed."""
    packed_bytes: int
    num_values: int
    encoding: int
    repetition_encoding: int
    repetition_bytes: int
    """Of version 2, where they are not compressed."""


_HEADER_FIELDS = (
    *((1,), (2,), (3,)),  # type, bytes, packed bytes
    *((5, 1), (5, 2), (5, 4)),  # version 1: values, encoding, that of repetition levels
    *((7, 1), (7, 2)),  # dictionary: values, encoding
    *((8, 1), (8, 4), (8, 6)),  # version 2: values, encoding, bytes of repetition levels
)
_HEADER: dict[Path, int] = dict.fromkeys(_HEADER_FIELDS, I32)


class _Bound:
    """Bytes that a row of a chunk may decode to, page after page.

    Rows that a page repeats (of a dictionary, or as prefixes of each other) count as its longest;
    others by the page's mean, so that n rows are at most n times the bound and the two pages they
    begin and end in.
    """

    def __init__(self, read_at: ReadAt, chunk: Chunk, enough: int) -> None:
        self._read_at, self._chunk, self._enough = read_at, chunk, enough
        self._longest = 0
        self._unfinished = 0  # bytes of a list that began on a page before
        self.row_bytes = 0

    def add(self, page: Page) -> None:
        if page.kind == _DICTIONARY:
            self._longest = max(self._longest, self._longest_of(page))
        elif page.kind in (_DATA, _DATA_V2) and page.num_values:
            per_value = self._repeated(page)
            if self._chunk.leaf.max_repetition:
                self._add_lists(page, per_value)
            else:
                self.row_bytes = max(self.row_bytes, per_value or page.bytes // page.num_values)

    def _repeated(self, page: Page) -> int:
        """Bytes of the longest value that may be there any number of times; 0 for none."""
        if self._chunk.leaf.physical_type not in (_BYTE_ARRAY, _FIXED_BYTES):
            return 0
        if page.encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
            return self._longest
        return page.bytes if page.encoding == _DELTA_BYTES else 0

    def _add_lists(self, page: Page, per_value: int) -> None:
        starts = self._row_starts(page)
        edges = np.concatenate([[0], starts, [page.num_values]])
        most = int(np.diff(edges).max())
        self.row_bytes = max(self.row_bytes, most * (per_value + VALUE_BYTES))
        if per_value:
            first, last = edges[1], page.num_values - edges[-2]
            first, last = (int(n) * (per_value + VALUE_BYTES) for n in (first, last))
        else:
            first = last = page.bytes + VALUE_BYTES * page.num_values
            self.row_bytes = max(self.row_bytes, page.bytes // max(1, len(starts)))
        whole = self._unfinished + first
        self._unfinished = last if len(starts) else whole
        if per_value or not len(starts):
            self.row_bytes = max(self.row_bytes, whole, self._unfinished)

    def _row_starts(self, page: Page) -> np.ndarray[Any, Any]:
        """Where on the page a row begins; nowhere where that cannot be told."""
        levels = b""
        if page.num_values <= _MAX_LEVELS:
            if page.kind == _DATA_V2:
                levels = self._read_at(page.begin, page.repetition_bytes)
            elif page.repetition_encoding == _RLE and self._chunk.codec in _CODECS:
                payload = self._payload(page)
                levels = payload[4 : 4 + int.from_bytes(payload[:4], "little")]
        if not levels:
            return np.zeros(0, np.int64)
        return _zeros(levels, self._chunk.leaf.max_repetition.bit_length(), page.num_values)

    def _longest_of(self, page: Page) -> int:
        """Upper bound of a dictionary's longest value."""
        if self._chunk.leaf.physical_type != _BYTE_ARRAY:
            return page.bytes // max(1, page.num_values)
        bound = page.bytes - 4 * page.num_values
        if bound < 0:
            raise ParquetDamage(f"a dictionary of {page.num_values} values in {page.bytes} bytes")
        known = self._chunk.codec in _CODECS and page.bytes <= MAX_DICTIONARY_BYTES
        if bound <= self._enough or not known:
            return bound
        return min(_longest_value(self._payload(page)), bound)

    def _payload(self, page: Page) -> bytes:
        packed = self._read_at(page.begin, page.packed_bytes)
        codec = _CODECS[self._chunk.codec]
        if not codec:
            return packed
        try:
            unpacked: bytes
            unpacked = pa.Codec(codec).decompress(packed, page.bytes, asbytes=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ParquetDamage(f"a page cannot be decompressed: {error}") from error
        return unpacked


def _longest_value(plain: bytes) -> int:
    """Of byte arrays, each behind its length; a tenth of a microsecond each."""
    unpack = struct.Struct("<I").unpack_from
    position = longest = 0
    try:
        while position < len(plain):
            size = unpack(plain, position)[0]
            if size > longest:
                longest = size
            position += 4 + size
    except struct.error:
        raise ParquetDamage("a dictionary ends inside a value") from None
    return longest


def _zeros(data: bytes, width: int, count: int) -> np.ndarray[Any, Any]:
    """Where `count` levels of `width` bits are 0, from parquet's hybrid of runs and packed bits."""
    zero = np.zeros(count, np.bool_)
    position = filled = 0
    while filled < count:
        header = shift = 0
        while True:
            if position >= len(data) or shift > 28:
                raise ParquetDamage("a page's levels end early")
            byte = data[position]
            position += 1
            header |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        num = header >> 1
        if header & 1:
            packed = np.frombuffer(data[position : position + num * width], np.uint8)
            packed = packed[: len(packed) // width * width]
            bits = np.unpackbits(packed, bitorder="little").reshape(-1, width)
            run = (bits.max(axis=1) == 0)[: count - filled]
            zero[filled : filled + len(run)] = run
            filled, position = filled + 8 * num, position + num * width
        else:
            zero[filled : filled + num] = data[position : position + 1] == b"\0"
            filled, position = filled + num, position + 1
    return np.flatnonzero(zero)


def row_bytes(read_at: ReadAt, chunk: Chunk, limit: int, enough: int) -> int:
    """Upper bound of what a row of `chunk` decodes to, see `_Bound`.

    ParquetDamage where a page, or one row's list, takes more than `limit` bytes. A dictionary all
    of whose bytes are at most `enough` is not looked into.
    """
    bound = _Bound(read_at, chunk, enough)
    for page in read_pages(read_at, chunk):
        if max(page.bytes, page.packed_bytes, _made_at_once(page)) > limit:
            what = f"a page of {page.bytes} bytes (compressed {page.packed_bytes})"
            raise PageTooLarge(f"{what} with {page.num_values} values")
        bound.add(page)
        if bound.row_bytes > limit:
            raise PageTooLarge(f"rows of up to {bound.row_bytes} bytes")
    return bound.row_bytes


def read_pages(read_at: ReadAt, chunk: Chunk) -> Iterator[Page]:
    """The page headers of a chunk, in order."""
    position = chunk.begin
    window, start = b"", 0
    while position < chunk.end:
        if not start <= position < start + len(window) - _SHORT_HEADER:
            window, start = read_at(position, WINDOW_BYTES), position
        page, window, start = _read_header(read_at, window, start, position)
        yield page
        position = page.begin + page.packed_bytes


def _made_at_once(page: Page) -> int:
    """Bytes of what pyarrow makes of all of a page's values together."""
    at_once = page.kind == _DICTIONARY or page.encoding in (_DELTA_LENGTH, _DELTA_BYTES)
    return VALUE_BYTES * page.num_values if at_once else 0


def _read_header(
    read_at: ReadAt, window: bytes, start: int, position: int
) -> tuple[Page, bytes, int]:
    """The page at `position`, and the window it was found in, which begins at `start`."""
    while True:
        cursor = Compact(window, position - start)
        try:
            found = cursor.numbers(_HEADER)
            break
        except CutShort:
            if len(window) >= MAX_HEADER_BYTES:
                raise ParquetDamage("a page's header is too long") from None
            size = WINDOW_BYTES if position != start else min(8 * len(window), MAX_HEADER_BYTES)
            longer = read_at(position, size)
            if position == start and len(longer) <= len(window):
                raise  # the file ends here
            window, start = longer, position
    kind = found.get((1,), -1)
    struct = {_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0)
    page = Page(
        kind=kind,
        begin=start + cursor.position,
        bytes=found.get((2,), -1),
        packed_bytes=found.get((3,), -1),
        num_values=found.get((struct, 1), 0),
        encoding=found.get((struct, 4 if kind == _DATA_V2 else 2), -1),
        repetition_encoding=found.get((5, 4), -1),
        repetition_bytes=found.get((8, 6), 0),
    )
    if min(page.bytes, page.packed_bytes, page.num_values, page.repetition_bytes) < 0:
        raise ParquetDamage(f"a page of {page.bytes} bytes, compressed {page.packed_bytes}")
    if page.repetition_bytes > page.packed_bytes:
        raise ParquetDamage(f"a page of {page.packed_bytes} bytes, {page.repetition_bytes} levels")
    return page, window, start
