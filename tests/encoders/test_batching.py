"""Batches: exact shapes, every caption once, a shape that follows from the caption alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embed_precompute.encoders.fused.stream import EqualLengthRun, runs_of
from embed_precompute.encoders.tokenizer import Shape, Tokenized, make_batches, pack, shape_of
from embed_precompute.errors import InternalError

SHAPES: tuple[Shape, ...] = ((4, 4), (3, 8), (1, 12))
PAD = 99


def captions(lengths: list[int]) -> Tokenized:
    """Captions of these lengths with ids that tell them apart; the first token is cropped."""
    ids = [np.arange(n, dtype=np.int32) + 100 * (row + 1) for row, n in enumerate(lengths)]
    stored = [length - 1 for length in lengths]
    zeros = [0] * len(lengths)
    return Tokenized(ids, lengths, [1] * len(ids), stored, stored, [False] * len(ids), zeros, zeros)


EMPTY = captions([1])


def test_shape_is_the_shortest_that_holds_the_caption() -> None:
    for shape, counts in (((4, 4), (0, 1, 4)), ((3, 8), (5, 8)), ((1, 12), (9, 12))):
        for num_tokens in counts:
            assert shape_of(num_tokens, SHAPES) == shape_of(num_tokens, SHAPES[::-1]) == shape


def test_captions_that_fit_nowhere_are_a_bug() -> None:
    with pytest.raises(InternalError, match="13 tokens"):
        shape_of(13, SHAPES)
    with pytest.raises(InternalError, match="has 5 tokens: a stream has 4"):
        list(pack(captions([5]), 4, 0))


@given(st.lists(st.integers(1, 12), max_size=40))
def test_every_caption_is_in_one_batch_of_its_shape(lengths: list[int]) -> None:
    given = captions(lengths)
    seen: list[int] = []
    for batch in make_batches(given, SHAPES, PAD, EMPTY):
        shape = batch.input_ids.shape
        assert shape in SHAPES
        assert batch.input_ids.dtype == np.int64
        assert 1 <= len(batch.rows) <= shape[0]
        for column in (batch.lengths, batch.first, batch.stored):
            assert column.shape == (shape[0],)
            assert column.dtype == np.int32
        for line in range(shape[0]):
            fills_up = line >= len(batch.rows)
            source, row = (EMPTY, 0) if fills_up else (given, int(batch.rows[line]))
            tokens = source.ids[row]
            assert shape_of(len(tokens), SHAPES) == shape or fills_up
            found = (batch.lengths[line], batch.first[line], batch.stored[line])
            assert found == (source.num_ids[row], source.first[row], source.stored[row])
            assert batch.input_ids[line, : len(tokens)].tolist() == tokens.tolist()
            assert (batch.input_ids[line, len(tokens) :] == PAD).all()
        seen.extend(batch.rows.tolist())
    order = sorted(range(len(lengths)), key=lambda row: (shape_of(lengths[row], SHAPES)[1], row))
    assert seen == order


def test_only_the_last_batch_of_a_shape_is_filled_up() -> None:
    batches = list(make_batches(captions([2] * 9 + [6] * 3), SHAPES, PAD, EMPTY))
    counts = [(batch.input_ids.shape, len(batch.rows)) for batch in batches]
    assert counts == [((4, 4), 4), ((4, 4), 4), ((4, 4), 1), ((3, 8), 3)]
    assert list(make_batches(captions([]), SHAPES, PAD, EMPTY)) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=80), st.integers(40, 120))
def test_packing(lengths: list[int], num_tokens: int) -> None:
    given = captions(lengths)
    seen: list[int] = []
    batches = list(pack(given, num_tokens, 0))
    for batch in batches:
        assert batch.input_ids.shape == (1, num_tokens)
        assert (np.diff(batch.lengths) <= 0).all()  # equal lengths lie next to each other
        for caption, row in enumerate(batch.rows.tolist()):
            begin, end = batch.starts[caption], batch.starts[caption] + batch.lengths[caption]
            assert batch.input_ids[0, begin:end].tolist() == given.ids[row].tolist()
            assert batch.stored[caption] == given.stored[row]
        assert not batch.input_ids[0, int(batch.lengths.sum()) :].any()
        runs = runs_of(batch)
        assert sum(run.count for run in runs) == len(batch.rows)
        assert runs[0] == EqualLengthRun(0, runs[0].count, int(batch.lengths[0]))
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(len(lengths)))
    # No two streams could have been one: of any two, together they hold more than a stream.
    filled = sorted(int(batch.lengths.sum()) for batch in batches)
    assert len(filled) < 2 or filled[0] + filled[1] > num_tokens
