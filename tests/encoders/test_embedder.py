"""HFEmbedder against the transcription of Open-Sora's, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from embed_precompute import HFEmbedder
from embed_precompute.errors import InputError
from make_demo import write_t5
from parity_table import (
    ALIGNMENTS,
    CLIP_FAMILIES,
    DTYPES,
    FAMILIES,
    captions,
    reference,
    relative,
    rows_of,
    write_family,
)

MAX_LENGTH = 60
CLIP_TRIMMED = {"float32": 1e-5, "bfloat16": 5e-2}
"""A job runs CLIP in the caption's own bucket: the same in mathematics, not in the last bits."""
FUSED = {"float32": 1e-5, "bfloat16": 5e-2}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def checkpoint(family: str, tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    return write_family(tmp_path_factory.mktemp("family") / "model", family, corpus)


@pytest.mark.parametrize("dtype", DTYPES)
def test_parity_table(family: str, checkpoint: Path, dtype: str) -> None:
    rows = list(rows_of(family, checkpoint, dtype, MAX_LENGTH))
    assert [row.seq_align for row in rows] == [1, 2, 4, 8]
    for row in rows:
        assert row.embedder == 0, row
        assert row.shardformer in (None, 0), row
        assert row.fused <= FUSED[dtype], row
        if family in CLIP_FAMILIES:
            assert row.job <= CLIP_TRIMMED[dtype], row
        else:
            assert row.job == 0, row
            assert row.shape[1] == MAX_LENGTH + ALIGNMENTS[row.seq_align]


def test_the_table_would_see_one_pad(checkpoint: Path, family: str) -> None:
    """The reference with one pad more or with another caption is far from itself."""
    clip = family in CLIP_FAMILIES
    theirs = reference(family, checkpoint, max_length=77 if clip else MAX_LENGTH, dtype="float32")
    other = theirs(["a blue fox"], 0, 1) if clip else theirs(["a red fox"], 1, 2)[:, :MAX_LENGTH]
    assert relative(theirs(["a red fox"], 0, 1), other) > 1e-3


def test_attention_implementation_is_passed_on(tiny_t5: Path) -> None:
    _, texts = captions()
    ours = HFEmbedder(str(tiny_t5), MAX_LENGTH, attn_implementation="eager")
    assert ours.hf_module.config._attn_implementation == "eager"
    theirs = reference(
        "T5 v1.1", tiny_t5, max_length=MAX_LENGTH, dtype="float32", attn_implementation="eager"
    )
    assert torch.equal(ours(texts, 1, 4), theirs(texts, 1, 4))


def test_it_is_a_frozen_module_as_the_document_uses_it(tiny_t5: Path, tiny_clip: Path) -> None:
    t5 = HFEmbedder(from_pretrained=str(tiny_t5), hf_module="T5EncoderModel")
    clip = HFEmbedder(from_pretrained=str(tiny_clip), hf_module="CLIPTextModel")
    assert (t5.max_length, clip.max_length) == (512, 77)
    for embedder in (t5, clip):
        assert isinstance(embedder, nn.Module)
        assert not embedder.hf_module.training
        assert not any(parameter.requires_grad for parameter in embedder.parameters())
        assert embedder.hf_module.dtype == torch.float32
    prompt = "A beautiful sunset over the ocean with waves crashing on the shore"
    embeddings, vector = t5([prompt]), clip([prompt])
    assert (embeddings.shape, vector.shape) == ((1, 512, 64), (1, 64))
    assert t5.output_key == "last_hidden_state"
    assert clip.output_key == "pooler_output"
    assert torch.equal(t5(prompt), embeddings)
    # Not an inference tensor: a trainer's projection must be able to keep it for its backward.
    projection = nn.Linear(64, 2)
    projection(embeddings).sum().backward()
    assert projection.weight.grad is not None


@pytest.mark.parametrize("given", [{"torch_dtype": torch.bfloat16}, {"dtype": "bfloat16"}, {}])
def test_float32_unless_asked_by_either_name(
    tmp_path: Path, corpus: list[str], given: dict[str, Any]
) -> None:
    folder = write_t5(tmp_path / "t5", corpus, dtype="float32" if given else "bfloat16")
    embedder = HFEmbedder(str(folder), 16, device_map=torch.device("cpu"), **given)
    expected = torch.bfloat16 if given else torch.float32
    assert {parameter.dtype for parameter in embedder.parameters()} == {expected}
    assert embedder(["x"]).dtype == expected


def test_another_tokenizer_can_be_assigned(tiny_t5: Path) -> None:
    embedder = HFEmbedder(str(tiny_t5), 16)
    assert f"tokenizer={type(embedder.tokenizer).__name__} (fast), max_length=16" in repr(embedder)
    words = embedder(["a red fox"])

    class Backwards:
        is_fast = False
        pad_token_id = embedder.tokenizer.pad_token_id

        def __init__(self, tokenizer: Any) -> None:
            self._tokenizer = tokenizer

        def __call__(self, texts: list[str], **kwargs: Any) -> Any:
            return self._tokenizer([text[::-1] for text in texts], **kwargs)

    embedder.tokenizer = Backwards(embedder.tokenizer)
    assert "Backwards (slow)" in repr(embedder)
    assert torch.equal(embedder(["xof der a"]), words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hf_module": "T5Model"}, "hf_module is 'T5Model': expected T5EncoderModel or CLIP"),
        (
            {"hf_module": "CLIPTextModel"},
            r"with hf_module 'CLIPTextModel': .* model_type 't5': an encoder of kind clip takes",
        ),
        ({"dtype": torch.float32, "torch_dtype": torch.float32}, "both dtype and torch_dtype"),
        ({"use_safetensors": False}, "reads safetensors only"),
        ({"max_length": 0}, "max_length is 0: expected 1 or more"),
        ({"revision": "main"}, "only a hub id has revisions"),
        ({"no_such_option": 1}, "no_such_option"),
    ],
)
def test_wrong_arguments(tiny_t5: Path, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        HFEmbedder(str(tiny_t5), **arguments)


def test_a_caption_that_is_none(tiny_t5: Path) -> None:
    with pytest.raises(InputError, match="caption 1 is None: expected a string"):
        HFEmbedder(str(tiny_t5))(["a", None])


def test_wrong_arguments_for_clip(tiny_clip: Path) -> None:
    with pytest.raises(InputError, match="max_length is 512: this model has 77 positions"):
        HFEmbedder(str(tiny_clip), 512, "CLIPTextModel")
    with pytest.raises(InputError, match="shardformer is for T5EncoderModel only"):
        HFEmbedder(str(tiny_clip), 77, "CLIPTextModel", shardformer=True)


def test_wrong_calls(tiny_t5: Path, tiny_clip: Path) -> None:
    t5, clip = HFEmbedder(str(tiny_t5), 16), HFEmbedder(str(tiny_clip), 77, "CLIPTextModel")
    for embedder, arguments, words in (
        (t5, ([], 0, 1), "text is an empty list"),
        (t5, (["x"], -1, 1), "added_tokens is -1"),
        (t5, (["x"], 0, 0), "seq_align 0"),
        (clip, (["x"], 0, 2), "seq_align 2 with added_tokens 0 would pad CLIP from 77"),
    ):
        with pytest.raises(InputError, match=words):
            embedder(*arguments)
    assert torch.equal(clip(["x"], added_tokens=3, seq_align=8), clip(["x"]))
