"""The captions that are measured: windows of a sorted corpus, or lengths of our own.

Guarantees: the same table gives the same captions. The windows lie evenly over the captions sorted
by length, so that a batch that is one window has the padding of a whole-corpus sort, and all of
them together have the corpus' mix of lengths. The synthetic captions have the lengths of public
video captions and prompts, and random ids among which no special one is.
Costs: the corpus is tokenised once, at most `MAX_CORPUS` captions of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embed_precompute.encoders.spec import ResolvedEncoder
from embed_precompute.encoders.tokenizer import CaptionTokenizer

WINDOW = 32
"""Captions of one forward of a peer that pads to the longest."""
NUM_WINDOWS = 6
"""Windows when no number of captions is given."""
MAX_CORPUS = 1 << 16
"""Captions looked at."""
SYNTHETIC_CORPUS = 16_384
SEED = 0
LENGTH_QUANTILES = (
    (0.0, 2), (0.05, 3), (0.10, 5), (0.25, 10), (0.50, 16), (0.70, 25), (0.75, 32), (0.80, 52),
    (0.85, 139), (0.90, 151), (0.95, 170), (0.99, 226), (0.999, 282), (1.0, 512),
)  # fmt: skip
"""Share of captions -> T5 tokens, of 15,811 public video captions and prompts:
mean 43."""

Ids = list[NDArray[np.int32]]


@dataclass(frozen=True)
class Workload:
    """What every variant of one encoder encodes."""

    ids: Ids
    """[tokens] each, in the order in which they are given."""
    chosen: str
    """How they were chosen."""


def corpus_windows(resolved: ResolvedEncoder, corpus: Ids, num_captions: int | None) -> Workload:
    """Of a corpus: windows of it, shuffled; where every caption has one length, its first ones."""
    total = f"{len(corpus):,} captions"
    if resolved.padded_length is not None:
        first = corpus[: num_captions or resolved.shapes[0][0]]
        return Workload(first, f"the first of {total}")
    lengths = np.array([len(tokens) for tokens in corpus])
    chosen = windows(lengths, num_captions or NUM_WINDOWS * WINDOW)
    rows = np.random.default_rng(SEED).permutation(np.concatenate(chosen))
    told = (
        f"{len(chosen)} windows of {len(chosen[0])} of {total} sorted by length "
        f"(mean {lengths.mean():.1f} tokens), shuffled"
    )
    return Workload([corpus[row] for row in rows.tolist()], told)


def windows(lengths: NDArray[np.integer[Any]], num_captions: int) -> list[NDArray[np.intp]]:
    """About `num_captions` indices of `lengths`: runs of the sorted order, evenly spaced.

    A run has `WINDOW` captions (fewer when fewer are asked for) and lies in the middle of its part
    of the order; where all captions are wanted, the last run may be shorter.
    """
    order = np.argsort(lengths, kind="stable")
    size = min(WINDOW, num_captions)
    count = num_captions // size
    if count * size >= len(order):
        return [order[start : start + size] for start in range(0, len(order), size)]
    part = len(order) / count
    starts = [int(number * part + (part - size) / 2) for number in range(count)]
    return [order[start : start + size] for start in starts]


def synthetic_lengths(num_captions: int) -> NDArray[np.int64]:
    """T5 tokens of captions whose lengths follow `LENGTH_QUANTILES`, in random order."""
    shares, tokens = zip(*LENGTH_QUANTILES, strict=True)
    at = (np.arange(num_captions) + 0.5) / num_captions
    lengths = np.rint(np.interp(at, shares, tokens)).astype(np.int64)
    return np.random.default_rng(SEED).permutation(lengths)


def synthetic_corpus(tokenizer: CaptionTokenizer, lengths: Sequence[int]) -> Ids:
    """Captions of random ids, at most max_length tokens each, framed as the tokenizer frames."""
    usable = np.setdiff1d(np.arange(tokenizer.max_id + 1), list(tokenizer.special_ids))
    begin, end = tokenizer.filler[:-1], tokenizer.filler[-1:]
    rng = np.random.default_rng(SEED)
    corpus = []
    for length in lengths:
        text = max(0, min(length, tokenizer.max_length) - len(tokenizer.filler))
        words = rng.choice(usable, text).astype(np.int32)
        corpus.append(np.concatenate([begin, words, end]))
    return corpus
