"""Asked to stop: within the grace, at once at a second signal, and when the agent died."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jobs import call, clean_environment, dataset_bytes, write_captions, write_job

from embed_precompute.encoders.encoder import TextEncoder
from embed_precompute.errors import InterruptedRunError
from embed_precompute.job.signals import stop_on_signals
from embed_precompute.store.commit import StagedFile, remove_dead, this_host
from embed_precompute.store.records import committed_units

STUCK = """
import hashlib, sys, threading
from pathlib import Path
from embed_precompute.distributed import DistContext
from embed_precompute.job.signals import stop_on_signals
from embed_precompute.store.commit import StagedFile
dist = DistContext(source="torchrun", run_id="x") if len(sys.argv) > 3 else None
with StagedFile(Path(sys.argv[1]) / "x") as staged, stop_on_signals(float(sys.argv[2]), dist) as s:
    with s.finishing():
        print("ready", flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # minutes, without the interpreter lock
"""


def start_stuck(folder: Path, grace_s: float, *words: str) -> subprocess.Popen[str]:
    """A process that is inside one long call, with a temporary file, when this returns."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(folder), str(grace_s), *words],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_the_grace_ends_a_process_that_is_stuck(tmp_path: Path, number: int) -> None:
    process = start_stuck(tmp_path, 0.3)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 75
    assert "its grace is over" in said
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_at_once_but_not_an_echo_of_the_first(tmp_path: Path) -> None:
    process = start_stuck(tmp_path, 600)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)  # Ctrl-C, and the agent that passes it on
    time.sleep(0.7)
    assert process.poll() is None
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 5
    assert process.returncode == 75
    assert "a second signal" in said
    assert list(tmp_path.iterdir()) == []


def test_a_worker_ends_when_its_agent_died(tmp_path: Path) -> None:
    """The agent is a shell that starts the worker, says its pid, and dies."""
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, STUCK, str(tmp_path)],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert agent.stdout is not None
    pid = int(agent.stdout.readline())
    assert agent.stdout.readline() == "ready\n"
    agent.kill()
    agent.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/stat").exists() and time.monotonic() < deadline:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        assert not Path(f"/proc/{pid}/stat").exists()
    agent.stdout.close()
    assert list(tmp_path.iterdir()) == []


AGENT = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2], "1", "agent"])
print(worker.pid, flush=True)
time.sleep(600)
"""


def test_a_request_breaks_off_what_is_no_unit() -> None:
    def stopped() -> None:
        with stop_on_signals(60):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(30)

    with pytest.raises(InterruptedRunError, match="SIGUSR1"):
        stopped()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def job(tiny_clip: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", [f"scene {i}" for i in range(40)])
    return write_job(
        tmp_path, captions, None, tiny_clip, samples_per_shard=10, implementation="hf"
    )  # hf: several batches to a unit


def at_batch(patch: pytest.MonkeyPatch, n: int, act: Callable[[], None]) -> None:
    """`act` before the n-th forward; warm-up forwards are counted too."""
    original, count = TextEncoder.submit, [0]

    def submit(self: TextEncoder, batch: Any) -> Any:
        count[0] += 1
        if count[0] == n:
            act()
        return original(self, batch)

    patch.setattr(TextEncoder, "submit", submit)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_unit_that_fits_the_grace_is_committed(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        at_batch(patch, 9, terminate)
        code, _, said = call("run", str(job))
    assert code == 75, said
    assert "signal SIGTERM" in said
    done = committed_units(tmp_path / "out")
    assert 1 <= len(done) < 4, "the unit at hand is committed, no other is begun"
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    assert call("run", str(job))[0] == 0


def test_a_unit_that_does_not_fit_is_dropped(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a commit took longer than the grace, at the first batch behind the null embedding."""
    with monkeypatch.context() as patch:
        at_batch(patch, 7, terminate)
        patch.setattr("embed_precompute.job.stages.COMMIT_SHARE", 10.0)
        code, _, said = call("run", str(job))
    assert code == 75, said
    assert committed_units(tmp_path / "out") == set()
    assert not list((tmp_path / "out").rglob(".tmp-*"))


def test_temporary_files_of_dead_writers_go_with_the_next_run(job: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    assert call("run", str(job))[0] == 0
    before = dataset_bytes(root)
    dead = subprocess.run(["sh", "-c", "echo $$"], capture_output=True, text=True, check=True)
    folder = root / "shards/000"
    gone = [
        root / f".tmp-plan.json-{this_host()}-{dead.stdout.strip()}-0123456789ab",
        folder / f".tmp-shard-000001.json-{this_host()}-{dead.stdout.strip()}-0123456789ab",
        folder / f".tmp-shard-000002.safetensors-{this_host()}-{os.getpid()}-0123456789ab",
    ]
    kept = [
        folder / f".tmp-shard-000001.json-{this_host()}-{os.getppid()}-0123456789ab",
        folder / f".tmp-shard-000001.json-other.{socket.gethostname()}-1-0123456789ab",
        folder / ".tmp-x",
    ]
    for path in (*gone, *kept):
        path.write_bytes(before["shards/000/shard-000000.json"])
    with StagedFile(folder / "mine"):
        assert remove_dead(root) == len(gone)
        assert len(list(root.rglob(".tmp-*"))) == len(kept) + 1
    assert len(committed_units(root)) == 4
    assert call("verify", str(root))[0] == 0
    (root / "manifest.json").unlink()
    assert call("run", str(job))[0] == 0
    assert dataset_bytes(root) == before  # finalize takes those of other machines too
