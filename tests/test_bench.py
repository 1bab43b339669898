"""`bench`: its figures are consistent; how fast anything is, is never asserted."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from jobs import call, write_captions, write_job

from embed_precompute import load_config
from embed_precompute.bench import Difference, EncoderBench, Measured, _encoder_lines, bench

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
    assert [measured.implementation for measured in clip.measured] == ["hf"]
    names = ["hf", "shardformer"] if COLOSSALAI else ["hf"]
    assert [measured.implementation for measured in t5.measured] == names
    assert t5.batches == [(4, 24), (4, 24)]
    assert t5.num_captions == 6  # the first of the seven samples has no text
    assert ("shardformer" in t5.left_out) == (not COLOSSALAI)
    for measured in (*clip.measured, *t5.measured):
        assert len(measured.round_s) == 3
        assert min(measured.round_s) > 0
        assert measured.weight_bytes > 100_000
    if COLOSSALAI:
        assert t5.measured[0].weight_bytes == t5.measured[1].weight_bytes
        difference = t5.measured[1].difference
        assert difference is not None
        assert difference.identical
        assert difference.largest == difference.relative == 0


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
    assert "t5 (float32): 4 captions in batches of 4 x 24; 1 rounds, medians" in out
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
    reference = Measured("hf", 100 << 20, 100 << 20, [1.0, 2.0, 4.0])
    other = Measured("shardformer", 100 << 20, 150 << 20, [1.1, 2.0, 3.0])
    other.difference = Difference(0.5, 0.25, identical=False)
    text = "\n".join(
        _encoder_lines(EncoderBench("t5", "float32", 8, [(4, 24), (4, 24)], [reference, other], {}))
    )
    assert "time per batch +0.0 % (-25.0 to +10.0), peak memory +25.0 %" in text
    assert "largest difference 0.5 (relative 2.50e-01)" in text
    assert "200.0 MiB    1.0000         4.0" in text
