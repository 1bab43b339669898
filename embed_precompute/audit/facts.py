"""What a report says of the samples and bytes of a dataset: one pass over its units.

Guarantees: an unfinished dataset is counted as far as it goes; the same dataset gives the same
facts, for what is sampled follows from the units' numbers. A shard that cannot be read costs its
norms only, and is named.
Costs: every record is read, and the texts' digests in manifest.parquet; without an index every rows
part, but for its texts. Norms read at most NORM_VECTORS vectors of about NORM_ROWS stored rows, in
at most NORM_UNITS shards. Memory holds one unit's columns, and 17 bytes a sample while equal texts
are counted.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from embed_precompute.errors import VerificationError
from embed_precompute.samples import Status
from embed_precompute.steps import steps
from embed_precompute.store.index import TABLE, DatasetIndex, Manifest, read_manifest
from embed_precompute.store.manifest import MANIFEST, Totals
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import (
    StoredTensor,
    UnitRecord,
    committed_units,
    read_record,
    record_path,
)
from embed_precompute.store.rows import (
    StoredSample,
    columns_of,
    encoder_names,
    iter_batches,
    read_samples,
)
from embed_precompute.store.shards import TORCH_DTYPES, ShardReader

EXAMPLES = 5
"""Samples that are shown of each status, and of texts that come often."""
NORM_ROWS, NORM_UNITS, NORM_VECTORS = 20_000, 1_000, 8
BUCKETS = 120
"""Parts of the input rows that the norms are shown by."""

MOST_TOKENS = 1 << 24
"""A number above it is damage."""
_LABELS = pa.array([status.label for status in sorted(Status)])

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass
class Norms:
    """Norms of one tensor's sampled rows, by bucket of input rows."""

    count: Array = field(default_factory=lambda: np.zeros(BUCKETS, np.int64))
    total: Array = field(default_factory=lambda: np.zeros(BUCKETS))
    low: Array = field(default_factory=lambda: np.full(BUCKETS, np.inf))
    high: Array = field(default_factory=lambda: np.full(BUCKETS, -np.inf))

    def add(self, bucket: int, norm: float) -> None:
        self.count[bucket] += 1
        self.total[bucket] += norm
        self.low[bucket] = min(self.low[bucket], norm)
        self.high[bucket] = max(self.high[bucket], norm)


@dataclass
class Facts:
    """Sums and samples of all committed units."""

    totals: Totals = field(default_factory=Totals)
    tokens: dict[str, Counter[int]] = field(default_factory=dict)
    """Encoder -> number of tokens -> samples."""
    examples: dict[str, list[StoredSample]] = field(default_factory=dict)
    """Status -> its first samples, with their texts."""
    num_compared: int = 0
    """Samples with an embedding whose texts were compared, over all units."""
    num_repeats: int = 0
    """Those of them whose text an earlier sample has."""
    num_sharing: int = 0
    """Those of them that use the stored row of an earlier sample of their unit."""
    num_repeated: int = 0
    """Texts that more than one sample has."""
    repeated: list[tuple[int, StoredSample]] = field(default_factory=list)
    """The texts that most samples have: how many, and the first of these samples."""
    norms: dict[str, Norms] = field(default_factory=dict)
    """By tensor."""
    num_norms: int = 0
    """Stored rows that were read for the norms."""
    unread: list[str] = field(default_factory=list)
    """Why a shard's norms, or the text of an example, could not be read."""
    bytes: dict[str, int] = field(default_factory=dict)
    """What takes them, for people -> bytes."""
    environments: list[Mapping[str, str]] = field(default_factory=list)
    made_in: dict[int, int] = field(default_factory=dict)
    """Unit -> which of the environments made it."""
    elsewhere: list[tuple[int, int]] = field(default_factory=list)
    """(first row, end) of the runs of units that another environment made than made most."""


@dataclass
class _Unit:
    """The columns of one unit that the facts need."""

    status: Array
    index: Array
    tokens: dict[str, Array]
    texts: Array
    """Of each sample that is ok, the first 64 bits of its text's sha256."""


def gather(root: Path, plan: Plan) -> Facts:
    """All facts of the dataset in `root`, as far as it goes."""
    manifest: Manifest | None = None
    with contextlib.suppress(FileNotFoundError):
        manifest = read_manifest(root)
    if manifest is not None and plan.as_of(manifest.plan_id) is None:
        manifest = None  # of a plan that was replaced
    facts = Facts(
        tokens={name: Counter() for name in encoder_names(plan.tensors)},
        norms={tensor.name: Norms() for tensor in plan.tensors},
    )
    units = sorted(unit for unit in committed_units(root) if unit < plan.num_units)
    index = DatasetIndex(root) if manifest is not None else None
    sampled = set(units[:: -(-len(units) // NORM_UNITS) or 1])
    wanted: dict[str, list[tuple[int, int]]] = {status.label: [] for status in Status}
    texts: list[tuple[int, Array]] = []
    hashes = [] if index is None else _table_texts(root, plan, index, facts.unread)
    sizes: Counter[str] = Counter()
    for unit in steps(units, len(units), "reading", " units"):
        record = read_record(root, unit)
        facts.totals.add(record)
        if record.environment not in facts.environments:
            facts.environments.append(record.environment)
        facts.made_in[unit] = facts.environments.index(record.environment)
        sizes["shards"] += record.files.shard.bytes
        sizes["rows"] += record.files.rows.bytes
        sizes["records"] += record_path(root, unit).stat().st_size
        try:
            columns = _columns(root, plan, record, index, hashes)
            _check(columns, record, root)
        except VerificationError as error:
            facts.unread.append(str(error))
            continue
        for status in Status:
            places, room = wanted[status.label], EXAMPLES - len(wanted[status.label])
            if room and record.status[status.label]:
                found = np.flatnonzero(columns.status == status)[:room]
                places += [(unit, int(position)) for position in found]
        ok = np.flatnonzero(columns.status == Status.OK)
        for name, values in columns.tokens.items():
            counts = np.bincount(values[ok])
            facts.tokens[name].update({int(n): int(counts[n]) for n in np.flatnonzero(counts)})
        if len(columns.texts) == len(ok):
            texts.append((unit, columns.texts))
            facts.num_sharing += len(ok) - len(np.unique(columns.index[ok]))
        if unit in sampled:
            each = min(len(ok), -(-NORM_ROWS // len(sampled)))
            drawn = sorted(random.Random(unit).sample(ok.tolist(), each))
            _sample_norms(root, plan, record, columns, places=drawn, facts=facts)
    _find_elsewhere(plan, facts)
    _measure(root, plan, manifest, facts, sizes)
    for label, places in wanted.items():
        facts.examples[label] = [s for s in _samples(root, plan, places, facts.unread) if s]
    _compare(root, plan, texts, facts)
    return facts


def _compare(root: Path, plan: Plan, texts: Sequence[tuple[int, Array]], facts: Facts) -> None:
    """Counts equal texts over all units by `texts`: units, and the hashes of their ok samples."""
    hashes = np.concatenate([np.zeros(0, np.uint64), *(each for _, each in texts)])
    facts.num_compared = len(hashes)
    ordered = np.sort(hashes)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    del ordered
    values, counts = np.unique(again, return_counts=True)  # a text of n samples is n - 1 times here
    facts.num_repeats, facts.num_repeated = len(again), len(values)
    ends = np.cumsum([len(each) for _, each in texts])
    places, numbers = [], []
    for at in np.argsort(-counts, kind="stable")[:EXAMPLES]:
        first = int(np.argmax(hashes == values[at]))
        part = int(np.searchsorted(ends, first, side="right"))
        unit, mine = texts[part]
        places.append((unit, first - int(ends[part]) + len(mine)))
        numbers.append(int(counts[at]) + 1)
    found = _samples(root, plan, places, facts.unread, among=Status.OK)
    facts.repeated = [(n, s) for n, s in zip(numbers, found, strict=True) if s]


def _table_texts(root: Path, plan: Plan, index: DatasetIndex, unread: list[str]) -> list[Array]:
    """`_Unit.texts` of each unit of the index, by manifest.parquet; none if it cannot be read."""
    path, name = root / TABLE, "text_sha256"
    found = np.zeros(int(np.count_nonzero(index.status == Status.OK)), np.uint64)
    done = 0
    try:
        for columns in columns_of(root, plan.tensors, [name]):
            part = _text_hashes(path, columns[name])
            if done + len(part) <= len(found):
                found[done : done + len(part)] = part
            done += len(part)
    except VerificationError as error:
        unread.append(str(error))
        return []
    if done != len(found):
        unread.append(f"{path} has {done:,} samples of status ok, the index {len(found):,}")
        return []
    counts = [
        np.count_nonzero(index.status[first : first + count] == Status.OK)
        for first, count, _ in index.shards.tolist()
    ]
    return np.split(found, np.cumsum(counts))


def _text_hashes(path: Path, digests: Sequence[str | None]) -> Array:
    """The first 64 bits of each sha256. Raises VerificationError."""
    try:
        return np.frombuffer(b"".join(bytes.fromhex(each[:16]) for each in digests if each), ">u8")
    except ValueError:
        raise VerificationError(f"{path} is damaged: a text_sha256 is none.") from None


def _columns(
    root: Path,
    plan: Plan,
    record: UnitRecord,
    index: DatasetIndex | None,
    hashes: Sequence[Array],
) -> _Unit:
    """By the index, and `_table_texts`; by the rows part if the unit is not in it."""
    encoders = encoder_names(plan.tensors)
    if index is not None and record.unit < index.num_units:
        first, count, _ = (int(each) for each in index.shards[record.unit])
        part = slice(first, first + count)
        tokens = {name: index.tokens[name][part] for name in encoders}
        texts = hashes[record.unit] if hashes else np.zeros(0, np.uint64)
        return _Unit(index.status[part], index.index[part], tokens, texts)
    statuses, places, hashed = [], [], [np.zeros(0, np.uint64)]
    counts: dict[str, list[Array]] = {name: [] for name in encoders}
    path = record.rows_path(root)
    for batch in iter_batches(path, plan.tensors, text=False, num_rows=record.num_samples):
        numbers = pc.index_in(batch.column("status"), _LABELS).fill_null(-1)
        statuses.append(numbers.to_numpy(zero_copy_only=False))
        places.append(batch.column("index").fill_null(-1).to_numpy(zero_copy_only=False))
        ok = pc.equal(batch.column("status"), Status.OK.label)
        hashed.append(_text_hashes(path, batch.column("text_sha256").filter(ok).to_pylist()))
        for name, pieces in counts.items():
            column = batch.column(f"{name}_tokens").fill_null(0)
            pieces.append(column.to_numpy(zero_copy_only=False))
    nothing = np.zeros(0, np.int64)
    tokens = {name: np.concatenate([nothing, *pieces]) for name, pieces in counts.items()}
    return _Unit(
        np.concatenate([nothing, *statuses]),
        np.concatenate([nothing, *places]),
        tokens,
        np.concatenate(hashed),
    )


def _check(columns: _Unit, record: UnitRecord, root: Path) -> None:
    """Raises VerificationError unless the columns can be those of the unit: the index is not read
    against its digest here."""
    limits = [(columns.status, len(Status)), (columns.index, record.num_stored)]
    limits += [(tokens, MOST_TOKENS) for tokens in columns.tokens.values()]
    for values, most in limits:
        # A sample without an embedding has stored row -1.
        least = -(columns.status != Status.OK).astype(np.int8) if values is columns.index else 0
        inside = (values >= least) & (values < most)
        if len(values) != record.num_samples or not inside.all():
            raise VerificationError(
                f"{root}: the samples of unit {record.unit} are not those of its record. "
                f"`embed-precompute verify {root}` says which file is damaged."
            )


def _sample_norms(
    root: Path,
    plan: Plan,
    record: UnitRecord,
    columns: _Unit,
    *,
    places: Sequence[int],
    facts: Facts,
) -> None:
    """Adds the norms of the samples at these places of a unit."""
    try:
        path = record.shard_path(root)
        shard = ShardReader(path, plan.fingerprint, record.unit, plan.tensors)
        for position in places:
            row = record.first_row + position * record.num_rows // record.num_samples
            bucket = row * BUCKETS // plan.num_rows
            for tensor in plan.tensors:
                tokens = int(columns.tokens[tensor.encoder][position])
                norm = _norm(tensor, shard.row(tensor.name, int(columns.index[position])), tokens)
                if norm is None:
                    continue
                if not math.isfinite(norm):
                    raise VerificationError(
                        f"{path} is damaged: a row of text_{tensor.name} holds inf or nan."
                    )
                facts.norms[tensor.name].add(bucket, norm)
            facts.num_norms += 1
    except VerificationError as error:
        facts.unread.append(str(error))


def _norm(tensor: StoredTensor, values: torch.Tensor, tokens: int) -> float | None:
    """L2 norm of a vector, or the mean over some vectors of the caption's own tokens; None if there
    is none."""
    if not tensor.per_caption:
        own = min(len(values), tokens + tensor.template_stored)
        if not own:
            return None
        begin = len(values) - own if tensor.padding_side == "left" else 0
        places = torch.linspace(begin, begin + own - 1, min(own, NORM_VECTORS)).round().long()
        values = values[places]
    return float(torch.linalg.vector_norm(values.double(), dim=-1).mean())


def _find_elsewhere(plan: Plan, facts: Facts) -> None:
    if len(facts.environments) < 2:
        return
    most = Counter(facts.made_in.values()).most_common(1)[0][0]
    for unit, environment in facts.made_in.items():
        if environment != most:
            first, count = plan.unit_rows(unit)
            begin = first
            if facts.elsewhere and facts.elsewhere[-1][1] == first:
                begin = facts.elsewhere.pop()[0]
            facts.elsewhere.append((begin, first + count))


def _measure(
    root: Path,
    plan: Plan,
    manifest: Manifest | None,
    facts: Facts,
    made: Mapping[str, int],
) -> None:
    """Bytes by what takes them. `made`: those of the units' shards, rows parts and records."""
    rest = made["shards"]
    for tensor in plan.tensors:
        size = facts.totals.vectors[tensor.name] * tensor.width
        size *= TORCH_DTYPES[tensor.dtype].itemsize
        facts.bytes[f"text_{tensor.name}"] = size
        rest -= size
    facts.bytes["offsets, checksums and headers of shards"] = rest
    facts.bytes["rows parts (ids, statuses, encoded texts)"] = made["rows"]
    facts.bytes["records"] = made["records"]
    if manifest is None:
        return
    sizes = {name: entry.bytes for name, entry in manifest.files.items()}
    with contextlib.suppress(OSError):
        sizes[MANIFEST] = (root / MANIFEST).stat().st_size
    facts.bytes[TABLE] = sizes.pop(TABLE)
    facts.bytes["index"] = sum(n for name, n in sizes.items() if name.startswith("index/"))
    others = sum(n for name, n in sizes.items() if not name.startswith("index/"))
    facts.bytes["plan, null embedding, manifest.json"] = others


def _samples(
    root: Path,
    plan: Plan,
    places: Sequence[tuple[int, int]],
    unread: list[str],
    among: Status | None = None,
) -> list[StoredSample | None]:
    """The sample at each (unit, position in it); None where its rows part cannot be read. `among`:
    positions count samples of this status."""
    found: dict[tuple[int, int], StoredSample] = {}
    for unit in sorted({unit for unit, _ in places}):
        record = read_record(root, unit)
        mine = {position for at, position in places if at == unit}
        try:
            samples = read_samples(record.rows_path(root), plan.tensors, record.num_samples)
            chosen = (each for each in samples if among in (None, each.status))
            for position, sample in enumerate(chosen):
                if position in mine:
                    found[unit, position] = sample
                if position >= max(mine):
                    break
        except VerificationError as error:
            unread.append(str(error))
    return [found.get(place) for place in places]
