"""Nothing is silent: whatever takes long says what it does and how far it is, while it does it."""

from __future__ import annotations

import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from jobs import edit, expect, write_job

from embed_precompute import steps as steps_module
from embed_precompute.captions import files, reader, table
from embed_precompute.encoders import device, encoder, loading, resolve, weights
from embed_precompute.job import claims
from embed_precompute.job.stages import Stages
from embed_precompute.steps import BYTES, Work, steps
from embed_precompute.store import manifest, plan

WAIT_S = 60.0
"""How long a slow call waits to be spoken of; only a failing test waits so long."""


class Ear(logging.Handler):
    """Hears every line, and lets a slow call wait until it is spoken of."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self._heard = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        with self._heard:
            self.lines.append(record.getMessage())
            self._heard.notify_all()

    def wait_for(self, words: str) -> None:
        """Until a line that begins now has these words."""
        with self._heard:
            first = len(self.lines)
            said = self._heard.wait_for(
                lambda: any(words in line for line in self.lines[first:]), WAIT_S
            )
        assert said, f"silent for long: nothing says {words!r}"


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ear]:
    """Lines come at once, in place of after ten seconds and every minute."""
    monkeypatch.setattr(steps_module, "BAR_AFTER_S", 0.001)
    monkeypatch.setattr(steps_module, "LINE_AFTER_S", 0.001)
    monkeypatch.setattr(steps_module, "LINE_EVERY_S", 0.001)
    heard = Ear()
    # Not their parent: a command replaces its handlers.
    loggers = [logging.getLogger(f"embed_precompute.{name}") for name in ("steps", "job.progress")]
    for logger in loggers:
        monkeypatch.setattr(logger, "level", logging.INFO)
        logger.addHandler(heard)
    yield heard
    for logger in loggers:
        logger.removeHandler(heard)


def test_how_far_it_is() -> None:
    counting = Work("verifying", 2_000, " units")
    assert counting.line(10) == "verifying: 0 of 2,000 units, 10.0 s so far"
    counting.add(500)
    assert counting.line(10) == "verifying: 500 of 2,000 units, 30.0 s left"
    counting.add(1_500)
    assert counting.line(90) == "verifying: 2,000 of 2,000 units, 1 min 30 s so far"
    reading = Work("reading", 9_524_000_000, BYTES, lambda: 2_381_000_000)
    assert reading.line(20) == "reading: 2.4 of 9.5 GB, 1 min 0 s left"
    assert Work("reading", 0, BYTES, lambda: 2_000_000).line(3) == "reading: 2.0 MB, 3.0 s so far"
    assert Work("importing").line(12.34) == "importing: 12.3 s so far"


def test_one_long_call_is_not_silent(ear: Ear) -> None:
    for number in steps(range(2), 2, "counting", " steps"):
        ear.wait_for(f"counting: {number} of 2 steps, ")
    assert ear.lines[-1].startswith("counting: done in ")


def test_silence_begins_where_the_last_line_was_said(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three works of nine seconds each would else be silent for half a minute."""
    monkeypatch.setattr(steps_module, "LINE_AFTER_S", 1000.0)
    monkeypatch.setattr(steps_module.stderr, "said_at", time.monotonic() - 1001.0)
    with Work("opening"):
        ear.wait_for("opening: ")
    monkeypatch.setattr(steps_module.stderr, "said_at", time.monotonic())
    with Work("reading"):
        pass
    assert not any("reading" in line for line in ear.lines)


def test_a_short_one_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert list(steps(range(3), 3, "counting", " steps")) == [0, 1, 2]
    assert not caplog.records


def test_a_terminal_has_a_bar_and_the_log_file_the_line(
    ear: Ear, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(steps_module, "BAR_EVERY_S", 0.001)
    with Work("loading", 100) as work:
        work.add(25)
        ear.wait_for("loading: 25 of 100")
    assert "loading:  25%" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    with Work("opening"):
        ear.wait_for("opening: ")
        ear.wait_for("opening: ")
    assert "opening [00:00]" in sys.stderr.getvalue()  # type: ignore[attr-defined]
    monkeypatch.setattr(steps_module.stderr, "speaks", False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with Work("loading", 100):
        ear.wait_for("loading: ")
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]


PLACES: dict[str, tuple[Any, str]] = {
    "reading caption files: ": (files, "_footer_bytes"),
    "looking for nulls in a column": (table, "_holds_null"),
    "reading ids: ": (table.CaptionTable, "_count"),
    "comparing ids: ": (table.IdCheck, "finish"),
    "encoders.t5: opening checkpoint and tokenizer: ": (resolve, "open_checkpoint"),
    "encoders.t5.pretrained: digesting weights: ": (weights, "_sha256"),
    "tokenising: ": (reader.CaptionReader, "read"),
    "looking for GPUs": (device.torch.cuda, "is_available"),
    "listing what is committed: ": (claims, "committed_units"),
    "encoders.t5.pretrained: loading weights: ": (loading, "load_model"),
    "encoders.t5: first forwards: 0 of ": (encoder.TextEncoder, "submit"),
    "encoders.t5: comparing with transformers: ": (device, "check_numbers"),
    "encoding: ": (Stages, "_commit"),
    "finalising: 0 of ": (manifest, "check_unit"),
    "finalising: sorting and digesting": (manifest.IndexWriter, "finish"),
    "finalising: looking for files": (manifest, "unnamed_files"),
}
"""What has to be said, and meanwhile what of a run is slow."""


def test_each_slow_part_of_a_run_is_spoken_of(
    ear: Ear, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoken_of = []

    def make_slow(words: str, owner: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(owner, name)

        def slow(*arguments: Any, **named: Any) -> Any:
            if words not in spoken_of:
                spoken_of.append(words)
                ear.wait_for(words)
            return original(*arguments, **named)

        monkeypatch.setattr(owner, name, slow)

    captions = tmp_path / "captions.parquet"
    pq.write_table(
        pa.table({"id": ["a", "b"], "text": ["a cat", "a dog"], "fps": [8, 9]}), captions
    )
    job = write_job(tmp_path, captions, tiny_t5, None)
    edit(job, "captions", recipe={"kind": "opensora", "motion_column": None})
    edit(job, "runtime", self_check="always")
    monkeypatch.setenv("EMBED_PRECOMPUTE_HOME", str(tmp_path / "home"))  # no digest is remembered
    for words, (owner, name) in PLACES.items():
        make_slow(words, owner, name)
    expect(0, "run", job)
    assert set(spoken_of) == set(PLACES)
    monkeypatch.setattr(plan, "stored_plan", lambda root: ear.wait_for("waiting for rank 0's plan"))
    assert plan.await_plan(tmp_path, None, 0.0, extend=False) is None  # type: ignore[arg-type]
