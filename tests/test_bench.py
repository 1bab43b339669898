"""`bench`: its figures are consistent; how fast anything is, is never asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from jobs import call, write_captions, write_job

from embed_precompute import load_config
from embed_precompute.bench import (
    Difference,
    EncoderBench,
    Measured,
    _encoder_lines,
    bench,
    useful_flops,
)
from embed_precompute.config import EncoderConfig
from embed_precompute.encoders import resolve

WHOLE_JOB = Path(__file__).parent.parent / "scripts" / "whole_job.py"
COLOSSALAI = find_spec("colossalai") is not None


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[str], tiny_t5: Path, tiny_clip: Path
) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    captions = write_captions(folder / "captions.parquet", [None, *corpus[:30]])
    return write_job(folder, captions, tiny_t5, tiny_clip)


def test_all_implementations_that_can_run_take_turns(job: Path) -> None:
    report = bench(load_config(job), num_captions=7, num_rounds=3)
    clip, t5 = report.encoders
    assert [measured.implementation for measured in clip.measured] == ["hf", "hf-pad", "fused"]
    names = ["hf", "fused", "shardformer"] if COLOSSALAI else ["hf", "fused"]
    assert [measured.implementation for measured in t5.measured] == names
    assert [measured.batches for measured in t5.measured[:2]] == [[(4, 24), (4, 24)]] * 2
    assert clip.measured[1].batches == [(4, 77), (4, 77)]
    assert clip.measured[2].batches == [(1, 4096)]
    assert t5.num_captions == 6  # the first of the seven samples has no text
    assert ("shardformer" in t5.left_out) == (not COLOSSALAI)
    for measured in (*clip.measured, *t5.measured):
        assert len(measured.round_s) == 3
        assert min(measured.round_s) > 0
        assert measured.weight_bytes > 100_000
    if COLOSSALAI:
        assert t5.measured[0].weight_bytes == t5.measured[2].weight_bytes
        difference = t5.measured[2].difference
        assert difference is not None
        assert difference.identical
        assert difference.largest == difference.relative == 0


@pytest.mark.parametrize("attention_mask", ["none", "padding"])
def test_all_encode_the_same_captions(
    tmp_path: Path, corpus: list[str], tiny_t5: Path, attention_mask: str
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", corpus[:30])
    job = write_job(tmp_path, captions, tiny_t5, None, attention_mask=attention_mask)
    (t5,) = bench(load_config(job), num_captions=30, num_rounds=1).encoders
    for measured in t5.measured[1:]:
        assert measured.difference is not None
        assert measured.difference.relative < 3e-6, measured.implementation


def test_flops_by_hand(tiny_t5: Path, tiny_clip: Path) -> None:
    config = json.loads((tiny_t5 / "config.json").read_text())
    d, ff, layers = config["d_model"], config["d_ff"], config["num_layers"]
    inner = config["num_heads"] * config["d_kv"]
    resolved = resolve("t5", EncoderConfig("t5", str(tiny_t5)))
    for tokens, found in ((5, useful_flops(resolved, [5])), (2, useful_flops(resolved, [1, 1]))):
        linears = tokens * 2 * (d * inner * 4 + d * ff * 3)
        attention = 2 * 2 * inner * (25 if tokens == 5 else 2)
        assert found == layers * (linears + attention)
    clip = resolve("clip", EncoderConfig("clip", str(tiny_clip)))
    config = json.loads((tiny_clip / "config.json").read_text())
    d, ff, layers = (
        config[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    )
    assert useful_flops(clip, [3]) == layers * (3 * 2 * (4 * d * d + 2 * d * ff) + 4 * 9 * d)


def test_weights_are_counted_once(job: Path, tiny_t5: Path) -> None:
    report = bench(load_config(job), num_captions=2, num_rounds=1)
    stored = (tiny_t5 / "model.safetensors").stat().st_size
    assert stored - 10_000 < report.encoders[1].measured[0].weight_bytes <= stored


def test_command_prints_a_table_and_writes_json(job: Path, tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    words = ["bench", str(job), "--rounds", "1", "--captions", "5", "--json", str(target)]
    code, out, said = call(*words)
    assert code == 0, said
    assert "captions/s" in out
    assert "t5 (float32): 4 captions, 96 tokens; 1 rounds, medians" in out
    assert "hf forwards: 1 of 4 x 24" in out
    assert "every bit equal" in out or "ColossalAI is not installed" in out
    written = json.loads(target.read_text())
    assert [encoder["name"] for encoder in written["encoders"]] == ["clip", "t5"]
    assert written["environment"]["torch"]
    assert not (job.parent / "out").exists()


def test_without_a_number_each_shape_has_a_batch(job: Path) -> None:
    report = bench(load_config(job), num_rounds=1)
    clip, t5 = report.encoders
    assert (t5.num_captions, clip.num_captions) == (4, 20)


def test_nowhere_to_write(job: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "absent" / "bench.json")
    code, out, said = call("bench", str(job), "--rounds", "1", "--captions", "2", "--json", target)
    assert code == 74
    assert "captions/s" in out
    assert "cannot write" in said


def test_no_caption_to_measure_with(tmp_path: Path, tiny_t5: Path) -> None:
    captions = write_captions(tmp_path / "captions.parquet", [None, None, "x"])
    job = write_job(tmp_path, captions, tiny_t5, None)
    code, _, said = call("bench", str(job), "--captions", "2")
    assert code == 2
    assert "none of the first 2 samples has a text" in said


def test_comparison_is_a_median_of_rounds() -> None:
    shapes = [(4, 24), (4, 24)]
    reference = Measured("hf", 100 << 20, 100 << 20, [1.0, 2.0, 4.0], shapes)
    other = Measured("shardformer", 100 << 20, 150 << 20, [1.1, 2.0, 3.0], shapes)
    other.difference = Difference(0.5, 0.25, identical=False)
    rates = [5e9, 1e9, 1e9]
    text = "\n".join(
        _encoder_lines(EncoderBench("t5", "float32", 8, 192, 1e9, rates, [reference, other], {}))
    )
    assert "1.00x the speed, time +0.0 % (-25.0 to +10.0), peak memory +25.0 %" in text
    assert "largest difference 0.5 (relative 2.50e-01)" in text
    assert "200.0 MiB    2.0000         4.0         96     0.25" in text


def test_whole_job_beside_its_encoders_alone(job: Path) -> None:
    command = [sys.executable, str(WHOLE_JOB), str(job), "--captions", "9", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    row = [float(cell) for cell in done.stdout.splitlines()[-1].strip("| ").split("|")]
    ranks, alone, in_job, loading, whole, ratio = row
    assert ranks == 1
    assert min(alone, in_job, loading) > 0
    assert in_job + loading < whole
    assert ratio == pytest.approx((whole - loading) / alone, rel=0.3)  # cells are rounded
