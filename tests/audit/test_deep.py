"""verify --level deep: do the encoders still give what is stored?"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import call, write_captions, write_job

from embed_precompute.audit import reencode
from embed_precompute.audit import verify as verify_module
from embed_precompute.audit.reencode import distance
from embed_precompute.encoders import device as device_module
from embed_precompute.encoders import hf, shardformer
from embed_precompute.encoders.transfers import Pending
from embed_precompute.errors import InputError

TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(30)]


def test_deep_is_byte_equal_in_the_same_environment(root: Path) -> None:
    code, said, _ = call("verify", str(root), "--level", "deep", "--sample", "9", "--seed", "5")
    assert code == 0, said
    assert "9 samples and the null embedding encoded again (seed 5)" in said
    assert "20 embeddings byte-equal" in said
    code, said, _ = call("verify", str(root), "--level", "deep", "--sample", "1000")
    assert code == 0, said
    assert "30 samples" in said


@pytest.mark.parametrize("attention_mask", ["none", "padding"])
def test_deep_in_half_precision_and_with_padding(
    tmp_path: Path, tiny_t5: Path, attention_mask: str
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", [*TEXTS, None, TEXTS[0], ""])
    fields = {"dtype": "bfloat16", "attention_mask": attention_mask}
    job = write_job(tmp_path, captions, tiny_t5, None, **fields)
    assert call("run", str(job), "--output.dtype", "bfloat16")[0] == 0
    code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep", "--sample", "100")
    assert code == 0, said
    assert "33 embeddings byte-equal" in said


def disturb(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Of every implementation: another environment is compared with the reference."""
    original = Pending.wait

    def wait(self: Pending) -> Any:
        values = original(self)
        return change(values) if isinstance(values, torch.Tensor) else list(map(change, values))

    patch.setattr(Pending, "wait", wait)


def test_deep_finds_what_the_digests_cannot(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the encoder is another one than it was: every stored byte is as it was written."""
    disturb(monkeypatch, lambda values: values * (1 + 1e-6))
    assert call("verify", str(root))[0] == 0
    code, said, _ = call("verify", str(root), "--level", "deep", "--sample", "3")
    assert code == 4
    assert "in the same environment" in said


@pytest.mark.parametrize(("factor", "code"), [(1 + 1e-6, 0), (1 + 1e-4, 4), (torch.nan, 4)])
def test_deep_has_a_tolerance_in_another_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch, factor: float, code: int
) -> None:
    here = device_module.environment("cpu")
    monkeypatch.setattr(reencode, "environment", lambda *_: {**here, "device": "another"})
    disturb(monkeypatch, lambda values: values * factor)
    found, said, _ = call("verify", str(root), "--level", "deep", "--sample", "5")
    assert found == code, said
    expected = "within the tolerance" if code == 0 else f"relative difference of {factor - 1:.2e}"
    assert expected.replace("nan", "inf") in said


def test_another_release_of_ours_is_another_environment(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own layers may round otherwise in it: to one that does, nothing is damaged."""
    disturb(monkeypatch, lambda values: values * (1 + 1e-6))
    assert call("verify", str(root), "--level", "deep", "--sample", "5")[0] == 4
    monkeypatch.setattr(device_module, "__version__", "0.0.9")
    code, said, _ = call("verify", str(root), "--level", "deep", "--sample", "5")
    assert code == 0, said
    assert "within the tolerance" in said


@pytest.mark.parametrize("installed", [True, False])
def test_deep_of_an_implementation_that_needs_another_stack(
    installed: bool, tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ColossalAI is, its version is part of the environment; elsewhere hf stands in for it.

    Shardformer's numbers are those of hf, so here hf is made to pass for it.
    """
    version = importlib.metadata.version
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    job = write_job(tmp_path, captions, tiny_t5, None, implementation="shardformer")
    with monkeypatch.context() as patch:
        patch.setattr(shardformer, "check_usable", lambda *_: None)
        patch.setattr(shardformer, "build", hf.build)
        versions = {"colossalai": "0.5.0"}
        patch.setattr(importlib.metadata, "version", lambda n: versions.get(n) or version(n))
        assert call("run", str(job))[0] == 0
        if installed:
            disturb(patch, lambda values: values * (1 + 1e-6))
            code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep")
            assert code == 4
            assert "in the same environment" in said
    if not installed:
        monkeypatch.setattr(shardformer, "check_usable", _unusable)
        code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep")
        assert code == 0, said
        assert "31 embeddings byte-equal" in said


def _unusable(*_: str) -> None:
    raise InputError("ColossalAI is not installed")


def test_deep_needs_the_checkpoint_of_the_dataset(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so at once, and not in place of what hours of checking have found."""
    monkeypatch.setattr(verify_module, "check_unit", lambda *_, **__: pytest.fail("it has begun"))
    config = root / "config.yaml"
    text = config.read_text()
    config.write_text(text.replace("max_length: 24", "max_length: 23"))
    code, _, said = call("verify", str(root), "--level", "deep")
    assert code == 3, said
    assert "max_length: 24 -> 23" in said
    config.unlink()
    code, _, said = call("verify", str(root), "--level", "deep")
    assert code == 2, said
    assert "config.yaml" in said


def test_distance_of_two_embeddings() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    assert distance(a, a) == (0.0, 1.0)
    difference, cosine = distance(a, torch.tensor([[0.0, 2.0], [0.0, 0.0]]))
    assert (difference, cosine) == (1.0, 0.0)
