"""Token batches of fixed shapes: which captions run together, and how they lie.

Every batch has one of a few shapes, and a caption's shape follows from its own number of tokens. So
the shape of a caption's forward never depends on its neighbours, which is what makes an embedding
bitwise a function of the caption. The last batch of a shape is filled up with the empty caption,
whose embeddings are thrown away.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embed_precompute.encoders.tokenizer import Tokenized
from embed_precompute.errors import InternalError

Shape = tuple[int, int]
"""(B, L): captions of one forward, tokens of each."""


@dataclass(frozen=True)
class TokenBatch:
    """Input of one forward; captions past `len(rows)` only fill it up."""

    input_ids: NDArray[np.int64]
    """[B, L], a caption a line, padded on the right with the pad id. Packed: [1, T], captions end
    to end, pads after the last."""
    lengths: NDArray[np.int32]
    """[C] real tokens of each caption, special tokens included; C is B unless packed."""
    first: NDArray[np.int32]
    """[C] the caption's first position that is stored, where only real ones are."""
    stored: NDArray[np.int32]
    """[C] how many positions are stored from there."""
    rows: NDArray[np.int64]
    """[n], n <= C: which captions (positions in the list that was batched) the first n are."""
    packed: bool = False

    @property
    def starts(self) -> NDArray[np.int64]:
        """[C] where each caption begins in `input_ids.reshape(-1)`."""
        if self.packed:
            ends: NDArray[np.int64] = np.cumsum(self.lengths, dtype=np.int64)
            return ends - self.lengths
        lines, length = self.input_ids.shape
        every: NDArray[np.int64] = np.arange(lines, dtype=np.int64) * length
        return every


def shape_of(num_tokens: int, shapes: Sequence[Shape]) -> Shape:
    """The shape a caption of `num_tokens` runs in: the shortest that holds it."""
    fitting = [shape for shape in shapes if shape[1] >= num_tokens]
    if not fitting:
        raise InternalError(f"A caption has {num_tokens} tokens: no shape of {shapes} holds it.")
    return min(fitting, key=lambda shape: shape[1])


def make_batches(
    captions: Tokenized, shapes: Sequence[Shape], pad_id: int, empty: Tokenized
) -> Iterator[TokenBatch]:
    """Batches of all captions: short shapes first, input order inside one.

    `empty` is the empty caption, which fills the lines left over in a shape's last batch.
    """
    rows_of: dict[Shape, list[int]] = {}
    for row, num_tokens in enumerate(captions.num_ids):
        rows_of.setdefault(shape_of(num_tokens, shapes), []).append(row)
    for shape in sorted(rows_of, key=lambda shape: shape[1]):
        rows = rows_of[shape]
        for start in range(0, len(rows), shape[0]):
            yield make_batch(captions, rows[start : start + shape[0]], shape, pad_id, empty)


def make_batch(
    captions: Tokenized, rows: Sequence[int], shape: Shape, pad_id: int, empty: Tokenized
) -> TokenBatch:
    """A batch of the captions `rows`, at most B; `empty` is in the lines left over."""
    left_over = shape[0] - len(rows)
    lines = [captions.ids[row] for row in rows] + empty.ids * left_over
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    for line, tokens in enumerate(lines):
        input_ids[line, : len(tokens)] = tokens

    def column(of_captions: list[int], of_empty: list[int]) -> NDArray[np.int32]:
        return np.array([of_captions[row] for row in rows] + of_empty * left_over, dtype=np.int32)

    return TokenBatch(
        input_ids,
        column(captions.num_ids, empty.num_ids),
        column(captions.first, empty.first),
        column(captions.stored, empty.stored),
        np.array(rows, dtype=np.int64),
    )


def pack(captions: Tokenized, num_tokens: int, pad_id: int) -> Iterator[TokenBatch]:
    """Packed streams of `num_tokens` tokens that hold all captions, end to end.

    Each stream takes the longest caption that still fits, again and again: the long ones come
    first, short ones fill the gaps, and captions of one length lie next to each other.
    """
    rows_of: dict[int, list[int]] = {}
    for row in range(len(captions) - 1, -1, -1):
        rows_of.setdefault(captions.num_ids[row], []).append(row)  # popped from the end
    if rows_of and max(rows_of) > num_tokens:
        raise InternalError(f"A caption has {max(rows_of)} tokens: a stream has {num_tokens}.")
    while rows_of:
        rows: list[int] = []
        left = num_tokens
        for length in sorted(rows_of, reverse=True):
            while left >= length and rows_of[length]:
                rows.append(rows_of[length].pop())
                left -= length
            if not rows_of[length]:
                del rows_of[length]
        packed = captions.select(rows)
        input_ids = np.full((1, num_tokens), pad_id, dtype=np.int64)
        input_ids[0, : num_tokens - left] = np.concatenate(packed.ids)
        yield TokenBatch(
            input_ids,
            np.array(packed.num_ids, dtype=np.int32),
            np.array(packed.first, dtype=np.int32),
            np.array(packed.stored, dtype=np.int32),
            np.array(rows, dtype=np.int64),
            packed=True,
        )
