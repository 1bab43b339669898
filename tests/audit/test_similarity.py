"""Similar captions: against a brute-force search, and through an embedder."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from handmade import write_dataset, write_units
from jobs import call, expect, write_captions, write_job

from embed_precompute import EmbeddingDataset, HFEmbedder, nearest_captions, prompt_similarity
from embed_precompute.audit.similarity import cosine
from embed_precompute.errors import IncompleteError, InputError

REPEATED = 3
"""The caption, by number, that more samples have."""


@pytest.fixture(scope="module")
def texts(corpus: list[str]) -> list[str | None]:
    found: list[str | None] = list(dict.fromkeys(corpus))[:40]
    found[7] = found[25] = found[38] = found[REPEATED]  # in its unit and in others
    found[20] = None
    return found


@pytest.fixture(scope="module")
def dataset(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str | None],
    tiny_t5: Path,
    tiny_clip: Path,
) -> Path:
    """40 samples in four units, padded to 24, so that pads are stored."""
    folder = tmp_path_factory.mktemp("similar")
    captions = write_captions(folder / "captions.parquet", texts)
    expect(0, "run", write_job(folder, captions, tiny_t5, tiny_clip))
    return folder / "out"


def vectors_of(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Per encoder, sample id -> the caption's vector of length 1."""
    manifest = pq.read_table(root / "manifest.parquet").to_pylist()
    tokens = {row["sample_id"]: row["t5_tokens"] for row in manifest}
    vectors: dict[str, dict[str, torch.Tensor]] = {"clip": {}, "t5": {}}
    for sample in EmbeddingDataset(root):
        mean = sample["text_t5"][: tokens[sample["id"]]].double().mean(0)
        vectors["t5"][sample["id"]] = mean / mean.norm()
        clip = sample["text_clip"].double()
        vectors["clip"][sample["id"]] = clip / clip.norm()
    return vectors


@pytest.mark.parametrize("sample_id", ["s0", f"s{REPEATED}", "s39"])
@pytest.mark.parametrize("top", [1, 5, 100])
def test_nearest_are_those_of_a_full_sort(
    dataset: Path, texts: list[str | None], sample_id: str, top: int
) -> None:
    own, vectors = texts[int(sample_id[1:])], vectors_of(dataset)
    first = {text: f"s{texts.index(text)}" for text in texts if text not in (None, own)}
    found = nearest_captions(dataset, sample_id, top)
    assert list(found) == ["clip", "t5"]
    values = {
        name: {i: float(by_id[sample_id] @ by_id[i]) for i in first.values()}
        for name, by_id in vectors.items()
    }
    for name, neighbours in found.items():
        ranked = sorted(first.values(), key=lambda i: -values[name][i])[:top]
        assert [near.sample_id for near in neighbours] == ranked
        for near in neighbours:
            assert first[near.text] == near.sample_id
            expected = {n: values[n][near.sample_id] for n in values}
            assert near.similarity == pytest.approx(expected, abs=1e-5)


def test_the_command(dataset: Path) -> None:
    code, out, said = call("info", str(dataset), "--similar", f"s{REPEATED}", "--top", "2")
    assert code == 0, said
    lines = out.splitlines()
    assert lines[0] == f"nearest to s{REPEATED} by text_clip (cosine similarity):"
    assert lines[3] == f"nearest to s{REPEATED} by text_t5 (cosine similarity):"
    assert len(lines) == 6
    nearest = nearest_captions(dataset, f"s{REPEATED}", 2)["t5"][0]
    values = f"{nearest.similarity['t5']:.4f}, clip {nearest.similarity['clip']:.4f}"
    assert lines[4] == f"  {values}  {nearest.sample_id}: {nearest.text!r}"


def test_what_has_no_neighbours(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its status is null_text"):
        nearest_captions(dataset, "s20")
    with pytest.raises(InputError, match="'nobody' is not in"):
        nearest_captions(dataset, "nobody")
    with pytest.raises(InputError, match="top is 0"):
        nearest_captions(dataset, "s0", 0)
    write_dataset(tmp_path / "alone", ["only one", None, "only one"])
    assert nearest_captions(tmp_path / "alone", "s0") == {"clip": [], "t5": []}
    assert "none: the dataset" in call("info", str(tmp_path / "alone"), "--similar", "s0")[1]
    write_units(tmp_path / "open", ["a", "b"])
    with pytest.raises(IncompleteError, match="not finished"):
        nearest_captions(tmp_path / "open", "s0")


# --- prompts -----------------------------------------------------------------------------------


def test_prompts(tiny_t5: Path, tiny_clip: Path, corpus: list[str]) -> None:
    """Section 9.1 of the document, for all pairs; T5's pads do not count."""
    prompts = [corpus[0], "a red fox", corpus[7], "a red fox", *corpus[20:30]]
    t5 = HFEmbedder(str(tiny_t5), max_length=40)
    clip = HFEmbedder(str(tiny_clip), max_length=77, hf_module="CLIPTextModel")
    for embedder in (t5, clip):
        found = prompt_similarity(embedder, prompts)
        assert found.shape == (14, 14)
        assert found.dtype == torch.float32
        assert torch.equal(found, found.T)
        assert torch.equal(found.diagonal(), torch.ones(14))
        assert found[1, 3] == pytest.approx(1, abs=1e-6)
        assert (found[0, 1] < 0.9999).item()
        vectors = [embedder([prompt])[0] for prompt in prompts[:2]]
        if embedder is t5:
            lengths = [len(t5.tokenizer(prompt)["input_ids"]) for prompt in prompts[:2]]
            vectors = [v[:n].mean(0) for v, n in zip(vectors, lengths, strict=True)]
        expected = torch.cosine_similarity(*vectors, dim=0)
        assert found[0, 1] == pytest.approx(expected.item(), abs=1e-5)


def test_no_prompts(tiny_t5: Path) -> None:
    for prompts in ([], "one string"):
        with pytest.raises(InputError, match="expected a list"):
            prompt_similarity(HFEmbedder(str(tiny_t5), max_length=40), prompts)


def test_cosine() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    b = torch.tensor([[6.0, 8.0], [-4.0, 3.0], [-3.0, -4.0]])
    assert cosine(a, b).tolist() == [[1.0, 0.0, -1.0], [0.0, 0.0, 0.0]]
