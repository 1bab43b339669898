"""Which files a path names, and what parquet's footers say.

Guarantees: the same files in the same (bytewise) order wherever the folder is mounted; a file that
is missing, truncated, not of its format or changed since it was planned is an error that names it;
the files of a dataset or an export of ours are never taken for captions.
Costs: one walk over the folders, then each file is read once for its digest, in a thread pool;
opening a parquet file again reads its footer only. No page of a column is decoded here.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import itertools
import logging
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import xxhash

from embed_precompute.captions.text_tables import (
    DELIMITERS,
    TextIndex,
    TextRows,
    first_types,
    index_text,
)
from embed_precompute.errors import ConflictError, InputError, one_line
from embed_precompute.steps import BYTES, Work

log = logging.getLogger(__name__)
DATA_EXTENSIONS = (".parquet", ".pq", ".parq", *DELIMITERS)
FOOTER_THREADS = 16
CONTENT_PIECE = 4 << 20
MAGIC = b"PAR1"
ARROW_SCHEMA = b"ARROW:schema"
"""Footer key under which Arrow keeps the types a table had when it was written."""

T = TypeVar("T")


@dataclass(frozen=True)
class InputFile:
    """One file of the plan: enough to tell later that it is still the same."""

    path: str
    """Relative to the input root, `/` separated; of a single file its name."""
    bytes: int
    rows: int
    footer_sha256: str
    """sha256 of a parquet footer's thrift bytes: a cheap check each time the file is opened. Of
    another format: sha256 of the whole file."""
    content_xxh3: str
    """XXH3-128 of the whole file: two captions swapped in place leave the footer as it was."""


@dataclass(frozen=True)
class Source:
    """A file that was found: `location` on `filesystem`, `path` as the plan calls it."""

    filesystem: Any
    location: str
    path: str

    def __str__(self) -> str:
        return self.location

    @property
    def format(self) -> str:
        """An ending of DELIMITERS, or `parquet`, whatever the name."""
        ending = os.path.splitext(self.path)[1].lower()
        return ending if ending in DELIMITERS else "parquet"


@dataclass(frozen=True)
class CaptionFile:
    """A file of the caption table: 8 bytes per row group, nothing per row."""

    source: Source
    input: InputFile
    group_starts: np.ndarray[Any, np.dtype[np.int64]]
    """[groups + 1] first row of each row group within the file."""
    text: TextIndex | None = None
    """Of a file that is not parquet: where its rows are, and of which types."""


# --- finding files -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Search:
    """What `captions.path` asks for, below a folder."""

    path: str
    """As the person wrote it."""
    filesystem: Any
    root: str
    pattern: tuple[str, ...]
    """The parts of a glob below `root`; () for everything."""
    is_local: bool

    def location(self, parts: Sequence[str]) -> str:
        return "/".join((self.root.rstrip("/"), *parts)) or "/"

    def wants(self, parts: Sequence[str]) -> bool:
        """Whether the file with this relative path is one of those asked for."""
        is_data = parts[-1].lower().endswith(DATA_EXTENSIONS)
        if self._skips(parts):
            return False
        if _matches(parts, self.pattern):
            return is_data or re.search(r"\.\w+$", self.pattern[-1]) is not None
        # A folder that the glob names stands for all data below it.
        return is_data and any(_matches(parts[:n], self.pattern) for n in range(len(parts)))

    def enters(self, parts: Sequence[str]) -> bool:
        """Whether this folder, or a folder below it, may hold files that are asked for."""
        fixed = itertools.takewhile(lambda wanted: wanted != "**", self.pattern)
        fits = all(map(fnmatch.fnmatchcase, parts, fixed))
        return fits and not self._skips(parts)

    def _skips(self, parts: Sequence[str]) -> bool:
        """Spark, Hive and pyarrow all mark what is not data by a leading `.` or `_`."""
        asked = any(part.startswith((".", "_")) for part in self.pattern)
        return not asked and any(part.startswith((".", "_")) for part in parts)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a relative path fits a glob, whose `**` is any number of folders."""
    if not pattern or not parts:
        return not parts and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or _matches(parts[1:], pattern)
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def find_files(path: str) -> list[Source]:
    """The files named by `path` (file, folder, glob or URI), sorted bytewise by path; all of one
    format."""
    search = _search(path)
    if isinstance(search, Source):
        return [search]
    found, num_others = [], 0
    for parts in _walk(search):
        if not search.wants(parts):
            num_others += 1
            continue
        found.append(Source(search.filesystem, search.location(parts), "/".join(parts)))
        # pyarrow leaves a dangling link out; a caption file must never vanish silently.
        if search.is_local and not os.path.exists(location := found[-1].location):
            raise InputError(
                f"{location} is a link to {os.readlink(location)}, which does not exist. Restore "
                "the file or remove the link."
            )
    if not found:
        raise InputError(
            f"captions.path {path!r} holds no caption table ({num_others} other files were "
            f"ignored): expected names that end in {', '.join(DATA_EXTENSIONS)} and do not start "
            "with '.' or '_'. Point captions.path at the folder that has them."
        )
    try:
        found.sort(key=lambda source: source.path.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(
            f"captions.path {path!r} holds a file whose name is not UTF-8: {error.object!r}. "
            "Rename it."
        ) from None
    if other := next((source for source in found if source.format != found[0].format), None):
        raise InputError(
            f"captions.path {path!r} holds two formats, {found[0]} and {other}: expected one. "
            "Name the captions with a glob, such as 'folder/*.csv', or move the others away."
        )
    return found


def refuse_output_inside(path: str, output: str | os.PathLike[str]) -> None:
    """InputError where a later search for captions would find the files of the dataset itself."""
    if (local := _local_path(path)) is None or os.path.isfile(local):
        return
    plain, pattern = _split_glob(local)
    root, folder = os.path.realpath(plain), os.path.realpath(output)
    if os.path.commonpath([root, folder]) != root:
        return
    below = os.path.relpath(folder, root)
    search = _Search(path, None, root, pattern, is_local=True)
    if search.enters([] if below == "." else below.split(os.sep)):
        raise InputError(
            f"output.path {os.fspath(output)!r} lies inside captions.path {path!r}: the dataset's "
            "own files would be read as captions. Choose an output.path outside it."
        )


def _local_path(path: str) -> str | None:
    """The absolute path of a local one; None for a URI of another file system."""
    scheme, separator, rest = path.partition("://")
    if not separator:
        return os.path.abspath(os.path.expanduser(path))
    if scheme != "file":
        return None
    host, slash, local = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise InputError(f"captions.path {path!r}: expected file:///absolute/path.")
    return os.path.abspath(urllib.parse.unquote(slash + local))


def _split_glob(path: str, magic: str = "*?[") -> tuple[str, tuple[str, ...]]:
    """(the folder before the first part that is a pattern, the parts from there on)."""
    if os.path.isdir(path):  # the path wins over the pattern: a folder may be called "take[1]"
        return path, ()
    parts = path.split("/")
    count = next((i for i, part in enumerate(parts) if set(part) & set(magic)), len(parts))
    return "/".join(parts[:count]) or "/", tuple(parts[count:])


def _search(path: str) -> _Search | Source:
    local = _local_path(path)
    if local is None:
        return _remote_search(path)
    filesystem = pyarrow.fs.LocalFileSystem()
    if os.path.isfile(local):
        return Source(filesystem, local, os.path.basename(local))
    root, pattern = _split_glob(local)
    if not os.path.isdir(root):
        raise InputError(
            f"captions.path {path!r} does not exist (looked for {local}): expected a file "
            "(parquet, CSV, JSON Lines), a folder of them, a glob or a URI. Check the path "
            "and that this machine mounts it."
        )
    return _Search(path, filesystem, root, pattern, is_local=True)


def _remote_search(path: str) -> _Search | Source:
    uri, question, query = path.partition("?")  # in a URI `?` starts the options, never a glob
    plain, pattern = _split_glob(uri, "*[")
    try:
        filesystem, root = pyarrow.fs.FileSystem.from_uri(plain + question + query)
        kind = filesystem.get_file_info(root).type
    except Exception as error:  # a library's own errors: hf:// raises those of its HTTP client
        _cannot_list(path, error)
    if kind == pyarrow.fs.FileType.File and not pattern:
        return Source(filesystem, root, root.rsplit("/", 1)[-1])
    if kind != pyarrow.fs.FileType.Directory:
        raise InputError(f"captions.path {path!r} does not exist. Check it and its region.")
    return _Search(path, filesystem, root, pattern, is_local=False)


def _cannot_list(path: str, error: Exception) -> NoReturn:
    raise InputError(
        f"captions.path {path!r} cannot be listed: {one_line(error)}. Expected a URI that pyarrow "
        "reads, such as s3://bucket/folder or hf://datasets/owner/name; check the name, the "
        "credentials and the network, or copy the files to a folder."
    ) from error


def _walk(search: _Search) -> Iterator[tuple[str, ...]]:
    """Files below the root, by the parts of their relative path; linked folders are followed, each
    real folder once; folders that hold a dataset or an export of ours are left out."""
    top = os.path.realpath(search.root)
    seen: set[str] = set()
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        parts = waiting.pop()
        location = search.location(parts)
        if search.is_local:
            real = os.path.realpath(location)
            is_link = bool(parts) and os.path.islink(location)
            # A link into the tree, or above it, would make a second copy or a loop.
            if real in seen or (is_link and os.path.commonpath([top, real]) in (top, real)):
                continue
            seen.add(real)
        folders, files = _listed(search, location)
        ours = None
        if "shards" in folders and {"plan.json", "manifest.json"} & set(files):
            ours = "a dataset"
        elif {"source.json", "null_t5.pt"} <= set(files):
            ours = "an export"
        if ours is not None:
            log.warning("captions.path: %s holds %s of ours and is skipped.", location, ours)
            continue
        below = [(*parts, name) for name in sorted(folders, reverse=True)]
        waiting += [folder for folder in below if search.enters(folder)]
        yield from ((*parts, name) for name in files)


def _listed(search: _Search, location: str) -> tuple[list[str], list[str]]:
    """(folders, files) of a folder, by name."""
    try:
        if search.is_local:
            with os.scandir(location) as entries:
                # isdir, because a link that leads to itself has no answer to `entry.is_dir()`.
                found = [
                    (entry.name, os.path.isdir(entry) if entry.is_symlink() else entry.is_dir())
                    for entry in entries
                ]
        else:
            listing = search.filesystem.get_file_info(pyarrow.fs.FileSelector(location))
            found = [(i.base_name, i.type == pyarrow.fs.FileType.Directory) for i in listing]
    except OSError as error:
        raise InputError(f"captions.path {search.path!r}: cannot list a folder: {error}.") from None
    except Exception as error:  # as in `_remote_search`
        _cannot_list(search.path, error)
    folders = [name for name, is_folder in found if is_folder]
    return folders, [name for name, is_folder in found if not is_folder]


# --- reading files -----------------------------------------------------------------------------


def read_footers(
    sources: Sequence[Source],
    examine: Callable[[CaptionFile, pa.Schema], T],
    *,
    digest: bool = True,
) -> list[T]:
    """`examine(file, schema)` of every file, in order; of several bad files the first is raised.

    In the schema text is plain `string`, never a dictionary. Without `digest` nothing but the
    footer of a parquet file is read, and the file's `content_xxh3` is empty.
    """

    def read(source: Source) -> T:
        if source.format != "parquet":
            file = _read_text(source, work.add)
            return examine(file, file.text.schema)  # type: ignore[union-attr]
        # No metadata is kept: a wide file's is large.
        file, _, schema = _read_footer(source, None if digest else "", work.add)
        return examine(file, schema)

    with (
        Work("reading caption files", _sizes(sources) if digest else 0, BYTES) as work,
        ThreadPoolExecutor(min(FOOTER_THREADS, len(sources)), "footer") as pool,
    ):
        return list(pool.map(read, sources))


def _sizes(sources: Sequence[Source]) -> int:
    """The bytes of local files; 0 for others, each of which would have to be asked for."""
    local = isinstance(sources[0].filesystem, pyarrow.fs.LocalFileSystem)
    with contextlib.suppress(OSError):  # reading the file says what is wrong with it
        return sum(os.path.getsize(source.location) for source in sources if local)
    return 0


def columns_of(source: Source) -> dict[str, Any]:
    """Arrow type of each column of a file: by parquet's footer, or by the first rows of another
    format. Raises InputError as a run does."""
    if source.format == "parquet":
        schema = _read_footer(source, content_xxh3="")[2]
        return dict(zip(schema.names, schema.types, strict=True))
    try:
        with source.filesystem.open_input_file(source.location) as file:
            return first_types(file, str(source), DELIMITERS[source.format])
    except InputError:
        raise
    except Exception as error:  # as in `_remote_search`
        raise InputError(f"{source} cannot be read: {one_line(error)}.") from error


def _read_text(source: Source, more: Callable[[int], None]) -> CaptionFile:
    try:
        with source.filesystem.open_input_file(source.location) as file:
            index = index_text(file, str(source), DELIMITERS[source.format], more)
    except InputError:
        raise
    except Exception as error:  # as in `_remote_search`
        raise InputError(f"{source} cannot be read: {one_line(error)}.") from error
    rows = int(index.row_starts[-1])
    found = InputFile(source.path, index.bytes, rows, index.sha256, index.content_xxh3)
    return CaptionFile(source, found, index.row_starts, index)


def open_rows(file: CaptionFile) -> pq.ParquetFile | TextRows:
    """The file for streaming its rows; ConflictError if it changed."""
    source, expected, metadata = file.source, file.input, None
    if file.text is None:
        found, metadata, _ = _read_footer(source, expected.content_xxh3)
        if found.input != expected:
            raise _changed(
                source,
                f"{found.input.bytes} bytes and {found.input.rows} rows now, {expected.bytes} and "
                f"{expected.rows} then",
            )
    try:
        opened = source.filesystem.open_input_file(source.location)
        if file.text is not None:
            if (size := opened.size()) != expected.bytes:
                opened.close()
                raise _changed(source, f"{size} bytes now, {expected.bytes} then")
            return TextRows(opened, str(source), file.text)
        # Without pre_buffer and with a buffer the reader holds a window of each column chunk, not
        # the chunk: memory does not depend on the size of row groups.
        return pq.ParquetFile(
            opened,
            metadata=metadata,
            pre_buffer=False,
            buffer_size=1 << 20,
            page_checksum_verification=True,
        )
    except ConflictError:
        raise
    except Exception as error:  # as in `_remote_search`
        raise InputError(f"{source} cannot be opened: {one_line(error)}.") from error


def _changed(source: Source, how: str) -> ConflictError:
    return ConflictError(
        f"{source} changed since it was planned: {how}. Put the old file back, or start a new "
        "output folder."
    )


def _read_footer(
    source: Source, content_xxh3: str | None = None, more: Callable[[int], None] = lambda _: None
) -> tuple[CaptionFile, Any, Any]:
    """(file, metadata, schema); InputError when it is no whole parquet file.

    The whole file is read for its digest, unless `content_xxh3` is given. `more` is told how many
    bytes were read.
    """
    try:
        with source.filesystem.open_input_file(source.location) as file:
            size = file.size()
            thrift = _footer_bytes(source, file, size)
            if content_xxh3 is None:
                digest = xxhash.xxh3_128()
                for offset in range(0, size, CONTENT_PIECE):
                    digest.update(piece := file.read_at(min(CONTENT_PIECE, size - offset), offset))
                    more(len(piece))
                content_xxh3 = digest.hexdigest()
    except InputError:
        raise
    except Exception as error:  # as in `_remote_search`
        raise InputError(f"{source} cannot be read: {one_line(error)}.") from error
    # Restoring the writer's Arrow types would make dictionaries again, and Arrow refuses a whole
    # batch of those for one value that is not UTF-8; under another name it does not find them.
    plain = thrift.replace(ARROW_SCHEMA, ARROW_SCHEMA.lower())
    whole = MAGIC + plain + len(plain).to_bytes(4, "little") + MAGIC  # a file that is all footer
    try:
        parsed = pq.ParquetFile(pa.BufferReader(whole))
        metadata, schema = parsed.metadata, parsed.schema_arrow
        schema.to_string(show_schema_metadata=False)  # raises where a name is not UTF-8
        groups = range(metadata.num_row_groups)
        starts = np.cumsum([0, *(metadata.row_group(i).num_rows for i in groups)], dtype=np.int64)
        if starts[-1] != metadata.num_rows or (np.diff(starts) < 0).any():
            raise pa.ArrowInvalid(f"row groups of {starts[-1]} rows, not {metadata.num_rows}")
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged_footer(source, one_line(error)) from error
    sha256 = hashlib.sha256(thrift).hexdigest()
    found = InputFile(source.path, size, metadata.num_rows, sha256, content_xxh3)
    return CaptionFile(source, found, starts), metadata, schema


def _footer_bytes(source: Source, file: Any, size: int) -> bytes:
    """Layout: PAR1, pages, thrift footer, its length (4 bytes, little endian), PAR1."""
    tail = file.read_at(min(size, 8), max(0, size - 8))
    if size < 12 or tail[-4:] != MAGIC:
        head = file.read_at(min(size, 4), 0)
        if head == MAGIC:
            raise InputError(
                f"{source} is a truncated parquet file: it starts as one, but its {size} bytes do "
                "not end with a footer. Copy or write it again."
            )
        unknown = (
            "" if source.path.lower().endswith(DATA_EXTENSIONS) else "has an unknown ending and "
        )
        raise InputError(
            f"{source} {unknown}is not a parquet file ({size} bytes, which start with {head!r}; "
            f"expected {MAGIC!r}). Convert it to parquet, give it its own ending (.csv, .tsv, "
            ".jsonl), or move it out of captions.path."
        )
    num_bytes = int.from_bytes(tail[:4], "little")
    if num_bytes > size - 12:
        raise _damaged_footer(source, f"it claims {num_bytes} bytes in a file of {size}")
    thrift: bytes = file.read_at(num_bytes, size - num_bytes - 8)
    return thrift


def _damaged_footer(source: Source, reason: str) -> InputError:
    return InputError(f"{source} has a damaged parquet footer ({reason}). Copy or write it again.")
