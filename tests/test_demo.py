"""The demo's captions, tokenizers and weights."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import pytest

from make_demo import demo_captions, write_clip, write_t5


def test_captions_are_a_prefix_of_more_captions() -> None:
    few, many = demo_captions(12), demo_captions(400)
    assert few.equals(many.slice(0, 12))
    assert not few.equals(demo_captions(12, seed=1))


def test_captions_hold_what_a_real_table_holds() -> None:
    table = demo_captions(3000)
    texts = table.column("text").to_pylist()
    assert texts[3] == ""
    assert texts[11] == texts[10]
    assert len(texts[7].split()) > 77
    assert 2000 < len(set(texts)) < 3000
    assert any(not text.isascii() for text in texts)
    assert len(set(table.column("id").to_pylist())) == 3000
    assert sum(column.null_count for column in table.columns) == 0


def test_same_arguments_give_the_same_bytes(tmp_path: Path, corpus: list[str]) -> None:
    for name in ("one", "two"):
        write_t5(tmp_path / name / "t5", corpus)
        write_clip(tmp_path / name / "clip", corpus)
    files = sorted(p.relative_to(tmp_path / "one") for p in tmp_path.glob("one/*/*"))
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_weights_are_the_same_on_every_machine_and_stack(tiny_t5: Path, tiny_clip: Path) -> None:
    found = [
        hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
        for folder in (tiny_t5, tiny_clip)
    ]
    assert found == ["aa4c83cb3726c266", "9de51c341e3a9ed9"]


@pytest.mark.parametrize("eos_rule", ["first", "argmax"])
def test_clip_pools_at_the_end_of_the_text(
    tmp_path: Path, corpus: list[str], eos_rule: Literal["first", "argmax"]
) -> None:
    import torch
    from transformers import AutoTokenizer, CLIPTextModel

    folder = write_clip(tmp_path, corpus, eos_rule=eos_rule)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    encoded = tokenizer(corpus[:4], padding=True, truncation=True, return_tensors="pt")
    output = CLIPTextModel.from_pretrained(folder)(encoded["input_ids"])
    for line, mask in enumerate(encoded["attention_mask"]):
        last = int(mask.sum()) - 1
        assert encoded["input_ids"][line, last] == len(tokenizer) - 1
        assert torch.equal(output.pooler_output[line], output.last_hidden_state[line, last])


@pytest.mark.parametrize("model_type", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("gated", [True, False])
def test_every_weight_is_the_architectures_own(
    tmp_path: Path, corpus: list[str], model_type: str, gated: bool
) -> None:
    import transformers

    folder = write_t5(tmp_path, corpus, model_type=model_type, gated=gated, layers=3)
    model_class = getattr(transformers, f"{model_type.upper()}EncoderModel")
    _, report = model_class.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
