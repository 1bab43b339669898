"""Thrift's compact protocol, as much of it as parquet's metadata needs.

Guarantees: whatever the bytes, a value or ParquetDamage; never a value other than Apache Thrift's
reader gives for the same bytes, so what is checked here is what pyarrow then acts on. (What that
reader cuts or merges, numbers wider than their type and repeated fields, is damage.) A list whose
count is forged ends with its bytes.
Costs: about a microsecond per value, nothing in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

I8, I16, I32, I64, DOUBLE, BINARY, LIST, SET, STRUCT = 3, 4, 5, 6, 7, 8, 9, 10, 12
_BOOLEANS = (1, 2)
_BITS = {I16: 16, I32: 32, I64: 64}
_MAX_DEPTH = 32
_CUT = "it ends too early"


Path = tuple[int, ...]
"""Field numbers, of a struct and of those in it."""
Numbers = dict[Path, int]


class ParquetDamage(ValueError):  # noqa: N818  the reader's word; an InputError is made of it
    """The bytes are not those of a sound parquet file."""


class CutShort(ParquetDamage):
    """The bytes end inside a value: more of them may help."""


class Compact:
    """A position in the bytes."""

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data, self.position = data, position

    def _byte(self) -> int:
        try:
            byte = self.data[self.position]
        except IndexError:
            raise CutShort(_CUT) from None
        self.position += 1
        return byte

    def _jump(self, size: int) -> None:
        self.position += size
        if self.position > len(self.data):
            raise CutShort(_CUT)

    def _varint(self) -> int:
        byte = self._byte()
        value, shift = byte & 127, 7
        while byte > 127:
            if shift > 63:
                raise ParquetDamage("it has a number of more than 64 bits")
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
        return value

    def _size(self) -> int:
        size = self._varint()
        if size >= 1 << 31:
            raise ParquetDamage(f"it claims {size} bytes or entries in one value")
        return size

    def number(self, kind: int) -> int:
        """An I16, I32 or I64."""
        value = self._varint()
        value = (value >> 1) ^ -(value & 1)
        if value.bit_length() >= _BITS[kind]:
            raise ParquetDamage(f"it has {value} where {_BITS[kind]} bits are expected")
        return value

    def binary(self) -> bytes:
        size = self._size()
        begin = self.position
        self._jump(size)
        return self.data[begin : self.position]

    def fields(self) -> Iterator[tuple[int, int]]:
        """(number, type) of each field of a struct; the caller reads or skips its value."""
        number = seen = 0
        while byte := self._byte():
            number = number + (byte >> 4) if byte >> 4 else self.number(I16)
            if not 0 <= number < 1 << 15 or seen >> number & 1:
                raise ParquetDamage(f"it has a field {number} twice or out of range")
            seen |= 1 << number
            yield number, byte & 15

    def elements(self) -> Iterator[int]:
        """The type of each element of a list; the caller reads or skips it."""
        byte = self._byte()
        count = byte >> 4 if byte >> 4 < 15 else self._size()
        for _ in range(count):  # each takes a byte at least, or the bytes have ended
            yield byte & 15

    def numbers(self, wanted: Mapping[Path, int], at: Path = ()) -> Numbers:
        """Values of the wanted fields of a struct, {path: type}; one of another type is skipped."""
        found: Numbers = {}
        for number, kind in self.fields():
            path = (*at, number)
            if wanted.get(path) == kind:
                found[path] = self.number(kind)
            elif kind == STRUCT and any(key[: len(path)] == path for key in wanted):
                found |= self.numbers(wanted, path)
            else:
                self.skip(kind)
        return found

    def skip(self, kind: int, depth: int = 0) -> None:
        """Pass over a field's value; a boolean field has none, it is in its type."""
        if depth > _MAX_DEPTH:
            raise ParquetDamage("its values are nested too deep")
        if kind in _BITS:
            self._varint()
        elif kind == BINARY:
            self._jump(self._size())
        elif kind == STRUCT:
            for _, inner in self.fields():
                self.skip(inner, depth + 1)
        elif kind in (LIST, SET):
            for inner in self.elements():
                self.skip(I8 if inner in _BOOLEANS else inner, depth + 1)
        elif kind in (I8, DOUBLE):
            self._jump(1 if kind == I8 else 8)
        elif kind not in _BOOLEANS:
            raise ParquetDamage(f"it has a value of the unknown type {kind}")
