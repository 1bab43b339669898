"""Commits: order, first wins, modes, faults; sealed JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from store_case import (
    FINGERPRINT,
    TENSORS,
    fail_at,
    flips,
    leftovers,
    raiser,
    write_shard,
)

from embed_precompute.documents import digest_of
from embed_precompute.errors import (
    StorageError,
    VerificationError,
)
from embed_precompute.store import leftovers as leftover_files
from embed_precompute.store.commit import (
    Outcome,
    StagedFile,
    digest_file,
    publish_bytes,
    replace_bytes,
)
from embed_precompute.store.manifest import (
    unit_paths,
)
from embed_precompute.store.sealed import FORMAT_VERSION, read_sealed, seal
from embed_precompute.store.shards import ShardWriter


def test_publish_first_wins(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "x.json"
    assert publish_bytes(target, b"one") is Outcome.PUBLISHED
    assert publish_bytes(target, b"one") is Outcome.SAME
    assert publish_bytes(target, b"two") is Outcome.DIFFERENT
    assert publish_bytes(target, b"longer") is Outcome.DIFFERENT
    assert target.read_bytes() == b"one"
    assert os.stat(target).st_nlink == 1
    assert leftovers(tmp_path) == []


def test_replace_writes_only_what_differs(tmp_path: Path) -> None:
    target = tmp_path / "x"
    assert replace_bytes(target, b"one")
    inode = target.stat().st_ino
    assert not replace_bytes(target, b"one")
    assert target.stat().st_ino == inode
    assert replace_bytes(target, b"two")
    assert target.read_bytes() == b"two"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_follow_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        publish_bytes(tmp_path / "published", b"x")
        replace_bytes(tmp_path / "replaced", b"x")
        shard = tmp_path / "shard"
        with ShardWriter(shard, FINGERPRINT, 0, TENSORS, {"t5": []}, num_rows=0) as writer:
            writer.finish()
            writer.publish()
    finally:
        os.umask(before)
    for name in ("published", "replaced", "shard"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~umask


def test_commit_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync(file), close, link, fsync(folder); the folder is made durable in its parent too."""
    calls: list[tuple[str, str]] = []

    def traced(name: str) -> None:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            subject = os.readlink(f"/proc/self/fd/{args[0]}") if type(args[0]) is int else args[0]
            calls.append((name, Path(subject).name[:5]))
            return original(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "fsync", "close", "link", "unlink"):
        traced(name)
    publish_bytes(tmp_path / "folder" / "x", b"payload")
    parent, temp = tmp_path.name[:5], ".tmp-"
    assert calls[: calls.index(("unlink", temp))] == [
        *[("fsync", parent), ("close", parent)],
        *[("pwrite", temp), ("fsync", temp), ("close", temp), ("link", temp)],
    ]
    assert ("fsync", "folde") in calls[calls.index(("link", temp)) :]


def test_exception_drops_the_staged_file(tmp_path: Path) -> None:
    def fail() -> None:
        with StagedFile(tmp_path / "x") as staged:
            staged.write(b"abc")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_staged_file_writes_anywhere(tmp_path: Path) -> None:
    with StagedFile(tmp_path / "x") as staged:
        staged.pwrite(b"world", 6)
        staged.write(b"hello ")
        assert staged.pread(5, 6) == b"world"
        stored = staged.digest()
        staged.publish()
    assert stored == digest_file(tmp_path / "x")
    assert (stored.bytes, stored.sha256) == (11, hashlib.sha256(b"hello world").hexdigest())


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK])
def test_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    target = tmp_path / "x"
    assert publish_bytes(target, b"one") is Outcome.PUBLISHED
    assert publish_bytes(target, b"one") is Outcome.SAME
    assert publish_bytes(target, b"two") is Outcome.DIFFERENT
    assert target.read_bytes() == b"one"
    assert leftovers(tmp_path) == []


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
    assert publish_bytes(tmp_path / "x", b"one") is Outcome.PUBLISHED
    assert leftovers(tmp_path) == []


def test_staged_file_removed_by_finaliser(tmp_path: Path) -> None:
    """The unit was committed by another, whose finalize swept up our temporary file."""
    target = tmp_path / "x"
    with StagedFile(target) as staged, StagedFile(target) as other, StagedFile(target) as third:
        staged.write(b"one")
        other.write(b"two")
        third.write(b"one")
        publish_bytes(target, b"one")
        leftover_files.remove_leftovers(tmp_path)
        assert staged.publish() is Outcome.SAME
        assert other.publish() is Outcome.DIFFERENT
        assert not third.replace()


def test_publish_again_after_moving_the_other_away(tmp_path: Path) -> None:
    target = tmp_path / "x"
    publish_bytes(target, b"bad")
    with StagedFile(target) as staged:
        staged.write(b"good")
        assert staged.publish() is Outcome.DIFFERENT
        target.rename(tmp_path / "aside")
        assert staged.publish() is Outcome.PUBLISHED
    assert target.read_bytes() == b"good"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("name", ["pwrite", "fsync", "link", "mkdir"])
def test_storage_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    target = tmp_path / "folder" / "x"
    if name != "mkdir":
        target.parent.mkdir()
    monkeypatch.setattr(os, name, raiser(code))
    with pytest.raises(StorageError, match=errno.errorcode[code]) as caught:
        publish_bytes(target, b"payload")
    monkeypatch.undo()
    assert "folder" in str(caught.value)
    if name != "mkdir":
        assert f"{target}: " in str(caught.value)
        assert "needs 7 bytes" in str(caught.value)
    assert not target.exists()
    assert leftovers(tmp_path) == []
    assert publish_bytes(target, b"payload") is Outcome.PUBLISHED


def test_disk_full_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The n-th write, fsync, close or link fails, for all n: exit 74 and never a wrong file."""
    whole = write_shard(tmp_path / "whole", 0)[0].read_bytes()
    for name in ("pwrite", "fsync", "close", "link"):
        for n in range(100):
            folder = tmp_path / f"{name}-{n}"
            folder.mkdir()
            with monkeypatch.context() as patch:
                left = fail_at(patch, name, n)
                with contextlib.suppress(StorageError):  # anything else is a failure here
                    write_shard(folder, 0)
            path = unit_paths(folder, 0).shard
            assert not path.exists() or path.read_bytes() == whole
            assert write_shard(folder, 0)[0].read_bytes() == whole
            if left[0] >= 0:
                break
        else:
            pytest.fail("the calls do not end")


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


def test_sealed_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    obj = {"format_version": FORMAT_VERSION, "kind": "unit", "text": "é\n", "n": 1}
    path.write_bytes(seal(obj))
    assert read_sealed(path, "unit") == {**obj, "digest": digest_of(obj)}
    assert seal(read_sealed(path)) == path.read_bytes()
    with pytest.raises(VerificationError, match="kind 'unit': expected 'null'"):
        read_sealed(path, "null")
    with pytest.raises(FileNotFoundError):
        read_sealed(tmp_path / "absent")


def test_every_flipped_bit_of_sealed_json_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    payload = seal({"format_version": FORMAT_VERSION, "kind": "unit", "ab": [1, "x", None, True]})
    for _ in flips(path, payload, range(len(payload) * 8)):
        with pytest.raises(VerificationError, match=str(path)):
            read_sealed(path)
    for end in range(len(payload)):
        path.write_bytes(payload[:end])
        with pytest.raises(VerificationError, match=str(path)):
            read_sealed(path)


@pytest.mark.parametrize(
    "payload",
    [
        b"[" * 100_000,
        b"[]",
        b"NaN",
        b'{"format_version":1,"x":1e999}',
        b'{"format_version":1,"x":"\\ud800"}',
        b'{"format_version":2}',
        b'{"format_version":1,"format_version":1,"digest":""}',
        b'{"format_version":1,"n":' + b"9" * 5000 + b"}",
    ],
)
def test_hostile_json(tmp_path: Path, payload: bytes) -> None:
    (tmp_path / "x").write_bytes(payload)
    with pytest.raises(VerificationError):
        read_sealed(tmp_path / "x")
