"""What a run says: banner, bar and lines, log file, summary."""

from __future__ import annotations

import io
import json
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import expect, write_captions, write_job

from embed_precompute.job import progress as progress_module
from embed_precompute.job.progress import Progress
from embed_precompute.job.stages import Stages
from embed_precompute.steps import steps

TEXTS = [f"scene {i} of a film" for i in range(30)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def job(tiny_t5: Path, tiny_clip: Path, tmp_path: Path) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", TEXTS)
    return write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=30)


def test_the_bar_moves_within_a_unit(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, shown = Progress.encoded, []

    def encoded(self: Progress, unit: int, samples: float) -> None:
        original(self, unit, samples)
        shown.append(self.captions())

    monkeypatch.setattr(Progress, "encoded", encoded)
    said = expect(0, "run", job)
    assert len(shown) > 5, "one unit, in several forwards"
    assert shown == sorted(shown)
    assert 0 < shown[0] < 15 < shown[-1] == pytest.approx(30)
    for part in (
        "device: cpu (",
        ", 1 process",
        "encoders: clip: float32, fused, weights ",
        f"output: {tmp_path / 'out'}, 0 of 1 units committed, 30 captions in all",
        "loading encoders.t5",
        "finalising",
    ):
        assert said.count(part) == 1


def test_a_bar_on_a_terminal_and_lines_elsewhere(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    terminal = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert list(steps(range(3), 3, "counting", " steps")) == [0, 1, 2]
        with Progress(_prepared(job), "cpu") as progress:
            progress.encoded(0, 12.5)
    assert "encoding on cpu" in terminal.getvalue()
    assert "12/30" in terminal.getvalue()
    line = Progress(_prepared(job), "cpu")._line(12.5, 2.5)
    assert line == (
        "encoding on cpu: 12 of 30 captions (0 committed by all ranks), 2.5 captions/s, 7.0 s left"
    )
    monkeypatch.setattr("embed_precompute.steps.LINE_EVERY_S", 0.0)
    caplog.set_level("INFO")
    assert sum(1 for _ in steps(range(2), 2, "counting", " steps")) == 2
    assert [r.message for r in caplog.records] == ["counting: 1 of 2 steps, 0.0 s left"]


def test_no_time_is_promised_before_two_batches(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was loaded before the first batch says nothing of the rate."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        progress_module, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time)
    )
    progress, steps_of = Progress(_prepared(job), "cpu"), iter([(600, 5), (1200, 5), (1300, 10)])

    def wait(_: float) -> bool:
        clock.now, samples = next(steps_of, (None, 0))
        progress.encoded(0, samples)
        return clock.now is None

    monkeypatch.setattr(progress, "_end", SimpleNamespace(wait=wait))
    caplog.set_level("INFO")
    progress._watch()
    endings = [r.message.partition("ranks), ")[2] for r in caplog.records]
    assert endings == [
        "0.0 captions/s, no rate yet",
        "0.0 captions/s, no rate yet",
        "0.0 captions/s, 46 min 40 s left",
    ]


def _prepared(job: Path) -> Any:
    from embed_precompute.config.files import load_config
    from embed_precompute.job.prepare import prepare

    return prepare(load_config(job))


def test_a_line_for_each_unit(job: Path, tmp_path: Path) -> None:
    """Operations count what was encoded: equal texts once, copied ones not at all."""
    write_captions(tmp_path / "captions.parquet", [*TEXTS[:10], *TEXTS[:10], "one more"])
    expect(0, "run", job)
    null, unit = _unit_lines(tmp_path / "out")
    assert (null["unit"], null["samples"], unit["unit"], unit["samples"]) == (-1, 1, 0, 21)
    assert null["host"] == unit["host"] == socket.gethostname()
    prepared = _prepared(job)
    texts = [*TEXTS[:10], "one more"]
    assert unit["flops"] == {
        each.name: each.flops(each.opened.tokenizer.encode(texts)) for each in prepared.encoders
    }
    assert 0 < null["flops"]["clip"] < unit["flops"]["clip"]
    new = tmp_path / "new"
    expect(0, "run", job, "--output.path", new, "--reuse", tmp_path / "out")
    assert [line["flops"] for line in _unit_lines(new)] == [{"clip": 0.0, "t5": 0.0}] * 2


def _unit_lines(root: Path) -> list[dict[str, Any]]:
    lines = (root / "logs" / "metrics-00000.jsonl").read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda line: int(line["unit"]))


def test_the_log_file_has_the_ending(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "out" / "logs" / "rank-00000.log"

    def broken(self: Stages) -> None:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "run", broken)
        expect(1, "run", job)
    assert "Traceback" in log.read_text()
    assert "RuntimeError: a fault of ours" in log.read_text()
    said = expect(0, "run", job)
    assert "encoded in " in said
    for part in ("complete, 30 samples", "encoded in ", "this rank encoded 30 samples"):
        assert part in log.read_text()
    said = expect(0, "run", job)
    assert f"{tmp_path / 'out'}: nothing to do\n" in said
    assert "encoded in " not in said
    before = log.read_text()
    expect(3, "run", job, "--encoders.t5.max_length", "20")
    assert "differs in\n  encoders.t5.max_length: 24 -> 20\n" in log.read_text()[len(before) :]


def test_progress_that_cannot_be_read_stops_nothing(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(root: Path) -> set[int]:
        raise OSError("gone")

    monkeypatch.setattr(progress_module, "committed_units", unreadable)
    expect(0, "run", job)
