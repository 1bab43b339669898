"""prepare, prepare_ids and condition dropout against the document's definitions, written out."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from handmade import write_dataset
from jobs import clean_environment
from torch import Tensor

from embed_precompute import EmbeddingDataset, dropout_condition, prepare, prepare_ids
from embed_precompute.errors import InputError
from embed_precompute.train.inputs import pad_null, position_ids

LENGTH, WIDTH, POOLED = 5, 3, 4


def vector(text: str, position: int, size: int) -> list[float]:
    """Any numbers that follow from the text and the position alone."""
    rng = random.Random(f"{text}:{position}")
    return [rng.uniform(-1, 1) for _ in range(size)]


class FakeT5:
    """[B, L, D]; pads as the document's section 2.3 says, and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[str], int, int]] = []

    def __call__(self, text: list[str], added_tokens: int = 0, seq_align: int = 1) -> Tensor:
        self.calls.append((text, added_tokens, seq_align))
        length = LENGTH
        while (added_tokens + length) % seq_align != 0:
            length += 1
        return torch.tensor([[vector(t, i, WIDTH) for i in range(length)] for t in text])


def fake_clip(text: list[str]) -> Tensor:
    return torch.tensor([vector(t, -1, POOLED) for t in text])


def written_out(
    img: Tensor, txt: Tensor, vec: Tensor, batch: int, patch: int
) -> dict[str, list[Any]]:
    """Section 4 of the document, number by number. Latents, texts and vectors are taken in turn."""
    _, channels, frames, height, width = img.shape
    out: dict[str, list[Any]] = {"img": [], "img_ids": [], "txt": [], "txt_ids": [], "y_vec": []}
    for b in range(batch):
        patches, places = [], []
        for t in range(frames):
            for row in range(height // patch):
                for column in range(width // patch):
                    places.append([float(t), float(row), float(column)])
                    patches.append(
                        [
                            img[b % img.shape[0], c, t, row * patch + y, column * patch + x].item()
                            for c in range(channels)
                            for y in range(patch)
                            for x in range(patch)
                        ]
                    )
        text = txt[b % txt.shape[0]].tolist()
        out["img"].append(patches)
        out["img_ids"].append(places)
        out["txt"].append(text)
        out["txt_ids"].append([[0.0, 0.0, 0.0] for _ in text])
        out["y_vec"].append(vec[b % vec.shape[0]].tolist())
    return out


def check(found: dict[str, Tensor], expected: dict[str, list[Any]], dtype: torch.dtype) -> None:
    """Exactly equal, in names, shapes, dtype and every number (rounded to `dtype` where given)."""
    assert list(found) == ["img", "img_ids", "txt", "txt_ids", "y_vec"]
    for name, values in expected.items():
        tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
        assert found[name].dtype == dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def random_case(seed: int) -> tuple[Tensor, str | list[str], int, int]:
    """Latents, prompt, seq_align and patch size."""
    rng = random.Random(seed)
    patch = rng.choice([1, 2, 2, 3, 4])
    batch = rng.randint(1, 3)
    shape = [batch, rng.randint(1, 4), rng.randint(1, 4)]
    shape += [patch * rng.randint(1, 4), patch * rng.randint(1, 4)]
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float64])
    img = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    kind = rng.choice(["one", "listed one", "each", "guidance"])
    if kind == "one":
        return img, "a red fox", rng.choice([1, 2, 4, 8]), patch
    number = {"listed one": 1, "each": batch, "guidance": 3 * batch}[kind]
    return img, [f"prompt {i}" for i in range(number)], rng.choice([1, 2, 4, 8]), patch


@pytest.mark.parametrize("seed", range(50))
def test_prepare_is_the_documents_definition(seed: int) -> None:
    img, prompt, seq_align, patch = random_case(seed)
    t5 = FakeT5()
    found = prepare(t5, fake_clip, img, prompt, seq_align=seq_align, patch_size=patch)
    prompts = [prompt] if isinstance(prompt, str) else prompt
    batch = max(len(img), len(prompts))
    _, _, frames, height, width = img.shape
    num_patches = frames * (height // patch) * (width // patch)
    assert t5.calls == [(prompts, num_patches, seq_align)], "each prompt is encoded once"
    txt, vec = FakeT5()(prompts, num_patches, seq_align), fake_clip(prompts)
    assert (txt.shape[1] + num_patches) % seq_align == 0
    expected = written_out(img, txt, vec, batch, patch)
    check(found, expected, img.dtype)
    # The same from embeddings that were computed before, for latents that are a batch already.
    repeated = torch.cat([img] * (batch // len(img)))
    cached = prepare_ids(repeated, txt, vec, patch_size=patch, seq_align=seq_align)
    check(cached, expected, img.dtype)


def test_defaults_are_open_soras() -> None:
    img = torch.randn(2, 3, 2, 4, 6)
    found = prepare_ids(img, torch.randn(1, 7, WIDTH), torch.randn(1, POOLED))
    assert {name: list(tensor.shape) for name, tensor in found.items()} == {
        "img": [2, 12, 12],
        "img_ids": [2, 12, 3],
        "txt": [2, 7, WIDTH],
        "txt_ids": [2, 7, 3],
        "y_vec": [2, POOLED],
    }
    assert position_ids(2, 2, 3).tolist()[-1] == [1, 1, 2]


def test_with_real_encoders(tiny_t5: Path, tiny_clip: Path) -> None:
    """Section 7.3 of the document, on four clips; cached embeddings give the same tensors."""
    from embed_precompute import HFEmbedder

    t5 = HFEmbedder(str(tiny_t5), max_length=30)
    clip = HFEmbedder(str(tiny_clip), max_length=77, hf_module="CLIPTextModel")
    img = torch.randn(4, 4, 1, 6, 10)  # 15 tokens
    found = prepare(t5=t5, clip=clip, img=img, prompt="a fox", seq_align=4, patch_size=2)
    assert found["txt"].shape[:2] == (4, 33)
    assert found["y_vec"].shape[0] == 4
    cached = prepare_ids(img, t5(["a fox"], 15, 4), clip(["a fox"]), patch_size=2, seq_align=4)
    assert all(torch.equal(found[name], cached[name]) for name in found)


def test_an_embedding_that_does_not_fit_says_what_to_precompute() -> None:
    img, vec = torch.randn(1, 2, 1, 6, 10), torch.randn(1, POOLED)
    prepare_ids(img, torch.randn(1, 33, 4), vec, seq_align=4)
    with pytest.raises(InputError) as raised:
        prepare_ids(img, torch.randn(1, 32, 4), vec, seq_align=4)
    said = str(raised.value)
    assert "32 vectors and the video 15 tokens: 47 together, no multiple of seq_align 4" in said
    assert "encoders.t5.seq_align 4 and encoders.t5.added_tokens 15" in said


@pytest.mark.parametrize(
    ("shape", "options", "said"),
    [
        ((1, 2, 1, 5, 4), {}, "5 x 4 do not divide into patches of 2 x 2"),
        ((1, 2, 4, 4), {}, r"expected \[B, C, T, H, W\]"),
        ((1, 2, 0, 4, 4), {}, r"expected \[B, C, T, H, W\]"),
        ((1, 2, 1, 4, 4), {"patch_size": 0}, "patch_size is 0"),
        ((1, 2, 1, 4, 4), {"seq_align": 0}, "seq_align is 0"),
        ((3, 2, 1, 4, 4), {}, r"t5_embedding has shape \[2, 5, 3\].*batch 3, or 1"),
    ],
)
def test_shapes_that_do_not_fit(shape: tuple[int, ...], options: dict[str, int], said: str) -> None:
    batch = 2 if shape[0] == 3 else 1
    with pytest.raises(InputError, match=said):
        prepare_ids(torch.zeros(shape), torch.zeros(batch, 5, 3), torch.zeros(1, 4), **options)


def test_a_vector_in_place_of_a_sequence_is_refused() -> None:
    img = torch.zeros(1, 2, 1, 4, 4)
    with pytest.raises(InputError, match=r"clip_embedding has shape \[1, 5, 3\]: expected \[B, C"):
        prepare_ids(img, torch.zeros(1, 5, 3), torch.zeros(1, 5, 3))


@pytest.mark.parametrize("number", [0, 2, 4])
def test_prompts_that_do_not_fit_the_batch(number: int) -> None:
    with pytest.raises(InputError, match=f"{number} prompts for latents of batch 3"):
        prepare(FakeT5(), fake_clip, torch.zeros(3, 1, 1, 2, 2), ["x"] * number)


# --- condition dropout -------------------------------------------------------------------------


def dropped_by_hand(seed: int, prob: float, txt: Tensor, null: Tensor) -> Tensor:
    """Open-Sora's dropout: one draw per sample, the null's last vector repeated to the length."""
    draws = torch.rand(len(txt), generator=torch.Generator().manual_seed(seed))
    out = txt.clone()
    for b in range(len(txt)):
        if draws[b] < prob:
            if txt.ndim == 2:
                out[b] = null[0]
                continue
            for i in range(txt.shape[1]):
                out[b, i] = null[0, min(i, null.shape[1] - 1)]
    return out


@pytest.mark.parametrize("shape", [(64, 7, 3), (64, 3)])
@pytest.mark.parametrize("prob", [0.0, 0.31622777, 1.0])
def test_dropout_is_the_definition(shape: tuple[int, ...], prob: float) -> None:
    txt = torch.randn(shape)
    null = torch.randn(1, 5, 3) if len(shape) == 3 else torch.randn(1, 3)
    generator = torch.Generator().manual_seed(3)
    found = dropout_condition(prob, txt, null, generator)
    assert torch.equal(found, dropped_by_hand(3, prob, txt, null))
    torch.manual_seed(3)  # without a generator: torch's own, as Open-Sora
    assert torch.equal(dropout_condition(prob, txt, null[0]), found)
    num_dropped = int((found != txt).flatten(1).any(1).sum())
    assert num_dropped == {0.0: 0, 1.0: 64}.get(prob, num_dropped)
    if 0 < prob < 1:
        assert 8 <= num_dropped <= 32


def test_dropout_keeps_the_batchs_dtype() -> None:
    """Open-Sora does not cast its null: one in float32 would turn all training float32."""
    txt = torch.randn(4, 7, 3).bfloat16()
    found = dropout_condition(1.0, txt, torch.randn(1, 7, 3))
    assert found.dtype == torch.bfloat16


def test_pad_null_repeats_the_last_vector() -> None:
    null = torch.arange(6.0).view(1, 3, 2)
    assert pad_null(null, 3) is null
    assert pad_null(null, 5)[0].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    with pytest.raises(InputError, match="3 vectors, the batch 2"):
        pad_null(null, 2)


@pytest.mark.parametrize("null", [(1, 7, 4), (2, 7, 3), (3,), (1, 1, 7, 3)])
def test_a_null_of_another_shape_is_refused(null: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[1, 7, 3\]"):
        dropout_condition(0.5, torch.zeros(4, 7, 3), torch.zeros(null))
    with pytest.raises(InputError, match=r"probability is 1\.5"):
        dropout_condition(1.5, torch.zeros(4, 3), torch.zeros(3))


def test_dropout_from_a_dataset(tmp_path: Path) -> None:
    write_dataset(tmp_path, ["a b c", "d e f"])
    dataset = EmbeddingDataset(tmp_path)
    txt = torch.stack([sample["text_t5"] for sample in dataset])  # [2, 4, 4]; the null is [1, 4]
    found = dropout_condition(1.0, txt, dataset.null["text_t5"])
    assert torch.equal(found, dataset.null["text_t5"].expand(2, 4, 4))


def test_a_training_job_imports_no_transformers() -> None:
    code = (
        "import sys\n"
        "from embed_precompute import EmbeddingDataset, dropout_condition, prepare_ids\n"
        "heavy = {'transformers', 'pyarrow', 'jsonargparse'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
