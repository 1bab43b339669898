"""What a run says: banner, bar and lines, log file, summary."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jobs import edit, expect, write_captions, write_job

from embed_precompute import steps
from embed_precompute.audit.timeline import read_timeline
from embed_precompute.distributed import DistContext
from embed_precompute.job import progress as progress_module
from embed_precompute.job.metrics import UnitLog, read_effort
from embed_precompute.job.progress import Progress
from embed_precompute.job.stages import Stages
from embed_precompute.job.tracker import Tracker
from embed_precompute.steps import byte_size
from embed_precompute.store.commit import UNLIMITED
from embed_precompute.store.manifest import finalize

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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time that a Progress sees: `now`."""
    found = SimpleNamespace(now=0.0)
    fake = SimpleNamespace(monotonic=lambda: found.now, time=time.time)
    monkeypatch.setattr(progress_module, "time", fake)
    monkeypatch.setattr(steps.stderr, "said_at", 0.0)
    return found


def watched(
    progress: Progress,
    clock: SimpleNamespace,
    moments: Sequence[tuple[float, Callable[[], None]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What `progress` does when these things happen at these times."""
    left = iter(moments)

    def wait(_: float) -> bool:
        clock.now, happens = next(left, (clock.now, None))
        if happens is not None:
            happens()
        return happens is None

    monkeypatch.setattr(progress, "_end", SimpleNamespace(wait=wait))
    progress._tracker = Tracker("none", progress._root, progress._plan)
    progress._look()
    progress._watch()


def test_the_step_of_a_curve_never_goes_back(
    job: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash takes back what is encoded and not committed, so a step counts commits."""
    committed, put = set[int](), list[tuple[float, int]]()
    monkeypatch.setattr(
        Tracker, "put", lambda self, figures, step: put.append((figures["captions"], step))
    )
    monkeypatch.setattr(progress_module, "committed_units", lambda root: set(committed))
    progress = Progress(_prepared(job))
    moments: list[tuple[float, Callable[[], None]]] = [
        (12.0, lambda: progress.encoded(0, 20)),
        (80.0, lambda: committed.add(0)),
    ]
    watched(progress, clock, moments, monkeypatch)
    assert put == [(20, 0), (30, 30), (30, 30)]


def test_a_bar_on_a_terminal_and_the_line_in_the_log_file(
    job: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(progress_module, "free_space", lambda root: (50 << 30, 1))
    caplog.set_level("INFO")
    progress = Progress(_prepared(job))
    moments = [(n, lambda n=n: progress.encoded(0, n)) for n in (0.5, 6.5, 12.5)]
    watched(progress, clock, moments, monkeypatch)
    last = sys.stderr.getvalue().split("\r")[-1]  # type: ignore[attr-defined]
    assert last.startswith("encoding:  40%|")
    ends = "0 of 1 units, 1.0 captions/s, 17.5 s left, 50.0 GiB free"
    assert "12/30 captions [" in last
    assert last.rstrip().endswith(f", {ends}]")
    (line,) = caplog.records
    assert line.message == f"encoding: 12 of 30 captions, {ends}"
    assert line.file_only


def test_a_line_comes_soon_and_then_every_minute(
    job: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """What was loaded before the first batch says nothing of the rate."""
    monkeypatch.setattr(progress_module, "free_space", lambda root: (UNLIMITED, 1))
    caplog.set_level("INFO")
    progress = Progress(_prepared(job))
    moments = [
        (9.0, lambda: None),
        (11.0, lambda: None),
        (62.0, lambda: progress.encoded(0, 5)),
        (71.0, lambda: progress.encoded(0, 5)),
        (112.0, lambda: progress.encoded(0, 10)),
        (131.0, lambda: None),
    ]
    watched(progress, clock, moments, monkeypatch)
    assert [record.message for record in caplog.records] == [
        "encoding: 0 of 30 captions, 0 of 1 units, no rate yet",
        "encoding: 5 of 30 captions, 0 of 1 units, no rate yet",
        "encoding: 10 of 30 captions, 0 of 1 units, 0.1 captions/s, 3 min 20 s left",
    ]


def test_the_rate_is_that_of_all_ranks_in_this_run(
    job: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """Units were committed before; the ranks commit theirs at nearly the same time, and in between
    the rate stays. Failed samples of all runs are counted."""
    edit(job, "output", samples_per_shard=1)
    committed = {0, 1}
    monkeypatch.setattr(progress_module, "committed_units", lambda root: set(committed))
    monkeypatch.setattr(progress_module, "free_space", lambda root: (500, 1))
    caplog.set_level("INFO")
    prepared = _prepared(job)
    prepared = dataclasses.replace(prepared, dist=DistContext(world_size=4))
    logs = prepared.root / "logs"
    logs.mkdir(parents=True)

    def unit(number: int, rank: int, failed: int = 0) -> None:
        committed.add(number)
        line = {"unit": number, "samples": 1, "shard_bytes": 30, "failed": failed}
        line |= {"tokens": {"t5": 9}, "flops": {"t5": 1e12}}
        with (logs / f"metrics-{rank:05d}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def batch() -> None:
        unit(4, 0)
        for number, rank in ((5, 1), (6, 2), (7, 3)):
            unit(number, rank)

    unit(0, 0, failed=1)
    progress = Progress(prepared)
    moments: list[tuple[float, Callable[[], None]]] = [
        (1.0, lambda: progress.encoded(2, 0.5)),
        (11.0, batch),  # 4 units in 10 s
        (20.0, lambda: unit(0, 1)),  # opened by a repair, and made again
        (72.0, lambda: None),
    ]
    watched(progress, clock, moments, monkeypatch)
    assert [record.message for record in caplog.records] == [
        "encoding: 6 of 30 captions, 6 of 30 units, 0.4 captions/s by 4 ranks, 58.8 s left, "
        "500 bytes free, 1 sample failed",
        f"{prepared.root}: what is left needs about 705 bytes, and 500 bytes are free. The run "
        "will stop with exit 74 when they are used up, and go on from there when there is space.",
        # nothing for 61 s, where there was something every 10 s
        "encoding: 6 of 30 captions, 6 of 30 units, 0.1 captions/s by 4 ranks, 5 min 58 s left, "
        "500 bytes free",
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
    said = expect(0, "run", job, "--output.path", new, "--reuse", tmp_path / "out")
    lines = _unit_lines(new)
    assert [line["flops"] for line in lines] == [{"clip": 0.0, "t5": 0.0}] * 2
    assert [line["tokens"] for line in lines] == [{"clip": 0, "t5": 0}] * 2
    assert "t5 encoded: 0" in said
    assert "tokens/s" not in said, "copied rows say nothing of the encoders' speed"


def test_a_line_that_a_crash_cut_off_costs_no_other(tmp_path: Path) -> None:
    def add(unit: int, samples: int) -> None:
        counts = {"stored": 1, "damaged": 0, "failed": 0, "shard_bytes": 9}
        sums: dict[str, Any] = {"copied": {}, "tokens": {"t5": 2}, "flops": {"t5": 0.5}}
        UnitLog(tmp_path, 0, "cpu").add(unit, samples=samples, **counts, **sums)

    add(0, 1)
    add(1, 10)
    path = tmp_path / "logs" / "metrics-00000.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    add(2, 100)
    add(3, 1000)
    effort = read_effort(tmp_path)
    assert effort is not None
    assert effort.sums.samples == 1101
    assert b"\n\n" not in path.read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        {"seconds": math.nan},
        {"time": math.inf},
        {"time": 10**400},
        {"seconds": 10**18},
        {"time": 1e13},
        {"samples": math.inf},
        {"flops": {"t5": 1e300}},
        {"seconds": "1"},
    ],
    ids=str,
)
def test_a_line_with_a_number_that_cannot_be_is_left_out(
    damage: dict[str, Any], tmp_path: Path
) -> None:
    line = {"time": 1e9, "seconds": 8, "unit": 0, "samples": 5, "device": "cpu", "failed": 0}
    line |= {"tokens": {"t5": 9}, "flops": {"t5": 1}, "shard_bytes": 9}
    (tmp_path / "logs").mkdir()
    text = json.dumps(line) + "\n" + json.dumps({**line, "unit": 1, **damage}) + "\n"
    (tmp_path / "logs" / "metrics-00000.jsonl").write_text(text)
    effort, timeline = read_effort(tmp_path), read_timeline(tmp_path)
    assert effort is not None
    assert (effort.wall_seconds, effort.sums.samples) == (8, 5)
    assert timeline is not None
    assert [(work.unit, work.seconds) for work in timeline.work] == [(0, 8)]


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


def test_the_summary_is_to_be_pasted(job: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    expect(0, "run", job)
    facts = json.loads((root / "run.json").read_text())
    (root / "run.json").write_text(json.dumps({**facts, "runs": [{}, {}]}))
    metrics = root / "logs" / "metrics-00000.jsonl"
    unit = _unit_lines(root)[-1]
    unit |= {"time": 1000.0, "seconds": 10.0, "flops": {"t5": 2e13, "clip": 1e6}}
    metrics.write_text(json.dumps(unit) + "\n")
    said = expect(0, "finalize", root)
    stored = [
        path for path in root.rglob("*") if path.suffix in (".safetensors", ".parquet", ".npy")
    ]
    assert finalize(root).num_bytes >= sum(path.stat().st_size for path in stored)
    assert len(said.splitlines()) < 15
    tokens = unit["tokens"]["t5"]
    for part in (
        f"{root}: complete, 30 samples of 30 rows in 1 shard, fingerprint ",
        f"30 distinct embeddings stored, {byte_size(finalize(root).num_bytes)} on disk\n",
        f"  t5: {tokens:,} tokens, 0 captions truncated; {tokens / 10:,.0f} tokens/s, 2 TFLOP/s\n",
        f"  clip: {unit['tokens']['clip']:,} tokens, ",
        "  encoded in 10.0 s by 1 process, 0.003 CPU process hours, 3.0 captions/s, 2 runs\n",
        "  made with device ",
        f"  check it: embed-precompute verify {root}\n",
    ):
        assert part in said


def test_a_log_file_tells_runs_apart(job: Path, tmp_path: Path) -> None:
    """It has what was said before there was a plan, too."""
    log = tmp_path / "out" / "logs" / "rank-00000.log"
    expect(2, "run", job, "--captions.text_column", "caption")
    assert not log.exists(), "a refused run leaves nothing"
    expect(0, "run", job)
    (tmp_path / "out" / "manifest.json").unlink()
    expect(0, "run", job)
    heads = [line for line in log.read_text().splitlines() if line.startswith("==== ")]
    assert len(heads) == 2
    assert all(f"[rank 0/1 {socket.gethostname()}] embed-precompute 0" in head for head in heads)
    assert log.read_text().startswith("==== ")
    assert "\n\n==== " in log.read_text()


@pytest.mark.parametrize(
    ("words", "code", "whole"),
    [
        (("--encoders.t5.max_length", "-1"), 2, "at most"),
        (("--captions.text_column", "caption"), 2, "Set captions.text_column"),
        (("--runtime.device", "cuda:7"), 2, "use runtime.device auto"),
    ],
    ids=["configuration", "captions", "its own GPU"],
)
def test_what_all_ranks_find_is_said_once(
    job: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], code: int, whole: str
) -> None:
    """Local rank 0 says it; another rank says all only of what it may have found alone."""
    for name, value in {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    edit(job, "runtime", plan_timeout_s=0)
    where = f"embed-precompute: [rank 9/16 {socket.gethostname()}] error: "
    said = expect(code, "run", job, *words)
    assert said.startswith(where)
    assert whole in said
    full = said
    monkeypatch.setenv("LOCAL_RANK", "1")
    said = expect(code, "run", job, *words)
    assert said.startswith(where)
    is_own = "runtime.device" in words[0]
    assert (whole in said) == is_own
    assert is_own or full.startswith(said.removesuffix("...\n")), "it ends with a whole word"


def test_progress_that_cannot_be_read_stops_nothing(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(root: Path) -> set[int]:
        raise OSError("gone")

    monkeypatch.setattr(progress_module, "committed_units", unreadable)
    expect(0, "run", job)
