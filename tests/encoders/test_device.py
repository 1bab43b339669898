"""The machine: which device, what cannot run on it, and the check before the first unit."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jobs import call, write_captions, write_job

from embed_precompute.encoders import device
from embed_precompute.encoders.device import difference, distance, log_device, resolve_device
from embed_precompute.encoders.encoder import FusedEncoder
from embed_precompute.errors import InputError


@pytest.fixture
def job(tmp_path: Path, tiny_t5: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", ["a red fox", "x", "two cats"])
    return write_job(tmp_path, captions, tiny_t5, None)


@pytest.mark.parametrize(
    ("setting", "count", "expected"),
    [
        *(("auto", 0, "cpu"), ("cpu", 4, "cpu"), ("auto", 4, "cuda:1"), ("cuda", 4, "cuda:1")),
        *(("cuda:3", 4, "cuda:3"), ("cuda", 0, None), ("cuda:4", 4, None)),
    ],
)
def test_which_device(
    monkeypatch: pytest.MonkeyPatch, setting: str, count: int, expected: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda name: "a GPU")
    if expected is None:
        with pytest.raises(InputError, match=rf"{setting} but torch .* sees {count} GPUs: instal"):
            resolve_device(setting, 5)
    else:
        assert resolve_device(setting, 5) == expected


@pytest.mark.parametrize(("cuda", "level"), [("12.4", "WARNING"), (None, "INFO")])
def test_a_cpu_in_a_gpus_place_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cuda: Any, level: str
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with caplog.at_level(logging.INFO, logger="embed_precompute"):
        log_device("auto", "cpu")
    (record,) = caplog.records
    assert record.levelname == level
    assert record.message.startswith("device: cpu")


def test_a_large_encoder_runs_on_a_cpu_only_when_asked_to(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "LARGE", 1000)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, said = call("run", str(job), "--runtime.device", "auto")
    assert code == 2
    assert "encoders.t5 has 0.0 billion parameters, and torch" in said
    assert "set runtime.device cpu" in said
    assert not (tmp_path / "out" / "plan.json").exists()
    assert call("plan", str(job), "--runtime.device", "auto")[0] == 0  # a login node
    assert call("run", str(job))[0] == 0  # its device is cpu


def test_compile_without_a_compiler_is_one_line(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    words = ("--encoders.t5.compile", "true")
    assert call("plan", str(job), *words)[0] == 0
    code, _, said = call("run", str(job), *words)
    assert code == 2
    assert "encoders.t5.compile is true, and torch.compile needs a C++ compiler" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out" / "plan.json").exists()


def test_compile_on_a_gpu_needs_torch_2_5(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = SimpleNamespace(implementation="fused", compiled=True)
    encoder: Any = SimpleNamespace(opened=SimpleNamespace(where="encoders.t5"), decision=decision)
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(device, "has_flex_attention", lambda: False)
    with pytest.raises(InputError, match=r"compile is true, and on a GPU that needs torch 2\.5"):
        device.check_machine("cuda", "cuda:0", [encoder])
    device.check_machine("cpu", "cpu", [encoder])


def test_the_self_check_stops_a_run_that_would_compute_wrong(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FusedEncoder.forward

    def wrong(self: FusedEncoder, batch: Any) -> dict[str, torch.Tensor]:
        return {name: values.flip(0) for name, values in original(self, batch).items()}

    monkeypatch.setattr(FusedEncoder, "forward", wrong)
    code, _, said = call("run", str(job), "--runtime.self_check", "always")
    assert code == 2
    assert "encoders.t5: self-check failed on cpu" in said
    assert f"torch {torch.__version__}" in said
    assert "Set implementation hf with a new output.path" in said
    assert not list((tmp_path / "out").glob("shards/*/*"))
    assert call("run", str(job))[0] == 0  # auto: not on a CPU


def test_difference_and_distance() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert distance(a, a) == (0.0, 1.0)
    assert distance(2 * a, a) == (1.0, 1.0)
    assert distance(-a, a)[1] == -1.0
    assert distance(torch.tensor([1.0, torch.nan]), torch.ones(2)) == (torch.inf, -1.0)
    assert difference(a, a, exact=True) is None
    assert difference(a * 1.001, a, exact=False) is None
    found = difference(a * 1.001, a, exact=True)
    assert found == "a relative difference of 1.00e-03 (at most 1e-05)"
    assert "a cosine of 0.96" in str(difference(a.flip(1), a, exact=False))
    assert "shape [2], not [2, 2]" in str(difference(a[0], a, exact=False))
    assert "inf" in str(difference(a / 0, a, exact=True))
    assert difference(a[:0], a[:0], exact=True) is None
