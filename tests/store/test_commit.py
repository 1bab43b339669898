"""Commits: order, first wins, names by content, modes, faults."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from breaking import raiser
from handmade import leftovers

from embed_precompute.store.commit import (
    StagedFile,
    content_name,
    publish_bytes,
    publish_bytes_by_content,
    remove_dead,
    remove_leftovers,
    this_host,
)


@pytest.mark.parametrize("no_links", [None, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_publish_first_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_links: int | None
) -> None:
    """Also on a file system without hard links."""
    if no_links is not None:
        monkeypatch.setattr(os, "link", raiser(no_links))
    target = tmp_path / "a" / "b" / "x.json"
    assert publish_bytes(target, b"one")
    assert publish_bytes(target, b"one")
    assert not publish_bytes(target, b"two")
    assert not publish_bytes(target, b"longer")
    assert target.read_bytes() == b"one"
    assert os.stat(target).st_nlink == 1
    assert leftovers(tmp_path) == []


def test_data_is_named_by_its_content(tmp_path: Path) -> None:
    """Equal bytes keep the file that is there; other bytes under the name are damage."""
    digest = hashlib.sha256(b"one").hexdigest()
    assert content_name("a.rows.parquet", digest) == f"a-{digest[:16]}.rows.parquet"
    stored = publish_bytes_by_content(tmp_path / "a.rows.parquet", b"one")
    path = tmp_path / f"a-{digest[:16]}.rows.parquet"
    assert (stored.name, stored.bytes, stored.sha256) == (path.name, 3, digest)
    inode = path.stat().st_ino
    publish_bytes_by_content(tmp_path / "a.rows.parquet", b"one")
    assert path.stat().st_ino == inode
    for damage in (b"two", b"longer", b""):
        path.write_bytes(damage)
        publish_bytes_by_content(tmp_path / "a.rows.parquet", b"one")
        assert path.read_bytes() == b"one"
    path.unlink()
    os.mkfifo(path)  # opening it would block
    publish_bytes_by_content(tmp_path / "a.rows.parquet", b"one")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"one"


@pytest.mark.parametrize("name", ["link", "rename"])
def test_failure_reported_after_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A retried network request may report an error for what it did."""
    original = getattr(os, name)

    def late(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        raise FileExistsError(errno.EEXIST, "late")

    if name == "rename":
        monkeypatch.setattr(os, "link", raiser(errno.EPERM))
    monkeypatch.setattr(os, name, late)
    assert publish_bytes(tmp_path / "x", b"one")
    assert leftovers(tmp_path) == []


def test_staged_file_removed_by_finaliser(tmp_path: Path) -> None:
    """The unit was committed by another, whose finalize swept up our temporary file."""
    target = tmp_path / "x"
    with StagedFile(target) as staged, StagedFile(target) as other, StagedFile(target) as third:
        staged.write(b"one")
        other.write(b"two")
        third.write(b"one")
        publish_bytes(target, b"one")
        remove_leftovers(tmp_path)
        assert staged.publish()
        assert not other.publish()
        assert not third.replace()


def test_file_size_limit(tmp_path: Path) -> None:
    """A real limit: the kernel writes part of a row and then fails."""
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from embed_precompute.store.commit import publish_bytes\n"
        "from embed_precompute.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: publish_bytes(Path(sys.argv[1]), bytes(1500))\n"
        "except StorageError as error: print(error)\n"
    )
    run = [sys.executable, "-c", code, str(tmp_path / "x")]
    result = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "writing at byte 1000 failed" in result.stdout
    assert "needs 1500 bytes" in result.stdout
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_written_meanwhile_are_not_taken_for_a_dead_writers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread stages a file after `remove_dead` has begun."""
    files: list[StagedFile] = []
    original = os.listdir

    def listing(folder: Path) -> list[str]:
        if folder == tmp_path and not files:
            files.append(StagedFile(tmp_path / "x"))
        return original(folder)

    monkeypatch.setattr(os, "listdir", listing)
    assert remove_dead(tmp_path) == 0
    assert files[0].publish()
    dead = tmp_path / f".tmp-y-{this_host()}-{os.getpid()}-0123456789ab"
    dead.touch()
    assert remove_dead(tmp_path) == 1
