"""An encoder's own steps and its empty captions, through a whole job and into training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from jobs import call, edit, expect, write_captions, write_job

from embed_precompute import ConditionDropout, EmbeddingDataset, EmbeddingLoader
from embed_precompute.errors import InputError
from embed_precompute.opensora.dataset import TextPair
from embed_precompute.train.dataset import collate_embeddings

SIGNS = ['a sign "OPEN" at "9"', "no sign", "", '"OPEN" at \u201c9\u201d!', "none here", 'a "B"']
GLYPHS = {"attention_mask": "padding", "text_steps": ["quoted"], "empty": "nothing"}


@pytest.fixture
def job(tiny_t5: Path, tiny_clip: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", [*SIGNS, *SIGNS[1:3]])
    return write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=6, **GLYPHS)


def test_nothing_is_stored_of_an_empty_caption(job: Path, tmp_path: Path) -> None:
    """The last unit has nothing to encode with T5, and the null embedding neither."""
    said = expect(0, "plan", job)
    assert "empty after text_steps: 5 of 8 captions, nothing is stored" in said
    assert re.search(r"^ +0 \S+ +5  62\.50 %$", said, re.MULTILINE)
    assert """encoded by t5 as 'Text "OPEN". Text "9". '""" in said
    assert "encoded by t5 as nothing\n" in said
    assert "encoded by clip as 'no sign'" in said
    expect(0, "run", job, "--runtime.self_check", "always")
    expect(0, "verify", tmp_path / "out", "--level", "deep", "--sample", "99")
    assert "; of 5 empty captions nothing is stored" in expect(0, "info", tmp_path / "out")
    dataset = EmbeddingDataset(tmp_path / "out", verify="rows")
    assert (dataset.lengths["t5"] > 0).tolist() == [t.count('"') + t.count("\u201c") > 1 for t in
        [*SIGNS, *SIGNS[1:3]]]  # fmt: skip
    assert dataset.tokens["t5"].tolist() == dataset.lengths["t5"].tolist()
    assert torch.equal(dataset[0]["text_t5"], dataset[3]["text_t5"])
    assert not torch.equal(dataset[0]["text_clip"], dataset[3]["text_clip"])
    assert dataset[1]["text_t5"].shape == (0, dataset.tensors["t5"].width)
    assert dataset.encoded_text(1) == "no sign"
    assert dataset.null["text_t5"].shape == (0, dataset.tensors["t5"].width)


def test_training_on_captions_of_nothing(job: Path, tmp_path: Path) -> None:
    expect(0, "run", job)
    dataset = EmbeddingDataset(tmp_path / "out")
    (batch,) = EmbeddingLoader(dataset, batch_size=8, shuffle=False)
    assert not batch["text_t5_mask"][1:3].any()
    assert not batch["text_t5"][1:3].any()
    assert torch.equal(batch["text_t5_mask"], batch["text_t5_token_mask"])
    of_nothing = collate_embeddings([dataset[1], dataset[2]])
    assert of_nothing["text_t5"].shape[:2] == of_nothing["text_t5_mask"].shape == (2, 0)
    fixed = collate_embeddings([dataset[1]], length=5)
    assert fixed["text_t5"].shape[1] == 5
    assert not fixed["text_t5_mask"].any()
    for given in (batch, of_nothing):
        dropped = ConditionDropout(dataset, {"text_t5": 1.0})(given)
        assert not dropped["text_t5"].any()
        assert not dropped["text_t5_mask"].any()
        assert not dropped["text_t5_length"].any()
    zeros = TextPair(dataset, "t5", "clip", "zeros").of(dataset.null)["text_t5"]
    assert zeros.shape[0] == 24
    assert not zeros.any()
    with pytest.raises(InputError, match=r"sample 's1' stores no vector .* pad_masked zeros"):
        TextPair(dataset, "t5", "clip", "repeat_last").of(dataset[1])


def test_another_datasets_nothing_is_copied(job: Path, tmp_path: Path) -> None:
    expect(0, "run", job)
    edit(job, "output", path=str(tmp_path / "more"))
    edit(job, "encoders.clip", max_length=70)  # so that something is encoded
    said = expect(0, "run", job, "--reuse", tmp_path / "out")
    assert "t5: copied where the text is the same" in said
    expect(0, "verify", tmp_path / "more")
    first, second = (EmbeddingDataset(tmp_path / name) for name in ("out", "more"))
    assert all(torch.equal(first[i]["text_t5"], second[i]["text_t5"]) for i in range(8))


def test_a_space_for_an_empty_caption(job: Path, tmp_path: Path) -> None:
    edit(job, "encoders.t5", empty="space", text_steps=["strip"])
    assert "empty after text_steps: 2 of 8 captions, encoded as ' '" in expect(0, "plan", job)
    expect(0, "run", job)
    expect(0, "verify", tmp_path / "out", "--level", "deep", "--sample", "99")
    dataset = EmbeddingDataset(tmp_path / "out")
    edit(job, "encoders.t5", empty="encode", text_steps=[])
    write_captions(tmp_path / "captions.parquet", [" "])
    expect(0, "run", job, "--output.path", tmp_path / "plain")
    (plain,) = EmbeddingDataset(tmp_path / "plain")
    for found in (dataset[2]["text_t5"], dataset.null["text_t5"]):
        assert torch.equal(found, plain["text_t5"])


def test_the_first_pad_is_stored_with_the_tokens(job: Path, tmp_path: Path) -> None:
    """As Chroma wants it: its mask is the stored one."""
    write_captions(tmp_path / "captions.parquet", ["a red fox", "x", "", "far too long " * 20])
    edit(job, "encoders.t5", text_steps=[], empty="encode", keep="real+1")
    expect(0, "run", job)
    expect(0, "verify", tmp_path / "out", "--level", "deep", "--sample", "99")
    dataset = EmbeddingDataset(tmp_path / "out")
    edit(job, "encoders.t5", keep="real")
    expect(0, "run", job, "--output.path", tmp_path / "real")
    real = EmbeddingDataset(tmp_path / "real")
    tokens = dataset.tokens["t5"]
    assert dataset.lengths["t5"].tolist() == [*(tokens[:3] + 1).tolist(), 24]
    for kept, plain in zip(dataset, real, strict=True):
        n = len(plain["text_t5"])
        torch.testing.assert_close(kept["text_t5"][:n], plain["text_t5"], rtol=1e-4, atol=1e-5)
    batch = collate_embeddings(list(dataset))
    assert batch["text_t5_mask"].sum(1).tolist() == dataset.lengths["t5"].tolist()
    assert batch["text_t5_token_mask"].sum(1).tolist() == tokens.tolist()
    dropped = ConditionDropout(dataset, {"text_t5": 1.0})(batch)
    assert torch.equal(dropped["text_t5"][0, :2], dataset.null["text_t5"])
    assert dropped["text_t5_length"].tolist() == [2] * 4
    with pytest.raises(InputError, match=r"positions real of .* one that stores pads too"):
        ConditionDropout(real, {"text_t5": 1.0})(batch)


@pytest.mark.parametrize(("name", "fields", "what"), [
    ("clip", {"empty": "nothing"}, "text_clip stores a vector per caption"),
    ("t5", {"attention_mask": "none"}, "text_t5 stores every position"),
])  # fmt: skip
def test_nothing_needs_real_positions(
    name: str, fields: dict[str, str], what: str, job: Path
) -> None:
    edit(job, f"encoders.{name}", **fields)
    assert f"encoders.{name}.empty is nothing: {what}" in expect(2, "run", job)


def test_captions_of_which_a_tokenizer_knows_nothing(
    tiny_t5: Path, tiny_clip: Path, tmp_path: Path
) -> None:
    """T5's vocabulary has no Chinese: two captions become one, and no one may find out late."""
    texts = ["a red fox", "\u7ea2\u8272\u7684\u72d0\u72f8", "\u84dd\u9cb8", "a dog"]
    captions = write_captions(tmp_path / "captions.parquet", [*texts, texts[1]])
    job = write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=5)
    known = "; 60.0 % of the captions have words that it does not know"
    counted = "captions with words unknown to t5: 3"
    said = expect(0, "plan", job)
    assert re.search(rf"^WARNING +tokenizer .*{known}", said, re.MULTILINE)
    assert f"{counted}, such as {captions}, row 1 " in said
    _, summary, log = call("run", str(job))
    assert known in log
    assert counted in summary
    assert counted in expect(0, "info", tmp_path / "out")
    dataset = EmbeddingDataset(tmp_path / "out")
    assert torch.equal(dataset[1]["text_t5"], dataset[2]["text_t5"])
    assert not torch.equal(dataset[1]["text_clip"], dataset[2]["text_clip"])
