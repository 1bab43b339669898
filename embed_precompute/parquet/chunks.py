"""The column chunks of a parquet footer: where their pages are, what their statistics say.

Guarantees: whatever the bytes, an answer or ParquetDamage. (pyarrow's own metadata of a column
chunk ends the process where a footer is damaged, with a C++ exception that nothing catches.)
Costs: some 30 microseconds per column chunk of the file, of every column.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from embed_precompute.parquet.thrift import (
    BINARY,
    I32,
    I64,
    LIST,
    STRUCT,
    Compact,
    Numbers,
    ParquetDamage,
)

ReadAt = Callable[[int, int], bytes]
"""(offset, size) -> the bytes there, fewer at the end of the file."""

FOOTER_WINDOW_BYTES = 16 << 10
_REPEATED = 2
_SCHEMA = {(1,): I32, (3,): I32, (5,): I32}
_CHUNK = {(4,): I32, (6,): I64, (7,): I64, (9,): I64, (11,): I64, (12, 3): I64}


@dataclass(frozen=True)
class Leaf:
    """A leaf of the schema: what a column chunk of each row group holds."""

    parts: tuple[str, ...]
    """(`text`,), or (`text`, `list`, `element`)."""
    physical_type: int
    max_repetition: int
    """How many lists it is in."""

    @property
    def path(self) -> str:
        return ".".join(self.parts)


@dataclass(frozen=True)
class Chunk:
    """A leaf's part of a row group, as the footer has it."""

    leaf: Leaf
    codec: int
    num_bytes: int
    """Of its pages decompressed, as the footer claims."""
    begin: int
    """Where its first page is in the file."""
    end: int
    null_count: int | None
    """None where the statistics do not say."""


def footer_bytes(read_at: ReadAt, size: int) -> bytes:
    """The footer's thrift bytes of a file of `size` bytes; what follows are its length and PAR1."""
    tail = read_at(max(0, size - FOOTER_WINDOW_BYTES), FOOTER_WINDOW_BYTES)
    num_bytes = int.from_bytes(tail[-8:-4], "little")
    if size < 12 or tail[-4:] != b"PAR1" or num_bytes > size - 12:
        raise ParquetDamage("it has no footer")
    if num_bytes + 8 > len(tail):
        tail = read_at(size - num_bytes - 8, num_bytes + 8)
    return tail[-8 - num_bytes : -8]


def column_chunks(footer: bytes, columns: Collection[str]) -> list[list[Chunk]]:
    """The chunks of these columns in each row group, as pyarrow selects them by name.

    `footer` is its thrift bytes. A chunk is known by its place, not by the name it gives itself.
    """
    cursor = Compact(footer)
    leaves: list[Leaf] = []
    groups: list[list[Chunk]] = []
    for number, kind in cursor.fields():
        if number == 2 and kind == LIST:
            leaves = _leaves([_element(cursor) for _ in cursor.elements()])
        elif number == 4 and kind == LIST:
            wanted = {i for i, leaf in enumerate(leaves) if _selects(columns, leaf)}
            groups = [_row_group(cursor, leaves, wanted) for _ in cursor.elements()]
        else:
            cursor.skip(kind)
    return groups


def _selects(columns: Collection[str], leaf: Leaf) -> bool:
    return any(".".join(leaf.parts[: n + 1]) in columns for n in range(len(leaf.parts)))


def _element(cursor: Compact) -> tuple[str, Numbers]:
    name, numbers = "", Numbers()
    for number, kind in cursor.fields():
        if number == 4 and kind == BINARY:
            name = cursor.binary().decode(errors="surrogateescape")
        elif _SCHEMA.get((number,)) == kind:
            numbers[(number,)] = cursor.number(kind)
        else:
            cursor.skip(kind)
    return name, numbers


def _leaves(elements: Sequence[tuple[str, Numbers]]) -> list[Leaf]:
    """Of a schema laid out in depth-first order, its root first."""
    leaves = []
    open_nodes: list[list[Any]] = []  # [children left, parts, lists around]
    for i, (name, numbers) in enumerate(elements):
        while open_nodes and open_nodes[-1][0] == 0:
            open_nodes.pop()
        if i and not open_nodes:
            raise ParquetDamage("its schema has more than one root")
        _, parts, depth = open_nodes[-1] if open_nodes else (0, (), 0)
        if open_nodes:
            open_nodes[-1][0] -= 1
            parts = (*parts, name)
            depth += numbers.get((3,)) == _REPEATED
        if (children := numbers.get((5,), 0)) > 0:
            open_nodes.append([children, parts, depth])
        elif i:
            leaves.append(Leaf(parts, numbers.get((1,), -1), depth))
    return leaves


def _row_group(cursor: Compact, leaves: Sequence[Leaf], wanted: Collection[int]) -> list[Chunk]:
    chunks: list[Chunk] = []
    position = 0
    for number, kind in cursor.fields():
        if number != 1 or kind != LIST:
            cursor.skip(kind)
            continue
        for position, _ in enumerate(cursor.elements(), 1):
            if position - 1 in wanted:
                chunks.append(_chunk(cursor, leaves[position - 1]))
            else:
                cursor.skip(STRUCT)
    if position != len(leaves):
        raise ParquetDamage(f"a row group has {position} columns, the schema {len(leaves)}")
    return chunks


def _chunk(cursor: Compact, leaf: Leaf) -> Chunk:
    found: Numbers = {}
    for number, kind in cursor.fields():
        if number == 3 and kind == STRUCT:
            found = cursor.numbers(_CHUNK)
        else:
            cursor.skip(kind)
    data, dictionary, size, unpacked = (found.get((n,), 0) for n in (9, 11, 7, 6))
    begin = dictionary if 0 < dictionary < data else data
    nulls = found.get((12, 3))
    if min(data, size, unpacked, nulls or 0) < 0:
        raise ParquetDamage(f"column {leaf.path!r} has {size} bytes at {data}, {nulls} nulls")
    return Chunk(leaf, found.get((4,), -1), unpacked, begin, begin + size, nulls)
