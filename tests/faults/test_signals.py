"""F3, F19: asked to stop, by a signal, twice, or because the agent died. Commits what fits the
grace, leaves no temporary file, exit 75; the next run goes on."""

from __future__ import annotations

import hashlib
import itertools
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from faults.lab import Lab, pace
from faults.processes import finish, launch, signal_to, wait_for
from jobs import expect, run_code, write_captions, write_job

from embed_precompute.distributed import DistContext
from embed_precompute.encoders.encoder import TextEncoder
from embed_precompute.errors import InterruptedRunError
from embed_precompute.job import signals
from embed_precompute.job.progress import Progress
from embed_precompute.job.signals import stop_on_signals
from embed_precompute.job.stages import Stages
from embed_precompute.job.writer import UnitWriter
from embed_precompute.store.commit import StagedFile
from embed_precompute.store.records import committed_units

ECHO_S = 3.0
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize("number", SIGNALS)
def test_f3_a_signal_while_units_are_under_way(number: int, lab: Lab) -> None:
    for _ in range(lab.size(1, 5)):
        job = lab.job(30)
        process = job.start(pace(0.2))
        wait_for(lambda job=job: len(job.records()) > 1)
        signal_to(process.pid or 0, number)
        assert finish(process) == 75, job.said()
        assert "Run the same command again" in job.said()
        assert "Traceback" not in job.said()
        job.assert_nothing_left()
        job.assert_resumes()


def test_f3_every_rank_of_a_gang_is_asked(lab: Lab) -> None:
    """As Slurm does."""
    job = lab.job()
    gang = job.gang(3, pace(0.2))
    wait_for(lambda: len(job.records()) > 2)
    for pid in gang.ranks():
        signal_to(pid, signal.SIGTERM)
    ended = wait_for(lambda: not gang.all_ranks())
    gang.kill()
    assert ended, "a rank did not end"
    job.assert_nothing_left()
    job.assert_resumes()


def stuck(folder: str, grace_s: float) -> None:
    """A process inside one call of some minutes that holds the interpreter, with a temporary file;
    what it says is in `folder`.log."""
    signals.SAME_REQUEST_S = ECHO_S  # a busy machine may take long between two signals
    sink = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT, 0o644)
    os.dup2(sink, 2)
    asked = stop_on_signals(grace_s, DistContext())
    with StagedFile(Path(folder) / "x"), asked as stop, stop.finishing():
        os.write(sink, b"ready\n")
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)


@pytest.mark.parametrize("again", [False, True])
def test_f3_a_stuck_process_ends_with_its_grace_or_at_a_second_signal(
    again: bool, tmp_path: Path
) -> None:
    folder, log = tmp_path / "x", tmp_path / "x.log"
    process = launch(stuck, str(folder), 600.0 if again else 0.3)
    wait_for(lambda: log.exists() and "ready" in log.read_text())
    signal_to(process.pid or 0, signal.SIGINT)
    if again:
        signal_to(process.pid or 0, signal.SIGTERM)  # Ctrl-C, and the agent that passes it on
        assert wait_for(lambda: "stopping (signal SIG" in log.read_text())
        time.sleep(ECHO_S + 0.5)
        assert process.exitcode is None, "an echo of the first is no second signal"
        signal_to(process.pid or 0, signal.SIGTERM)
    assert finish(process) == 75
    assert ("a second signal" if again else "its grace is over") in log.read_text()
    assert list(folder.iterdir()) == []


def test_a_request_breaks_off_what_is_no_unit() -> None:
    def stopped() -> None:
        with stop_on_signals(60):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(30)

    with pytest.raises(InterruptedRunError, match="SIGUSR1"):
        stopped()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_ctrl_c_while_the_program_ends_gives_no_traceback() -> None:
    said = run_code(
        "import os, signal; from embed_precompute.cli import main as cli\n"
        "def main(): raise KeyboardInterrupt\n"
        "cli.main = main\n"
        "print(cli.program())\n"
        "os.kill(os.getpid(), signal.SIGINT); print('lives')"
    )
    assert said.split() == ["75", "lives"]


@pytest.mark.parametrize("fits", [True, False])
def test_f3_the_unit_at_hand_is_committed_if_that_fits_the_grace(
    fits: bool, tiny_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", [f"scene {i}" for i in range(40)])
    job = write_job(tmp_path, captions, None, tiny_clip, implementation="hf")
    original, number = TextEncoder.submit, itertools.count(1)

    def submit(self: TextEncoder, batch: Any) -> Any:
        # hf has several batches to a unit; the 7th is the first after the null embedding.
        if next(number) == (9 if fits else 7):
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "submit", submit)
        if not fits:  # as if a commit took longer than the grace
            patch.setattr("embed_precompute.job.stages.COMMIT_SHARE", 10.0)
        said = expect(75, "run", job)
    assert "signal SIGTERM" in said
    committed = committed_units(tmp_path / "out")
    assert len(committed) < 4, "no other unit is begun"
    assert bool(committed) == fits
    assert ("; committed shards stay" in said) == fits
    assert "error:" not in said
    assert not list((tmp_path / "out").rglob(".tmp-*"))
    expect(0, "run", job)


# --- F19 ------------------------------------------------------------------------------------------


def test_f19_workers_end_when_their_agent_died(lab: Lab) -> None:
    job = lab.job(grace_s=1.0)
    begun = job.folder / "begun"
    gang = job.gang(2, pace(600.0, log=str(begun)))
    wait_for(lambda: begun.exists() and len(begun.read_text().splitlines()) == 2)
    signal_to(gang.group, signal.SIGKILL)
    ended = gang.ended()
    gang.kill()
    assert ended, "workers go on without an agent"
    job.assert_resumes()


def test_f19_without_standard_streams(lab: Lab) -> None:
    job = lab.job(12)
    code, said = job.execute(("close_standard_streams", {}))
    assert code == 0, said
    job.assert_undisturbed()


def test_f3_units_that_wait_for_the_writer_are_committed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unit at hand does not fit the grace; three that are encoded wait for a slow disk."""
    job = lab.job(60, per_shard=10)
    begun: list[int] = []
    dropped = threading.Event()
    commit = UnitWriter.commit

    def slow(self: UnitWriter) -> Any:
        assert self._unit.is_null or dropped.wait(60)
        return commit(self)

    def encoded(_: Progress, unit: int, samples: float) -> None:
        if unit not in begun:
            begun.append(unit)
            if len(begun) == 4:
                os.kill(os.getpid(), signal.SIGTERM)

    def fits(*_: object) -> bool:
        dropped.set()
        return False

    monkeypatch.setattr(UnitWriter, "commit", slow)
    monkeypatch.setattr(Progress, "encoded", encoded)
    monkeypatch.setattr(Stages, "_fits_grace", fits)
    expect(75, "run", job.path)
    assert committed_units(job.root) == set(begun[:3])
    monkeypatch.undo()
    job.assert_nothing_left()
    job.assert_resumes()
