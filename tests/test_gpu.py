"""What a GPU runs: the tests that need one, and what a CPU can say about the rest.

With a GPU: `pytest tests/test_gpu.py`. The encoders have real widths, for small products have
kernels of their own.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jobs import call, dataset_bytes, write_captions, write_job

from embed_precompute.encoders import hf, offload
from embed_precompute.encoders import resolve as encoders
from embed_precompute.encoders.fused import graph
from embed_precompute.encoders.fused.encoder import longest_of
from embed_precompute.encoders.fused.stream import one_attention
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.encoders.resolve import build, resolve
from embed_precompute.encoders.spec import ResolvedEncoder, TextEncoder
from embed_precompute.encoders.transfers import IN_FLIGHT, Copies, in_order, upload
from embed_precompute.errors import InputError

Encode = Callable[[TextEncoder, Sequence[str]], "list[torch.Tensor]"]
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
with_compiler = pytest.mark.skipif(encoders.compiler() is None, reason="no C++ compiler")
MODES = ["t5-padded", "t5-masked", "umt5-masked", "clip"]
DTYPES = ["float32", "bfloat16", "float16"]
RELATIVE = {"float32": 1e-5, "bfloat16": 0.03, "float16": 0.005}
"""Largest relative difference from the reference in float32 on the CPU."""
GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def wide(
    tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, tiny_umt5: Path, tiny_clip: Path
) -> dict[str, Path]:
    """Three layers of the base shape with random weights, by model."""
    folders: dict[str, Path] = {}
    t5 = {"d_model": 768, "d_ff": 2048, "d_kv": 64, "num_heads": 12, "num_layers": 3}
    for name, tiny in (("t5", tiny_t5), ("umt5", tiny_umt5), ("clip", tiny_clip)):
        folders[name] = tmp_path_factory.mktemp("wide") / name
        shutil.copytree(tiny, folders[name])
        torch.manual_seed(11)
        if name == "clip":
            shape = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
            config = transformers.CLIPTextConfig.from_pretrained(str(tiny), **shape)
            model: Any = transformers.CLIPTextModel(config)
        elif name == "umt5":
            config = transformers.UMT5Config.from_pretrained(str(tiny), **t5)
            model = transformers.UMT5EncoderModel(config)
        else:
            config = transformers.T5Config.from_pretrained(str(tiny), **t5)
            model = transformers.T5EncoderModel(config)
        model.save_pretrained(str(folders[name]), safe_serialization=True)
    return folders


@pytest.fixture(autouse=True)
def _dropped() -> Iterator[None]:
    """What a test leaves on the GPU would be missing in the next."""
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch._dynamo.reset()


def resolved_of(mode: str, folders: dict[str, Path], **fields: Any) -> ResolvedEncoder:
    name, _, shape = mode.partition("-")
    settings: dict[str, Any] = {"implementation": "fused", "compile": False, **fields}
    if settings["implementation"] == "fused" and shape != "padded":
        settings["stream_tokens"] = 1024
    if name == "clip":
        return resolve("enc", EncoderConfig("clip", str(folders[name]), **settings))
    mask: Any = "none" if shape == "padded" else "padding"
    settings |= {"max_length": 200, "attention_mask": mask, "batch_tokens": 1600}
    return resolve("enc", EncoderConfig("t5", str(folders[name]), **settings))


def texts_of(corpus: list[str]) -> list[str]:
    """Of many lengths, some longer than a block of attention."""
    return ["", "x", *corpus[:40], " ".join(corpus[:12]), " ".join(corpus[5:12]), "a red fox"]


# --- with a GPU -----------------------------------------------------------------------------------


@on_gpu
@pytest.mark.parametrize("implementation", ["hf", "fused", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_numbers_and_bits(
    encode: Encode,
    corpus: list[str],
    wide: dict[str, Path],
    mode: str,
    dtype: str,
    implementation: str,
) -> None:
    """The reference's numbers; neighbours, place and order change no bit."""
    texts = texts_of(corpus)
    exact = resolved_of(mode, wide, implementation="hf", dtype="float32")
    expected = encode(build(exact, "cpu", "float32"), texts)
    name = "fused" if implementation == "compiled" else implementation
    ours = resolved_of(
        mode, wide, implementation=name, dtype=dtype, compile=implementation == "compiled"
    )
    encoder = build(ours, "cuda", "float32")
    together, backwards = encode(encoder, texts), encode(encoder, texts[::-1])[::-1]
    for text, found, other, wanted in zip(texts, together, backwards, expected, strict=True):
        difference = (found - wanted).abs().max() / wanted.abs().max()
        assert difference <= RELATIVE[dtype], (text, float(difference))
        assert torch.equal(found, other), text
    for row in range(0, len(texts), 5):
        assert torch.equal(together[row], encode(encoder, [texts[row]])[0]), texts[row]


@on_gpu
@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("implementation", ["fused", "compiled"])
@pytest.mark.parametrize("mode", ["t5-padded", "t5-masked", "clip"])
def test_overlapped_forwards_are_those_one_by_one(
    corpus: list[str], wide: dict[str, Path], mode: str, implementation: str, output_dtype: str
) -> None:
    compiled = implementation == "compiled"
    resolved = resolved_of(mode, wide, dtype="bfloat16", compile=compiled)
    encoder = build(resolved, "cuda", output_dtype)
    ids = resolved.tokenizer.encode(texts_of(corpus) * 5).ids
    batches = list(resolved.batches(ids))
    assert len(batches) > 2 * IN_FLIGHT
    alone = [encoder.encode(batch) for batch in batches]
    together = [pending.wait() for pending in in_order(map(encoder.submit, batches))]
    for ours, expected in zip(together, alone, strict=True):
        lines = list(zip(ours, expected, strict=True))
        assert lines
        for line, wanted in lines:
            assert line.dtype == getattr(torch, output_dtype)
            assert line.is_pinned()
            assert torch.equal(line, wanted)


@on_gpu
def test_a_download_does_not_wait_for_the_device() -> None:
    """Long products are under way when the copy is asked for; then their result is overwritten."""
    size = 4096
    left = torch.randn(size, size, device=GPU)
    product = torch.empty_like(left)
    copies = Copies(GPU, torch.float32)
    torch.mm(left, left, out=product)
    expected = product.cpu()
    copies.download(product, reused=True).wait()  # page-locked memory is there from now on
    gc.collect()
    product.zero_()
    for _ in range(60):
        torch.mm(left, left, out=product)
    pending = copies.download(product, reused=True)
    product.zero_()
    assert not pending.ready()
    found = pending.wait()
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)
    host = torch.arange(10)
    assert torch.equal(upload(host, GPU).cpu(), host)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["t5", "clip"])
def test_weights_go_straight_to_the_gpu(wide: dict[str, Path], name: str, dtype: str) -> None:
    resolved = resolved_of(f"{name}-masked" if name == "t5" else name, wide, dtype=dtype)
    loaded = hf.load_on(resolved, GPU, may_offload=True)
    expected = dict(hf.load_model(resolved).named_parameters())
    for key, parameter in loaded.named_parameters():
        assert parameter.device.type == "cuda"
        assert parameter.dtype == expected[key].dtype
        assert torch.equal(parameter.cpu(), expected[key])


@on_gpu
@pytest.mark.parametrize("implementation", ["hf", "fused"])
@pytest.mark.parametrize("mode", MODES)
def test_layers_in_host_memory_change_no_bit(
    encode: Encode,
    corpus: list[str],
    wide: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mode: str,
    implementation: str,
) -> None:
    resolved = resolved_of(mode, wide, implementation=implementation, dtype="bfloat16")
    whole = build(resolved, "cuda", "float32")
    size = whole.weight_bytes()
    expected = encode(whole, texts_of(corpus))
    monkeypatch.setattr(offload, "forward_bytes", lambda resolved, config: 0)
    monkeypatch.setattr(offload, "free_bytes", lambda device: size - 1024)
    with caplog.at_level(logging.WARNING):
        parts = build(resolved, "cuda", "float32")
    assert parts.weight_bytes() < size
    assert "stay in host memory" in caplog.text
    for ours, wanted in zip(encode(parts, texts_of(corpus)), expected, strict=True):
        assert torch.equal(ours, wanted)
    compiled = dataclasses.replace(resolved, compiled=True)
    with pytest.raises(InputError, match="set compile false"):
        build(compiled, "cuda", "float32")


@on_gpu
def test_the_estimate_of_a_forward_holds(
    encode: Encode, corpus: list[str], wide: dict[str, Path]
) -> None:
    for implementation in ("hf", "fused"):
        for mode in MODES:
            resolved = resolved_of(mode, wide, implementation=implementation, dtype="bfloat16")
            encoder: Any = build(resolved, "cuda", "float32")
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            encode(encoder, texts_of(corpus))
            taken = torch.cuda.max_memory_allocated() - before
            assert taken <= offload.forward_bytes(resolved, encoder._model.config), mode
            del encoder
            gc.collect()


@on_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_a_job_gives_the_same_bytes_twice(
    tmp_path: Path, tiny_t5: Path, tiny_clip: Path, corpus: list[str], compiled: bool
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", ["", *corpus[:60]])
    job = write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=40)
    switch = str(compiled).lower()
    words = ["--runtime.device", "cuda", "--encoders.t5.compile", switch]
    words += ["--encoders.clip.compile", switch]
    found = []
    for name in ("out", "again"):
        path = str(tmp_path / name)
        code, _, said = call("run", str(job), *words, "--output.path", path)
        assert code == 0, said
        found.append(dataset_bytes(tmp_path / name))
    assert found[0] == found[1]
    code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep", "--sample", "60")
    assert code == 0, said


# --- without --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_body_is_one_graph_for_the_compiler(
    encode: Encode,
    corpus: list[str],
    tiny_t5: Path,
    tiny_umt5: Path,
    tiny_clip: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    """torch traces it whole, also in versions that make no code of flex_attention for a CPU."""
    folders = {"t5": tiny_t5, "umt5": tiny_umt5, "clip": tiny_clip}
    texts = ["", "x", *corpus[:8]]
    exact = resolved_of(mode, folders, implementation="hf", dtype="float32")
    expected = encode(build(exact, "cpu", "float32"), texts)
    resolved = resolved_of(mode, folders, dtype="float32")
    encoder: Any = build(resolved, "cpu", "float32")
    encoder._body = graph.body(encoder._model, longest_of(resolved), pooled=resolved.pooled)
    original, traced = torch.compile, []

    def compile_eagerly(function: Any, **settings: Any) -> Any:
        traced.append(settings)
        return original(function, **settings, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    ours = encode(encoder, texts)
    assert traced == [{"fullgraph": True, "dynamic": False}]
    for found, wanted in zip(ours, expected, strict=True):
        assert (found - wanted).abs().max() / wanted.abs().max() <= RELATIVE["float32"]


def test_a_gpu_has_one_kernel_for_attention_and_a_cpu_its_own() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with one_attention(torch.device("cpu")):
        assert torch.backends.cuda.flash_sdp_enabled() is before
    with one_attention(GPU):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() is before
