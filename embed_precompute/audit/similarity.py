"""Cosine similarity of captions: of prompts through an embedder, and of a dataset's samples.

Guarantees: a T5 caption is the mean of its real tokens' vectors, in float32, so stored pads do not
count; a CLIP caption is its one vector. Samples with one caption are one neighbour, counted.
Costs: `nearest_captions` reads a whole dataset once, of each T5 caption the real tokens only;
memory holds one unit's rows and means, never its tokens. Nothing is written, and no row is checked
against its checksum: `verify` does that.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from embed_precompute.errors import InputError
from embed_precompute.samples import Status
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.records import StoredTensor, read_record, stored_tensors
from embed_precompute.store.rows import iter_batches
from embed_precompute.store.shards import ShardReader
from embed_precompute.train.dataset import EmbeddingDataset

PROMPTS_PER_FORWARD = 8
MAX_LINE_TEXT = 160


class Embedder(Protocol):
    """`HFEmbedder`, or anything that is called and tokenises as it does."""

    tokenizer: Any

    def __call__(self, text: list[str]) -> Tensor: ...


def prompt_similarity(embedder: Embedder, prompts: Sequence[str]) -> Tensor:
    """Cosine similarities of N prompts, float32 [N, N]: T5 over real tokens, CLIP as pooled."""
    if isinstance(prompts, str) or not prompts:
        raise InputError(f"prompts are {prompts!r}: expected a list of at least one.")
    means = []
    for first in range(0, len(prompts), PROMPTS_PER_FORWARD):
        batch = list(prompts[first : first + PROMPTS_PER_FORWARD])
        embedding = embedder(batch)
        tokens = [1] * len(batch)
        if embedding.ndim == 3:
            longest = embedding.shape[1]
            encoded = embedder.tokenizer(batch, truncation=True, max_length=longest)
            tokens = [len(ids) for ids in encoded["input_ids"]]
        means += [mean_vector(*pair) for pair in zip(embedding, tokens, strict=True)]
    stacked = torch.stack(means)
    return cosine(stacked, stacked)


def mean_vector(values: Tensor, tokens: int) -> Tensor:
    """A caption's one vector, float32: the mean of the first `tokens` of [L, D], or [C] itself."""
    return values.float() if values.ndim == 1 else values[:tokens].float().mean(0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities of [N, D] with [M, D], float32 [N, M], computed in float64.

    A vector of zeros has similarity 0 with everything.
    """
    one, other = (torch.nn.functional.normalize(each.double(), dim=-1) for each in (a, b))
    return (one @ other.T).clamp(-1, 1).float()


@dataclass(frozen=True)
class Neighbour:
    """A caption of the dataset and how near it is."""

    sample_id: str
    """The first sample, in input order, that has this caption."""
    text: str
    similarity: dict[str, float]
    """By every encoder."""
    others: int
    """Further samples with this very caption."""


@dataclass(frozen=True)
class Nearest:
    """The captions nearest to one sample's own."""

    sample_id: str
    text: str
    others: int
    """Other samples with the sample's own caption; they are not among the neighbours."""
    neighbours: dict[str, list[Neighbour]]
    """Per encoder, nearest first."""


@dataclass
class _Caption:
    """A stored caption of one unit, and how near it is."""

    sample: int
    """Number, in input order, of the first sample that has it."""
    sample_id: str
    sha256: str
    row: int
    """Stored row in the unit's shard."""
    tokens: dict[str, int]
    samples: int
    similarity: dict[str, float]


def nearest_captions(root: str | Path, sample_id: str, top: int = 10) -> Nearest:
    """The `top` captions nearest to a sample's, by each encoder of the finished dataset `root`.

    Raises InputError when the dataset has no such sample, or its status is not ok.
    """
    if top < 1:
        raise InputError(f"top is {top}: expected 1 or more.")
    search = _Search(Path(root), sample_id, top)
    for unit in range(search.index.num_units):
        search.add_unit(unit)
    return search.result()


def similar_lines(root: Path, sample_id: str, top: int) -> list[str]:
    """`embed-precompute info DIR --similar SAMPLE_ID`, line by line."""
    nearest = nearest_captions(root, sample_id, top)
    lines = [f"id: {nearest.sample_id}", f"encoded text: {nearest.text!r}"]
    lines.append(f"other samples with this text: {nearest.others:,}")
    for name, neighbours in nearest.neighbours.items():
        lines.append(f"nearest by text_{name} (cosine similarity):")
        for found in neighbours:
            values = found.similarity
            rest = "".join(f", {other} {values[other]:.4f}" for other in values if other != name)
            more = f" and {found.others:,} more" if found.others else ""
            text = found.text
            shown = text if len(text) <= MAX_LINE_TEXT else f"{text[:MAX_LINE_TEXT]}..."
            lines.append(f"  {values[name]:.4f}{rest}  {found.sample_id}{more}: {shown!r}")
        if not neighbours:
            lines.append("  none: the dataset has no other caption")
    return lines


class _Search:
    """One pass over a dataset's units, keeping the nearest captions."""

    def __init__(self, root: Path, sample_id: str, top: int) -> None:
        EmbeddingDataset(root).index_of(sample_id)  # says why, where there is no embedding
        self.root, self.sample_id, self.top = root, sample_id, top
        self.index = DatasetIndex(root)
        self._tensors: tuple[StoredTensor, ...] = stored_tensors(self.index.manifest.spec)
        sample = self.index.find(sample_id)
        assert sample is not None
        self._sample = sample
        unit, row = int(self.index.shard[sample]), int(self.index.index[sample])
        own = next(caption for caption in self._captions(unit) if caption.row == row)
        self._own_sha256, self._num_own = own.sha256, 0
        self._query = self._means(self._reader(unit), [own])
        self._best: dict[str, dict[str, _Caption]] = {t.name: {} for t in self._tensors}

    def add_unit(self, unit: int) -> None:
        """Rank a unit's captions among those seen so far."""
        captions = self._captions(unit)
        self._num_own += sum(c.samples for c in captions if c.sha256 == self._own_sha256)
        captions = [c for c in captions if c.sha256 != self._own_sha256]
        if not captions:
            return
        for name, means in self._means(self._reader(unit), captions).items():
            values = cosine(self._query[name], means)[0].tolist()
            for caption, value in zip(captions, values, strict=True):
                caption.similarity[name] = value
        for name, best in self._best.items():
            # At most `top` of these are in `best` already, so `top` others are among them.
            for caption in _nearest(name, captions, 2 * self.top):
                if caption.sha256 in best:
                    best[caption.sha256].samples += caption.samples
                else:
                    best[caption.sha256] = _Caption(**vars(caption))
            kept = _nearest(name, best.values(), self.top)
            self._best[name] = {caption.sha256: caption for caption in kept}

    def result(self) -> Nearest:
        found = {c.sample for best in self._best.values() for c in best.values()}
        texts = self._texts({self._sample, *found})
        neighbours = {
            name: [
                Neighbour(c.sample_id, texts[c.sample], c.similarity, c.samples - 1)
                for c in best.values()
            ]
            for name, best in self._best.items()
        }
        own_text = texts[self._sample]
        return Nearest(self.sample_id, own_text, self._num_own - 1, neighbours)

    def _reader(self, unit: int) -> ShardReader:
        fingerprint = self.index.manifest.fingerprint
        return ShardReader(self.index.shard_path(unit), fingerprint, unit, self._tensors)

    def _means(self, reader: ShardReader, captions: Sequence[_Caption]) -> dict[str, Tensor]:
        """Per encoder the captions' vectors, float32 [n, D]."""
        means = {}
        for tensor in self._tensors:
            name, encoder = tensor.name, tensor.encoder
            rows = (mean_vector(reader.row(name, c.row), c.tokens[encoder]) for c in captions)
            means[name] = torch.stack(list(rows))
        return means

    def _captions(self, unit: int) -> list[_Caption]:
        """The distinct captions of a unit; equal ones share a stored row."""
        names = [tensor.encoder for tensor in self._tensors]
        sample = int(self.index.shards[unit][0])
        by_row: dict[int, _Caption] = {}
        for batch in iter_batches(self._rows_path(unit), self._tensors, text=False):
            for entry in batch.to_pylist():
                if entry["status"] == Status.OK.label:
                    row = entry["index"]
                    if row in by_row:
                        by_row[row].samples += 1
                    else:
                        tokens = {name: entry[f"{name}_tokens"] for name in names}
                        sha256, found = entry["text_sha256"], entry["sample_id"]
                        by_row[row] = _Caption(sample, found, sha256, row, tokens, 1, {})
                sample += 1
        return list(by_row.values())

    def _rows_path(self, unit: int) -> Path:
        return read_record(self.root, unit).rows_path(self.root)

    def _texts(self, samples: Iterable[int]) -> dict[int, str]:
        """Encoded texts by sample number, from the rows parts that hold them."""
        by_unit: dict[int, set[int]] = {}
        for sample in samples:
            by_unit.setdefault(int(self.index.shard[sample]), set()).add(sample)
        texts: dict[int, str] = {}
        for unit, wanted in by_unit.items():
            first = int(self.index.shards[unit][0])
            for batch in iter_batches(self._rows_path(unit), self._tensors):
                column = batch.column("text")
                for sample in wanted & set(range(first, first + len(column))):
                    texts[sample] = column[sample - first].as_py()
                first += len(column)
        return texts


def _nearest(name: str, captions: Iterable[_Caption], top: int) -> list[_Caption]:
    """The `top` nearest, nearest first; of equally near ones the first in input order."""
    return heapq.nsmallest(top, captions, key=lambda c: (-c.similarity[name], c.sample))
