"""The doctor: a sound machine passes, each fault is one line with what to do, nothing is left."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import call

from embed_precompute.encoders import trial
from embed_precompute.encoders.encoder import FusedEncoder

ATTEMPTS = ("write anywhere", "exclusive create", "hard link", "rename", "fsync", "long names")


def examined(folder: Path) -> tuple[int, dict[str, str]]:
    """The exit code, and each line by what it is about."""
    code, out, said = call("doctor", str(folder))
    assert "error" not in said  # how far it is may stand there
    return code, {line[6:].split(": ")[0]: line for line in out.splitlines()}


@pytest.fixture
def no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "try_implementations", lambda: iter(()))


def test_a_sound_machine_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, out, _ = call("doctor", str(tmp_path / "no" / "out"), "--json")
    report = json.loads(out)
    levels = {each["what"]: each["level"] for each in report["findings"]}
    assert code == 0
    assert report["usable"] is True
    assert f"PyTorch version: {torch.__version__}" in report["environment"]
    compiled = {each for each in levels if each.endswith("compile true")}
    assert compiled == {f"{kind} fused, compile true" for kind in ("t5", "clip", "decoder")}
    assert {name for name, level in levels.items() if level == "warn"} - {"GPU"} == compiled
    assert {
        *ATTEMPTS,
        "free space",
        "model cache",
        "t5 hf",
        "t5 fused",
        "clip hf",
        "clip fused",
    } < {*levels}
    said = {each["what"]: each for each in report["findings"]}["t5 fused, compile true"]
    assert "torch.compile needs a C++ compiler" in said["found"]
    assert said["advice"] == "Leave compile false."
    assert list(tmp_path.iterdir()) == []


def test_wrong_numbers_are_a_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = FusedEncoder.forward

    def wrong(self: FusedEncoder, batch: Any) -> dict[str, torch.Tensor]:
        return {name: values.flip(0) for name, values in original(self, batch).items()}

    monkeypatch.setattr(FusedEncoder, "forward", wrong)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    code, lines = examined(tmp_path)
    assert code == 2
    failed = {what for what, line in lines.items() if line.startswith("fail")}
    assert failed == {"t5 fused", "clip fused", "decoder fused"}
    assert "self-check failed on" in lines["t5 fused"]


def _refuses(code: int) -> Callable[..., Any]:
    def refuse(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


def _fsync_of_files_only(descriptor: int) -> None:
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def _in_order(descriptor: int, payload: memoryview, offset: int) -> int:
    """A mounted bucket: a file is written from its start to its end."""
    if offset != os.fstat(descriptor).st_size:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
    return os.write(descriptor, payload)


@pytest.mark.parametrize(
    ("owner", "name", "fake", "code", "expected"),
    [
        (os, "link", _refuses(errno.EPERM), 0, {"hard link": "warn"}),
        (os, "link", _refuses(errno.EIO), 2, {"hard link": "fail"}),
        (os, "link", lambda source, target: None, 2, {"hard link": "fail"}),
        (os, "fsync", _fsync_of_files_only, 0, {"fsync": "warn"}),
        (os, "fsync", _refuses(errno.EIO), 2, {"fsync": "fail", "long names": "fail"}),
        (os, "replace", _refuses(errno.EPERM), 2, {"rename": "fail", "long names": "fail"}),
        (Path, "touch", lambda self, exist_ok=True: self.write_bytes(b""), 2,
            {"exclusive create": "fail"}),
        (os, "pwrite", _in_order, 2, {"write anywhere": "fail"}),
        (tempfile, "mkdtemp", _refuses(errno.EACCES), 2, {"write": "fail"}),
    ],
)  # fmt: skip
def test_what_a_file_system_lacks(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    no_trials: None,
    owner: Any,
    name: str,
    fake: Any,
    code: int,
    expected: dict[str, str],
) -> None:
    monkeypatch.setattr(owner, name, fake)
    found, lines = examined(tmp_path)
    others = {what: line[:4].strip() for what, line in lines.items() if not line.startswith("ok")}
    others.pop("GPU", None)
    assert (found, others) == (code, expected)
    assert list(tmp_path.iterdir()) == []


def test_too_little_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_trials: None) -> None:
    monkeypatch.setattr("embed_precompute.audit.doctor.free_space", lambda folder: (10**9, 5))
    code, lines = examined(tmp_path)
    assert code == 2
    assert lines["free space"].startswith(f"fail  free space: {tmp_path}: 1.0 GB, 5 files. ")


def test_libraries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, no_trials: None) -> None:
    original = importlib.metadata.version
    other = {"transformers": "5.0.0", "ftfy": "5.0"}
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: other.get(name) or original(name)
    )
    required = ["transformers>=4.51.3,!=5.0.*,<6", "torch>=2", 'ftfy>=6.2; extra == "text"']
    required += ['colossalai==0.5.0; extra == "colossalai"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: required)
    monkeypatch.setitem(sys.modules, "embed_precompute.encoders.trial", None)
    code, lines = examined(tmp_path)
    assert code == 2
    assert lines["transformers"].startswith("fail  transformers: 5.0.0, expected ")
    assert lines["ftfy"].startswith("warn  ftfy: 5.0, expected >=6.2. Only presets with text_steps")
    assert "colossalai" not in lines
    assert lines["libraries"].startswith("fail  libraries: ModuleNotFoundError: ")


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, out, said = call("doctor", str(tmp_path / "file" / "out"))
    assert (code, out) == (2, "")
    assert f"DIR {tmp_path / 'file' / 'out'}: {tmp_path / 'file'} is not a folder" in said
