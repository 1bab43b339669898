"""The fused encoder: the reference's numbers, and bitwise a function of the caption."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import call, write_captions, write_job

from embed_precompute.encoders import resolve as encoders
from embed_precompute.encoders.batching import pack
from embed_precompute.encoders.fused import graph, stream
from embed_precompute.encoders.fused.clip import ClipBody
from embed_precompute.encoders.fused.encoder import longest_of
from embed_precompute.encoders.fused.kernels import one_compiles_first
from embed_precompute.encoders.fused.stream import Group, groups_of
from embed_precompute.encoders.fused.t5 import T5Body
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.encoders.resolve import build, resolve, settle
from embed_precompute.encoders.spec import TextEncoder
from embed_precompute.errors import InputError, InternalError

Encode = Callable[[TextEncoder, Sequence[str]], "list[torch.Tensor]"]
STREAM = 256
RELATIVE = {"float32": 3e-6, "bfloat16": 0.02, "float16": 0.004}
"""Largest relative difference from the fp32 reference; half precision: the weights' rounding."""


def config_of(mode: str, folders: dict[str, Path], **fields: Any) -> EncoderConfig:
    fields = {"dtype": "float32", "implementation": "fused", "stream_tokens": STREAM, **fields}
    if mode == "clip":
        return EncoderConfig("clip", str(folders["clip"]), **fields)
    mask = "none" if mode.endswith("padded") else "padding"
    model = mode.partition("-")[0]
    batch = {"batch_tokens": 200} if mask == "none" else {}
    return EncoderConfig(
        "t5", str(folders[model]), max_length=48, attention_mask=mask, **batch, **fields
    )


@pytest.fixture(scope="session")
def folders(tiny_t5: Path, tiny_umt5: Path, tiny_clip: Path, t5_relu: Path) -> dict[str, Path]:
    return {"t5": tiny_t5, "umt5": tiny_umt5, "clip": tiny_clip, "relu": t5_relu}


@pytest.fixture(scope="session")
def t5_relu(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path) -> Path:
    """T5 v1.0: one inner matrix and relu, random weights."""
    import transformers

    folder = tmp_path_factory.mktemp("checkpoints") / "relu"
    shutil.copytree(tiny_t5, folder)
    config = transformers.T5Config.from_pretrained(str(tiny_t5))
    settings = {**config.to_dict(), "feed_forward_proj": "relu"}
    for name in ("dense_act_fn", "is_gated_act"):
        settings.pop(name, None)
    torch.manual_seed(5)
    model = transformers.T5EncoderModel(transformers.T5Config(**settings))
    model.save_pretrained(str(folder), safe_serialization=True)
    return folder


T5_MODELS = ("t5", "relu", "umt5")
MODES = [f"{model}-{mode}" for model in T5_MODELS for mode in ("padded", "masked")] + ["clip"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mode", MODES)
def test_the_references_numbers(
    encode: Encode, corpus: list[str], folders: dict[str, Path], mode: str, dtype: Any
) -> None:
    texts = ["", "x", "a red fox", *corpus[:40]]
    config = config_of(mode, folders, dtype=dtype)
    exact = dataclasses.replace(config, implementation="hf", dtype="float32")
    reference = encode(build(resolve("enc", exact), "cpu", "float32"), texts)
    ours = encode(build(resolve("enc", config), "cpu", "float32"), texts)
    for text, found, expected in zip(texts, ours, reference, strict=True):
        assert found.shape == expected.shape
        difference = (found - expected).abs().max() / expected.abs().max()
        assert difference <= RELATIVE[dtype], (text, float(difference))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_neighbours_place_and_order_change_no_bit(
    encode: Encode, corpus: list[str], folders: dict[str, Path], mode: str, dtype: Any
) -> None:
    encoder = build(resolve("enc", config_of(mode, folders, dtype=dtype)), "cpu", dtype)
    texts = ["", *corpus[:30], "a red fox", "x"]
    together = encode(encoder, texts)
    order = np.random.default_rng(3).permutation(len(texts))
    shuffled = encode(encoder, [texts[i] for i in order])
    for place, row in enumerate(order):
        assert torch.equal(shuffled[place], together[row]), texts[row]
    for row, text in enumerate(texts):
        assert torch.equal(together[row], encode(encoder, [text])[0]), text


@pytest.mark.parametrize("mode", MODES)
def test_streams_of_several_products(
    encode: Encode,
    corpus: list[str],
    folders: dict[str, Path],
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real streams take several steps; tests' are as short as one. The last reaches behind them."""
    for body in (T5Body, ClipBody):
        monkeypatch.setattr(body, "product_rows", lambda config, dtype: 100)
    monkeypatch.setattr(stream, "ATTENTION_TOKENS", 60)
    texts = ["", "x", "a red fox", "a red fax", *corpus[:40]]
    config = config_of(mode, folders)
    encoder = build(resolve("enc", config), "cpu", "float32")
    reference = dataclasses.replace(config, implementation="hf")
    expected = encode(build(resolve("enc", reference), "cpu", "float32"), texts)
    ours = encode(encoder, texts)
    for text, found, wanted in zip(texts, ours, expected, strict=True):
        difference = (found - wanted).abs().max() / wanted.abs().max()
        assert difference <= RELATIVE["float32"], (text, float(difference))
    for row in (0, 7, len(texts) - 1):
        assert torch.equal(ours[row], encode(encoder, [texts[row]])[0]), texts[row]


def test_steps_have_one_size_and_cover_the_stream() -> None:
    def steps(num_tokens: int, *, converts: bool = False) -> list[slice]:
        device = torch.device("cpu")
        space = stream.Workspace(device, torch.float32, 2048, compiled=False, converts=converts)
        return space.steps(num_tokens)

    assert steps(4096) == [slice(0, 2048), slice(2048, 4096)]
    assert steps(2047) == [slice(0, 2047)]
    assert steps(2049) == [slice(0, 1025), slice(1025, 2050)]
    assert steps(9000, converts=True) == [slice(0, 9000)]


def test_rows_of_a_product_by_width() -> None:
    def rows(d_ff: int, dtype: torch.dtype) -> int:
        return T5Body.product_rows(SimpleNamespace(d_ff=d_ff), dtype)

    assert rows(10240, torch.bfloat16) == 4096
    assert rows(10240, torch.float32) == 2048
    assert rows(2048, torch.bfloat16) == 20480
    assert rows(1 << 30, torch.float32) == 2048


def test_an_end_of_text_token_within_a_caption(encode: Encode, folders: dict[str, Path]) -> None:
    """Both of transformers' rules pool at the first one."""
    texts = ["a red <|endoftext|> fox runs"]
    config = config_of("clip", folders)
    ours = encode(build(resolve("enc", config), "cpu", "float32"), texts)[0]
    reference = dataclasses.replace(config, implementation="hf")
    expected = encode(build(resolve("enc", reference), "cpu", "float32"), texts)[0]
    assert (ours - expected).abs().max() / expected.abs().max() <= RELATIVE["float32"]


def test_spec_and_shapes(folders: dict[str, Path]) -> None:
    masked = resolve("enc", config_of("t5-masked", folders))
    assert masked.packed
    assert masked.shapes == ((1, STREAM),) == (masked.null_shape,)
    assert masked.spec()["implementation"] == "fused"
    padded = resolve("enc", config_of("t5-padded", folders))
    assert not padded.packed
    assert padded.shapes == ((4, 48),)


def test_another_batch_is_refused(folders: dict[str, Path]) -> None:
    encoder = build(resolve("enc", config_of("t5-masked", folders)), "cpu", "float32")
    other = next(pack([np.array([5, 1])], STREAM + 1, 0))
    with pytest.raises(InternalError, match="A batch is"):
        encoder.encode(other)


def test_an_activation_it_does_not_compute(tmp_path: Path, folders: dict[str, Path]) -> None:
    folder = tmp_path / "silu"
    shutil.copytree(folders["t5"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["feed_forward_proj"] = "gated-silu"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="'gated-silu', and fused computes relu, gated-gelu"):
        resolve("enc", config_of("t5-masked", {"t5": folder}))


def test_auto_is_fused_where_fused_can(tmp_path: Path, folders: dict[str, Path]) -> None:
    auto = config_of("t5-masked", folders, implementation="auto")
    assert resolve("enc", auto).implementation == "fused"
    with_buckets = dataclasses.replace(auto, buckets=(16,))
    assert resolve("enc", with_buckets).implementation == "hf"
    folder = tmp_path / "silu"
    shutil.copytree(folders["t5"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "feed_forward_proj": "gated-silu"}))
    assert resolve("enc", dataclasses.replace(auto, pretrained=str(folder))).implementation == "hf"


def test_auto_compiles_large_jobs_where_a_compiler_is(
    monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]
) -> None:
    auto = config_of("t5-masked", folders)
    found: list[str | None] = ["/usr/bin/g++"]
    monkeypatch.setattr(encoders, "compiler", lambda: found[0])
    sizes = (0, 19_999, 20_000)
    assert [resolve("enc", auto, num_samples=n).compiled for n in sizes] == [False, False, True]
    reference = dataclasses.replace(auto, implementation="hf")
    assert not resolve("enc", reference, num_samples=20_000).compiled
    found[0] = None
    assert not resolve("enc", auto, num_samples=20_000).compiled
    asked = dataclasses.replace(auto, compile=True)
    assert resolve("enc", asked).compiled


def test_the_plans_choices_stand(folders: dict[str, Path]) -> None:
    auto = config_of("t5-masked", folders, implementation="auto")
    spec = resolve("enc", auto).spec() | {"implementation": "hf"}
    assert settle(auto, spec).implementation == "hf"
    assert settle(auto, spec | {"implementation": "fused", "compiled": True}).compile is True
    assert settle(auto, {"implementation": "of a later version", "compiled": 7}) == auto
    for contrary in ({"buckets": (16,)}, {"compile": True}):
        asked = dataclasses.replace(auto, **contrary)  # a conflict with the plan, not nonsense
        assert settle(asked, spec | {"implementation": "fused", "compiled": True}) == asked
    explicit = dataclasses.replace(auto, implementation="fused", compile=False)
    assert settle(explicit, spec | {"compiled": True}) == explicit


def test_settings_that_cannot_be(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="buckets are for the implementation hf"):
        config_of("t5-masked", folders, buckets=(16,))
    with pytest.raises(InputError, match="compile is true: hf is never compiled"):
        config_of("t5-masked", folders, implementation="hf", compile=True)
    with pytest.raises(InputError, match="tf32 is true with dtype bfloat16"):
        config_of("t5-masked", folders, dtype="bfloat16", tf32=True)
    with pytest.raises(InputError, match="stream_tokens is 40: expected at least max_length"):
        config_of("t5-masked", folders, stream_tokens=40)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=80), st.integers(40, 120))
def test_packing(lengths: list[int], stream: int) -> None:
    rng = np.random.default_rng(len(lengths))
    ids = [rng.integers(2, 99, length) for length in lengths]
    seen: list[int] = []
    batches = list(pack(ids, stream, 0))
    for batch in batches:
        assert batch.input_ids.shape == (1, stream)
        assert (np.diff(batch.lengths) <= 0).all()  # equal lengths lie side by side
        for caption, row in enumerate(batch.rows.tolist()):
            assert (batch.tokens(caption) == ids[row]).all()
        assert not batch.input_ids[0, int(batch.lengths.sum()) :].any()
        groups = groups_of(batch)
        assert sum(group.count for group in groups) == len(batch.rows)
        assert groups[0] == Group(0, groups[0].count, int(batch.lengths[0]))
        seen += batch.rows.tolist()
    assert sorted(seen) == list(range(len(ids)))
    # No two streams could have been one: of any two, together they hold more than a stream.
    filled = sorted(int(batch.lengths.sum()) for batch in batches)
    assert len(filled) < 2 or filled[0] + filled[1] > stream


def test_a_caption_longer_than_the_stream() -> None:
    with pytest.raises(InternalError, match="has 5 tokens: a stream has 4"):
        list(pack([np.arange(5)], 4, 0))


# --- static graphs, as a GPU runs them ------------------------------------------------------------


def static_encoder(config: EncoderConfig, *, compiled: bool) -> Any:
    """The encoder a compiled job has on a GPU, on the CPU."""
    resolved = resolve("enc", config)
    encoder: Any = build(resolved, "cpu", config.dtype)
    encoder._body = graph.body(
        encoder._model, longest_of(resolved), pooled=resolved.pooled, compiled=compiled
    )
    return encoder


@pytest.mark.parametrize("mode", MODES)
def test_graphs_have_the_references_numbers(
    encode: Encode, corpus: list[str], folders: dict[str, Path], mode: str
) -> None:
    texts = ["", "x", "a red fox", *corpus[:20]]
    config = config_of(mode, folders)
    reference = dataclasses.replace(config, implementation="hf")
    expected = encode(build(resolve("enc", reference), "cpu", "float32"), texts)
    ours = encode(static_encoder(config, compiled=False), texts)
    for text, found, wanted in zip(texts, ours, expected, strict=True):
        assert found.shape == wanted.shape
        difference = (found - wanted).abs().max() / wanted.abs().max()
        assert difference <= RELATIVE["float32"], (text, float(difference))


@pytest.mark.parametrize("mode", ["t5-masked", "umt5-masked", "clip"])
def test_in_graphs_too_neighbours_and_place_change_no_bit(
    encode: Encode, corpus: list[str], folders: dict[str, Path], mode: str
) -> None:
    encoder = static_encoder(config_of(mode, folders), compiled=False)
    texts = ["", *corpus[:20], "x"]
    together = encode(encoder, texts)
    backwards = encode(encoder, texts[::-1])[::-1]
    for text, ours, theirs in zip(texts, together, backwards, strict=True):
        assert torch.equal(ours, theirs), text
        assert torch.equal(ours, encode(encoder, [text])[0]), text


def test_captions_longer_than_a_block(encode: Encode, folders: dict[str, Path]) -> None:
    texts = ["a fox " * n for n in (1, 70, 20, 100, 3)]
    config = dataclasses.replace(config_of("t5-masked", folders), max_length=300, stream_tokens=600)
    reference = dataclasses.replace(config, implementation="hf")
    expected = encode(build(resolve("enc", reference), "cpu", "float32"), texts)
    assert max(map(len, expected)) > graph.BLOCK
    ours = encode(static_encoder(config, compiled=False), texts)
    for found, wanted in zip(ours, expected, strict=True):
        assert (found - wanted).abs().max() / wanted.abs().max() <= RELATIVE["float32"]


def test_a_frame_takes_captions_in_parts() -> None:
    packing = graph.Packing(256, 300, torch.device("cpu"))
    assert packing.num_blocks == 8
    assert list(packing.parts([1] * 19)) == [(0, 8), (8, 16), (16, 19)]
    assert list(packing.parts([300, 129, 300, 5])) == [(0, 3), (3, 4)]


# --- compiled -------------------------------------------------------------------------------------


@pytest.mark.skipif(encoders.compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("mode", "body"),
    [("t5-padded", "kernels"), ("clip", "kernels"), ("t5-padded", "graph"), ("t5-masked", "graph")],
)
def test_compiled_layers_have_the_references_numbers(
    encode: Encode, corpus: list[str], folders: dict[str, Path], mode: str, body: str
) -> None:
    if body == "graph" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("torch compiles flex_attention for a CPU from 2.6 on")
    texts = ["", "x", "a red fox", *corpus[:8]]
    config = config_of(mode, folders, compile=True)
    reference = dataclasses.replace(config, implementation="hf", compile=False)
    expected = encode(build(resolve("enc", reference), "cpu", "float32"), texts)
    encoder = (
        static_encoder(config, compiled=True)
        if body == "graph"
        else build(resolve("enc", config), "cpu", "float32")
    )
    ours = encode(encoder, texts)
    for text, found, wanted in zip(texts, ours, expected, strict=True):
        difference = (found - wanted).abs().max() / wanted.abs().max()
        assert difference <= RELATIVE["float32"], (text, float(difference))
        assert torch.equal(found, encode(encoder, [text])[0]), text


def test_a_compiled_job(tmp_path: Path, folders: dict[str, Path]) -> None:
    """The plan says compiled; another run of the job takes it from there."""
    captions = write_captions(tmp_path / "captions.parquet", ["a red fox", "x", "two cats"])
    job = write_job(tmp_path, captions, None, folders["clip"])
    words = ("--encoders.clip.compile", "true")
    if encoders.compiler() is None:
        pytest.skip("no C++ compiler")
    assert call("run", str(job), *words)[0] == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["spec"]["encoders"]["clip"]["compiled"] is True
    assert call("run", str(job))[0] == 0  # auto: what the plan says
    code, _, said = call("run", str(job), "--encoders.clip.compile", "false")
    assert code == 3
    assert "encoders.clip.compiled: True -> False" in said
    assert call("verify", str(tmp_path / "out"), "--level", "deep", "--sample", "3")[0] == 0


def test_one_process_compiles_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import sys, tempfile, time; tempfile.tempdir = sys.argv[1]\n"
        "from embed_precompute.encoders.fused.kernels import one_compiles_first\n"
        "with one_compiles_first(True): print('inside', flush=True)\n"
    )
    with one_compiles_first(compiled=True):
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE
        )
        with one_compiles_first(compiled=False):  # who compiles nothing does not wait
            pass
        with pytest.raises(subprocess.TimeoutExpired):
            other.communicate(timeout=6)
    assert other.communicate(timeout=60)[0] == b"inside\n"


@pytest.mark.parametrize("implementation", ["hf", "fused"])
def test_tf32_is_as_the_specification_says(
    encode: Encode,
    folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    implementation: Any,
) -> None:
    seen: list[bool] = []
    original = torch.Tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(torch.backends.cuda.matmul.allow_tf32)
        return original(self, *args, **kwargs)

    for wanted in (True, False):
        config = config_of("clip", folders, implementation=implementation, tf32=wanted)
        encoder = build(resolve("enc", config), "cpu", "float32")
        torch.backends.cuda.matmul.allow_tf32 = not wanted
        try:
            with monkeypatch.context() as patch:
                patch.setattr(torch.Tensor, "to", to)
                seen.clear()
                encode(encoder, ["a red fox"])
            assert wanted in seen
            assert torch.backends.cuda.matmul.allow_tf32 is not wanted
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False  # torch's default
