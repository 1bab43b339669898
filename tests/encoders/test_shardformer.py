"""Shardformer on ColossalAI for real; where that is not installed, only that it is refused."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_case import encoder_of
from jobs import call, write_captions, write_job

from embed_precompute import EmbeddingDataset, HFEmbedder, shardformer_t5
from embed_precompute.encoders import shardformer as module
from embed_precompute.encoders.device import check_numbers
from embed_precompute.errors import InputError
from make_demo import write_t5

COLOSSALAI = find_spec("colossalai") is not None
needs_colossalai = pytest.mark.skipif(not COLOSSALAI, reason="ColossalAI is not installed")
without_colossalai = pytest.mark.skipif(COLOSSALAI, reason="ColossalAI is installed")
DTYPES = ("float32", "bfloat16", "float16")


def model_of(folder: Path, kind: str = "t5", dtype: str = "float32") -> Any:
    name = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    class_name = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"}
    model_class = getattr(transformers, class_name[kind])
    return model_class.from_pretrained(folder, **{name: getattr(torch, dtype)})


@pytest.fixture(scope="module", params=["t5", "relu", "mt5"])
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, corpus: list[str]
) -> tuple[str, Path]:
    kind = "mt5" if request.param == "mt5" else "t5"
    folder = tmp_path_factory.mktemp("shardformer") / "model"
    return kind, write_t5(folder, corpus, model_type=kind, gated=request.param != "relu")


@needs_colossalai
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_layer_is_replaced_and_every_bit_is_the_references(
    checkpoint: tuple[str, Path], dtype: str
) -> None:
    kind, folder = checkpoint
    plain, given = model_of(folder, kind, dtype).eval(), model_of(folder, kind, dtype).train()
    optimised = shardformer_t5(given)
    assert optimised is given
    assert not any(part.training for part in optimised.modules())
    expected = {name: parameter.dtype for name, parameter in plain.named_parameters()}
    for name, parameter in optimised.named_parameters():
        assert not parameter.requires_grad
        assert parameter.dtype == expected[name]  # in float16 wo stays in float32
    for block in optimised.encoder.block:
        for layer in block.layer:
            assert layer.forward.__func__.__module__ == "colossalai.shardformer.modeling.t5"
            assert layer.dropout_add.__func__.__module__ == "colossalai.shardformer.modeling.jit"
    input_ids = torch.randint(2, 1000, (3, 40), generator=torch.Generator().manual_seed(0))
    for _ in range(3):  # torch.jit specialises its code in the second and third call
        with torch.no_grad():
            found, wanted = (each(input_ids, attention_mask=None) for each in (optimised, plain))
        assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)


@needs_colossalai
def test_embedder_by_argument_and_as_the_document_does_it(tiny_t5: Path) -> None:
    plain = HFEmbedder(str(tiny_t5), 32)
    texts = ["a red fox", ""]
    expected = plain(texts, added_tokens=3, seq_align=8)
    by_argument = HFEmbedder(str(tiny_t5), 32, shardformer=True)
    assert torch.equal(by_argument(texts, added_tokens=3, seq_align=8), expected)
    plain.hf_module = shardformer_t5(plain.hf_module)
    assert torch.equal(plain(texts, added_tokens=3, seq_align=8), expected)


@needs_colossalai
def test_a_whole_run(tmp_path: Path, tiny_t5: Path, corpus: list[str]) -> None:
    captions = write_captions(tmp_path / "captions.parquet", corpus[:12])
    roots: list[Path] = []
    for implementation in ("hf", "shardformer"):
        folder = tmp_path / implementation
        folder.mkdir()
        job = write_job(folder, captions, tiny_t5, None, implementation=implementation)
        code, _, said = call("run", str(job))
        assert code == 0, said
        roots.append(folder / "out")
    plain, optimised = (EmbeddingDataset(root) for root in roots)
    for number in range(12):
        assert torch.equal(plain[number]["text_t5"], optimised[number]["text_t5"])
    record = (roots[1] / "shards/000/shard-000000.json").read_text()
    assert '"colossalai":"0.5' in record
    with pytest.raises(Exception, match="implementation"):  # another fingerprint
        EmbeddingDataset(roots)


@needs_colossalai
def test_the_self_check_compares_with_layers_that_are_not_optimised(tiny_t5: Path) -> None:
    """Both would be wrong by the same, and the check would pass."""
    encoder = encoder_of("t5", tiny_t5, implementation="shardformer", max_length=16)
    check_numbers(encoder)
    feed_forward = encoder.model.encoder.block[0].layer[-1]
    original = feed_forward.forward
    feed_forward.forward = lambda states: 1.5 * original(states)
    with pytest.raises(InputError, match="shardformer has a relative difference of"):
        check_numbers(encoder)


def test_umt5_is_refused(tiny_umt5: Path) -> None:
    with pytest.raises(InputError, match="of type 'umt5', but Shardformer's layers fit t5 and mt5"):
        shardformer_t5(model_of(tiny_umt5, "umt5"))


def test_transformers_5_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(module.importlib.metadata, "version", lambda name: "5.23.0")
    with pytest.raises(InputError, match=r"this is transformers 5.23.0, whose T5 layers"):
        module.check_usable("shardformer_t5", "t5")


def test_missing_colossalai_says_how_to_install(
    tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    words = r"ColossalAI is not installed.*pip install 'embed-precompute\[colossalai\]'"
    with pytest.raises(InputError, match=words):
        shardformer_t5(model_of(tiny_t5))
    with pytest.raises(InputError, match=words):
        HFEmbedder(str(tiny_t5), 16, shardformer=True)


@without_colossalai
def test_a_run_without_colossalai_leaves_nothing(
    tmp_path: Path, tiny_t5: Path, corpus: list[str]
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", corpus[:3])
    job = write_job(tmp_path, captions, tiny_t5, None, implementation="shardformer")
    code, _, said = call("run", str(job))
    assert code == 2
    assert "encoders.t5.implementation is shardformer: ColossalAI is not installed" in said
    assert not (tmp_path / "out").exists()
