"""verify --level deep: does plain transformers still give what is stored?"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import call, expect, write_captions, write_job

from embed_precompute.audit import verify as verify_module
from embed_precompute.encoders import shardformer
from embed_precompute.encoders.families import FAMILIES

TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(30)]


def test_deep_compares_samples_and_the_null_embedding(root: Path) -> None:
    said = expect(0, "verify", root, "--level", "deep", "--sample", "9", "--seed", "5")
    assert "9 samples and the null embedding encoded again by plain transformers (seed 5)" in said
    assert "20 embeddings within the tolerance" in said
    assert "30 samples" in expect(0, "verify", root, "--level", "deep", "--sample", "1000")


@pytest.mark.parametrize(
    ("attention_mask", "dtype"), [("none", "bfloat16"), ("padding", "float32")]
)
def test_deep_in_half_precision_and_with_padding(
    tmp_path: Path, tiny_t5: Path, attention_mask: str, dtype: str
) -> None:
    """Also where float32 is stored in half precision."""
    captions = write_captions(tmp_path / "captions.parquet", [*TEXTS, None, TEXTS[0], ""])
    job = write_job(
        tmp_path, captions, tiny_t5, None, dtype=dtype, attention_mask=attention_mask, seq_align=1
    )
    expect(0, "run", job, "--output.dtype", "bfloat16")
    said = expect(0, "verify", tmp_path / "out", "--level", "deep", "--sample", "100")
    assert "33 embeddings within the tolerance" in said


def disturb(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """The references give other numbers than they did."""
    for family in FAMILIES.values():
        original = family.reference

        def reference(*arguments: Any, original: Any = original) -> Any:
            encode = original(*arguments)
            return lambda *given: {name: change(v) for name, v in encode(*given).items()}

        patch.setattr(family, "reference", reference, raising=False)


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (1 + 1e-6, None),
        (1 + 1e-4, "with a relative difference of "),
        (torch.nan, "with a relative difference of inf"),
    ],
)
def test_deep_finds_what_the_digests_cannot(
    root: Path, monkeypatch: pytest.MonkeyPatch, factor: float, words: str | None
) -> None:
    """Every stored byte is as it was written; the encoder was another one."""
    disturb(monkeypatch, lambda values: values * factor)
    expect(0, "verify", root)
    code, said, _ = call("verify", str(root), "--level", "deep", "--sample", "5")
    assert code == (0 if words is None else 4), said
    assert words is None or said.count(words) == 12


def test_other_lengths_are_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(monkeypatch, lambda values: values[:-1] if values.dim() == 2 else values)
    said = expect(4, "verify", root, "--level", "deep", "--sample", "1")
    assert "text_t5 of the empty caption with shape [1, 64], not [0, 64]" in said


def test_deep_needs_no_implementation_but_transformers(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dataset of another stack: ColossalAI is not needed to check what it made."""
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    job = write_job(tmp_path, captions, tiny_t5, None, implementation="shardformer")
    with monkeypatch.context() as patch:
        patch.setattr(shardformer, "check_usable", lambda *_: None)
        patch.setattr(shardformer, "shardformer_t5", lambda model: model)
        patch.setattr("embed_precompute.encoders.device.environment", lambda *_: {})
        patch.setattr("embed_precompute.job.run.environment", lambda *_: {"torch": "0"})
        expect(0, "run", job)
    expect(0, "verify", tmp_path / "out", "--level", "deep")


def test_deep_needs_the_checkpoint_of_the_dataset(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so at once, and not in place of what hours of checking have found."""
    config = root / "config.yaml"
    text = config.read_text()
    # config.yaml may name a hub id or a folder that has moved; run.json has where it was.
    folder = json.loads((root / "run.json").read_bytes())["checkpoints"]["t5"]
    assert folder in text
    config.write_text(text.replace(f"pretrained: {folder}", "pretrained: owner/t5"))
    expect(0, "verify", root, "--level", "deep", "--sample", "2")
    monkeypatch.setattr(verify_module, "check_unit", lambda *_, **__: pytest.fail("it has begun"))
    config.write_text(text.replace("max_length: 24", "max_length: 23"))
    assert "max_length: 24 -> 23" in expect(3, "verify", root, "--level", "deep")
    config.unlink()
    assert "config.yaml" in expect(2, "verify", root, "--level", "deep")
