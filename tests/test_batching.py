"""Batches: exact shapes, every caption once, a shape that follows from the caption alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embed_precompute.encoders.batching import Shape, make_batches, shape_of
from embed_precompute.errors import InternalError

SHAPES: tuple[Shape, ...] = ((4, 4), (3, 8), (1, 12))
PAD, FILLER = 99, np.array([1], dtype=np.int32)


def captions(lengths: list[int]) -> list[np.ndarray]:
    """Captions of these lengths with ids that tell them apart."""
    return [np.arange(n, dtype=np.int32) + 100 * (row + 1) for row, n in enumerate(lengths)]


@pytest.mark.parametrize(
    ("num_tokens", "shape"),
    [(0, (4, 4)), (1, (4, 4)), (4, (4, 4)), (5, (3, 8)), (8, (3, 8)), (9, (1, 12)), (12, (1, 12))],
)
def test_shape_is_the_shortest_that_holds_the_caption(num_tokens: int, shape: Shape) -> None:
    assert shape_of(num_tokens, SHAPES) == shape
    assert shape_of(num_tokens, SHAPES[::-1]) == shape


def test_caption_that_fits_no_shape_is_a_bug() -> None:
    with pytest.raises(InternalError, match="13 tokens"):
        shape_of(13, SHAPES)


@given(st.lists(st.integers(1, 12), max_size=40))
def test_every_caption_is_in_one_batch_of_its_shape(lengths: list[int]) -> None:
    ids = captions(lengths)
    seen: list[int] = []
    for batch in make_batches(ids, SHAPES, PAD, FILLER):
        shape = batch.input_ids.shape
        assert shape in SHAPES
        assert batch.input_ids.dtype == np.int64
        assert batch.lengths.shape == (shape[0],)
        assert batch.lengths.dtype == np.int32
        assert 1 <= len(batch.rows) <= shape[0]
        for line in range(shape[0]):
            is_filler = line >= len(batch.rows)
            tokens = FILLER if is_filler else ids[batch.rows[line]]
            assert shape_of(len(tokens), SHAPES) == shape or is_filler
            assert batch.lengths[line] == len(tokens)
            assert batch.input_ids[line, : len(tokens)].tolist() == tokens.tolist()
            assert (batch.input_ids[line, len(tokens) :] == PAD).all()
        seen.extend(batch.rows.tolist())
    order = sorted(range(len(ids)), key=lambda row: (shape_of(lengths[row], SHAPES)[1], row))
    assert seen == order


def test_only_the_last_batch_of_a_shape_is_filled_up() -> None:
    batches = list(make_batches(captions([2] * 9 + [6] * 3), SHAPES, PAD, FILLER))
    counts = [(batch.input_ids.shape, len(batch.rows)) for batch in batches]
    assert counts == [((4, 4), 4), ((4, 4), 4), ((4, 4), 1), ((3, 8), 3)]


def test_no_captions_make_no_batch() -> None:
    assert list(make_batches([], SHAPES, PAD, FILLER)) == []
