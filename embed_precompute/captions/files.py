"""Which parquet files a path names, and what their footers say.

Guarantees: the same files in the same (bytewise) order wherever the folder is mounted; a file that
is missing, truncated, not parquet or changed since it was planned is an error that names it.
Costs: one directory walk, then each file is read once for its digest, in a thread pool; opening it
again reads its footer only. No page of a column is decoded here.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import xxhash

from embed_precompute.errors import ConflictError, InputError

DATA_EXTENSIONS = (".parquet", ".pq", ".parq")
FOOTER_THREADS = 16
TAIL_BYTES = 64 * 1024
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
    """sha256 of the footer's thrift bytes: a cheap check each time the file is opened."""
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


@dataclass(frozen=True)
class Footer:
    """A parsed footer; `metadata` is large for wide files, so keep it no longer than needed."""

    source: Source
    input: InputFile
    thrift: bytes
    metadata: Any
    schema: Any


def find_files(path: str) -> list[Source]:
    """Parquet files named by `path` (file, folder, glob or URI), sorted bytewise by path."""
    scheme, _, rest = path.partition("://")
    if not rest:
        sources = _local_files(path, os.path.abspath(os.path.expanduser(path)))
    elif scheme == "file":
        host, slash, local = rest.partition("/")
        if host not in ("", "localhost") or not slash:
            raise InputError(f"captions.path {path!r}: expected file:///absolute/path.")
        sources = _local_files(path, os.path.abspath(urllib.parse.unquote(slash + local)))
    else:
        sources = _remote_files(path)
    try:
        return sorted(sources, key=lambda source: source.path.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise InputError(
            f"captions.path {path!r} holds a file whose name is not UTF-8: {error.object!r}. "
            "Rename it."
        ) from None


def _is_hidden(path: str) -> bool:
    """Spark, Hive and pyarrow all mark what is not data by a leading `.` or `_`."""
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _is_data(path: str) -> bool:
    return not _is_hidden(path) and path.lower().endswith(DATA_EXTENSIONS)


def _none_found(path: str, num_others: int) -> InputError:
    return InputError(
        f"captions.path {path!r} holds no parquet file ({num_others} other files were ignored): "
        f"expected names that end in {', '.join(DATA_EXTENSIONS)} and do not start with '.' or "
        "'_'. Point captions.path at the folder that has them."
    )


def _local_files(path: str, absolute: str) -> list[Source]:
    # The path wins over the pattern: a file may be called "take[1].parquet".
    if os.path.isfile(absolute):
        return [_local(absolute, os.path.basename(absolute))]
    if os.path.isdir(absolute):
        names = list(_walk(path, absolute))
        found = [_local(os.path.join(absolute, name), name) for name in names if _is_data(name)]
        if not found:
            raise _none_found(path, len(names))
        return found
    if not glob.has_magic(absolute):
        raise InputError(
            f"captions.path {path!r} does not exist (looked for {absolute}): expected a parquet "
            "file, a folder of them, a glob or a URI. Check the path and that this machine "
            "mounts it."
        )
    return _local_glob(path, absolute)


@functools.cache
def _local_filesystem() -> Any:
    return pyarrow.fs.LocalFileSystem()


def _local(location: str, name: str) -> Source:
    # pyarrow leaves a dangling link out of a listing; a caption file must never vanish silently.
    if os.path.islink(location) and not os.path.exists(location):
        raise InputError(
            f"{location} is a link to {os.readlink(location)}, which does not exist. Restore the "
            "file or remove the link."
        )
    return Source(_local_filesystem(), location, name.replace(os.sep, "/"))


def _walk(path: str, root: str) -> Iterator[str]:
    """Files under `root`, relative to it; linked folders are followed, each real folder once."""

    def refuse(error: OSError) -> None:
        raise InputError(f"captions.path {path!r}: cannot list a folder: {error}.")

    top = os.path.realpath(root)
    seen: set[str] = set()

    def follow(folder: str) -> bool:
        if not os.path.islink(folder):
            return True
        target = os.path.realpath(folder)  # inside the tree or above it: a loop or a second copy
        return target not in seen and os.path.commonpath([top, target]) not in (top, target)

    for folder, folders, names in os.walk(root, followlinks=True, onerror=refuse):
        seen.add(os.path.realpath(folder))
        folders[:] = [name for name in sorted(folders) if follow(os.path.join(folder, name))]
        for name in names:
            yield os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")


def _local_glob(path: str, pattern: str) -> list[Source]:
    parts = pattern.split(os.sep)
    num_plain = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root = os.sep.join(parts[:num_plain]) or os.sep
    wanted = _glob_filter("/".join(parts[num_plain:]))
    found: dict[str, Source] = {}
    num_others = 0
    for match in glob.iglob(pattern, recursive=True):
        name = os.path.relpath(match, root).replace(os.sep, "/")
        if os.path.isdir(match):
            below = [f"{name}/{inner}" for inner in _walk(path, match)]
            chosen = [inner for inner in below if _is_data(inner)]
            num_others += len(below) - len(chosen)
        else:
            chosen = [name] if wanted(name) else []
            num_others += not chosen
        for inner in chosen:
            if inner not in found:
                found[inner] = _local(os.path.join(root, inner), inner)
    if not found:
        raise _none_found(path, num_others)
    return list(found.values())


def _glob_filter(pattern: str) -> Callable[[str], bool]:
    """What a glob may match: data files, and whatever its own text asks for by name."""
    asks_hidden = any(part.startswith((".", "_")) for part in pattern.split("/"))
    asks_extension = re.search(r"\.\w+$", pattern) is not None
    return lambda name: (
        (asks_hidden or not _is_hidden(name))
        and (asks_extension or name.lower().endswith(DATA_EXTENSIONS))
    )


def _remote_files(path: str) -> list[Source]:
    uri, question, query = path.partition("?")  # in a URI `?` starts the options, never a glob
    parts = uri.split("/")
    num_plain = next((i for i, part in enumerate(parts) if re.search(r"[*\[]", part)), len(parts))
    pattern = "/".join(parts[num_plain:])
    selector = pyarrow.fs.FileSelector
    try:
        filesystem, base = pyarrow.fs.FileSystem.from_uri(
            "/".join(parts[:num_plain]) + question + query
        )
        top = filesystem.get_file_info(base)
        if top.type == pyarrow.fs.FileType.File and not pattern:
            return [Source(filesystem, base, base.rsplit("/", 1)[-1])]
        if top.type != pyarrow.fs.FileType.Directory:
            raise InputError(f"captions.path {path!r} does not exist. Check it and its region.")
        entries = filesystem.get_file_info(selector(base, recursive=True))
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise InputError(
            f"captions.path {path!r} cannot be listed: {one_line(error)}. Expected a URI that "
            "pyarrow.fs reads, such as s3://bucket/folder; check the credentials and the name."
        ) from error
    files = [entry.path for entry in entries if entry.type == pyarrow.fs.FileType.File]
    names = [(location, location[len(base) :].lstrip("/")) for location in files]
    wanted = _remote_filter(pattern) if pattern else _is_data
    found = [Source(filesystem, location, name) for location, name in names if wanted(name)]
    if not found:
        raise _none_found(path, len(names))
    return found


def _remote_filter(pattern: str) -> Callable[[str], bool]:
    tokens = re.findall(r"\*\*/|\*\*|\*|\[[^\]]+\]|[^*\[]+|\[", pattern)
    known = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*"}
    expression = "".join(
        known.get(token)
        or (token.replace("[!", "[^") if len(token) > 1 and token[0] == "[" else re.escape(token))
        for token in tokens
    )
    whole, folder = re.compile(expression), re.compile(f"(?:{expression})/.*")
    wanted = _glob_filter(pattern)
    return lambda name: (
        (whole.fullmatch(name) is not None and wanted(name))
        or (folder.fullmatch(name) is not None and _is_data(name))
    )


def read_footer(source: Source, content_xxh3: str | None = None) -> Footer:
    """A file's size, digests and footer; InputError when it is no whole parquet file.

    The whole file is read for its digest, unless `content_xxh3` is given.
    """
    try:
        with source.filesystem.open_input_file(source.location) as file:
            size = file.size()
            thrift = _footer_bytes(source, file, size)
            content = _content_xxh3(file, size) if content_xxh3 is None else content_xxh3
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{source} cannot be read: {one_line(error)}.") from error
    metadata, schema = _parse(source, thrift)
    digest = hashlib.sha256(thrift).hexdigest()
    found = InputFile(source.path, size, metadata.num_rows, digest, content)
    return Footer(source, found, thrift, metadata, schema)


def _content_xxh3(file: Any, size: int) -> str:
    digest = xxhash.xxh3_128()
    for offset in range(0, size, CONTENT_PIECE):
        digest.update(file.read_at(min(CONTENT_PIECE, size - offset), offset))
    return digest.hexdigest()


def _parse(source: Source, thrift: bytes) -> tuple[Any, Any]:
    """(metadata, Arrow schema), from a parquet "file" in memory that is all footer."""
    whole = MAGIC + thrift + len(thrift).to_bytes(4, "little") + MAGIC
    try:
        parsed = pq.ParquetFile(pa.BufferReader(whole))
        return parsed.metadata, parsed.schema_arrow
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{source} has a damaged parquet footer ({one_line(error)}). Copy or write it again."
        ) from error


def _footer_bytes(source: Source, file: Any, size: int) -> bytes:
    """Layout: PAR1, pages, thrift footer, its length (4 bytes, little endian), PAR1."""
    tail: bytes = file.read_at(min(size, TAIL_BYTES), max(0, size - TAIL_BYTES))
    if size < 12 or tail[-4:] != MAGIC:
        raise InputError(f"{source} {_not_parquet(tail, file.read_at(min(size, 4), 0), size)}")
    num_bytes = int.from_bytes(tail[-8:-4], "little")
    if num_bytes > size - 12:
        raise InputError(
            f"{source} has a damaged parquet footer: it claims {num_bytes} bytes in a file of "
            f"{size}. Copy or write it again."
        )
    if num_bytes + 8 > len(tail):
        tail = file.read_at(num_bytes + 8, size - num_bytes - 8)
    return tail[-8 - num_bytes : -8]


def _not_parquet(tail: bytes, head: bytes, size: int) -> str:
    if tail[-4:] == b"PARE":
        return "is an encrypted parquet file, which is not supported. Decrypt it first."
    if head == MAGIC:
        return (
            f"is a truncated parquet file: it starts as one, but its {size} bytes do not end with "
            "a footer. Copy or write it again."
        )
    return (
        f"is not a parquet file ({size} bytes, which start with {head!r}; expected {MAGIC!r}). "
        "Convert it to parquet, or take it out of captions.path."
    )


def read_footers(sources: Sequence[Source], examine: Callable[[Footer], T]) -> list[T]:
    """`examine(footer)` of every file, in order; of several bad files the first one is raised."""

    def one(source: Source) -> T:
        try:
            return examine(read_footer(source))
        except UnicodeDecodeError as error:
            raise InputError(
                f"{source} has a column whose name is not UTF-8 ({error.object!r}): its footer is "
                "damaged. Copy or write it again."
            ) from error

    pool = ThreadPoolExecutor(min(FOOTER_THREADS, len(sources)), "footer")
    try:
        return list(pool.map(one, sources))
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class OpenParquet:
    """An open file: its `ParquetFile`, its bytes by place, and its footer's thrift bytes."""

    parquet: Any
    read_at: Callable[[int, int], bytes]
    """(offset, size) -> the bytes there, fewer at the end of the file."""
    thrift: bytes


def open_parquet(source: Source, expected: InputFile) -> OpenParquet:
    """The file as a `ParquetFile` that streams pages; ConflictError if it changed.

    Text comes as plain `string` (or `list<string>`), whatever Arrow type it was written from.
    """
    footer = read_footer(source, expected.content_xxh3)
    if footer.input != expected:
        raise ConflictError(
            f"{source} changed since it was planned: {footer.input.bytes} bytes and "
            f"{footer.input.rows} rows now, {expected.bytes} and {expected.rows} then. Put the "
            "old file back, or start a new output folder."
        )
    # Restoring the writer's Arrow types would make dictionaries again, and Arrow refuses a whole
    # batch of those for one value that is not UTF-8; under another name it does not find them.
    metadata, _ = _parse(source, footer.thrift.replace(ARROW_SCHEMA, ARROW_SCHEMA.lower()))
    # Without pre_buffer and with a buffer the reader holds a window of each column chunk, not the
    # chunk: memory does not depend on the size of row groups.
    try:
        file = source.filesystem.open_input_file(source.location)
        parquet = pq.ParquetFile(
            file,
            metadata=metadata,
            pre_buffer=False,
            buffer_size=1 << 20,
            page_checksum_verification=True,
        )
        return OpenParquet(
            parquet, lambda offset, size: bytes(file.read_at(size, offset)), footer.thrift
        )
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{source} cannot be opened: {one_line(error)}.") from error


def one_line(error: BaseException) -> str:
    """The error's text on one line, as every message of this program is."""
    return " ".join(str(error).split()).rstrip(".")
