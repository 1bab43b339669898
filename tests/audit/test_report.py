"""The report: facts of a dataset on a page that needs nothing else, and its card."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from handmade import (
    DIMS,
    ENVIRONMENT,
    embedding,
    make_plan,
    paths_of,
    samples_of,
    write_dataset,
    write_null,
    write_plan,
    write_unit,
    write_units,
)
from huggingface_hub import DatasetCard
from jobs import dataset_bytes, expect

from embed_precompute.audit import card, facts, plots
from embed_precompute.audit.facts import gather
from embed_precompute.audit.timeline import Timeline, read_timeline
from embed_precompute.errors import StorageError
from embed_precompute.store.commit import publish_bytes
from embed_precompute.store.manifest import finalize
from embed_precompute.store.plan import read_plan
from embed_precompute.store.records import document_bytes

SECTIONS = [
    *("Samples by status", "Tokens", "Norms over input order", "Bytes", "Speed of the ranks"),
    *("Repeated captions", "Verification", "What was encoded", "Runs"),
]
NASTY = {
    "script": "<script>alert(1)</script> & \"'",
    "override": "abc \u202e\u2066 gpj.exe שלום עולם",
    "long": "x" * 100_000,
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 é",
    "control": "bell\x07 null\x00 next\x85 line\u2028 tag]]><!--",
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


class Page(HTMLParser):
    """A page as a reader sees it: the words of each section, and which elements there are."""

    def __init__(self, payload: bytes) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.sections: dict[str, str] = {"": ""}
        self._open: list[str] = []
        self._heading = ""
        self.feed(payload.decode())
        assert not self._open, "every element is closed"

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)
        if tag not in ("meta", "br", "wbr"):
            self._open.append(tag)
        if tag == "h2":
            self._heading = ""
            self.sections[""] += " "

    def handle_startendtag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["h2"]:
            self._heading = data
            self.sections[data] = ""
        elif self._open[-1:] != ["style"]:
            self.sections[self._heading] += f"{data} "


def report(root: Path) -> Page:
    expect(0, "report", root)
    return Page((root / "report.html").read_bytes())


def write_metrics(root: Path, *ranks: Sequence[dict[str, Any]]) -> None:
    (root / "logs").mkdir(exist_ok=True)
    for rank, lines in enumerate(ranks):
        path = root / "logs" / f"metrics-{rank:05d}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def line(end: float, seconds: float, unit: int = 0, **more: Any) -> dict[str, Any]:
    return {
        **{"time": 1e9 + end, "seconds": seconds, "unit": unit, "samples": 10, "stored": 10},
        **{"copied": {}, "damaged": 0, "tokens": {}, "device": "cuda", "host": "node-a"},
        **more,
    }


def test_a_finished_dataset(root: Path) -> None:
    page = report(root)
    assert list(page.sections)[1:] == SECTIONS
    head = page.sections[""]
    assert "complete, 3 of 3 units committed" in head
    day = json.loads((root / "run.json").read_bytes())["started"][:10]
    assert head.count("Embeddings of captions.parquet by clip (folder ") == 2  # title, heading
    assert f"), {day} " in head
    assert "30 of 30 captions (100 %) have embeddings by clip and t5: " in head
    assert "by 1 process. The dataset is  complete ; it was never verified." in head
    words = page.sections["What was encoded"]
    plan = read_plan(root)
    for fact in (plan.fingerprint, plan.plan_id, "captions.parquet", "the caption as it is"):
        assert fact in words
    for encoder in plan.spec["encoders"].values():
        assert encoder["weights"] in words
    assert "s0" in page.sections["Samples by status"]
    assert "limit 24" in page.sections["Tokens"]
    assert "30 stored rows that were read" in page.sections["Norms over input order"]
    assert "text_t5" in page.sections["Bytes"]
    assert "rank 0" in page.sections["Speed of the ranks"]
    assert "is not in our table" in page.sections["Speed of the ranks"]  # the peak of a CPU
    assert "Never verified" in page.sections["Verification"]
    assert json.loads((root / "run.json").read_bytes())["started"] in page.sections["Runs"]


def test_the_page_needs_nothing_else_and_is_the_same_twice(root: Path, tmp_path: Path) -> None:
    before = dataset_bytes(root)
    page = report(root)
    assert not page.tags & {"script", "img", "link", "iframe", "object", "a", "use", "image"}
    assert not {name for name in page.attributes if name.startswith("on")}
    payload = (root / "report.html").read_bytes()
    assert b"http" not in payload.replace(b"https://", b"http") or b"url(" not in payload
    assert b"@import" not in payload
    expect(0, "report", root, "--output", tmp_path / "page.html")
    assert (tmp_path / "page.html").read_bytes() == payload
    assert dataset_bytes(root) == before
    said = expect(0, "verify", root)
    assert "not ours" not in said


def test_output_leaves_the_dataset_alone(root: Path, tmp_path: Path) -> None:
    (root / "README.md").unlink()
    said = expect(0, "report", root, "--output", tmp_path / "page.html")
    assert said.startswith(f"written: {tmp_path / 'page.html'} (")
    assert not (root / "README.md").exists()
    assert not (root / "report.html").exists()
    (tmp_path / "file").touch()
    said = expect(2, "report", root, "--output", tmp_path / "file" / "page.html")
    assert f"{tmp_path / 'file'} is not a folder" in said
    said = expect(2, "report", root, "--output", tmp_path)
    assert f"{tmp_path} is a folder. Give a file, such as {tmp_path / 'report.html'}." in said


def test_only_its_own_page_is_overwritten(root: Path, tmp_path: Path) -> None:
    own, empty, link = root / "report.html", tmp_path / "empty.html", tmp_path / "link.html"
    own.write_text("<!doctype html><p>mine")
    link.symlink_to(tmp_path / "nothing")
    before = dataset_bytes(root)
    for words in ((), ("--output", root / "plan.json"), ("--output", link)):
        said = expect(2, "report", root, *words)
        assert f"{words[-1] if words else own} is there, and is no page of a report" in said
    assert own.read_text() == "<!doctype html><p>mine"
    assert link.is_symlink()
    assert dataset_bytes(root) == before
    empty.touch()
    expect(0, "report", root, "--output", empty)
    expect(0, "report", root, "--output", empty)
    own.unlink()
    expect(0, "report", root)
    assert own.read_bytes() == empty.read_bytes()


def test_texts_are_shown_and_do_nothing(tmp_path: Path) -> None:
    root = tmp_path / "<b>out"
    texts = [*NASTY.values(), None]
    write_dataset(root, texts, 3, text_column="<u>text")
    (root / "run.json").write_text(json.dumps({"command": ["<script>"], "started": "<i>"}))
    (root / "logs").mkdir()
    (root / "logs" / "verify.json").write_text(json.dumps({"problems": 1, "first": ["<hr>"]}))
    write_metrics(root, [line(3, 3, host="<td>")])
    page = report(root)
    assert not page.tags & {"script", "u", "i", "hr"}
    payload = (root / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", payload)
    words = page.sections["Samples by status"]
    for name in ("script", "override", "emoji"):
        assert NASTY[name] in words
    assert "x… (100,000 characters)" in words
    assert r"bell\x07 null\x00 next\x85" in words
    assert payload.count("<bdi") == payload.count("</bdi>") > 0
    assert len(payload) < 100_000
    assert "<hr>" in page.sections["Verification"]
    assert "alert" not in card.card_text(root)
    assert "`<u>text`" in card.card_text(root)


def test_an_unfinished_dataset_is_reported_as_far_as_it_goes(tmp_path: Path) -> None:
    plan = make_plan(9, 3)
    write_plan(tmp_path, plan)
    page = report(tmp_path)
    assert "not finished" in page.sections[""]
    assert "0 of 3 units" in page.sections[""]
    assert "Embeddings of a.parquet by clip and t5 " in page.sections[""]
    assert "0 of 9 captions (0 %) have embeddings by" in page.sections[""]
    assert "no stored row could be read" in page.sections["Norms over input order"]
    assert list(page.sections)[1:] == SECTIONS
    (tmp_path / "config.yaml").write_text("encoders: [1]")  # of nobody knows which release
    write_null(tmp_path, plan)
    write_unit(tmp_path, plan, 1, samples_of(["a b", "nan", None], 3))
    said = expect(0, "report", tmp_path)
    assert f"not written: {tmp_path / 'README.md'}" in said
    page = Page((tmp_path / "report.html").read_bytes())
    assert "1 of 3 units" in page.sections[""]
    assert "1 of 9 captions (11.11 %)" in page.sections[""]
    assert "3 of 9 samples" in page.sections[""]
    assert "11.11 % with an embedding" in page.sections[""]
    assert "not complete yet" in page.sections[""]
    assert "inf or nan" in page.sections["Samples by status"]
    assert "a.parquet, row 4" in page.sections["Samples by status"]
    assert "mean 3.0" in page.sections["Tokens"]
    assert "1 stored rows" in page.sections["Norms over input order"]
    assert "run.json is missing" in page.sections["Runs"]
    assert "Left out: logs/" in page.sections["Speed of the ranks"]


def test_facts_are_those_of_the_samples(tmp_path: Path) -> None:
    """With the index, and without it, by the rows parts."""
    texts = ["one", "two words", "one", None, "one", "two words", "three of them"] * 3
    write_units(tmp_path, texts, 7)
    plan = read_plan(tmp_path)
    parts = gather(tmp_path, plan)
    finalize(tmp_path)
    found = gather(tmp_path, plan)
    assert found.tokens == parts.tokens
    assert dict(found.tokens["t5"]) == {2: 9, 3: 6, 4: 3}
    for each in (parts, found):  # over all units, by the table as by the rows parts
        assert (each.num_compared, each.num_repeats, each.num_repeated) == (18, 15, 3)
        assert each.num_sharing == 9  # within units
        assert [(n, s.sample_id, s.text) for n, s in each.repeated] == [
            *[(9, "s0", "one"), (6, "s1", "two words"), (3, "s6", "three of them")],
        ]
    assert [s.sample_id for s in found.examples["null_text"]] == ["s3", "s10", "s17"]
    assert [s.text for s in found.examples["ok"]][:2] == ["one", "two words"]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(found.bytes.values()) == sum(path.stat().st_size for path in files)
    for name in DIMS:
        norms = [embedding(name, text).double().norm(dim=-1).mean() for text in texts if text]
        assert found.norms[name].total.sum() == pytest.approx(float(sum(norms)))
        assert found.norms[name].low.min() == pytest.approx(float(min(norms)))
        assert found.norms[name].high.max() == pytest.approx(float(max(norms)))


def test_equal_captions_of_different_units_are_repeats(tmp_path: Path) -> None:
    """A placeholder is found however small the shards are; a table that is damaged costs this."""
    write_dataset(tmp_path, ["first", "no caption", None, "no caption", "last", "no caption"], 1)
    words = report(tmp_path).sections["Repeated captions"]
    assert "2 of 5 samples (40 %) repeat the text of an earlier one; 1 text comes more" in words
    assert "0 of these samples use the stored row of another" in words
    assert "3 s1 no caption" in " ".join(words.split())
    payload = (tmp_path / "manifest.parquet").read_bytes()
    (tmp_path / "manifest.parquet").write_bytes(payload[: len(payload) // 2])
    page = report(tmp_path)
    assert f"not readable: {tmp_path / 'manifest.parquet'} is damaged" in page.sections[""]
    assert "5 samples not compared" in page.sections["Repeated captions"]
    assert "text_t5" in page.sections["Norms over input order"]


def test_norms_of_a_sample_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of many rows and units, spread over the table; the same ones each time."""
    write_dataset(tmp_path, [f"caption {i}" for i in range(200)], 10)
    monkeypatch.setattr(facts, "NORM_ROWS", 20)
    monkeypatch.setattr(facts, "NORM_UNITS", 10)
    monkeypatch.setattr(facts, "BUCKETS", 10)
    plan = read_plan(tmp_path)
    found = gather(tmp_path, plan)
    assert found.num_norms == 20
    again = gather(tmp_path, plan)
    assert (found.norms["t5"].total == again.norms["t5"].total).all()


def test_a_lost_shard_costs_its_norms_only(tmp_path: Path) -> None:
    write_dataset(tmp_path, [f"caption {i}" for i in range(9)])
    path = paths_of(tmp_path, 1).shard
    path.unlink()
    page = report(tmp_path)
    assert f"not readable: {path}" in page.sections[""]
    assert "6 stored rows" in page.sections["Norms over input order"]
    assert "text_t5" in page.sections["Bytes"]


def test_damage_is_named(tmp_path: Path) -> None:
    """In the index, which is not compared with its digest, and in vectors."""
    write_dataset(tmp_path, [f"caption {i}" for i in range(9)])
    path = paths_of(tmp_path, 2).shard
    payload = path.read_bytes()
    path.write_bytes(payload[:-2] + b"\xff\x7f")  # nan
    damaged = tmp_path / "index" / "tokens_t5.npy"
    payload = damaged.read_bytes()
    damaged.write_bytes(payload[:128] + b"\xff\xff\xff\xff" + payload[132:])
    damaged = tmp_path / "index" / "index.npy"
    payload = damaged.read_bytes()
    damaged.write_bytes(payload[:-24] + b"\xff\xff\xff\xff" + payload[-20:])
    words = report(tmp_path).sections[""]
    for unit in (0, 1):
        assert f"the samples of unit {unit} are not those of its record" in words
    assert f"{path} is damaged: a row of text_t5 holds inf or nan" in words


def test_units_of_another_environment_are_marked(tmp_path: Path) -> None:
    plan = make_plan(12, 3)
    write_plan(tmp_path, plan)
    write_null(tmp_path, plan)
    other = {**ENVIRONMENT, "device": "another GPU"}
    for unit in range(4):
        texts = [f"caption {unit} {i}" for i in range(3)]
        environment = other if unit in (1, 2) else ENVIRONMENT
        write_unit(tmp_path, plan, unit, samples_of(texts, 3 * unit), environment)
    found = gather(tmp_path, plan)
    assert found.elsewhere == [(3, 9)]
    page = report(tmp_path)
    assert "another GPU" in page.sections["What was encoded"]
    assert "Shaded" in page.sections["Norms over input order"]


def test_an_extension_that_is_not_finished(root: Path) -> None:
    """Its units are counted by their rows parts, the others by the index."""
    plan = read_plan(root)
    extended = plan.extended([plan.inputs.files[0]], plan.num_samples + 30)
    assert gather(root, plan).totals.samples == 30
    publish_bytes(root / extended.file_name, document_bytes(extended))
    page = report(root)
    assert "it is being extended" in page.sections[""]
    assert (root / "README.md").exists()


# --- time -----------------------------------------------------------------------------------------


def timeline(root: Path) -> Timeline:
    found = read_timeline(root)
    assert found is not None
    return found


def test_rates_and_rests(tmp_path: Path) -> None:
    """Rank 0 works all the time, rank 1 rests from 20 to 60 and after 80."""
    write_metrics(
        tmp_path,
        [line(50, 50, 0), line(100, 50, 2, samples=20)],
        [line(20, 20, 1), line(80, 20, 3, host="node-b")],
    )
    found = timeline(tmp_path)
    rates = found.rates(lambda work: work.samples)
    width = found.seconds / len(rates[0])
    assert sum(rate or 0.0 for rate in rates[0]) * width == pytest.approx(30)
    assert rates[0][0] == pytest.approx(0.2)
    assert rates[0][-1] == pytest.approx(0.4)
    assert sum(rate or 0.0 for rate in rates[1]) * width == pytest.approx(20)
    assert sum(rate is None for rate in rates[1]) * width == pytest.approx(60, abs=2 * width)
    assert [(r.rank, r.begin - 1e9, r.end - 1e9) for r in found.rests()] == [
        (1, 20, 60),
        (1, 80, 100),
    ]


def test_the_rate_is_that_of_the_time_at_work(tmp_path: Path) -> None:
    """Three days in a queue between two runs: a piece of the time holds both work and rest."""
    days = 3 * 86400
    write_metrics(
        tmp_path,
        [line(start + 10 * n, 10, n, samples=100) for start in (0, days) for n in range(1, 61)],
    )
    (rates,) = timeline(tmp_path).rates(lambda work: work.samples).values()
    found = [rate for rate in rates if rate is not None]
    assert found == pytest.approx([10.0] * len(found))
    assert 2 <= len(found) < 6


def test_a_height_of_lanes_where_most_of_the_time_nothing_is_done(root: Path) -> None:
    write_metrics(root, [line(300, 300, -1), line(301, 1, 0)])
    words = report(root).sections["Speed of the ranks"]
    assert "full height is 0" not in words
    assert "full height is 5" in words


def test_the_time_between_runs_is_not_idle(tmp_path: Path) -> None:
    """Both ranks are preempted from 30 to 90; rank 1 rests before that, and at the end."""
    write_metrics(
        tmp_path,
        [line(30, 30, 0), line(120, 30, 2)],
        [line(20, 20, 1), line(110, 20, 3)],
    )
    found = timeline(tmp_path)
    assert [(begin - 1e9, end - 1e9) for begin, end in found.pauses] == [(30, 90)]
    assert [(r.rank, r.begin - 1e9, r.end - 1e9) for r in found.rests()] == [
        (1, 20, 30),
        (1, 110, 120),
    ]
    write_units(tmp_path, ["a", "b"], 1)
    words = report(tmp_path).sections["Speed of the ranks"]
    assert "Between runs nothing was at work: 1 time, 1 min 0 s together" in words
    assert "wrote nothing for 16.67 % of their time (2 min 0 s of 2 ranks together)" in words


def test_a_rank_is_idle_in_runs_that_had_it(tmp_path: Path) -> None:
    """Four ranks for a minute, rank 3 for half of it; then one rank for ten hours, then two."""
    ranks = [[line(60, 60, n)] for n in range(3)] + [[line(30, 30, 3)]]
    ranks[0] += [line(60 + 3600 * n, 3600, 3 + n) for n in range(1, 11)]
    ranks[0] += [line(36160, 100, 14)]
    ranks[1] += [line(36120, 60, 15)]
    write_metrics(tmp_path, *ranks)
    write_units(tmp_path, ["a", "b"], 1)
    starts: list[Any] = [
        {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(1e9 + at)), "world_size": size}
        for at, size in ((0, 4), (60, 1), (36060, 2))
    ]
    (tmp_path / "run.json").write_text(json.dumps({"runs": [*starts, {"started": "soon"}, 3]}))
    words = report(tmp_path).sections["Speed of the ranks"]
    assert "wrote nothing for 0.1921 % of their time (10 h 7 min of 4 ranks together)" in words
    found = read_timeline(tmp_path, {"runs": starts})
    assert found is not None
    assert [(r.rank, r.begin - 1e9, r.end - 1e9) for r in found.rests()] == [
        (1, 36120, 36160),
        (3, 30, 60),
    ]
    (tmp_path / "run.json").write_text('{"runs": 3}')
    assert "wrote nothing for 74" in report(tmp_path).sections["Speed of the ranks"]


def test_lines_of_other_releases_and_torn_lines(tmp_path: Path) -> None:
    write_metrics(tmp_path, [line(10, 10), {"unit": 3}, line(20, 10, 1, flops={"t5": "many"})])
    path = tmp_path / "logs" / "metrics-00000.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('[1]\n"x"\n{"time": NaN, "seconds": 1, "unit": 1, "samples": 1}\n{"time": 17')
    shutil.copy(path, path.with_name("metrics-old.jsonl"))
    assert [work.end - 1e9 for work in timeline(tmp_path).work] == [10]
    path.write_text("", encoding="utf-8")
    assert read_timeline(tmp_path) is None


@pytest.mark.parametrize("ranks", [2, 17, 130])
def test_speed_of_few_and_of_many_ranks(ranks: int, tmp_path: Path) -> None:
    """Lanes for few, shades for many; the share of a GPU's peak by its name and dtype."""
    plan = make_plan(6, 3)
    for encoder in plan.spec["encoders"].values():
        encoder["dtype"] = "bfloat16"
    plan = type(plan).make(plan.spec, plan.inputs, samples_per_shard=3, num_rows=6, num_samples=6)
    write_plan(tmp_path, plan)
    write_null(tmp_path, plan)
    made = {**ENVIRONMENT, "device": "NVIDIA H100 80GB HBM3"}
    for unit in range(2):
        write_unit(tmp_path, plan, unit, samples_of(["a", "b", "c"], 3 * unit), made)
    work = {"t5": 4.5e14, "clip": 4.47e13}  # half a second at 989.4 TFLOP/s
    lines = [[line(10, 10, -1, flops=work), line(20, 10, 1, flops=work)] for _ in range(ranks)]
    write_metrics(tmp_path, *lines)
    words = report(tmp_path).sections["Speed of the ranks"]
    assert "5 % over all units" in words
    assert ("rank 0, node-a" in words) is (ranks == 2)
    assert ("3 neighbours to a row" in words) is (ranks == 130)
    write_metrics(tmp_path, [line(10, 10), line(20, 10, 1)])
    words = report(tmp_path).sections["Speed of the ranks"]
    assert "an older release" in words


# --- verify and the card --------------------------------------------------------------------------


def test_verify_says_what_it_found(root: Path) -> None:
    expect(0, "verify", root, "--level", "quick")
    page = report(root)
    assert "its last verification (quick, 20" in page.sections[""]
    words = page.sections["Verification"]
    assert "no problems" in words
    assert "quick" in words
    path = paths_of(root, 1).shard
    path.unlink()
    expect(4, "verify", root)
    noted = json.loads((root / "logs" / "verify.json").read_bytes())
    assert noted["problems"] == 1
    assert noted["first"][0].startswith(str(path))
    assert set(noted) == {*("time", "level", "complete", "problems", "first", "bytes", "seconds")}
    assert "1 problem " in report(root).sections["Verification"]
    path = root / "logs" / "verify.json"
    for odd in ("NaN", "Infinity", "1" + 400 * "0", '"x"'):
        path.write_text(f'{{"problems": 2, "seconds": {odd}, "bytes": {odd}}}')
        words = report(root).sections["Verification"]
        assert words.count("not noted") == 2
        assert "2 problems" in words
    path.write_text(json.dumps(noted))

    assert "did not end without problems" in report(root).sections[""]
    late = line(5e9, 1)  # after the check
    write_metrics(root, [late])
    assert "verify again" in report(root).sections["Verification"]


def test_verify_writes_nothing_where_it_cannot(root: Path, tmp_path: Path) -> None:
    shutil.rmtree(root / "logs")
    (root / "logs").touch()
    expect(0, "verify", root)
    (root / "logs").unlink()
    (tmp_path / "elsewhere").mkdir()
    (root / "logs").symlink_to(tmp_path / "elsewhere")
    expect(0, "verify", root)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_the_card_is_written_by_run_finalize_and_report(root: Path) -> None:
    written = (root / "README.md").read_bytes()
    for command in ("finalize", "report"):
        (root / "README.md").unlink()
        expect(0, command, root)
        assert (root / "README.md").read_bytes() == written
    (root / "README.md").write_bytes(written.replace(b"n<1K", b"n<2K"))
    expect(0, "finalize", root)
    assert (root / "README.md").read_bytes() == written
    for own in (
        written.replace(b"# made by", b"# by"),
        b"# mine\n\n# made by embed-precompute, and then by me",
    ):
        (root / "README.md").write_bytes(own)
        assert "left as it is" in expect(0, "report", root)
        assert (root / "README.md").read_bytes() == own
    assert "not ours" not in expect(0, "verify", root)
    (root / "README.md").unlink()
    (root / "README.md").symlink_to(root / "nothing")
    assert "left as it is" in expect(0, "report", root)
    assert (root / "README.md").is_symlink()


@pytest.mark.parametrize("owner", ["program", "person"])
def test_a_repair_that_opens_units_removes_our_card(owner: str, root: Path) -> None:
    """Its counts are those of the dataset before."""
    path = root / "README.md"
    if owner == "person":
        path.write_text("# mine")
    written = path.read_bytes()
    expect(0, "repair", root)
    assert path.read_bytes() == written
    paths_of(root, 1).shard.unlink()
    expect(5, "repair", root)
    assert path.exists() is (owner == "person")


def test_the_hub_understands_the_card(root: Path) -> None:
    found = DatasetCard.load(root / "README.md")
    assert found.data.size_categories == ["n<1K"]
    assert found.data.tags == ["embed-precompute", "text-embeddings", "clip_text_model", "t5"]
    assert "text-to-video" in found.data.task_categories
    assert "`folder " in found.text
    assert "/" not in found.text.split("folder ")[1].split("`")[0], "where it lay is no one's"
    assert re.search(r"captions truncated \([0-9.]+ %\)", found.text)
    for fact in ("ok 30", read_plan(root).fingerprint, "EmbeddingDataset("):
        assert fact in found.text
    code = found.text.split("```python\n")[1].split("```")[0]
    exec(code.replace("path/to/this/folder", str(root)), {})


def test_a_card_that_cannot_be_written_stops_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, payload: bytes) -> None:
        raise StorageError(f"{path}: no space left")

    monkeypatch.setattr(card, "replace_bytes", full)
    assert "README.md is not written" in expect(0, "finalize", root)
    (root / "README.md").unlink()
    (root / "README.md").mkdir()
    assert "left as it is" in expect(0, "report", root)


# --- plots ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", [0, -3.7, 12.02, 1e-9])
@pytest.mark.parametrize("span", [1e-6, 0.3, 1, 7, 99, 15_811, 30e6])
def test_axes_are_round_and_hold_their_values(low: float, span: float) -> None:
    axis = plots.number_axis(low, low + span)
    assert axis.low <= low + 1e-9 * span
    assert axis.high >= low + span * (1 - 1e-9)
    assert 2 <= len(axis.ticks) <= 8
    places = [at for at, _ in axis.ticks]
    steps = {round((b - a) / span, 6) for a, b in itertools.pairwise(places)}
    assert len(steps) == 1


@pytest.mark.parametrize("value", [0, 5, -2])
def test_an_axis_of_one_value(value: float) -> None:
    axis = plots.number_axis(value, value)
    assert axis.low <= value <= axis.high
    assert axis.low < axis.high


@pytest.mark.parametrize("seconds", [0, 0.4, 8, 61, 3599, 86400, 40 * 86400, 900 * 86400])
def test_times_have_few_round_ticks(seconds: float) -> None:
    axis = plots.time_axis(seconds)
    assert 1 <= len(axis.ticks) <= 20
    assert all(math.isfinite(axis.share(at)) for at, _ in axis.ticks)


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (12.34, "12.3"), (999.4, "999"), (999.6, "1 k"), (15_811, "15.8 k"), (3e7, "30 M")],
)
def test_numbers_have_three_digits(value: float, words: str) -> None:
    assert plots.compact(value) == words


# --- in a browser ---------------------------------------------------------------------------------

MEASURE = """<script>addEventListener('load', () => {
const wide = document.documentElement.clientWidth;
const over = [...document.querySelectorAll('main *')].filter(
  e => !e.closest('.wide') && e.getBoundingClientRect().right > wide + 1);
parent.document.title = JSON.stringify([innerWidth, document.documentElement.scrollWidth,
  over.map(e => e.outerHTML.slice(0, 80)),
  Math.min(...[...document.querySelectorAll('svg text')].map(
    e => parseFloat(getComputedStyle(e).fontSize)))]);
})</script>"""
"""In a frame, for a window has a least width."""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser on PATH: {', '.join(BROWSERS)}")
    return found


def browse(browser: str, page: Path, width: int, *words: str) -> tuple[str, list[str]]:
    """(what the browser prints, what its console says)."""
    done = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--enable-logging=stderr", f"--user-data-dir={page.parent / 'profile'}"),
            *(f"--window-size={width},1600", *words, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout, [each for each in done.stderr.splitlines() if "CONSOLE" in each]


@pytest.fixture
def hard(tmp_path: Path) -> Path:
    """A dataset whose names, texts and ranks are hard to show."""
    root = tmp_path / ("folder" * 30)
    plan = make_plan(6, 6, text_column="column" * 40)
    write_plan(root, plan)
    write_null(root, plan)
    samples = samples_of([*NASTY.values(), None])
    samples = [dataclasses.replace(s, sample_id=f"{s.row}{'id' * 99}") for s in samples]
    write_unit(root, plan, 0, samples, {**ENVIRONMENT, "of " + "x" * 99: "y" * 99})
    finalize(root)
    ranks = [[line(3600 * rank, 60, host="host" * 20)] for rank in range(1, 40)]
    write_metrics(root, *ranks)
    (root / "run.json").write_text(json.dumps({"command": ["word" * 100], "started": "now"}))
    return root


@pytest.mark.parametrize("dataset", ["root", "hard"])
def test_in_a_browser(
    dataset: str, browser: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(dataset)
    expect(0, "report", root, "--output", tmp_path / "page.html")
    page, measured = tmp_path / "page.html", tmp_path / "measured.html"
    text = page.read_text(encoding="utf-8").replace("</body>", f"{MEASURE}</body>")
    for width in (400, 1280):
        shot = tmp_path / f"{width}.png"
        _, console = browse(browser, page, width, f"--screenshot={shot}")
        assert console == []
        header = shot.read_bytes()[:24]
        assert header[1:4] == b"PNG"
        assert int.from_bytes(header[16:20], "big") == width
        assert shot.stat().st_size > 20_000, "an empty page compresses to less"
        frame = f'<iframe style="border:0" width="{width}" srcdoc="{html.escape(text)}"></iframe>'
        measured.write_text(f"<title></title>{frame}", encoding="utf-8")
        printed, _ = browse(browser, measured, width, "--dump-dom")
        title = re.search("<title>(.*?)</title>", printed)
        assert title is not None
        inner, scroll, over, smallest = json.loads(html.unescape(title[1]))
        assert (inner, scroll, over) == (width, width, [])
        assert smallest >= 11


def test_an_error_of_the_console_would_be_seen(browser: str, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<script>console.error('seen')</script>", encoding="utf-8")
    _, console = browse(browser, page, 400, f"--screenshot={tmp_path / 'shot.png'}")
    assert any("seen" in each for each in console)
