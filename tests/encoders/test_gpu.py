"""The tests that need a GPU: `pytest tests/encoders/test_gpu.py`.

The encoders have real widths, for small products have kernels of their own.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import family_case
import pytest
import torch
import transformers
from jobs import call, dataset_bytes, write_captions, write_job

from embed_precompute.encoders import encoder as encoder_module
from embed_precompute.encoders.device import check_numbers
from embed_precompute.encoders.encoder import (
    TextEncoder,
    build,
    copy_engine,
    download,
    forward_bytes,
)
from embed_precompute.encoders.fused.stream import upload
from embed_precompute.encoders.loading import Source, load_model, loaded_bytes, num_bytes
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.job.stages import IN_FLIGHT, overlapped

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
    clip = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    names = {"t5": ("T5", "Encoder"), "umt5": ("UMT5", "Encoder"), "clip": ("CLIPText", "")}
    for name, tiny in (("t5", tiny_t5), ("umt5", tiny_umt5), ("clip", tiny_clip)):
        folders[name] = tmp_path_factory.mktemp("wide") / name
        shutil.copytree(tiny, folders[name])
        torch.manual_seed(11)
        family, kind = names[name]
        config_class = getattr(transformers, f"{family}Config")
        config = config_class.from_pretrained(str(tiny), **(clip if name == "clip" else t5))
        model: Any = getattr(transformers, f"{family}{kind}Model")(config)
        model.save_pretrained(str(folders[name]), safe_serialization=True)
    return folders


@pytest.fixture(autouse=True)
def _dropped() -> Iterator[None]:
    """What a test leaves on the GPU would be missing in the next."""
    yield
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()


def resolved_of(mode: str, folders: dict[str, Path], **fields: Any) -> ResolvedEncoder:
    name, _, shape = mode.partition("-")
    fields = {"implementation": "fused", "stream_tokens": 1024, **fields}
    if name != "clip":
        fields |= {"max_length": 200, "batch_tokens": 1600}
        fields |= {"attention_mask": "none" if shape == "padded" else "padding"}
    return family_case.resolved_of("clip" if name == "clip" else "t5", folders[name], **fields)


def encode(encoder: TextEncoder, texts: list[str]) -> list[torch.Tensor]:
    return family_case.encode(encoder, texts)[""]


def texts_of(corpus: list[str]) -> list[str]:
    """Of many lengths, some longer than a block of attention."""
    return ["", "x", *corpus[:40], " ".join(corpus[:12]), " ".join(corpus[5:12]), "a red fox"]


@pytest.mark.parametrize("implementation", ["hf", "fused", "compiled"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_numbers_and_bits(
    corpus: list[str], wide: dict[str, Path], mode: str, dtype: str, implementation: str
) -> None:
    """The reference's numbers; neighbours, place and order change no bit."""
    texts = texts_of(corpus)
    exact = resolved_of(mode, wide, implementation="hf", dtype="float32")
    expected = encode(build(exact, "cpu", "float32"), texts)
    compiled = implementation == "compiled"
    name = "fused" if compiled else implementation
    ours = resolved_of(mode, wide, implementation=name, dtype=dtype, compile=compiled)
    encoder = build(ours, "cuda", "float32")
    check_numbers(encoder)
    together, backwards = encode(encoder, texts), encode(encoder, texts[::-1])[::-1]
    for text, found, other, wanted in zip(texts, together, backwards, expected, strict=True):
        difference = (found - wanted).abs().max() / wanted.abs().max()
        assert difference <= RELATIVE[dtype], (text, float(difference))
        assert torch.equal(found, other), text
    for row in range(0, len(texts), 5):
        assert torch.equal(together[row], encode(encoder, [texts[row]])[0]), texts[row]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_streamed_weights_give_the_bits_of_resident_ones(
    corpus: list[str], wide: dict[str, Path], mode: str, dtype: str, monkeypatch: Any
) -> None:
    """In several windows, of layers that come faster and slower than they are computed with."""
    monkeypatch.setattr(encoder_module, "WINDOW_TOKENS", 5000)
    resolved = resolved_of(mode, wide, dtype=dtype)
    captions = resolved.opened.tokenizer.encode(texts_of(corpus) * 10)
    batches = list(resolved.batches(captions))
    assert len(list(encoder_module.windows(batches))) > 1
    expected = [each.wait()[""] for each in build(resolved, "cuda", dtype).submit_all(batches)]
    encoder = build(resolved, "cuda", dtype, "stream")
    check_numbers(encoder)
    for _ in range(3):
        found = [pending.wait()[""] for pending in encoder.submit_all(batches)]
        for ours, wanted in zip(found, expected, strict=True):
            assert all(map(torch.equal, ours, wanted))


@pytest.mark.parametrize("output_dtype", DTYPES)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("mode", ["t5-padded", "t5-masked", "clip"])
def test_overlapped_forwards_are_those_one_by_one(
    corpus: list[str], wide: dict[str, Path], mode: str, compiled: bool, output_dtype: str
) -> None:
    resolved = resolved_of(mode, wide, dtype="bfloat16", compile=compiled)
    encoder = build(resolved, "cuda", output_dtype)
    captions = resolved.opened.tokenizer.encode(texts_of(corpus) * 5)
    batches = list(resolved.batches(captions))
    assert len(batches) > 2 * IN_FLIGHT
    alone = [encoder.encode(batch)[""] for batch in batches]
    together = [
        pending.wait()[""] for _, pending in overlapped((b, encoder.submit(b)) for b in batches)
    ]
    for ours, expected in zip(together, alone, strict=True):
        lines = list(zip(ours, expected, strict=True))
        assert lines
        for line, wanted in lines:
            assert line.dtype == getattr(torch, output_dtype)
            assert line.is_pinned()
            assert torch.equal(line, wanted)


def test_a_download_does_not_wait_for_the_device() -> None:
    """Long products are under way when the copy is asked for; then their result is overwritten."""
    size = 4096
    left = torch.randn(size, size, device=GPU)
    product = torch.empty_like(left)
    arguments = (torch.float32, copy_engine(GPU), lambda suffix, values: values)
    torch.mm(left, left, out=product)
    expected = product.cpu()
    download({"": product}, *arguments, reused=True).wait()  # page-locked memory is there now
    gc.collect()
    product.zero_()
    for _ in range(60):
        torch.mm(left, left, out=product)
    pending = download({"": product}, *arguments, reused=True)
    product.zero_()
    assert not pending.ready()
    found = pending.wait()[""]
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)
    host = torch.arange(10)
    assert torch.equal(upload(host, GPU).cpu(), host)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["t5-masked", "clip"])
def test_weights_go_straight_to_the_gpu(wide: dict[str, Path], mode: str, dtype: str) -> None:
    resolved = resolved_of(mode, wide, dtype=dtype)
    source = Source(resolved.opened.checkpoint, resolved.family, resolved.options)
    expected = dict(load_model(source, getattr(torch, dtype)).named_parameters())
    model = build(resolved_of(mode, wide, implementation="hf", dtype=dtype), "cuda", dtype).model
    for key, parameter in model.named_parameters():
        assert parameter.device.type == "cuda"
        assert parameter.dtype == expected[key].dtype
        assert torch.equal(parameter.cpu(), expected[key])


@pytest.mark.parametrize("mode", MODES)
def test_what_does_not_fit_stays_in_host_memory_and_changes_no_bit(
    corpus: list[str], wide: dict[str, Path], monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    resolved = resolved_of(mode, wide, implementation="hf", dtype="bfloat16")
    whole = build(resolved, "cuda", "float32")
    expected, size = encode(whole, texts_of(corpus)), num_bytes(whole.model)
    source = Source(resolved.opened.checkpoint, resolved.family, resolved.options)
    free = loaded_bytes(source, torch.bfloat16) * 3 // 4
    monkeypatch.setattr(encoder_module, "forward_bytes", lambda resolved: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    parts = build(resolved, "cuda", "float32")
    assert num_bytes(parts.model) < size
    for ours, wanted in zip(encode(parts, texts_of(corpus)), expected, strict=True):
        assert torch.equal(ours, wanted)


def test_the_estimate_of_a_forward_holds(corpus: list[str], wide: dict[str, Path]) -> None:
    for implementation in ("hf", "fused"):
        for mode in MODES:
            resolved = resolved_of(mode, wide, implementation=implementation, dtype="bfloat16")
            encoder = build(resolved, "cuda", "float32")
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            encode(encoder, texts_of(corpus))
            taken = torch.cuda.max_memory_allocated() - before
            assert taken <= forward_bytes(resolved), mode
            del encoder
            gc.collect()


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
        assert "self-check on cuda:0 passed" in said
        found.append(dataset_bytes(tmp_path / name))
    assert found[0] == found[1]
    code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep", "--sample", "60")
    assert code == 0, said
