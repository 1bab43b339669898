"""CLIP: its cases for the conformance kit, where it is pooled, and its two outputs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from family_case import Case, built, copied, encode, resolved_of
from safetensors.torch import load_file, save_file

from embed_precompute.errors import InputError
from make_demo import write_clip


def write_projected(folder: Path, corpus: list[str]) -> Path:
    """A checkpoint that was saved as CLIPTextModelWithProjection."""
    write_clip(folder, corpus)
    path = folder / "model.safetensors"
    projection = torch.randn(48, 64, generator=torch.Generator().manual_seed(1)) / 8
    save_file({**load_file(path), "text_projection.weight": projection}, path, {"format": "pt"})
    names = ["CLIPTextModelWithProjection"]
    return copied(folder, folder, architectures=names, projection_dim=48)


def write_long(folder: Path, corpus: list[str]) -> Path:
    """HiDream's form: 248 positions, and saved with its projection."""
    write_projected(folder, corpus)
    path = folder / "model.safetensors"
    places = torch.randn(248, 64, generator=torch.Generator().manual_seed(2)) / 8
    name = next(name for name in load_file(path) if name.endswith("position_embedding.weight"))
    save_file({**load_file(path), name: places}, path, {"format": "pt"})
    return copied(folder, folder, max_position_embeddings=248)


def write_gelu(folder: Path, corpus: list[str]) -> Path:
    """CLIP-G's form."""
    write_projected(folder, corpus)
    return copied(folder, folder, hidden_act="gelu")


FAST = {"batch_size": 4, "stream_tokens": 256}
BOTH = {"outputs": ["pooled", "hidden"], **FAST}
LONG = {"projection": True, "max_length": 128}
CASES = [
    Case("clip-pooled", "clip", write_clip, FAST, ("hf", "fused")),
    Case("clip-argmax", "clip", partial(write_clip, eos_rule="argmax"), FAST, ("hf", "fused")),
    Case("clip-both", "clip", write_clip, BOTH),
    Case("clip-hidden", "clip", write_clip, {"outputs": ["hidden"], "hidden_state": -1, **FAST}),
    Case("clip-projected", "clip", write_gelu, {"projection": True, **FAST}, ("hf", "fused")),
    Case("clip-sd3", "clip", write_gelu, {"projection": True, **BOTH}),
    Case("clip-long", "clip", write_long, {**LONG, **FAST}, ("hf", "fused")),
]


resolved = partial(resolved_of, "clip", batch_size=4, implementation="hf")


def test_shapes(tiny_clip: Path) -> None:
    assert resolved(tiny_clip).decision.shapes == ((4, 16), (4, 32), (4, 48), (4, 64), (4, 77))
    assert resolved(tiny_clip, buckets=(40,)).decision.shapes == ((4, 40), (4, 77))
    assert resolved(tiny_clip, implementation="fused").decision.packed
    both = resolved(tiny_clip, outputs=("pooled", "hidden"), implementation="auto")
    assert both.decision.implementation == "hf"
    assert both.decision.shapes == ((4, 77),) == (both.decision.null_shape,)
    assert both.decision.padded_length == 77
    assert [tensor for tensor in both.tensors()] == ["enc", "enc_hidden"]
    with pytest.raises(InputError, match="buckets has 1:"):
        resolved(tiny_clip, buckets=(1, 16))


def test_one_forward_gives_both_outputs(tiny_clip: Path) -> None:
    case = next(case for case in CASES if case.name == "clip-both")
    encoder = built(case, tiny_clip)
    calls = []
    encoder.model.register_forward_hook(lambda *_: calls.append(1))
    found = encode(encoder, ["a red fox", ""])
    assert len(calls) == 1
    assert found[""][0].shape == (64,)
    assert found["_hidden"][0].shape == (77, 64)


def test_the_pooled_vector_is_of_the_first_end_of_text(tiny_clip: Path) -> None:
    """Also where a caption names the token itself."""
    texts = ["a red <|endoftext|> fox runs", "a red"]
    options = {"implementation": "fused", **FAST}
    found = encode(built(CASES[0], tiny_clip, **options), texts)[""]
    assert (found[0] - found[1]).abs().max() < 1e-5


def test_clip_must_pool_at_the_tokenizers_end_token(tmp_path: Path, tiny_clip: Path) -> None:
    folder = copied(tiny_clip, tmp_path / "clip", eos_token_id=7)
    with pytest.raises(InputError, match=r"ends captions with id .*pools at eos_token_id, 7"):
        resolved(folder)


def test_the_old_rule_needs_the_highest_id(tmp_path: Path, corpus: list[str]) -> None:
    folder = write_clip(tmp_path / "clip", corpus, eos_rule="argmax")
    resolved(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    highest = max(token["id"] for token in tokenizer["added_tokens"])
    added = {**tokenizer["added_tokens"][0], "id": highest + 1, "content": "<sks>"}
    tokenizer["added_tokens"].append(added)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    copied(folder, folder, vocab_size=2000)
    with pytest.raises(InputError, match="highest id"):
        resolved(folder)


def test_a_projection_is_a_choice(tmp_path: Path, corpus: list[str]) -> None:
    folder = write_projected(tmp_path / "clip", corpus)
    with pytest.raises(InputError, match=r"enc.projection is not given: .*WithProjection"):
        resolved(folder)
    assert resolved(folder, projection=False).outputs[0].width == 64
    assert resolved(folder, projection=True).outputs[0].width == 48
    assert resolved(folder, outputs=("hidden",)).outputs[0].width == 64


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_length": 78}, "max_length is 78: the model in .* has 77 positions"),
        ({"outputs": ("hidden",), "hidden_state": -3}, "hidden_state is -3: .* has 2 layers"),
        ({"outputs": ("hidden",), "hidden_state": 0}, "hidden_state is 0"),
        ({"max_length": 1}, "max_length 1 leaves no room"),
        ({"outputs": ()}, "expected pooled, hidden or both"),
        ({"outputs": ("hidden",), "buckets": (16,)}, "hidden is stored at max_length"),
        ({"outputs": ("hidden",), "implementation": "fused"}, "fused makes the pooled vector only"),
        ({"implementation": "shardformer"}, "clip has no shardformer. Expected hf or fused"),
    ],
)
def test_settings_that_cannot_be(tiny_clip: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolved(tiny_clip, **fields)
