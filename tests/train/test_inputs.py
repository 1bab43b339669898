"""prepare, prepare_ids and condition dropout against the document's definitions, written out."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset

from embed_precompute import (
    ConditionDropout,
    EmbeddingDataset,
    HFEmbedder,
    JoinedDataset,
    collate_embeddings,
    dropout_condition,
    prepare,
    prepare_ids,
)
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
    cells = list(itertools.product(range(frames), range(height // patch), range(width // patch)))
    inside = list(itertools.product(range(channels), range(patch), range(patch)))
    out: dict[str, list[Any]] = {"img": [], "img_ids": [], "txt": [], "txt_ids": [], "y_vec": []}
    for b in range(batch):
        latents, text = img[b % len(img)].tolist(), txt[b % len(txt)].tolist()
        tokens = [
            [latents[c][t][row * patch + y][column * patch + x] for c, y, x in inside]
            for t, row, column in cells
        ]
        out["img"].append(tokens)
        out["img_ids"].append([list(map(float, cell)) for cell in cells])
        out["txt"].append(text)
        out["txt_ids"].append([[0.0, 0.0, 0.0] for _ in text])
        out["y_vec"].append(vec[b % len(vec)].tolist())
    return out


def check(found: dict[str, Tensor], expected: dict[str, list[Any]], dtype: torch.dtype) -> None:
    """Exactly equal, in names, shapes, dtype and every number (rounded to `dtype` where given)."""
    assert list(found) == ["img", "img_ids", "txt", "txt_ids", "y_vec"]
    for name, values in expected.items():
        tensor = torch.tensor(values, dtype=torch.float32).to(dtype)
        assert (found[name].dtype, found[name].shape) == (dtype, tensor.shape), name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("seed", range(30))
def test_prepare_is_the_documents_definition(seed: int) -> None:
    rng = random.Random(seed)
    patch, seq_align = rng.choice([1, 2, 2, 3, 4]), rng.choice([1, 2, 4, 8])
    shape = [rng.randint(1, 3), rng.randint(1, 4), rng.randint(1, 4)]
    shape += [patch * rng.randint(1, 4), patch * rng.randint(1, 4)]
    img = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    img = img.to(rng.choice([torch.float32, torch.bfloat16, torch.float64]))
    number = rng.choice([0, 1, len(img), 3 * len(img)])
    prompts = [f"prompt {i}" for i in range(number)] or ["a red fox"]
    t5, batch = FakeT5(), max(len(img), len(prompts))
    found = prepare(
        t5, fake_clip, img, prompts if number else prompts[0], seq_align, patch_size=patch
    )
    num_patches = shape[2] * (shape[3] // patch) * (shape[4] // patch)
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
    shapes = {"img": (2, 12, 12), "img_ids": (2, 12, 3), "txt": (2, 7, WIDTH), "txt_ids": (2, 7, 3)}
    assert {n: tuple(t.shape) for n, t in found.items()} == {**shapes, "y_vec": (2, POOLED)}
    assert position_ids(2, 2, 3).tolist()[-1] == [1, 1, 2]


def test_with_real_encoders(tiny_t5: Path, tiny_clip: Path) -> None:
    """Section 7.3 of the document, on four clips; cached embeddings give the same tensors."""
    t5 = HFEmbedder(str(tiny_t5), max_length=30)
    clip = HFEmbedder(str(tiny_clip), max_length=77, hf_module="CLIPTextModel")
    img = torch.randn(4, 4, 1, 6, 10)  # 15 tokens
    found = prepare(t5=t5, clip=clip, img=img, prompt="a fox", seq_align=4, patch_size=2)
    assert found["txt"].shape[:2] == (4, 33)
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
    with pytest.raises(InputError, match=r"clip_embedding has shape \[1, 5, 3\]: expected \[B, C"):
        prepare_ids(torch.zeros(1, 2, 1, 4, 4), torch.zeros(1, 5, 3), torch.zeros(1, 5, 3))


def test_prompts_that_do_not_fit_the_batch() -> None:
    for number in (0, 2, 4):
        with pytest.raises(InputError, match=f"{number} prompts for latents of batch 3"):
            prepare(FakeT5(), fake_clip, torch.zeros(3, 1, 1, 2, 2), ["x"] * number)


# --- condition dropout -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 7, 3), (64, 3)])
@pytest.mark.parametrize("prob", [0.0, 0.31622777, 1.0])
def test_dropout_condition_is_open_soras(shape: tuple[int, ...], prob: float) -> None:
    txt, null = torch.randn(shape), torch.randn(1, *shape[1:])
    draws = torch.rand(64, generator=torch.Generator().manual_seed(3))
    expected = torch.stack([null[0] if draws[b] < prob else txt[b] for b in range(64)])
    found = dropout_condition(prob, txt, null, torch.Generator().manual_seed(3))
    assert torch.equal(found, expected)
    torch.manual_seed(3)  # without a generator: torch's own, as Open-Sora
    assert torch.equal(dropout_condition(prob, txt, null[0]), expected)


def test_dropout_keeps_the_batchs_dtype() -> None:
    """Open-Sora does not cast its null: one in float32 would turn all training float32."""
    txt = torch.randn(4, 7, 3).bfloat16()
    assert dropout_condition(1.0, txt, torch.randn(1, 7, 3)).dtype == torch.bfloat16


def test_a_null_of_another_shape_is_refused() -> None:
    """Another length too: only the dataset knows whether its last vector is a pad's."""
    for null in ((1, 7, 4), (2, 7, 3), (3,), (1, 1, 7, 3), (1, 1, 3), (1, 6, 3)):
        with pytest.raises(InputError, match=r"expected \[1, 7, 3\].*ConditionDropout"):
            dropout_condition(0.5, torch.zeros(4, 7, 3), torch.zeros(null))
    with pytest.raises(InputError, match=r"probability is 1\.5"):
        dropout_condition(1.5, torch.zeros(4, 3), torch.zeros(3))


def test_pad_null_repeats_the_last_vector() -> None:
    null = torch.arange(6.0).view(1, 3, 2)
    assert pad_null(null, 3) is null
    assert pad_null(null, 5)[0].tolist() == [[0, 1], [2, 3], [4, 5], [4, 5], [4, 5]]
    with pytest.raises(InputError, match="3 vectors, the batch 2"):
        pad_null(null, 2)


class MadeUp(EmbeddingDataset):
    """A dataset with a null embedding and a mask of its own; nothing of it is on a disk."""

    def __init__(self, null: dict[str, Tensor], masked: bool) -> None:
        self._made_up, self._is_masked = null, masked

    @property
    def null(self) -> dict[str, Tensor]:
        return self._made_up

    def positions(self, tensor: str) -> Any:
        if tensor != "text_t5":
            return None
        return "real" if self._is_masked else "all"


def batch_of(lengths: list[int]) -> dict[str, Any]:
    """A batch of sequences of these lengths, zeros after them, and of vectors."""
    samples = [
        {"id": f"s{i}", "text_t5": torch.randn(n, 3), "text_clip": torch.randn(2)}
        for i, n in enumerate(lengths)
    ]
    return collate_embeddings(samples)


def as_at_inference(null: Tensor, masked: bool, length: int, padded: int) -> list[list[float]]:
    """What the model is given for an empty prompt in the place of a caption of `length`."""
    vectors = null.tolist()
    if not masked:
        vectors += [vectors[-1]] * (length - len(vectors))
    return vectors + [[0.0] * 3] * (padded - len(vectors))


@pytest.mark.parametrize("null_length", [1, 4])
@pytest.mark.parametrize("masked", [True, False])
def test_a_dropped_caption_is_the_empty_prompt(masked: bool, null_length: int) -> None:
    null = {"text_t5": torch.randn(null_length, 3), "text_clip": torch.randn(2)}
    batch = batch_of([5, 7, 6] if null_length == 4 else [3, 1, 2])
    padded = batch["text_t5"].shape[1]
    dropout = ConditionDropout(MadeUp(null, masked), {"text_t5": 0.5, "text_clip": 0.5})
    seen: set[bool] = set()
    for seed in range(8):
        found = dropout(batch, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        of_t5, of_clip = (torch.rand(3, generator=generator) < 0.5 for _ in range(2))
        assert found["id"] == batch["id"]
        for i in range(3):
            length = int(batch["text_t5_length"][i])
            wanted = batch["text_t5"][i].tolist()
            if of_t5[i]:
                wanted = as_at_inference(null["text_t5"], masked, length, padded)
                length = null_length if masked else length
            assert found["text_t5"][i].tolist() == wanted
            assert found["text_t5_length"][i] == length
            assert found["text_t5_mask"][i].tolist() == [k < length for k in range(padded)]
            wanted = null["text_clip"] if of_clip[i] else batch["text_clip"][i]
            assert torch.equal(found["text_clip"][i], wanted)
        seen |= {bool(of_t5[0]), bool(of_clip[1])}
    assert seen == {True, False}


def test_a_masked_batch_grows_to_the_empty_prompt() -> None:
    """Prompt templates make it several tokens long."""
    null = {"text_t5": torch.randn(4, 3), "text_clip": torch.randn(2)}
    batch = batch_of([2, 1])
    found = ConditionDropout(MadeUp(null, True), 1.0)(batch)
    assert torch.equal(found["text_t5"], null["text_t5"].expand(2, 4, 3))
    assert found["text_t5_mask"].all()
    assert batch["text_t5"].shape[1] == 2, "the batch that was given is left alone"
    with pytest.raises(InputError, match="4 vectors, the batch 2"):
        ConditionDropout(MadeUp(null, False), 1.0)(batch)


def test_one_probability_drops_all_of_a_sample() -> None:
    null = {"text_t5": torch.zeros(1, 3), "text_clip": torch.zeros(2)}
    found = ConditionDropout(MadeUp(null, True), 0.5)(batch_of([2] * 200))
    t5_dropped, clip_dropped = found["text_t5_length"] == 1, (found["text_clip"] == 0).all(1)
    assert torch.equal(t5_dropped, clip_dropped)
    assert 60 < int(t5_dropped.sum()) < 140
    only_clip = ConditionDropout(MadeUp(null, True), {"text_clip": 1.0})(batch_of([2]))
    assert int(only_clip["text_t5_length"]) == 2


def test_a_batch_of_the_other_mask_is_refused() -> None:
    """It got the empty caption of another mask, with lengths and masks that were not its own."""
    null = {"text_t5": torch.randn(4, 3), "text_t5_token_mask": torch.tensor([True] + [False] * 3)}
    samples = [
        {"text_t5": torch.randn(n, 3), "text_t5_token_mask": torch.arange(n) < tokens}
        for n, tokens in ((4, 4), (3, 3), (4, 2), (4, 3))
    ]
    masked, unmasked = collate_embeddings(samples[:2]), collate_embeddings(samples[2:])
    of_masked, of_unmasked = (ConditionDropout(MadeUp(null, m), 0.5) for m in (True, False))
    of_masked(masked)
    of_unmasked(unmasked)
    of_unmasked(collate_embeddings(samples[:1]))  # a caption without pads is of either kind
    assert repr(of_masked) == "ConditionDropout({'text_t5': 0.5}, together)"
    with pytest.raises(InputError, match=r"positions all of .* one that stores real ones only"):
        of_unmasked(masked)
    with pytest.raises(InputError, match=r"positions real of .* one that stores pads too"):
        of_masked(unmasked)


def test_a_wrapped_dataset_gives_its_empty_caption() -> None:
    null = {"text_t5": torch.zeros(1, 3), "text_clip": torch.zeros(2)}
    joined = JoinedDataset.__new__(JoinedDataset)
    joined.embeddings = MadeUp(null, True)
    dropout = ConditionDropout(Subset(joined, [0]), 1.0)
    assert not dropout(batch_of([2]))["text_t5"].any()
    with pytest.raises(
        InputError, match="list is no EmbeddingDataset and has none as `embeddings`"
    ):
        ConditionDropout([], 0.1)


def test_what_cannot_be_dropped_is_said() -> None:
    made_up = MadeUp({"text_t5": torch.zeros(1, 3)}, True)
    with pytest.raises(InputError, match="has no text_clip, only text_t5"):
        ConditionDropout(made_up, {"text_clip": 0.1})
    with pytest.raises(InputError, match="probability is -1"):
        ConditionDropout(made_up, -1)
    with pytest.raises(InputError, match=r"no text_t5_length.*collate_embeddings"):
        ConditionDropout(made_up, 1.0)({"text_t5": torch.zeros(1, 2, 3)})
