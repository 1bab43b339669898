"""The family that docs/encoders.md shows line by line works as it stands there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import test_families as kit
import torch
import transformers
from family_case import Case
from jobs import PACKAGE_ROOT
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from embed_precompute.encoders.families import FAMILIES


def write_bert(folder: Path, corpus: list[str]) -> Path:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    ends = [(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, ends)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(str(folder))
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.BertConfig(num_hidden_layers=2, vocab_size=600, **sizes)
    model = transformers.BertModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.1)
    model.save_pretrained(str(folder), safe_serialization=True)
    return folder


CASE = Case("bert", "bert", write_bert, {"max_length": 60, "batch_tokens": 400})


@pytest.fixture
def folder(tmp_path: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    page = (PACKAGE_ROOT / "docs" / "encoders.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "bert.py").write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("bert_of_the_docs", tmp_path / "bert.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bert_of_the_docs", module)  # dataclasses look there
    spec.loader.exec_module(module)
    monkeypatch.setitem(FAMILIES, "bert", module.Bert())
    return write_bert(tmp_path / "bert", corpus)


def test_the_worked_example_passes_the_kit(
    folder: Path, corpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [
        "",
        "x",
        "a red fox",
        *corpus[:6],
        corpus[0] * 12,
        "caf\u00e9 \ube68\uac04",
        "a [PAD] b",
    ]

    def folder_of(case: Case) -> Path:
        return folder

    kit.test_float32_is_plain_transformers_one_caption_at_a_time(CASE, "hf", folder_of, texts)
    for dtype in ("float32", "bfloat16"):
        kit.test_neighbours_order_and_place_change_no_bit(CASE, "hf", dtype, folder_of, texts)
        kit.test_every_weight_has_the_dtype(CASE, dtype, folder_of)
    kit.test_the_null_embedding_is_the_empty_captions(CASE, "hf", folder_of)
    kit.test_tokens_and_spans(CASE, folder_of, texts)
    kit.test_what_was_decided_stands_in_the_spec(CASE, folder_of)
    kit.test_a_copy_of_equal_values_is_the_same_encoder(CASE, folder_of, tmp_path)
    kit.test_whatever_changes_the_numbers_changes_the_digest(CASE, folder_of, tmp_path)
    kit.test_a_fetched_copy_gives_the_same_bits(CASE, "hf", folder_of, texts, tmp_path)
    kit.test_the_self_check_sees_a_wrong_encoder(CASE, "hf", folder_of, monkeypatch)
    kit.test_a_whole_job(CASE, folder_of, texts, tmp_path)
