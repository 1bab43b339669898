"""The process that F15 hurts: mutates one file of a sound dataset, reads it, reports, again.

Imports as little as a reader does, so that its memory is a reader's.
"""

from __future__ import annotations

import gc
import json
import os
import random
import re
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from handmade import restate, restate_derived, rewrite_json, write_dataset

from embed_precompute.audit.info import dataset_lines, read_status
from embed_precompute.audit.sample import sample_lines
from embed_precompute.audit.verify import verify
from embed_precompute.captions.recipes import CaptionsConfig, OpenSoraRecipe
from embed_precompute.captions.table import CaptionTable
from embed_precompute.errors import EmbedPrecomputeError, InternalError
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import NULL_UNIT, document_bytes
from embed_precompute.train.dataset import EmbeddingDataset

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
MAX_MIB = 512


def attack(folder: str, seed: int, count: int, report: str) -> None:
    """`count` mutations from `seed`; a line of JSON [what was done, problems] for each."""
    rng, base = random.Random(seed), Path(folder)
    (base / "outside").mkdir()
    (base / "outside" / "secret").write_text("secret")
    whole, root, captions = base / "whole", base / "root", base / "captions.parquet"
    write_dataset(whole, TEXTS)
    numbers = {"fps": [24 if i % 7 else None for i in range(200)]}
    texts = {"id": [f"s{i}" for i in range(200)], "text": [f"caption {i}" for i in range(200)]}
    pq.write_table(pa.table({**texts, **numbers}), base / "sound.parquet", compression="zstd")
    seen = _watch(base)
    gc.freeze()  # a collection in a child would copy every page of these modules
    with open(report, "a", buffering=1) as sink:
        for _ in range(count):
            shutil.copytree(whole, root)
            shutil.copy(base / "sound.parquet", captions)
            mutation, trial = rng.choice(MUTATIONS), rng.getrandbits(64)

            # Two children: what the mutation needed is not memory of who reads its result.
            def mutate(mutation: Any = mutation, trial: int = trial) -> None:
                (base / "what").write_text(mutation(root, captions, random.Random(trial)))

            def read() -> None:
                of_captions = (base / "what").read_text().startswith("captions")
                actions = (_read_captions,) if of_captions else READERS
                found = [_guarded(lambda act=act: act(root, captions)) for act in actions]
                (base / "problems").write_text(json.dumps([f for f in found if f] + seen))

            _forked(mutate)
            what = (base / "what").read_text()
            (base / "problems").write_text("[]")
            status, peak_kib = _forked(read)
            problems = json.loads((base / "problems").read_text())
            # A damaged caption table is the job's own data: it may cost the process that reads it.
            if not what.startswith("captions"):
                problems += [f"died with status {status}"] if status else []
                problems += [f"{peak_kib >> 10} MiB resident"] if peak_kib >> 10 > MAX_MIB else []
            sink.write(json.dumps([what, problems]) + "\n")
            shutil.rmtree(root)
    os._exit(0)


def _forked(function: Callable[[], None]) -> tuple[int, int]:
    """(status, peak of resident KiB) of a child that runs `function`."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(99)
    _, status, usage = os.wait4(pid, 0)
    return status, usage.ru_maxrss


def _watch(base: Path) -> list[str]:
    """The audit events that must not happen, from now on."""
    seen: list[str] = []
    outside = (str(base / "outside"), "/etc/passwd")

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in FORBIDDEN:
            seen.append(event)
        elif event == "open" and args and isinstance(args[0], str):
            path = os.path.normpath(args[0])
            if path.startswith(outside):
                seen.append(f"opened {path}")

    sys.addaudithook(hook)
    return seen


def _guarded(action: Callable[[], object]) -> str | None:
    """What is wrong with how `action` ended: an error of ours is right."""
    try:
        action()
    except InternalError as error:
        return f"InternalError: {error}"
    except EmbedPrecomputeError:
        return None
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        where = [f"{Path(f.filename).name}:{f.lineno}" for f in frames if "embed_pre" in f.filename]
        return f"{type(error).__name__} {str(error)[:80]!r} at {' '.join(where[-2:])}"
    return None


def _read(root: Path, captions: Path) -> None:
    dataset = EmbeddingDataset(root)
    for i in range(len(dataset)):
        dataset[i]
    dataset.null  # noqa: B018  reading it is the point
    dataset.index_of("s1")


def _read_captions(root: Path, captions: Path) -> None:
    recipe = OpenSoraRecipe()  # asks whether the integer fps column holds a null
    table = CaptionTable.open(CaptionsConfig(path=str(captions), recipe=recipe), [])
    scan = table.scan(None)
    reader = table.reader(scan.num_rows, scan.last_row_samples)
    reader.read(0, min(scan.num_rows, 1000))


READERS = (
    lambda root, captions: verify(root, "full"),
    lambda root, captions: read_status(root).lines(),
    lambda root, captions: list(dataset_lines(root)),
    lambda root, captions: list(sample_lines(root, "s1")),
    _read,
    lambda root, captions: finalize(root),
)


# --- mutations: each changes one file, and says what it did ---------------------------------------


def _files(root: Path, *suffixes: str) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and p.name.endswith(suffixes))


def _damaged(original: bytes, rng: random.Random) -> tuple[str, bytes]:
    """(how, bytes): flipped, cut, doubled, filled, or with bytes put in."""
    payload = bytearray(original)
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
    return way, payload


def _bytes(root: Path, captions: Path, rng: random.Random) -> str:
    """Any file of the dataset, damaged."""
    path = rng.choice(_files(root, ""))
    way, damaged = _damaged(path.read_bytes(), rng)
    path.write_bytes(damaged)
    return f"bytes: {way} {path.name}"


def _json(root: Path, captions: Path, rng: random.Random) -> str:
    """A value of a JSON file replaced, and its digest made right."""
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
    """The record or manifest that names a file has its new size, digest and content name."""
    data = re.fullmatch(r"(null|shard-([0-9]+))-\w{16}\.(safetensors|rows\.parquet)", path.name)
    if data is None:
        restate_derived(root, str(path.relative_to(root)))
        return
    unit = NULL_UNIT if data[2] is None else int(data[2])
    new = restate(root, unit, "shard" if data[3] == "safetensors" else "rows", path)
    if new != path:
        path.unlink()
    if unit == NULL_UNIT:
        rewrite_json(root / "manifest.json", lambda manifest: manifest["files"].pop(path.name))
        restate_derived(root, new.name)
    elif data[3] == "safetensors":
        digests = np.load(root / "index/shard_digest.npy")
        digests[unit] = int(new.name.split("-")[2][:16], 16)
        np.save(root / "index/shard_digest.npy", digests)
        restate_derived(root, "index/shard_digest.npy")


def _captions(root: Path, captions: Path, rng: random.Random) -> str:
    """The job's own input, damaged anywhere or in its footer."""
    payload = captions.read_bytes()
    footer = len(payload) - 8 - int.from_bytes(payload[-8:-4], "little")
    first = rng.choice((0, footer))
    way, damaged = _damaged(payload[first:], rng)
    captions.write_bytes(payload[:first] + damaged)
    return f"captions: {way} from byte {first}"


MUTATIONS = (_bytes, _bytes, _json, _json, _header, _index, _rows, _captions)
