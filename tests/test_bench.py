"""`bench`: its figures are consistent; how fast anything is, is never asserted."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import call, write_captions, write_job

import bench_table
from embed_precompute import load_config
from embed_precompute.bench.compare import bench
from embed_precompute.bench.measure import counted_shares, difference, useful_flops
from embed_precompute.bench.report import (
    BenchReport,
    Difference,
    EncoderBench,
    Measured,
    comparison,
    encoder_lines,
)
from embed_precompute.bench.variants import MODES, topped_up
from embed_precompute.bench.workload import (
    WINDOW,
    corpus_windows,
    synthetic_corpus,
    synthetic_lengths,
    windows,
)
from embed_precompute.encoders.batching import make_batches, pack
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.encoders.resolve import compiler, resolve

WHOLE_JOB = Path(__file__).parent.parent / "scripts" / "whole_job.py"
COLOSSALAI = find_spec("colossalai") is not None
COMPILES = compiler() is not None


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[str], tiny_t5: Path, tiny_clip: Path
) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    captions = write_captions(folder / "captions.parquet", [None, *corpus[:100]])
    return write_job(folder, captions, tiny_t5, tiny_clip)


@pytest.fixture(scope="module")
def everything(job: Path, tiny_t5: Path) -> dict[str, EncoderBench]:
    """Mode -> all its variants, of a T5 in both modes and a CLIP."""
    folder = job.parent / "masked"
    folder.mkdir()
    masked = write_job(
        folder,
        job.parent / "captions.parquet",
        tiny_t5,
        None,
        attention_mask="padding",
    )
    reports = [bench(load_config(path), num_captions=64, num_rounds=2) for path in (job, masked)]
    return {each.mode: each for report in reports for each in report.encoders}


def _expected(mode: str) -> list[str]:
    """The variants that can run here."""
    names = [name for name in MODES[mode] if COMPILES or not name.endswith("compile")]
    if mode == "t5, attention_mask none" and int(_transformers_version()) < 5:
        names.remove("hf-eager")  # it has no other attention
    return [name for name in names if COLOSSALAI or name != "shardformer"]


def _transformers_version() -> str:
    import transformers

    return transformers.__version__.split(".")[0]


@pytest.mark.parametrize("mode", MODES)
def test_every_variant_that_can_run_has_its_turns(
    everything: dict[str, EncoderBench], mode: str
) -> None:
    found = everything[mode]
    assert [measured.variant for measured in found.measured] == _expected(mode)
    assert set(found.left_out) == set(MODES[mode]) - set(_expected(mode))
    assert found.num_captions == 64
    for measured in found.measured:
        assert len(measured.round_s) == 2, measured.variant
        assert min(measured.round_s) > 0
        assert measured.weight_bytes > 100_000
        assert measured.difference is not None
        assert measured.difference.relative < 3e-6, measured.variant
        assert found.figures(measured)["fused_is"] is not None


def test_forwards_are_those_that_the_names_say(everything: dict[str, EncoderBench]) -> None:
    padded, masked, clip = (everything[mode] for mode in MODES)
    for name in ("hf", "fused"):
        assert _batches(padded, name) == [(4, 24)] * 16
    assert _batches(clip, "hf-pad") == [(WINDOW, 77)] * 2
    assert _batches(masked, "hf-pad") == [(WINDOW, 24)] * 2
    assert _batches(masked, "fused") == [(1, 4096)]
    fused = masked.of("fused")
    assert fused is not None
    assert fused.counted == pytest.approx(masked.num_tokens / 4096, rel=0.01)
    assert fused.real_share > 0.99
    for found in (masked, clip):
        (few, short), (many, long) = _batches(found, "hf-sorted")
        assert few == many == WINDOW
        assert short < long
    shares = [_share(masked, name) for name in ("hf-pad", "hf-random", "hf-sorted")]
    assert shares == sorted(shares)
    assert shares[0] == masked.num_tokens / (64 * 24)


def _batches(found: EncoderBench, variant: str) -> list[tuple[int, int]]:
    measured = found.of(variant)
    assert measured is not None
    return measured.batches


def _share(found: EncoderBench, variant: str) -> float:
    measured = found.of(variant)
    assert measured is not None
    return measured.real_share


def test_forwards_of_one_cost_are_counted_not_run(tmp_path: Path, tiny_t5: Path) -> None:
    fields = {"attention_mask": "padding", "max_length": 300}
    job = write_job(tmp_path, tmp_path / "absent", tiny_t5, None, **fields)
    names = ["hf-pad", "hf-random"]
    (t5,) = bench(load_config(job), 96, 1, names, synthetic=True).encoders
    pad, random = t5.measured
    assert pad.batches == [(WINDOW, 300)] * 2  # 16,384 tokens and more
    assert (pad.counted, random.counted) == (3.0, 3.0)
    assert pad.real_share == pytest.approx(t5.num_tokens / (96 * 300))
    assert pad.difference is not None
    assert pad.difference.relative < 3e-6


def test_no_room_for_float32(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embed_precompute.bench.memory.available", lambda device: 1000)
    (_, t5) = bench(load_config(job), 4, 1, ["fused"]).encoders
    assert t5.measured[0].difference is None
    assert "the layers in float32 take 0.0 GiB" in t5.left_out["the difference from float32"]


def test_bfloat16_shows_its_distance_from_float32(
    tmp_path: Path, corpus: list[str], tiny_t5: Path
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", corpus[:40])
    job = write_job(tmp_path, captions, tiny_t5, None, attention_mask="padding", dtype="bfloat16")
    (t5,) = bench(load_config(job), 32, 1, ["hf", "fused"]).encoders
    for measured in t5.measured:
        assert measured.difference is not None
        assert 1e-4 < measured.difference.relative < 5e-2, measured.variant
    assert t5.rounding is None  # stored as float32


def test_differences_are_over_all_captions() -> None:
    exact = {0: torch.tensor([3.0, 4.0]), 7: torch.tensor([[0.0, -12.0]])}
    ours = {0: torch.tensor([3.0, 4.5]), 7: torch.tensor([[1.2, -12.0]]), 9: torch.ones(2)}
    found = difference(ours, exact)
    assert dataclasses.astuple(found) == pytest.approx((1.2, 0.1, 0.1))


def test_windows_lie_evenly_over_the_sorted_corpus() -> None:
    lengths = np.random.default_rng(3).permutation(np.arange(1000))
    chosen = windows(lengths, 130)
    assert [len(window) for window in chosen] == [WINDOW] * 4
    runs = [lengths[window].tolist() for window in chosen]
    assert [run[0] for run in runs] == [109, 359, 609, 859]  # 32 in the middle of every 250
    assert all(run == list(range(run[0], run[0] + WINDOW)) for run in runs)


@pytest.mark.parametrize("count", [96, 97, 100, 129, 1001])
def test_no_caption_is_in_two_windows(count: int) -> None:
    chosen = windows(np.arange(count) % 7, 96)
    assert [len(window) for window in chosen] == [WINDOW] * 3
    assert len(set(np.concatenate(chosen).tolist())) == 96


def test_fewer_captions_than_a_window() -> None:
    (chosen,) = windows(np.arange(9), 5)
    assert chosen.tolist() == [2, 3, 4, 5, 6]
    assert sum(len(window) for window in windows(np.arange(40), 64)) == 40


def test_the_captions_are_shuffled_windows(tiny_t5: Path) -> None:
    config = EncoderConfig("t5", str(tiny_t5), attention_mask="padding", implementation="hf")
    resolved = resolve("t5", config)
    corpus = synthetic_corpus(resolved.tokenizer, synthetic_lengths(500).tolist())
    given = corpus_windows(resolved, corpus, 96).ids
    lengths = np.array([len(ids) for ids in corpus])
    expected = np.concatenate(windows(lengths, 96))
    assert sorted(map(len, given)) == sorted(lengths[expected].tolist())
    assert list(map(len, given)) != sorted(map(len, given))
    again = corpus_windows(resolved, corpus, 96).ids
    assert all((a == b).all() for a, b in zip(given, again, strict=True))


def test_synthetic_lengths_are_those_of_video_captions() -> None:
    lengths = synthetic_lengths(16_384)
    for share, tokens in ((0.25, 10), (0.5, 16), (0.8, 52), (0.9, 151), (0.99, 226)):
        assert np.quantile(lengths, share) == pytest.approx(tokens, abs=1)
    assert lengths.mean() == pytest.approx(42.5, abs=0.6)
    assert lengths.min() >= 2
    assert 400 < lengths.max() <= 512
    assert (synthetic_lengths(500) == synthetic_lengths(500)).all()


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_synthetic_captions_have_no_special_id_inside(
    kind: str, tiny_t5: Path, tiny_clip: Path
) -> None:
    folder = tiny_t5 if kind == "t5" else tiny_clip
    resolved = resolve(kind, EncoderConfig(kind, str(folder), implementation="hf"))  # type: ignore[arg-type]
    tokenizer = resolved.tokenizer
    made = synthetic_corpus(tokenizer, [2, 3, 40, 5000])
    assert [len(ids) for ids in made] == [2, 3, 40, tokenizer.max_length]
    for ids in made:
        assert ids[-1] == tokenizer.eos_id
        inside = ids[len(tokenizer.filler) - 1 : -1]
        assert not tokenizer.special_ids & set(inside.tolist())
        assert ids.max() <= tokenizer.max_id
    assert len(np.unique(made[3])) > 10


def test_without_a_table(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    job = write_job(tmp_path, tmp_path / "absent", tiny_t5, tiny_clip, added_tokens="video")
    words = ["--synthetic", "--rounds", "1", "--captions", "6", "--variants", "hf", "fused"]
    code, out, said = call("bench", str(job), *words)
    assert code == 0, said
    assert "6 captions, 144 tokens (mean 24.0): synthetic, the first of 16,384 captions" in out
    assert "synthetic, 1 windows of 6 of 16,384 captions sorted by length" in out


def test_a_part_empty_forward_counts_by_its_part() -> None:
    captions = [np.full(3, 5, np.int32)] * 10
    batches = list(make_batches(captions, [(4, 8)], 0, captions[0]))
    assert counted_shares(batches) == [1.0, 1.0, 0.5]
    streams = list(pack(captions, 10, 0))  # three, three, three, one
    assert counted_shares(streams) == pytest.approx([1.0, 1.0, 1.0, 1 / 3])
    assert counted_shares(streams[:1]) == pytest.approx([0.9])


def test_streams_are_full_of_the_same_captions() -> None:
    ids = [np.full(length, length, np.int32) for length in (9, 2, 5, 3)]
    given = topped_up(ids, 50)
    assert [len(tokens) for tokens in given] == [9, 2, 5, 3, 9, 2, 5, 3, 9, 2]
    assert sum(map(len, given)) == 49
    assert topped_up(ids, 19) == ids


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


def test_weights_are_counted_once(everything: dict[str, EncoderBench], tiny_t5: Path) -> None:
    stored = (tiny_t5 / "model.safetensors").stat().st_size
    for mode in ("t5, attention_mask none", "t5, attention_mask padding"):
        assert stored - 10_000 < everything[mode].measured[0].weight_bytes <= stored


def test_command_prints_a_table_and_writes_json(job: Path, tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    words = ["--rounds", "1", "--captions", "5", "--variants", "hf-pad", "hf", "fused"]
    code, out, said = call("bench", str(job), *words, "--json", str(target))
    assert code == 0, said
    assert "captions/s" in out
    assert (
        "t5: t5, attention_mask none, float32\n  5 captions, 120 tokens (mean 24.0): the first"
        in out
    )
    assert "hf: 2 of 4 x 24, 100 % of it needed (counted as 1.25 forwards)" in out
    assert "hf-pad left out: it is no variant of t5, attention_mask none: hf, hf-eager" in out
    written = json.loads(target.read_text())
    assert [encoder["name"] for encoder in written["encoders"]] == ["clip", "t5"]
    assert written["environment"]["torch"]
    fused = written["encoders"][1]["measured"][1]
    assert fused["figures"]["fused_is"] == 1.0
    assert fused["figures"]["captions_per_s"] == pytest.approx(5 / fused["round_s"][0])
    assert BenchReport.from_json(written).lines() == out.splitlines()
    assert json.loads(json.dumps(BenchReport.from_json(written).to_json())) == written
    assert not (job.parent / "out").exists()


def test_without_a_number_there_is_a_batch_or_six_windows(job: Path) -> None:
    clip, t5 = bench(load_config(job), num_rounds=1, variants=["fused"]).encoders
    assert (t5.num_captions, clip.num_captions) == (4, 100)
    assert clip.measured[0].variant == "fused"


def test_nowhere_to_write(job: Path, tmp_path: Path) -> None:
    target = str(tmp_path / "absent" / "bench.json")
    words = ["--rounds", "1", "--captions", "2", "--variants", "hf", "--json", target]
    code, out, said = call("bench", str(job), *words)
    assert code == 74
    assert "captions/s" in out
    assert "cannot write" in said


def test_no_caption_to_measure_with(tmp_path: Path, tiny_t5: Path) -> None:
    captions = write_captions(tmp_path / "captions.parquet", [None, None])
    job = write_job(tmp_path, captions, tiny_t5, None)
    code, _, said = call("bench", str(job))
    assert code == 2
    assert "none of the first 2 samples has a text" in said
    assert "--synthetic" in said


def test_an_unknown_variant_names_the_known(job: Path) -> None:
    code, out, said = call("bench", str(job), "--variants", "hf", "fast", "hf-sort")
    assert code == 2
    assert out == ""
    assert "--variants has fast, hf-sort: known are hf, hf-eager, hf-compile, fused" in said


def test_no_variant_that_fits(tmp_path: Path, tiny_clip: Path) -> None:
    job = write_job(tmp_path, tmp_path / "absent", None, tiny_clip)
    code, _, said = call("bench", str(job), "--synthetic", "--variants", "hf-random")
    assert code == 2
    assert "nothing could be measured" in said
    assert "clip, hf-random: it is no variant of clip" in said


def test_a_peer_that_fails_is_left_out(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no such\n  kernel")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setenv("CXX", sys.executable)  # any program: it is not called
    (_, t5) = bench(load_config(job), 4, 1, ["hf", "hf-compile", "fused"]).encoders
    assert [measured.variant for measured in t5.measured] == ["hf", "fused"]
    assert t5.left_out == {"hf-compile": "RuntimeError: no such kernel"}


def test_without_a_compiler_its_variants_are_left_out(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("shutil.which", lambda name: None)
    (_, t5) = bench(load_config(job), 4, 1, ["hf", "hf-compile", "fused-compile"]).encoders
    assert [measured.variant for measured in t5.measured] == ["hf"]
    for name in ("hf-compile", "fused-compile"):
        assert "torch.compile needs a C++ compiler" in t5.left_out[name]


def test_ratios_are_medians_of_rounds() -> None:
    shapes = [(4, 24), (4, 24)]
    fused = Measured("fused", 100 << 20, 0.5, 50 << 20, 50 << 20, shapes, 2.0, 1.0)
    fused.round_s = [1.0, 2.0, 4.0]
    other = Measured("shardformer", 100 << 20, 0.5, 50 << 20, 100 << 20, shapes, 1.5, 0.9)
    other.round_s = [1.1, 2.0, 3.0]
    other.difference = Difference(0.5, 0.25, 0.125)
    rates = [5e9, 1e9, 1e9]
    found = EncoderBench(
        *("t5", "t5, attention_mask none", "float32", "the first", 8, 192, 1e9, rates, 6, None),
        [fused, other],
        {"hf": "no reason"},
    )
    assert found.figures(other) == {
        "captions_per_s": 4.0,
        "tokens_per_s": 96.0,
        "of_gemm": 1 / 3,
        "fused_is": 1.0,
        "peak_bytes": 250 << 20,
    }
    text = "\n".join(encoder_lines(found))
    assert "shardformer         4.0         96     0.33     1.00x     250.0 MiB" in text
    assert "5.00e-01   2.5e-01  1.2e-01" in text
    assert "hf left out: no reason" in text
    assert "(counted as 1.50 forwards)" in text
    assert (
        comparison(other, fused) == "shardformer against fused: time +0.0 % (-25.0 to +10.0), "
        "peak memory +25.0 %"
    )


def test_table_of_real_shapes(
    tmp_path: Path,
    tiny_t5: Path,
    tiny_clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def tiny(folder: Path, shape: str, dtype: str, layers: int) -> Path:
        return tiny_clip if shape == "clip" else tiny_t5

    monkeypatch.setattr(bench_table, "checkpoint", tiny)
    words = ["bench_table", str(tmp_path), "--jobs", "xxl-masked", "--dtypes", "float32"]
    words += ["--num-captions", "4", "--rounds", "1", "--variants", "hf", "fused"]
    monkeypatch.setattr(sys, "argv", words)
    bench_table.main()
    *_, head, _, row = capfd.readouterr().out.splitlines()
    cells = dict(zip(head.strip("| ").split(" | "), row.strip("| ").split(" | "), strict=True))
    assert cells["mode"] == "masked"
    assert cells["shape"] == "2 layers of xxl"
    assert float(cells["of GEMM"]) >= 0
    assert cells["fused is"].endswith("x hf")


def test_quick_weights_are_scaled_and_typed() -> None:
    weights = bench_table.QuickWeights("bfloat16")
    weights.add("w", 300, 400, std=0.05, mean=1.0)
    made = weights.tensors["w"]
    assert made.dtype == torch.bfloat16
    assert made.float().std().item() == pytest.approx(0.05, rel=0.05)
    assert made.float().mean().item() == pytest.approx(1.0, rel=0.01)


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
