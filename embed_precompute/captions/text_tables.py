"""Caption tables in CSV, TSV and JSON Lines.

Guarantees: a column has one type in the whole table, whatever the size of a block. Ids and captions
are what is written: `007` stays `007`. An empty field of CSV, quoted or not, is null, and so is a
key that a JSON object lacks. A line that does not fit is an InputError that names it. Bytes that
changed since the file was opened are a ConflictError.
Costs: each file is parsed once when it is opened, 250,000 rows of CSV or 150,000 of JSON Lines a
second on one core, and held as 24 bytes per MiB. To read a row, the MiB that holds it is parsed.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from embed_precompute.errors import ConflictError, InputError, one_line

DELIMITERS = {".csv": ",", ".tsv": "\t", ".jsonl": None}
"""By ending; None: a JSON object in each line."""
GROUP_BYTES = 1 << 20
FIRST_ROWS = 10_000
MAX_FIELD_CHARS = 4 << 20
"""A longer field of CSV is a quote that is never closed."""
NO_NUMBER = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN")
) | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
"""What pandas reads as a missing number."""
NO_NUMBER_BUT_DIGITS = r"^(\+|-?0[0-9xX]|-?[0-9]{19,}$)"
"""Fields that a parser could take for a number, and that a number would not be written as."""
BOM = "\xef\xbb\xbf"  # UTF-8's, as Latin-1
UTF16 = ("\xff\xfe", "\xfe\xff")
STRINGS = pa.list_(pa.string())
SCALARS: dict[type, Any] = {
    type(None): pa.null(),
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}


@dataclass(frozen=True)
class TextIndex:
    """What the first pass over a file found."""

    bytes: int
    sha256: str
    content_xxh3: str
    delimiter: str | None
    types: dict[str, Any]
    """Arrow type of each column, in order; `null` where all values are null."""
    own_types: dict[str, Any]
    """Of this file alone; `types` are those of the table."""
    nullable: frozenset[str]
    """Columns that hold a null; of CSV, columns of numbers only."""
    odd: dict[str, tuple[int, str]]
    """Column -> (row, value): in CSV the first value that is no number; in JSON the first one that
    has another type than those before, or a type that captions have no use for."""
    row_starts: np.ndarray[Any, np.dtype[np.int64]]
    """[groups + 1] first row of each group of rows."""
    offsets: np.ndarray[Any, np.dtype[np.int64]]
    """[groups + 1] first byte of each group; the header is in the first."""
    digests: np.ndarray[Any, np.dtype[np.uint64]]
    """[groups] XXH3-64 of each group's bytes."""

    @property
    def schema(self) -> pa.Schema:
        return pa.schema(list(self.types.items()))


class TextRows:
    """The rows of an open file; it has of pq.ParquetFile what a RowCursor asks for."""

    def __init__(self, file: Any, name: str, index: TextIndex) -> None:
        self._file, self._name, self._index = file, name, index
        self.schema_arrow = index.schema

    def iter_batches(
        self, batch_size: int, row_groups: Sequence[int], columns: Sequence[str], use_threads: bool
    ) -> Iterator[pa.RecordBatch]:
        """Record batches of these columns, as far as the file has them, of one group of rows."""
        index, (group,) = self._index, row_groups
        start, end = (int(n) for n in index.offsets[group : group + 2])
        raw = self._file.read_at(end - start, start)
        if xxhash.xxh3_64_intdigest(raw) != index.digests[group]:
            raise ConflictError(
                f"{self._name} changed since it was opened, between byte {start} and {end}. Run "
                "again with the file as it is to be, and do not write to it meanwhile."
            )
        names = list(index.types)
        text = raw.decode("latin-1").removeprefix(BOM if group == 0 else "")
        rows = _rows(iter(io.StringIO(text, newline="")), index.delimiter, self._name)
        if index.delimiter is not None and group == 0:
            next(rows)  # the header
        wanted = {name: index.types[name] for name in columns if name in index.types}
        while batch := list(itertools.islice(rows, batch_size)):
            values = _by_column(batch, names, index.delimiter)
            arrays = [self._array(name, values[name]) for name in wanted]
            yield pa.RecordBatch.from_arrays(arrays, schema=pa.schema(list(wanted.items())))

    def _array(self, name: str, values: Sequence[Any]) -> pa.Array:
        wanted = self._index.types[name]
        if self._index.delimiter is None:
            return _json_array(values, wanted, is_odd=name in self._index.odd)
        if pa.types.is_string(wanted):
            encoded = [value.encode("latin-1") if value else None for value in values]
            return pa.array(encoded, pa.binary()).cast(wanted, safe=False)  # UTF-8 is checked later
        return pa.array([None if v in NO_NUMBER else v for v in values], pa.string()).cast(wanted)

    def close(self, force: bool = False) -> None:
        self._file.close()


def index_text(
    file: Any, name: str, delimiter: str | None, more: Callable[[int], None]
) -> TextIndex:
    """Parse an open file once; `name` is for messages. `more` is told how many bytes were read.
    InputError where it is not of its format."""
    sha256, content = hashlib.sha256(), xxhash.xxh3_128()
    starts, offsets, digests = [0], [0], []
    with io.TextIOWrapper(file, "latin-1", newline="") as text:
        lines = _Lines(text, name)
        rows = _rows(iter(lines), delimiter, name)
        names = [] if delimiter is None else _header(next(rows, []), name)
        columns = _Columns(names, delimiter)
        while True:
            group = []
            for row in rows:
                group.append(row)
                if lines.held_bytes >= GROUP_BYTES:
                    break
            raw = lines.take()
            sha256.update(raw)
            content.update(raw)
            more(len(raw))
            if not group:  # at the end; what is left are empty lines
                size = offsets[-1] + len(raw)
                break
            columns.add(group, starts[-1])
            starts.append(starts[-1] + len(group))
            offsets.append(offsets[-1] + len(raw))
            digests.append(xxhash.xxh3_64_intdigest(raw))
    return TextIndex(
        bytes=size,
        sha256=sha256.hexdigest(),
        content_xxh3=content.hexdigest(),
        delimiter=delimiter,
        types=columns.types,
        own_types=columns.types,
        nullable=frozenset(columns.nullable),
        odd=columns.odd,
        row_starts=np.array(starts, np.int64),
        offsets=np.array(offsets, np.int64),
        digests=np.array(digests, np.uint64),
    )


def first_types(file: Any, name: str, delimiter: str | None) -> dict[str, Any]:
    """Arrow type of each column of an open file, by its first rows; `name` as in `index_text`."""
    with io.TextIOWrapper(file, "latin-1", newline="") as text:
        rows = _rows(iter(_Lines(text, name)), delimiter, name)
        names = [] if delimiter is None else _header(next(rows, []), name)
        columns = _Columns(names, delimiter)
        columns.add(list(itertools.islice(rows, FIRST_ROWS)), 0)
    return columns.types


def as_one_table(indexes: Sequence[TextIndex], strings: Collection[str]) -> list[TextIndex]:
    """The same files with one type for each column. `strings`: columns of CSV that are text."""
    is_csv = indexes[0].delimiter is not None
    types: dict[str, Any] = {}
    for index in indexes:
        for name, found in index.types.items():
            otherwise = pa.string() if is_csv else None
            types[name] = _wider(types.get(name, pa.null()), found, otherwise)
    for name, found in types.items():
        if is_csv and name in strings:
            types[name] = pa.string()
        elif is_csv and found == pa.null():
            types[name] = pa.float64()  # as pandas reads a column without a value
    return [
        replace(
            index,
            types={
                name: types[name] if types[name] is not None else index.types[name]
                for name in index.types or types  # without a line, JSON has no column
            },
        )
        for index in indexes
    ]


def type_alone(indexes: Sequence[TextIndex], name: str) -> Any:
    """The Arrow type that a column would have in a table of these files only; null: no value."""
    otherwise = pa.string() if indexes[0].delimiter is not None else None
    found = (index.own_types.get(name, pa.null()) for index in indexes)
    return functools.reduce(lambda one, other: _wider(one, other, otherwise), found)


# --- lines -------------------------------------------------------------------------------------


class _Lines:
    """The lines of a file as Latin-1, a character for each byte; `take` gives their bytes."""

    def __init__(self, text: Iterable[str], name: str) -> None:
        self._text, self._name = text, name
        self._held: list[str] = []
        self.held_bytes = 0

    def __iter__(self) -> Iterator[str]:
        is_first = True
        for line in self._text:
            self._held.append(line)
            self.held_bytes += len(line)
            if is_first and line.startswith(UTF16):
                raise InputError(f"{self._name} is UTF-16: expected UTF-8. Convert it.")
            yield line.removeprefix(BOM) if is_first else line
            is_first = False

    def take(self) -> bytes:
        taken = "".join(self._held).encode("latin-1")
        self._held, self.held_bytes = [], 0
        return taken


def _rows(lines: Iterator[str], delimiter: str | None, name: str) -> Iterator[Any]:
    """The rows: of CSV lists of fields, the header first; of JSON Lines objects."""
    return _objects(lines, name) if delimiter is None else _records(lines, delimiter, name)


def _records(lines: Iterator[str], delimiter: str, name: str) -> Iterator[list[str]]:
    # The limit is of the process: it is raised, never lowered.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_FIELD_CHARS))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    width, line = None, 1
    try:
        for record in reader:
            if record:  # an empty line is none
                width = width or len(record)
                if len(record) != width:
                    raise InputError(
                        f"{name}, line {line} has {len(record)} field(s): expected {width}, as in "
                        "the header. Mend the line. A field with a delimiter or a line break in it "
                        "stands in quotes."
                    )
                yield record
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(
            f"{name}, line {line} is not CSV ({one_line(error)}): expected closed quotes, and a "
            "quote within quotes written twice. Mend it."
        ) from None


def _objects(lines: Iterator[str], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        raw = line.encode("latin-1")
        try:
            # What is not UTF-8 becomes lone surrogates, which `_utf8` makes invalid UTF-8 again.
            found = json.loads(raw.decode("utf-8", "surrogateescape"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{name}, line {number} is not JSON ({one_line(error)}): expected one object in "
                "each line. Mend it."
            ) from None
        if not isinstance(found, dict):
            raise InputError(
                f"{name}, line {number} holds {found!r:.80}: expected one JSON object in each "
                "line. Mend it."
            )
        yield found


def _header(names: list[str], name: str) -> list[str]:
    try:
        header = [each.encode("latin-1").decode("utf-8") for each in names]
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: the header is not UTF-8 ({error}). Convert it.") from None
    if not header:
        raise InputError(f"{name} is empty: expected a first line with the names of the columns.")
    if twice := [each for each in header if header.count(each) > 1]:
        raise InputError(
            f"{name} has {len(twice)} columns named {twice[0]!r}: expected one. Rename the others."
        )
    return header


def _by_column(rows: Sequence[Any], names: Iterable[str], delimiter: str | None) -> dict[str, Any]:
    if delimiter is None:
        return {name: [row.get(name) for row in rows] for name in names}
    return dict(zip(names, zip(*rows, strict=True), strict=True))


# --- types -------------------------------------------------------------------------------------


class _Columns:
    """The type of each column, found from one group of rows after the other."""

    def __init__(self, names: Iterable[str], delimiter: str | None) -> None:
        self._delimiter = delimiter
        self.types: dict[str, Any] = dict.fromkeys(names, pa.null())
        self.nullable: set[str] = set()
        self.odd: dict[str, tuple[int, str]] = {}

    def add(self, rows: Sequence[Any], first_row: int) -> None:
        if self._delimiter is None:
            for name in dict.fromkeys(itertools.chain.from_iterable(rows)):
                if name not in self.types:
                    self.types[name] = pa.null()
                    self.nullable |= {name} if first_row else set()
        for name, values in _by_column(rows, self.types, self._delimiter).items():
            if self._delimiter is None:
                self._add_json(name, values, first_row)
            elif self.types[name] != pa.string():
                self._add_csv(name, values, first_row)

    def _add_csv(self, name: str, values: Sequence[str], first_row: int) -> None:
        different = set(values)
        self.types[name] = _wider(self.types[name], _csv_type(different), pa.string())
        if not different.isdisjoint(NO_NUMBER):
            self.nullable.add(name)
        if self.types[name] == pa.string():
            row, value = next((i, v) for i, v in enumerate(values) if _csv_type({v}) == pa.string())
            shown = value.encode("latin-1").decode("utf-8", "replace")
            self.odd[name] = (first_row + row, shown)

    def _add_json(self, name: str, values: Sequence[Any], first_row: int) -> None:
        if None in values:
            self.nullable.add(name)
        if name in self.odd:
            return
        wider = functools.reduce(_wider, _json_types(values), self.types[name])
        if wider is None:
            # The types of longer and longer prefixes, up to the value that does not fit.
            types = itertools.accumulate(
                (found for value in values for found in _json_types([value])),
                _wider,
                initial=self.types[name],
            )
            row = next(i for i, prefix in enumerate(types) if prefix is None) - 1
            self.odd[name] = (first_row + row, json.dumps(values[row], ensure_ascii=False))
            wider = pa.string()
        self.types[name] = wider


def _wider(one: Any, other: Any, otherwise: Any = None) -> Any:
    """The type that takes the values of both; null fits all."""
    if one == other or other == pa.null():
        return one
    if one == pa.null():
        return other
    return pa.float64() if {one, other} == {pa.int64(), pa.float64()} else otherwise


def _csv_type(fields: set[str]) -> Any:
    """int64, float64 or string, as the fields are written; null where none has a value."""
    array = pa.array(list(fields - NO_NUMBER), pa.string())
    if len(array) == 0:
        return pa.null()
    # `007` is a name, and pandas alone would make it 7.
    if pc.any(pc.match_substring_regex(array, NO_NUMBER_BUT_DIGITS)).as_py():
        return pa.string()
    for numeric in (pa.int64(), pa.float64()):
        with contextlib.suppress(pa.ArrowInvalid):
            array.cast(numeric)
            return numeric
    return pa.string()


def _json_types(values: Sequence[Any]) -> set[Any]:
    """The types of these values; None stands for one that no column of captions has."""
    kinds = set(map(type, values))
    types = {SCALARS.get(kind) for kind in kinds - {list}}
    if int in kinds and any(type(v) is int and not -(1 << 63) <= v < 1 << 63 for v in values):
        types = {*types - {pa.int64()}, None}
    if list in kinds:
        entries = (entry for value in values if type(value) is list for entry in value)
        types.add(STRINGS if {type(entry) for entry in entries} <= {str, type(None)} else None)
    return types


def _json_array(values: Sequence[Any], wanted: Any, is_odd: bool) -> pa.Array:
    if is_odd:  # a value that is no text stays JSON
        values = [
            v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False)
            for v in values
        ]
    if wanted == pa.string():
        return _strings(values)
    if wanted == STRINGS:
        ends = itertools.accumulate((len(v or ()) for v in values), initial=0)
        entries = _strings([entry for value in values for entry in value or ()])
        nulls = pa.array([value is None for value in values])
        return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), entries, mask=nulls)
    if wanted == pa.float64():
        values = [None if value is None else float(value) for value in values]
    return pa.array(values, wanted)


def _strings(values: Sequence[str | None]) -> pa.Array:
    encoded = [None if value is None else _utf8(value) for value in values]
    return pa.array(encoded, pa.binary()).cast(pa.string(), safe=False)


def _utf8(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:  # a lone surrogate: invalid, as a reader of the rows will find
        return value.encode("utf-8", "surrogatepass")
