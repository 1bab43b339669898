"""Our own layers: several products and runs, the static graphs of a GPU, compiled kernels.

That their numbers are the reference's, and that neighbours change no bit: test_families.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import family_case
import pytest
import torch
from family_case import copied, resolved_of
from jobs import call, write_captions, write_job

from embed_precompute.encoders.device import compiler
from embed_precompute.encoders.encoder import FusedEncoder, TextEncoder, build
from embed_precompute.encoders.fused import graph, layers, stream
from embed_precompute.encoders.resolve import ResolvedEncoder, resolve
from embed_precompute.errors import InputError
from make_demo import write_t5

RELATIVE = 3e-6
"""Largest relative difference from hf in float32."""
T5_MODELS = ("t5", "relu", "umt5")
MODES = [f"{model}-{mode}" for model in T5_MODELS for mode in ("padded", "masked")] + ["clip"]
with_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="session")
def folders(
    tiny_t5: Path,
    tiny_umt5: Path,
    tiny_clip: Path,
    corpus: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    relu = write_t5(tmp_path_factory.mktemp("checkpoints") / "relu", corpus, gated=False)
    return {"t5": tiny_t5, "umt5": tiny_umt5, "clip": tiny_clip, "relu": relu}


def resolved(mode: str, folders: dict[str, Path], **fields: Any) -> ResolvedEncoder:
    model, _, mask = mode.partition("-")
    fields = {"implementation": "fused", "stream_tokens": 256, **fields}
    if mode == "clip":
        return resolved_of("clip", folders[model], **fields)
    shapes = {"batch_tokens": 200} if mask == "padded" else {"attention_mask": "padding"}
    return resolved_of("t5", folders[model], **{"max_length": 48, **shapes, **fields})


def encoder_of(mode: str, folders: dict[str, Path], **fields: Any) -> TextEncoder:
    return build(resolved(mode, folders, **fields), "cpu", "float32")


def encode(encoder: TextEncoder, texts: list[str]) -> list[torch.Tensor]:
    return family_case.encode(encoder, texts)[""]


@pytest.fixture(scope="module")
def expected_of(folders: dict[str, Path], texts: list[str]) -> Any:
    @cache
    def run(mode: str) -> list[torch.Tensor]:
        return encode(encoder_of(mode, folders, implementation="hf"), texts)

    return run


@pytest.fixture(scope="module")
def texts(corpus: list[str]) -> list[str]:
    return ["", "x", "a red fox", "a red fax", *corpus[:30]]


def assert_near(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.shape == wanted.shape
        assert float((ours - wanted).abs().max() / wanted.abs().max()) <= RELATIVE


@pytest.mark.parametrize("mode", MODES)
def test_several_products_and_attention_calls(
    folders: dict[str, Path], texts: list[str], expected_of: Any, mode: str, monkeypatch: Any
) -> None:
    """Real batches take several; tests' are as short as one. The last reaches past the end."""
    monkeypatch.setattr(stream, "ATTENTION_TOKENS", 60)
    encoder = encoder_of(mode, folders)
    assert isinstance(encoder, FusedEncoder)
    encoder.layers._workspace._product_rows = 100  # type: ignore[attr-defined]
    ours = encode(encoder, texts)
    assert_near(ours, expected_of(mode))
    for row in (0, 7, len(texts) - 1):
        assert torch.equal(ours[row], encode(encoder, [texts[row]])[0]), texts[row]


def test_row_blocks_have_one_size_and_cover_all_rows() -> None:
    def blocks(num_tokens: int, weights: torch.Tensor, row_width: int = 1 << 30) -> list[slice]:
        workspace = stream.Workspace(weights, layers.PRODUCT_BYTES, row_width=row_width)
        return workspace.row_blocks(num_tokens)

    weights = torch.zeros(1)
    assert blocks(4096, weights) == [slice(0, 2048), slice(2048, 4096)]
    assert blocks(2047, weights) == [slice(0, 2047)]
    assert blocks(2049, weights) == [slice(0, 1025), slice(1025, 2050)]
    assert blocks(9000, weights, row_width=2048) == [slice(0, 9000)]  # 10,240 rows in 80 MiB
    assert blocks(9000, torch.zeros(1, dtype=torch.float16)) == [slice(0, 9000)]  # is converted


def test_an_activation_it_does_not_compute(tmp_path: Path, folders: dict[str, Path]) -> None:
    """Asked for it is refused; auto takes hf. So does auto with buckets."""
    silu = {"t5": copied(folders["t5"], tmp_path / "silu", feed_forward_proj="gated-silu")}
    with pytest.raises(InputError, match="'gated-silu', and fused computes relu, gated-gelu"):
        resolved("t5-masked", silu)

    for given, fields, chosen in (
        (silu, {}, "hf"),
        (folders, {}, "fused"),
        (folders, {"buckets": (16,)}, "hf"),
    ):
        auto = resolved("t5-masked", given, implementation="auto", **fields)
        assert auto.decision.implementation == chosen


def test_the_plans_choice_stands_where_it_can(folders: dict[str, Path]) -> None:
    def chosen(stored: str, **fields: Any) -> str:
        opened = resolved("t5-masked", folders, **{"implementation": "auto", **fields}).opened
        return resolve(opened, stored={"implementation": stored}).decision.implementation

    assert chosen("hf") == "hf"
    assert chosen("shardformer") == "shardformer"
    assert chosen("of a later version") == "fused"
    assert chosen("fused", buckets=(16,)) == "hf"  # a conflict with the plan, which names it
    assert chosen("hf", compile=True) == "fused"
    assert chosen("hf", implementation="fused") == "fused"


# --- static graphs, as a GPU runs them ------------------------------------------------------------


def static_encoder(mode: str, folders: dict[str, Path], *, compiled: bool, **fields: Any) -> Any:
    """The encoder a compiled job has on a GPU, on the CPU."""
    encoder: Any = encoder_of(mode, folders, **fields)
    tokenizer, decision = encoder.resolved.opened.tokenizer, encoder.resolved.decision
    longest = decision.padded_length or tokenizer.longest
    model = (
        graph.ClipGraph(encoder.model, longest, tokenizer.eos_id)
        if mode == "clip"
        else graph.T5Graph(encoder.model, longest)
    )
    encoder.layers = graph.GraphLayers(model, compiled=compiled)
    return encoder


@pytest.mark.parametrize("mode", MODES)
def test_graphs_have_the_references_numbers_and_neighbours_change_no_bit(
    folders: dict[str, Path], texts: list[str], expected_of: Any, mode: str
) -> None:
    encoder, texts = static_encoder(mode, folders, compiled=False), texts[:20]
    together = encode(encoder, texts)
    assert_near(together, expected_of(mode)[:20])
    backwards = encode(encoder, texts[::-1])[::-1]
    for ours, theirs in zip(together, backwards, strict=True):
        assert torch.equal(ours, theirs)
    for row in (0, 7, len(texts) - 1):
        assert torch.equal(together[row], encode(encoder, [texts[row]])[0]), texts[row]


@pytest.mark.parametrize("mode", ["t5-padded", "umt5-masked", "clip"])
def test_the_layers_are_one_graph_for_the_compiler(
    folders: dict[str, Path], texts: list[str], expected_of: Any, monkeypatch: Any, mode: str
) -> None:
    """torch traces them whole, also in versions that make no code of flex_attention for a CPU."""
    encoder = static_encoder(mode, folders, compiled=True)
    original, traced = torch.compile, []

    def compile_eagerly(function: Any, **settings: Any) -> Any:
        traced.append(settings)
        return original(function, **settings, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    assert_near(encode(encoder, texts[:10]), expected_of(mode)[:10])
    assert traced == [{"fullgraph": True, "dynamic": False}]


def test_captions_longer_than_a_block(folders: dict[str, Path]) -> None:
    texts = ["a fox " * n for n in (1, 70, 20, 100, 3)]
    fields = {"max_length": 300, "stream_tokens": 600}
    expected = encode(encoder_of("t5-masked", folders, implementation="hf", **fields), texts)
    assert max(map(len, expected)) > graph.BLOCK
    encoder = static_encoder("t5-masked", folders, compiled=False, **fields)
    assert_near(encode(encoder, texts), expected)


def test_a_packed_stream_is_run_in_parts() -> None:
    packing = graph.Packing(256, 300, torch.device("cpu"))
    assert packing.num_blocks == 8
    assert list(packing.parts([1] * 19)) == [(0, 8), (8, 16), (16, 19)]
    assert list(packing.parts([300, 129, 300, 5])) == [(0, 3), (3, 4)]


# --- compiled -------------------------------------------------------------------------------------


@with_compiler
@pytest.mark.parametrize(
    ("mode", "layers"),
    [("t5-padded", "kernels"), ("clip", "kernels"), ("t5-padded", "graph"), ("t5-masked", "graph")],
)
def test_compiled_layers_have_the_references_numbers(
    folders: dict[str, Path], texts: list[str], expected_of: Any, mode: str, layers: str
) -> None:
    if layers == "graph" and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):
        pytest.skip("torch compiles flex_attention for a CPU from 2.6 on")
    fields: dict[str, Any] = {"compile": True} if layers == "kernels" else {"compiled": True}
    encoder = (encoder_of if layers == "kernels" else static_encoder)(mode, folders, **fields)
    ours = encode(encoder, texts[:12])
    assert_near(ours, expected_of(mode)[:12])
    assert torch.equal(ours[5], encode(encoder, [texts[5]])[0])


@with_compiler
def test_a_compiled_job(tmp_path: Path, folders: dict[str, Path]) -> None:
    captions = write_captions(tmp_path / "captions.parquet", ["a red fox", "x", "two cats"])
    job = write_job(tmp_path, captions, None, folders["clip"])
    compiled = ("--encoders.clip.compile", "true")
    assert call("run", str(job), *compiled)[0] == 0
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert plan["spec"]["encoders"]["clip"]["compiled"] is True
    assert call("run", str(job), *compiled)[0] == 0
    code, _, said = call("run", str(job))
    assert code == 3
    assert "encoders.clip.compiled: true -> false" in said
    assert call("verify", str(tmp_path / "out"), "--level", "deep", "--sample", "3")[0] == 0


def test_a_gpu_has_one_kernel_for_attention_and_a_cpu_its_own() -> None:
    before = torch.backends.cuda.flash_sdp_enabled()
    with stream.one_attention(torch.device("cpu")):
        assert torch.backends.cuda.flash_sdp_enabled() is before
    with stream.one_attention(torch.device("cuda")):
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() is before
