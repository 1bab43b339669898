"""Token batches of fixed shapes: which captions run together, and in what frame.

Guarantees: every batch has exactly one of the given shapes, and a caption's shape follows from its
own number of tokens alone. So a forward's frame never depends on a caption's neighbours, which is
what makes an embedding bitwise a function of the caption. Every caption is in one batch, once.
Costs: the last batch of each shape is filled up with copies of a filler caption, which are encoded
and thrown away; of a packed stream only what no caption fits is lost. numpy only; one copy of the
ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embed_precompute.errors import InternalError

Shape = tuple[int, int]
"""(B, L): captions of one forward, tokens of each."""


@dataclass(frozen=True)
class TokenBatch:
    """Input of one forward; captions past `len(rows)` are filler."""

    input_ids: NDArray[np.int64]
    """[B, L], a caption a line, padded on the right with the pad id. Packed: [1, T], captions end
    to end, pads behind the last."""
    lengths: NDArray[np.int32]
    """[C] real tokens of each caption, special tokens included; C is B unless packed."""
    rows: NDArray[np.int64]
    """[n], n <= C: which captions (positions in the list given) the first n are."""
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

    def tokens(self, caption: int) -> NDArray[np.int64]:
        """[tokens] the ids of a caption, without pads."""
        start = int(self.starts[caption])
        return self.input_ids.reshape(-1)[start : start + int(self.lengths[caption])]


def shape_of(num_tokens: int, shapes: Sequence[Shape]) -> Shape:
    """The shape a caption of `num_tokens` runs in: the shortest that holds it."""
    fitting = [shape for shape in shapes if shape[1] >= num_tokens]
    if not fitting:
        raise InternalError(f"A caption has {num_tokens} tokens: no shape of {shapes} holds it.")
    return min(fitting, key=lambda shape: shape[1])


def make_batches(
    ids: Sequence[NDArray[np.integer[Any]]],
    shapes: Sequence[Shape],
    pad_id: int,
    filler: NDArray[np.integer[Any]],
) -> Iterator[TokenBatch]:
    """Batches of all captions `ids` ([tokens] each): short shapes first, input order inside one.

    `filler` ([tokens], the empty caption) fills the lines left over in a shape's last batch.
    """
    rows_of: dict[Shape, list[int]] = {}
    for row, tokens in enumerate(ids):
        rows_of.setdefault(shape_of(len(tokens), shapes), []).append(row)
    for shape in sorted(rows_of, key=lambda shape: shape[1]):
        rows = rows_of[shape]
        for start in range(0, len(rows), shape[0]):
            yield make_batch(ids, rows[start : start + shape[0]], shape, pad_id, filler)


def pack(ids: Sequence[NDArray[np.integer[Any]]], stream: int, pad_id: int) -> Iterator[TokenBatch]:
    """Streams of `stream` tokens that hold all captions `ids` ([tokens] each), end to end.

    Each stream takes the longest caption that still fits, again and again: the long ones come
    first, short ones fill the gaps, and captions of one length lie side by side.
    """
    rows_of: dict[int, list[int]] = {}
    for row in range(len(ids) - 1, -1, -1):
        rows_of.setdefault(len(ids[row]), []).append(row)  # popped from the end: input order
    if rows_of and max(rows_of) > stream:
        raise InternalError(f"A caption has {max(rows_of)} tokens: a stream has {stream}.")
    while rows_of:
        rows: list[int] = []
        room = stream
        for length in sorted(rows_of, reverse=True):
            while room >= length and rows_of[length]:
                rows.append(rows_of[length].pop())
                room -= length
            if not rows_of[length]:
                del rows_of[length]
        input_ids = np.full((1, stream), pad_id, dtype=np.int64)
        input_ids[0, : stream - room] = np.concatenate([ids[row] for row in rows])
        lengths = np.array([len(ids[row]) for row in rows], dtype=np.int32)
        yield TokenBatch(input_ids, lengths, np.array(rows, dtype=np.int64), packed=True)


def make_batch(
    ids: Sequence[NDArray[np.integer[Any]]],
    rows: list[int],
    shape: Shape,
    pad_id: int,
    filler: NDArray[np.integer[Any]],
) -> TokenBatch:
    """A batch of the captions `rows` of `ids`, at most B; `filler` is in the lines left over."""
    lines = [ids[row] for row in rows] + [filler] * (shape[0] - len(rows))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    for line, tokens in enumerate(lines):
        input_ids[line, : len(tokens)] = tokens
    lengths = np.array([len(tokens) for tokens in lines], dtype=np.int32)
    return TokenBatch(input_ids, lengths, np.array(rows, dtype=np.int64))
