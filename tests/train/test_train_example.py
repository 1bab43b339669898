"""The worked training example: it learns from our datasets, and minds seq_align."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import call, write_captions, write_job

import train_example
from embed_precompute import EmbeddingDataset
from embed_precompute.errors import InputError

VIDEO_TOKENS = 2 * 2 * 3  # of train_example.LATENT_SHAPE with its patch size


@pytest.fixture(scope="module")
def made(tmp_path_factory: Any, corpus: list[str], tiny_t5: Path, tiny_clip: Path) -> Any:
    def make(num_captions: int, **fields: Any) -> EmbeddingDataset:
        folder = tmp_path_factory.mktemp("example")
        captions = write_captions(folder / "captions.parquet", corpus[:num_captions])
        code, _, said = call("run", str(write_job(folder, captions, tiny_t5, tiny_clip, **fields)))
        assert code == 0, said
        return EmbeddingDataset(folder / "out")

    return make


def trainer(dataset: EmbeddingDataset, seq_align: int = 1) -> train_example.Trainer:
    return train_example.Trainer(dataset, 8, seq_align, torch.device("cpu"), seed=0)


@pytest.fixture(scope="module")
def plain(made: Any) -> EmbeddingDataset:
    dataset: EmbeddingDataset = made(24)
    return dataset


def test_it_learns_and_uses_its_condition(plain: EmbeddingDataset) -> None:
    run = trainer(plain)
    losses = run.train(200)
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert run.evaluate(0.0) < 0.9 * run.evaluate(1.0), "captions lower the loss"
    assert trainer(plain).train(3) == trainer(plain).train(3)


def test_seq_align_must_be_the_datasets(plain: EmbeddingDataset, made: Any) -> None:
    said = f"seq_align 5 and encoders.t5.added_tokens {VIDEO_TOKENS}"
    with pytest.raises(InputError, match=said):
        trainer(plain, seq_align=5).train(1)
    fitting = made(8, seq_align=5, added_tokens=VIDEO_TOKENS)
    assert fitting[0]["text_t5"].shape[0] == 28  # 24, padded until it fits
    assert fitting.null["text_t5"].shape[0] == 25  # padded with 0 added tokens, as Open-Sora's
    assert len(trainer(fitting, seq_align=5).train(2)) == 2


def test_what_it_cannot_train_on_is_said(made: Any) -> None:
    with pytest.raises(SystemExit, match="attention_mask none"):
        trainer(made(8, attention_mask="padding"))
