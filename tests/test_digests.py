"""Digests of weights: one reader per node, and nobody waits for one that hangs."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from pathlib import Path

import pytest

from embed_precompute.encoders import digests
from embed_precompute.encoders.digests import file_sha256


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to digest; cache and lock in folders of this test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def hold(path: Path, release: threading.Event, held: threading.Event, known: str | None) -> None:
    """Be another rank of this node that reads `path` until `release`, and then knows `known`."""
    status = path.stat()
    key = [str(path), status.st_size, status.st_mtime_ns, status.st_ino]
    name = f"{digests.digest_of(key)}.json"
    with digests._one_reader(name, 60):
        held.set()
        release.wait(60)
        if known is not None:
            digests._remember(name, key, known)


@pytest.mark.parametrize("hangs", [False, True])
def test_one_rank_of_a_node_reads(
    weights: Path, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    release, held = threading.Event(), threading.Event()
    peer = threading.Thread(target=hold, args=(weights, release, held, None if hangs else "f" * 64))
    peer.start()
    assert held.wait(30)
    found: list[str] = []
    monkeypatch.setattr(digests, "LOCK_SLACK_S", 0.3 if hangs else 60.0)
    me = threading.Thread(target=lambda: found.append(file_sha256(weights)))
    me.start()
    if hangs:
        me.join(30)
        assert found == [hashlib.sha256(b"weights").hexdigest()]
    else:
        time.sleep(0.3)
        assert not found
    release.set()
    peer.join(30)
    me.join(30)
    assert hangs or found == ["f" * 64]


def test_a_home_that_cannot_be_written(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").write_bytes(b"no folder")
    first = file_sha256(weights)
    assert first == hashlib.sha256(b"weights").hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(digests, "_read", None)
        assert file_sha256(weights) == first


def test_a_folder_that_others_may_write_is_not_trusted(weights: Path) -> None:
    folder = digests._node_folder()
    assert folder is not None
    folder.chmod(0o777)
    assert digests._node_folder() is None
    assert file_sha256(weights) == hashlib.sha256(b"weights").hexdigest()
