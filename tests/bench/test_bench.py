"""`bench` and scripts/benchmarks: figures are consistent; how fast anything is, is not asserted."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from handmade import words_as_tokens
from jobs import call, clean_environment, write_captions, write_job

import bench_table
import claims_simulation
import decoders
import peers
import whole_job
from embed_precompute.bench import measure
from embed_precompute.bench.compare import bench, encoder_lines
from embed_precompute.bench.measure import (
    EncoderBench,
    Measured,
    filled_shares,
    topped_up,
)
from embed_precompute.config.files import load_config
from embed_precompute.encoders.device import compiler
from embed_precompute.encoders.families.clip import ClipOptions
from embed_precompute.encoders.families.t5 import T5Options
from embed_precompute.encoders.resolve import open_encoder, resolve
from embed_precompute.encoders.tokenizer import Tokenized, make_batches


@pytest.fixture(scope="module")
def job(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[str], tiny_t5: Path, tiny_clip: Path
) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    captions = write_captions(folder / "captions.parquet", [None, *corpus[:100]])
    return write_job(folder, captions, tiny_t5, tiny_clip)


@pytest.fixture(autouse=True)
def _small_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "GEMM_SIZE", 64)


def captions_of(lengths: list[int]) -> Tokenized:
    return words_as_tokens(["x " * (length - 1) for length in lengths])


def test_the_command_prints_a_table_and_writes_json(job: Path, tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    words = ["--captions", "20", "--rounds", "2", "--variants", "hf", "fused"]
    words += ["--encoders.t5.dtype", "bfloat16"]
    code, out, said = call("bench", str(job), *words, "--json", str(target))
    assert code == 0, said
    clip, t5 = json.loads(target.read_text())["encoders"]
    assert (clip["name"], t5["name"]) == ("clip", "t5")
    assert t5["num_tokens"] == 20 * 24  # pads are attended
    for encoder, low, high in ((clip, 0, 3e-6), (t5, 1e-4, 0.1)):
        assert (encoder["num_captions"], encoder["num_compared"]) == (20, 20)
        assert [each["variant"] for each in encoder["measured"]] == ["hf", "fused"]
        for measured in encoder["measured"]:
            assert len(measured["round_s"]) == 2
            assert min(measured["round_s"]) > 0
            assert measured["weight_bytes"] > 100_000
            assert low <= measured["relative"] < high
            assert measured["rms"] <= measured["relative"] * 5
            assert measured["figures"]["captions_per_s"] > 0
        assert f"{encoder['name']}, {encoder['dtype']}: 20 captions" in out
    assert "threads" in out
    words[:4] = ["--captions", "2", "--rounds", "1"]
    code, _, said = call("bench", str(job), *words, "--json", str(tmp_path / "absent" / "x.json"))
    assert code == 74
    assert "cannot write" in said


def test_what_cannot_run_is_left_out_with_the_reason(
    job: Path, tiny_t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_kib", lambda path, name: 1)
    monkeypatch.setattr("embed_precompute.encoders.device.compiler", lambda: None)
    for found in bench(load_config(job), 8, 1, ["hf", "fused-compile"]).encoders:
        assert "0.0 are free" in found.left_out["the difference from float32"]
        assert "needs a C++ compiler" in found.left_out["fused-compile"]
        assert found.measured[0].relative is None
    captions = write_captions(tmp_path / "captions.parquet", [None, None])
    empty = write_job(tmp_path, captions, tiny_t5, None)
    for words, expected in (
        ((job, "--variants", "fused-compile"), "nothing could be measured"),
        ((job, "--variants", "fuzed"), "fuzed: known are hf, fused, fused-compile, shardformer"),
        ((empty,), "none of the first 2 samples has a text"),
    ):
        code, _, said = call("bench", *map(str, words))
        assert code == 2
        assert expected in said


def test_a_part_empty_batch_counts_by_its_part_and_packed_streams_are_full() -> None:
    batches = list(make_batches(captions_of([3] * 5 + [7]), ((4, 4), (2, 8)), 0, captions_of([1])))
    assert filled_shares(batches) == [1.0, 0.25, 0.5]
    lengths = [30, 20, 9, 2]
    rows = topped_up(lengths, 128)
    assert sum(lengths[row] for row in rows) == 128
    assert rows[:4] == [0, 1, 2, 3]
    assert topped_up([64, 64], 128) == [0, 1]


def test_flops_by_hand(tiny_t5: Path, tiny_clip: Path) -> None:
    t5 = resolve(open_encoder("t5", T5Options(pretrained=str(tiny_t5))))
    clip = resolve(open_encoder("clip", ClipOptions(pretrained=str(tiny_clip))))
    linears = 4 * 64 * 64 + 3 * 64 * 128
    sizes = t5.family.sizes(t5.opened.checkpoint)
    assert sizes.flops([5, 7]) == 2 * (2 * linears * 12 + 4 * (25 + 49) * 64)
    linears = 4 * 64 * 64 + 2 * 64 * 256
    sizes = clip.family.sizes(clip.opened.checkpoint)
    assert sizes.flops([5]) == 2 * (2 * linears * 5 + 4 * 25 * 64)


def test_ratios_are_medians_of_rounds() -> None:
    fused = Measured("fused", 1, 1.0, peak_bytes=3 << 20, round_s=[1.0, 4.0, 1.0])
    hf = Measured("hf", 1, 2.0, round_s=[2.0, 8.0, 3.0], relative=1.5e-7, rms=1e-7)
    bench = EncoderBench("t5", "float32", 10, 100, 4e9, [1e9, 1e9, 2e9], 6, [hf, fused], {"x": "y"})
    speeds = {"captions_per_s": 10 / 3, "tokens_per_s": 100 / 3}
    assert bench.figures(hf) == {**speeds, "of_gemm": pytest.approx(2 / 3), "fused_is": 2.0}
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
    assert_near([t5, clip, padded])


def assert_near(encoders: list[EncoderBench]) -> None:
    for measured in (measured for encoder in encoders for measured in encoder.measured):
        assert measured.relative is not None
        assert measured.relative < 3e-6, measured.variant


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_a_compiled_peer(
    tmp_path: Path, job: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    clip = write_job(tmp_path, job.parent / "captions.parquet", None, tiny_clip)
    (encoder,) = peers.compare(load_config(clip), 8, 1, ["hf-pad-compile"]).encoders
    assert len(encoder.measured) == 1
    assert_near([encoder])


def test_a_table_of_real_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With tiny weights in place of real ones, and the command in this process."""
    write = bench_table.write_t5

    def tiny(*arguments: Any, **fields: Any) -> Path:
        sizes = {"width": 64, "layers": 1, "heads": 4, "feed_forward": 128}
        return write(*arguments, **{**fields, **sizes})

    def run(command: list[str]) -> subprocess.CompletedProcess[bytes]:
        monkeypatch.setattr(sys, "argv", command[1:])
        peers.main()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(bench_table, "write_t5", tiny)
    monkeypatch.setattr(bench_table, "subprocess", SimpleNamespace(run=run))
    words = ["--jobs", "base-padded", "--rounds", "1", "--num-captions", "2"]
    words += ["--batch", "2", "--variants", "hf", "fused", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench_table", str(tmp_path), *words])
    bench_table.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2
    assert rows[1].startswith("| padded | bfloat16 | base |")
    assert "x hf |" in rows[1]


def test_decoders_of_real_shapes(
    tmp_path: Path, job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--captions", str(job.parent / "captions.parquet"), str(tmp_path)]
    words += ["packed", "layers", "prefix", "--divide", "64", "--layers", "1", "--rounds", "1"]
    words += ["--models", "Z-Image", "--variants", "fused", "hf-random", "--num-captions", "4"]
    monkeypatch.setattr(decoders, "VOCABULARY", 600)
    monkeypatch.setattr(sys, "argv", ["decoders", *words, "--device", "cpu"])
    decoders.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    names = [row.split(" | ")[0] for row in rows]
    assert names == ["| template of", "| Z-Image", "| model", "| Z-Image", "| prefix"] + [
        f"| {before}" for before in decoders.PREFIXES
    ]
    assert rows[1].endswith("x hf-random |")


def test_a_whole_job_next_to_its_encoders_alone(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each side in this process, as the one rank of a launch."""

    def launch(arguments: Any, ranks: int, role: str, folder: str) -> list[dict[str, float]]:
        assert ranks == 1
        arguments.worker, arguments.output = role, str(Path(folder, role))
        found = whole_job.work(arguments)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return [found]

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**rank, "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(whole_job, "launch", launch)
    words = ["whole_job", str(job), "--rounds", "1", "--captions", "30"]
    monkeypatch.setattr(sys, "argv", words)
    whole_job.main()
    rows = capsys.readouterr().out.splitlines()
    (row,) = (line for line in rows if line.startswith("| 1 |"))
    assert all(float(cell) > 0 for cell in row.strip("| ").split("|"))


def test_a_simulated_device(tmp_path: Path, tiny_t5: Path) -> None:
    """The script replaces parts of a job: a change of those must not go unseen."""
    captions = write_captions(tmp_path / "captions.parquet", ["a red fox", "two dogs"])
    job = write_job(tmp_path, captions, tiny_t5, None)
    script = Path(bench_table.__file__).parent / "simulated_device.py"
    command = [sys.executable, str(script), str(job), "--rounds", "1", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\| [\d,]+ \| .* \| median$", done.stdout, re.M)


def test_slow_and_dead_ranks_hold_nobody_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the simulation's time: with a store, with one that is lost, and without one."""
    words = ["", "--ranks", "100", "--units", "5000"]
    monkeypatch.setattr(sys, "argv", words)
    claims_simulation.main()
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == list(claims_simulation.VARIANTS)
    assert all(float(row[2]) < 1.15 for row in rows), rows
    assert all(int(row[4].replace(",", "")) < 100 for row in rows), "units encoded twice"
