"""Cosine similarity of captions: of prompts through an embedder, and of the samples of a dataset.

A caption counts as one vector: CLIP's own, or the mean over T5's vectors of its real tokens, in
float32, so stored pads do not count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from embed_precompute.errors import InputError
from embed_precompute.train.dataset import EmbeddingDataset

PROMPTS_PER_FORWARD = 8


class Embedder(Protocol):
    """`HFEmbedder`, or anything that is called and tokenises like it."""

    tokenizer: Any

    def __call__(self, text: list[str]) -> Tensor: ...


def prompt_similarity(embedder: Embedder, prompts: Sequence[str]) -> Tensor:
    """Cosine similarities of N prompts with each other, float32 [N, N]."""
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
    """A caption's vector, float32: the mean of the first `tokens` of [L, D], or [C] itself."""
    return values.float() if values.ndim == 1 else values[:tokens].float().mean(0)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarities of [N, D] with [M, D], float32 [N, M], computed in float64.

    A vector of zeros has similarity 0 with everything.
    """
    one, other = (torch.nn.functional.normalize(each.double(), dim=-1) for each in (a, b))
    return (one @ other.T).clamp(-1, 1).float()


@dataclass(frozen=True)
class Neighbour:
    """A caption of the dataset, and how similar it is to the caption asked about."""

    sample_id: str
    """The first sample that has this caption."""
    text: str
    similarity: dict[str, float]
    """Cosine similarity, by tensor."""


def nearest_captions(root: str | Path, sample_id: str, top: int = 10) -> dict[str, list[Neighbour]]:
    """For every tensor the `top` captions most similar to a sample's, the most similar first.

    Reads every embedding of the finished dataset `root` once; checksums are not compared. Samples
    with one text are one caption, and the sample's own text is left out. Raises InputError if the
    sample has no embedding.
    """
    if top < 1:
        raise InputError(f"top is {top}: expected 1 or more.")
    dataset = EmbeddingDataset(root, copy=False)
    own = dataset.index_of(sample_id)
    own_digest, tokens = next(islice(_samples(dataset), own, None))
    query = _vectors(dataset[own], tokens)
    found: dict[str, tuple[int, dict[str, float]]] = {}
    for i, (digest, tokens) in enumerate(_samples(dataset)):
        if digest != own_digest and digest not in found:
            vectors = _vectors(dataset[i], tokens)
            found[digest] = i, {n: float(cosine(query[n], vectors[n])) for n in query}
    nearest: dict[str, list[Neighbour]] = {}
    for name in query:
        ranked = sorted(found.values(), key=lambda entry: -entry[1][name])[:top]
        nearest[name] = [
            Neighbour(dataset[i]["id"], dataset.encoded_text(i), similarity)
            for i, similarity in ranked
        ]
    return nearest


def _samples(dataset: EmbeddingDataset) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields every sample's digest of the text and number of real tokens by tensor, in order."""
    tokens_of = {name: f"{tensor.encoder}_tokens" for name, tensor in dataset.tensors.items()}
    for columns in dataset.columns("text_sha256", *set(tokens_of.values())):
        for i, digest in enumerate(columns["text_sha256"]):
            yield digest, {name: columns[tokens][i] for name, tokens in tokens_of.items()}


def _vectors(sample: dict[str, Any], tokens: dict[str, int]) -> dict[str, Tensor]:
    """A sample's vectors by tensor, float32 [1, D]."""
    return {name: mean_vector(sample[f"text_{name}"], n)[None] for name, n in tokens.items()}


def similar_lines(root: Path, sample_id: str, top: int) -> list[str]:
    """`embed-precompute info DIR --similar SAMPLE_ID`, line by line."""
    lines = []
    for name, neighbours in nearest_captions(root, sample_id, top).items():
        lines.append(f"nearest to {sample_id} by text_{name} (cosine similarity):")
        for near in neighbours:
            others = (f", {n} {value:.4f}" for n, value in near.similarity.items() if n != name)
            shown = near.text if len(near.text) <= 160 else f"{near.text[:160]}..."
            values = f"{near.similarity[name]:.4f}{''.join(others)}"
            lines.append(f"  {values}  {near.sample_id}: {shown!r}")
        if not neighbours:
            lines.append("  none: the dataset has no other caption")
    return lines
