"""T5: its cases for the conformance kit, its two recipes, and the one padded length."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from family_case import Case

from embed_precompute.encoders.families.t5 import T5Options
from embed_precompute.encoders.resolve import ResolvedEncoder, open_encoder, resolve
from embed_precompute.errors import InputError, InternalError
from make_demo import write_t5

PADDED = {"max_length": 60, "seq_align": 8, "added_tokens": 3, "batch_tokens": 400}
MASKED = {"max_length": 60, "attention_mask": "padding", "batch_tokens": 400, "stream_tokens": 256}
OURS = ("hf", "fused")
CASES = [
    Case("t5-padded", "t5", write_t5, PADDED, (*OURS, "shardformer")),
    Case("t5-masked", "t5", write_t5, MASKED, (*OURS, "shardformer")),
    Case("t5-relu", "t5", partial(write_t5, gated=False, seed=1), PADDED, OURS),
    Case("mt5-masked", "t5", partial(write_t5, model_type="mt5", seed=2), MASKED, OURS),
    Case("umt5-padded", "t5", partial(write_t5, model_type="umt5", seed=3), PADDED, OURS),
    Case("umt5-masked", "t5", partial(write_t5, model_type="umt5", seed=3), MASKED, OURS),
]


MASK = {"attention_mask": "padding"}
OPTIONS: dict[str, Any] = {"max_length": 48, "batch_tokens": 192, "implementation": "hf"}


def resolved(folder: Path, counts: dict[int, int] | None = None, **fields: Any) -> ResolvedEncoder:
    options = T5Options(pretrained=str(folder), **{**OPTIONS, **fields})
    return resolve(open_encoder("enc", options), added_tokens=counts)


def test_padded_shapes(tiny_t5: Path) -> None:
    decision = resolved(tiny_t5, seq_align=64, added_tokens=1000).decision
    assert decision.padded_length == 88  # 1000 + 88 = 17 * 64
    assert decision.shapes == ((2, 88),)
    assert decision.null_shape == (3, 64)
    assert not decision.packed
    assert resolved(tiny_t5, batch_tokens=10).decision.shapes == ((1, 48),)
    assert resolved(tiny_t5, implementation="fused").decision.shapes == ((4, 48),)


def test_masked_shapes(tiny_t5: Path) -> None:
    masked = resolved(tiny_t5, attention_mask="padding", batch_tokens=64).decision
    assert masked.shapes == ((4, 16), (2, 32), (1, 48))
    assert masked.null_shape == (4, 16)
    assert masked.padded_length is None
    fused = resolved(tiny_t5, attention_mask="padding", implementation="fused").decision
    assert fused.packed
    assert fused.shapes == ((1, 4096),) == (fused.null_shape,)


def test_the_padded_length_of_a_column(tiny_t5: Path) -> None:
    """From the captions' values, from the plan where there is one; several are listed."""
    column: dict[str, Any] = {"seq_align": 8, "added_tokens": "video_tokens"}
    encoder = resolved(tiny_t5, {7: 30, 15: 2}, **column)
    assert encoder.decision.shapes == ((3, 49),)
    stored = resolve(encoder.opened, stored={"padded_length": 55})
    assert stored.decision.padded_length == 55
    absent = resolve(encoder.opened, stored={})  # the plan has no such encoder: a conflict later
    assert absent.decision.padded_length == 48
    with pytest.raises(InputError, match=r"'video_tokens' .* 48 \(2 rows\), 49 \(30 rows\)"):
        resolved(tiny_t5, {7: 30, 16: 2}, **column)
    with pytest.raises(InternalError, match="video_tokens"):
        resolved(tiny_t5, **column)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"buckets": (16,)}, "buckets are for attention_mask padding"),
        ({**MASK, "seq_align": 2}, "belong to attention_mask none"),
        ({**MASK, "added_tokens": 2}, "belong to attention_mask none"),
        ({"implementation": "hf", "compile": True}, "compile is true: hf is never compiled"),
        ({"tf32": True}, "tf32 is true with dtype bfloat16"),
        ({**MASK, "stream_tokens": 400}, "stream_tokens is 400: expected at least max_length"),
        ({"seq_align": 0}, "seq_align is 0: expected 1 or more"),
        ({"batch_tokens": 1 << 40}, "at most 67108864"),
        ({"added_tokens": -1}, "added_tokens is -1: below 0"),
        ({**MASK, "buckets": (16,), "implementation": "fused"}, "are for the implementation hf"),
        ({**MASK, "buckets": (600,)}, "512, and buckets has 600: expected 1 to"),
        ({**MASK, "buckets": (0, 9)}, "and buckets has 0: expected 1 to"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        T5Options(pretrained="x", **fields)
