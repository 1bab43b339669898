"""The process that F15 hurts: mutates one file of a sound dataset, reads it, reports, again.

Imports as little as a reader does, so that its memory is a reader's.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from faults.hostile_captions import captions_footer, captions_other, write_captions

TEXTS = ["one", "two words", None, "three more words", "one", "last of all"]
BAD_NAMES = (
    "../outside/secret", "/etc/passwd", "..", ".", "", "a/../../outside/secret", "a\0b", "con",
    "shard-000000.safetensors/../../../outside/secret", "\\..\\outside", "x" * 5000, "～/secret",
)  # fmt: skip
BAD_VALUES: tuple[Any, ...] = (
    -1, 0, 2**31, 2**62, 2**63, 2**64, 10**400, 1.5, None, True, "", "x" * 100_000, [], {},
    [[[[]]]], *BAD_NAMES,
)  # fmt: skip
FORBIDDEN = ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn")


def attack(folder: str, seed: int, count: int, report: str) -> None:
    """`count` mutations from `seed`; a line of JSON in `report` for each."""
    from handmade import write_dataset

    # What each child would import anew: it is a reader's memory all the same.

    rng = random.Random(seed)
    base = Path(folder)
    (base / "outside").mkdir()
    (base / "outside" / "secret").write_text("secret")
    whole = base / "whole"
    write_dataset(whole, TEXTS)
    write_captions(base / "sound.parquet", rng)
    shutil.copy(base / "sound.parquet", base / "captions.parquet")
    watch = _Watch(base)
    sys.addaudithook(watch.hook)
    gc.freeze()  # a collection in a child would copy every page of these modules
    with open(report, "a", buffering=1) as sink:
        for _ in range(count):
            root, trial = base / "root", rng.getrandbits(64)
            shutil.copytree(whole, root)
            # Two children: what the mutation needed is not memory of who reads its result.
            _fork(_mutate, root, base, trial)
            what = (base / "what").read_text()
            captions = base / "captions.parquet"
            if status := _fork(_record, sink, what, root, captions, watch):
                died = {"what": what, "problems": [f"died with status {status}"]}
                sink.write(json.dumps({**died, "seconds": 0.0, "peak_mib": 0}) + "\n")
            shutil.rmtree(root)
            if what.startswith("captions"):
                shutil.copy(base / "sound.parquet", captions)
    os._exit(0)


def _fork(function: Callable[..., None], *arguments: Any) -> int:
    """The status of a child that runs `function`."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    return os.waitpid(pid, 0)[1]


def _mutate(root: Path, base: Path, seed: int) -> None:
    rng = random.Random(seed)
    what = rng.choice(MUTATIONS)(root, base / "captions.parquet", rng)
    (base / "what").write_text(what)


def _record(sink: Any, what: str, root: Path, captions: Path, watch: _Watch) -> None:
    sink.write(json.dumps(_trial(what, root, captions, watch)) + "\n")


class HostileError(Exception):
    """What an inner action said."""


class _Watch:
    """Audit events that must not happen."""

    def __init__(self, base: Path) -> None:
        self._outside = (str(base / "outside"), "/etc/passwd")
        self.seen: list[str] = []

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            self.seen.append(event)
        elif event == "open" and args and isinstance(args[0], str):
            path = os.path.normpath(args[0])
            if path.startswith(self._outside):
                self.seen.append(f"opened {path}")


def _trial(what: str, root: Path, captions: Path, watch: _Watch) -> dict[str, Any]:
    problems: list[str] = []
    watch.seen.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of resident memory starts anew
    slowest = 0.0
    actions = (_read_captions,) if what.startswith("captions") else (_verify, _read, _finalize)
    for action in actions:
        began = time.process_time()  # not what other processes take of a busy machine
        problem = _guarded(lambda action=action: action(root, captions))
        slowest = max(slowest, time.process_time() - began)
        problems += [f"{action.__name__}: {problem}"] if problem else []
    problems += watch.seen
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) >> 10
    return {"what": what, "problems": problems, "seconds": slowest, "peak_mib": peak}


def _guarded(action: Callable[[], None]) -> str | None:
    from embed_precompute.errors import EmbedPrecomputeError, InternalError

    try:
        action()
    except InternalError as error:
        return f"InternalError: {error}"
    except EmbedPrecomputeError:
        return None
    except HostileError as error:
        return str(error)
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "embed_pre" in f.filename]
        return f"{type(error).__name__} {str(error)[:80]!r} at {' '.join(where[-2:])}"
    return None


def _verify(root: Path, captions: Path) -> None:
    from embed_precompute.audit.verify import verify

    for level in ("quick", "full"):
        verify(root, level)  # type: ignore[arg-type]


def _read(root: Path, captions: Path) -> None:
    from embed_precompute.audit.info import dataset_lines, read_status, sample_lines
    from embed_precompute.train.dataset import EmbeddingDataset

    problems = [_guarded(lambda: read_status(root).lines() and None)]
    problems += [_guarded(lambda: list(dataset_lines(root)) and None)]
    problems += [_guarded(lambda: list(sample_lines(root, "s1")) and None)]
    found = [problem for problem in problems if problem]
    if found:
        raise HostileError(found[0])
    dataset = EmbeddingDataset(root)
    for i in range(len(dataset)):
        dataset[i]
    dataset.null  # noqa: B018  reading it is the point
    dataset.index_of("s1")


def _finalize(root: Path, captions: Path) -> None:
    from embed_precompute.store.manifest import finalize

    finalize(root)


def _read_captions(root: Path, captions: Path) -> None:
    from embed_precompute.captions.recipes import CaptionsConfig, OpenSoraRecipe
    from embed_precompute.captions.table import CaptionTable

    recipe = OpenSoraRecipe()  # asks whether the integer fps column holds a null
    table = CaptionTable.open(CaptionsConfig(path=str(captions), recipe=recipe), [])
    scan = table.scan(None)
    reader = table.reader(scan.num_rows, scan.last_row_samples)
    for first in range(0, min(scan.num_rows, 1000), 100):
        reader.read(first, min(100, scan.num_rows - first))
    if scan.num_rows > 1000:
        reader.read(scan.num_rows - 100, 100)


def _files(root: Path, *suffixes: str) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name.endswith(suffixes))


def _bytes(root: Path, captions: Path, rng: random.Random) -> str:
    """Any file: flipped, cut, doubled, filled, or with bytes put in."""
    path = rng.choice([*_files(root, ""), captions])
    payload = bytearray(path.read_bytes())
    way = rng.choice(("flip", "cut", "insert", "fill", "double"))
    at = rng.randrange(len(payload))
    if way == "flip":
        for _ in range(rng.choice((1, 4, 64))):
            payload[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del payload[at:]
    elif way == "insert":
        payload[at:at] = rng.randbytes(rng.choice((1, 8, 1000)))
    elif way == "fill":
        payload[at : at + 64] = rng.choice((b"\0", b"\xff")) * len(payload[at : at + 64])
    else:
        payload *= 2
    path.write_bytes(payload)
    kind = "captions" if path == captions else "bytes"
    return f"{kind}: {way} {path.name}"


def _json(root: Path, captions: Path, rng: random.Random) -> str:
    """A value of a JSON file replaced, and its digest made right."""
    from embed_precompute.store.records import document_bytes

    path = rng.choice(_files(root, ".json"))
    content = json.loads(path.read_bytes())
    owner: Any = content
    trail = []
    while True:
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        key = rng.choice(keys)
        trail.append(str(key))
        inner = owner[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.8:
            owner = inner
            continue
        way = rng.random()
        if way < 0.15:
            del owner[key]
        elif way < 0.3 and isinstance(owner, dict):
            owner[rng.choice(BAD_NAMES)] = owner.pop(key)
        else:
            owner[key] = rng.choice(BAD_VALUES)
        break
    try:
        path.write_bytes(document_bytes(content))
    except (ValueError, RecursionError):
        path.write_text(json.dumps(content))
    return f"json: {path.name} {'.'.join(trail)[:60]}"


def _header(root: Path, captions: Path, rng: random.Random) -> str:
    """A safetensors header with a hostile length, or hostile JSON of the right length."""
    path = rng.choice(_files(root, ".safetensors"))
    payload = path.read_bytes()
    size = int.from_bytes(payload[:8], "little")
    body = payload[8 + size :]
    if rng.random() < 0.3:
        length = rng.choice((0, 1, len(payload), 2**31, 2**63, 2**64 - 1, 100_000_001))
        path.write_bytes(length.to_bytes(8, "little") + payload[8:])
        return f"safetensors: length {length}"
    header = json.loads(payload[8 : 8 + size])
    key = rng.choice(list(header))
    entry = header[key]
    if rng.random() < 0.5 and "shape" in entry:
        field = rng.choice(list(entry))
        entry[field] = rng.choice(([2**40], [-1], [2**62, 4], [], "F64", [0, 2**60], None))
    else:
        header[rng.choice((key, *BAD_NAMES))] = rng.choice(BAD_VALUES)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = b"[" * 200_000
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    _restate(root, path)
    return f"safetensors: header {key[:40]}"


def _index(root: Path, captions: Path, rng: random.Random) -> str:
    """An index file with a hostile header, or a wrong but valid array, stated in the manifest."""
    path = rng.choice(_files(root, ".npy"))
    payload = path.read_bytes()
    way = rng.choice(("object", "shape", "values", "version"))
    if way == "object":
        head = b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"
        head += b" " * (117 - len(head)) + b"\n"
        payload = payload[:10] + head + b"cos\nsystem\n(S'touch outside'\ntR."
    elif way == "shape":
        number = rng.choice((b"(2305843009213693952,)", b"(-1,)", b"(99999999999, 3)", b"()"))
        head = payload[10:128]
        begin = head.index(b"(")
        head = head[:begin] + number + head[head.index(b")") + 1 :]
        payload = payload[:10] + head[:117].ljust(117) + b"\n" + payload[128:]
    elif way == "values":
        values = bytearray(payload[128:])
        for _ in range(8):
            if values:
                values[rng.randrange(len(values))] = rng.randrange(256)
        payload = payload[:128] + bytes(values)
    else:
        payload = payload[:6] + bytes([rng.randrange(256)]) + payload[7:]
    path.write_bytes(payload)
    _restate(root, path)
    return f"index: {way} {path.name}"


def _rows(root: Path, captions: Path, rng: random.Random) -> str:
    """A rows part with other columns, other values or a bomb, stated in its record."""
    path = rng.choice(_files(root, ".rows.parquet"))
    table = pq.read_table(path)
    way = rng.choice(("column", "values", "bomb", "text", "empty"))
    if way == "column":
        name = rng.choice(table.column_names)
        table = table.drop_columns([name])
    elif way == "values":
        name = rng.choice(("row", "shard", "index"))
        at = table.column_names.index(name)
        wrong = pa.array([rng.choice((-1, 2**31 - 1, 7))] * len(table), table.schema.field(at).type)
        table = table.set_column(at, table.schema.field(at), wrong)
    elif way == "bomb":
        table = pa.concat_tables([table] * rng.choice((1000, 30_000))).combine_chunks()
    elif way == "text":
        at = table.column_names.index("text")
        huge = pa.array(["x" * (16 << 20)] * len(table), pa.string())
        table = table.set_column(at, "text", huge)
    else:
        table = table.slice(0, 0)
    pq.write_table(table, path, compression="zstd", store_schema=False)
    _restate(root, path)
    return f"rows: {way}"


def _restate(root: Path, path: Path) -> None:
    """State a file's new size and sha256 in the record or manifest that has it."""
    from embed_precompute.store.records import document_bytes

    payload = path.read_bytes()
    now: dict[str, Any] = {"bytes": len(payload), "sha256": hashlib.sha256(payload).hexdigest()}
    before, name = str(path.relative_to(root)), path.name
    if data := re.fullmatch(r"(null|shard-([0-9]+))-[0-9a-f]{16}(\..*)", name):
        path = path.rename(path.with_name(f"{data[1]}-{now['sha256'][:16]}{data[3]}"))
        if data[2] and data[3] == ".safetensors":
            digests = np.load(root / "index/shard_digest.npy")
            digests[int(data[2])] = int(now["sha256"][:16], 16)
            np.save(root / "index/shard_digest.npy", digests)
            _restate(root, root / "index/shard_digest.npy")
    for owner in _files(root, ".json"):
        content = json.loads(owner.read_bytes())
        entries = content.get("files", {})
        if before in entries:
            del entries[before]
            entries[str(path.relative_to(root))] = now
        for entry in entries.values():
            if entry.get("name") == name:
                entry.update({**now, "name": path.name})
        owner.write_bytes(document_bytes(content))


MUTATIONS = (
    _bytes, _bytes, _json, _json, _header, _index, _rows, captions_other,
    captions_footer,
)  # fmt: skip
