"""`bench` and scripts/benchmarks: figures are consistent; how fast anything is, is not asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import PACKAGE_ROOT, call, write_captions, write_job

import bench_table
import peers
from embed_precompute.bench import measure
from embed_precompute.bench.compare import bench, encoder_lines
from embed_precompute.bench.measure import (
    EncoderBench,
    Measured,
    filled_shares,
    topped_up,
    useful_flops,
)
from embed_precompute.config.files import load_config
from embed_precompute.encoders.device import compiler
from embed_precompute.encoders.families.clip import ClipOptions
from embed_precompute.encoders.families.t5 import T5Options
from embed_precompute.encoders.resolve import open_encoder, resolve
from embed_precompute.encoders.tokenizer import Tokenized, make_batches, pack

BENCHMARKS = PACKAGE_ROOT / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[str], tiny_t5: Path, tiny_clip: Path
) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    captions = write_captions(folder / "captions.parquet", [None, *corpus[:100]])
    return write_job(folder, captions, tiny_t5, tiny_clip)


def captions_of(lengths: list[int]) -> Tokenized:
    ids = [np.full(length, 3, dtype=np.int32) for length in lengths]
    none = [False] * len(lengths)
    return Tokenized(ids, lengths, [0] * len(ids), lengths, lengths, none, [0] * len(ids))


def test_the_command_prints_a_table_and_writes_json(job: Path, tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    words = ("--captions", "20", "--rounds", "2", "--variants", "hf", "fused")
    code, out, said = call("bench", str(job), *words, "--json", str(target))
    assert code == 0, said
    clip, t5 = json.loads(target.read_text())["encoders"]
    assert (clip["name"], t5["name"]) == ("clip", "t5")
    assert t5["num_tokens"] == 20 * 24  # pads are attended
    for encoder in (clip, t5):
        assert (encoder["num_captions"], encoder["num_compared"]) == (20, 20)
        assert [each["variant"] for each in encoder["measured"]] == ["hf", "fused"]
        for measured in encoder["measured"]:
            assert len(measured["round_s"]) == 2
            assert min(measured["round_s"]) > 0
            assert measured["weight_bytes"] > 100_000
            assert measured["relative"] < 3e-6
            assert measured["rms"] <= measured["relative"] * 5
            assert measured["figures"]["captions_per_s"] > 0
        assert f"{encoder['name']}, float32: 20 captions" in out
    assert "threads" in out
    unwritable = tmp_path / "absent" / "x.json"
    code, _, said = call("bench", str(job), *words, "--json", str(unwritable))
    assert code == 74
    assert "cannot write" in said


def test_bfloat16_shows_its_distance_from_float32(job: Path) -> None:
    words = ["--encoders.t5.dtype", "bfloat16", "--output.dtype", "bfloat16"]
    report = measure_of(job, words, ["hf"])
    (measured,) = report[1].measured
    assert measured.relative is not None
    assert 1e-4 < measured.relative < 0.1


def measure_of(job: Path, words: list[str], variants: list[str]) -> list[EncoderBench]:

    return bench(load_config(job, words), 8, 1, variants).encoders


def test_what_cannot_run_is_left_out_with_the_reason(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_kib", lambda path, name: 1)
    monkeypatch.setattr("embed_precompute.encoders.device.compiler", lambda: None)
    for found in measure_of(job, [], ["hf", "fused-compile"]):
        assert "0.0 are free" in found.left_out["the difference from float32"]
        assert "needs a C++ compiler" in found.left_out["fused-compile"]
        assert found.measured[0].relative is None
    code, _, said = call("bench", str(job), "--variants", "fused-compile")
    assert code == 2
    assert "nothing could be measured" in said
    code, _, said = call("bench", str(job), "--variants", "fuzed")
    assert code == 2
    assert "--variants has fuzed: known are hf, fused, fused-compile, shardformer" in said


def test_a_table_without_captions(tmp_path: Path, tiny_t5: Path) -> None:
    captions = write_captions(tmp_path / "captions.parquet", [None, None])
    code, _, said = call("bench", str(write_job(tmp_path, captions, tiny_t5, None)))
    assert code == 2
    assert "none of the first 2 samples has a text" in said


def test_a_part_empty_batch_counts_by_its_part() -> None:
    empty = captions_of([1])
    batches = list(make_batches(captions_of([3] * 5 + [7]), ((4, 4), (2, 8)), 0, empty))
    assert filled_shares(batches) == [1.0, 0.25, 0.5]


def test_packed_streams_are_full_of_the_same_captions() -> None:
    given = captions_of([30, 20, 9, 2])
    full = topped_up(given, 128)
    assert sum(full.num_ids) == 128
    assert full.num_ids[:4] == given.num_ids
    assert set(full.num_ids) <= {30, 20, 9, 2}
    assert len(list(pack(full, 128, 0))) == 1
    assert len(topped_up(captions_of([64, 64]), 128)) == 2


def test_flops_by_hand(tiny_t5: Path, tiny_clip: Path) -> None:
    t5 = resolve(open_encoder("t5", T5Options(pretrained=str(tiny_t5))))
    clip = resolve(open_encoder("clip", ClipOptions(pretrained=str(tiny_clip))))
    linears = 4 * 64 * 64 + 3 * 64 * 128
    assert useful_flops(t5, [5, 7]) == 2 * (2 * linears * 12 + 4 * (25 + 49) * 64)
    linears = 4 * 64 * 64 + 2 * 64 * 256
    assert useful_flops(clip, [5]) == 2 * (2 * linears * 5 + 4 * 25 * 64)


def test_ratios_are_medians_of_rounds() -> None:
    fused = Measured("fused", 1, 1.0, peak_bytes=3 << 20, round_s=[1.0, 4.0, 1.0])
    hf = Measured("hf", 1, 2.0, round_s=[2.0, 8.0, 3.0], relative=1.5e-7, rms=1e-7)
    bench = EncoderBench("t5", "float32", 10, 100, 4e9, [1e9, 1e9, 2e9], 6, [hf, fused], {"x": "y"})
    assert bench.figures(hf) == {
        "captions_per_s": 10 / 3,
        "tokens_per_s": 100 / 3,
        "of_gemm": pytest.approx(2 / 3),
        "fused_is": 2.0,
    }
    lines = encoder_lines(bench)
    assert "1.5e-07" in lines[-3]
    assert "unknown" in lines[-3]
    assert "3.0 MiB" in lines[-2]
    assert lines[-1] == "  x left out: y"


# --- scripts/benchmarks ---------------------------------------------------------------------------


def test_peers_run_as_their_users_run_them(job: Path, tiny_t5: Path, tmp_path: Path) -> None:
    masked = write_job(
        tmp_path, job.parent / "captions.parquet", tiny_t5, None, attention_mask="padding"
    )
    names = ["hf-pad", "hf-random", "hf-sorted", "hf", "fused"]
    (t5,) = peers.compare(load_config(masked), 64, 1, names).encoders
    assert [each.variant for each in t5.measured] == names
    clip, padded = peers.compare(load_config(job), 32, 1, ["hf-pad", "hf-eager"]).encoders
    assert [each.variant for each in clip.measured] == ["hf-pad", "hf-eager"]
    assert [each.variant for each in padded.measured] + list(padded.left_out) == ["hf-eager"]
    for encoder in (t5, clip, padded):
        for measured in encoder.measured:
            assert measured.relative is not None
            assert measured.relative < 3e-6, measured.variant


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_compiled_peers(job: Path) -> None:
    for encoder in peers.compare(load_config(job), 8, 1, ["hf-compile", "hf-pad-compile"]).encoders:
        assert len(encoder.measured) == 1
        assert encoder.measured[0].relative is not None
        assert encoder.measured[0].relative < 3e-6


def test_a_table_of_real_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With tiny weights in place of real ones; the command itself is run."""
    monkeypatch.setattr(bench_table, "write_t5", tiny(bench_table.write_t5, 4))
    monkeypatch.setattr(bench_table, "write_clip", tiny(bench_table.write_clip, 4))
    words = ["--jobs", "base-padded", "clip-pooled", "--rounds", "1", "--num-captions", "2"]
    words += ["--batch", "2", "--variants", "hf", "fused", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench_table", str(tmp_path), *words])
    monkeypatch.setenv("PYTHONPATH", str(PACKAGE_ROOT))
    bench_table.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 3
    assert rows[1].startswith("| padded | bfloat16 | base |")
    assert rows[2].startswith("| pooled | bfloat16 | clip |")
    assert all("x hf |" in row for row in rows[1:])


def tiny(write: Any, heads: int) -> Any:
    def run(*arguments: Any, **fields: Any) -> Path:
        fields |= {"width": 64, "layers": 1, "heads": heads}
        if "feed_forward" in fields:
            fields["feed_forward"] = 128
        path: Path = write(*arguments, **fields)
        return path

    return run


def test_a_whole_job_next_to_its_encoders_alone(job: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "whole_job.py"), str(job), "--rounds", "1"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(PACKAGE_ROOT)},
    )
    assert done.returncode == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("| 1 |"))
    assert all(float(cell) > 0 for cell in row.strip("| ").split("|"))
