"""Decoder-only models: cases for the conformance kit, templates and crops, and what is loaded."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from family_case import Case, built, copied, encode, reference_of, resolved_of
from jobs import call, write_captions
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from embed_precompute.encoders import resolve
from embed_precompute.encoders.device import check_numbers, difference
from embed_precompute.encoders.encoder import build, is_streamed
from embed_precompute.encoders.families.decoder import ChatOptions, Message, ProjectOptions
from embed_precompute.encoders.fetch import fetch
from embed_precompute.encoders.loading import Source
from embed_precompute.encoders.readout import Projection
from embed_precompute.encoders.weights import stored_weights
from embed_precompute.errors import InputError
from embed_precompute.train.dataset import EmbeddingDataset
from preset_checkpoints import write_qwen3

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
SPECIAL = ["<|begin|>", "<|user|>", "<|end|>", "<|pad|>"]
CHAT = "<|user|>Describe the video:\n{text}<|end|>\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}(no {thoughts})\n{% endif %}"
    "{% endif %}"
)
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 600,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 30}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3]}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 24},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**GEMMA, "sliding_window_pattern": 2},
    "qwen2_5_vl": {"rope_scaling": MROPE},
    "qwen3_vl": {"head_dim": 16, "rope_scaling": {**MROPE, "mrope_interleaved": True}},
}
TOWERS = {"gemma3": "gemma3_text", "mistral3": "mistral", "llava": "llama"} | {
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2} | {
    "num_hidden_layers": 1,
    "depth": 1,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
OLD = transformers.__version__.startswith("4.51.")


def write_tokenizer(
    folder: Path,
    corpus: list[str],
    *,
    begins: bool = False,
    ends: bool = False,
    chat_template: str = CHAT_TEMPLATE,
) -> None:
    """`begins`: it puts a begin-of-text token first, as Llama's does; `ends`: an end token last, as
    that of some embedding models does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    added = "<|begin|> $A" if begins else "$A <|end|>" if ends else "$A"
    special = [(name, tokenizer.token_to_id(name)) for name in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(added, None, special)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="left",
        chat_template=chat_template,
    )
    fast.save_pretrained(str(folder))


def make_model(model_type: str) -> Any:
    """A random causal language model with its head, and its vision tower if it has one."""
    text = {**SIZES, **OF_FAMILY.get(TOWERS.get(model_type, model_type), {})}
    config_class: Any = transformers.models.auto.configuration_auto.CONFIG_MAPPING[model_type]
    if model_type not in TOWERS or (OLD and model_type == "qwen2_5_vl"):
        ids = {"image_token_id": 590, "video_token_id": 591, "vision_start_token_id": 592}
        config = config_class(**text, **(ids if model_type in TOWERS else {}))
    else:
        tower = {"qwen2_5_vl": "qwen2_5_vl_text", "qwen3_vl": "qwen3_vl_text"}
        text["model_type"] = tower.get(model_type, TOWERS[model_type])
        config = config_class(text_config=text)
    if model_type in TOWERS:
        for key in VISION.keys() & vars(config.vision_config).keys():
            setattr(config.vision_config, key, VISION[key])
    torch.manual_seed(7)
    whole = "ImageTextToText" if model_type in TOWERS else "CausalLM"
    model = getattr(transformers, f"AutoModelFor{whole}").from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # so that a norm that is forgotten shows
                parameter.normal_(0.0 if "gemma" in model_type else 1.0, 0.2)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
    return model


def write_decoder(
    folder: Path, corpus: list[str], *, model_type: str = "qwen2", **ends: bool
) -> Path:
    """A random model of this type as its trainers save one, with a tokenizer."""
    write_tokenizer(folder, corpus, **ends)
    make_model(model_type).save_pretrained(str(folder), safe_serialization=True)
    return folder


def tower(folder: Path, model_class: Any, **arguments: Any) -> Any:
    """The text tower of a checkpoint with a vision tower, or of one without."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if not hasattr(config, "vision_config") or config.architectures == [model_class.__name__]:
        return model_class.from_pretrained(folder, **arguments)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(folder, **arguments)
    return next(m for m in whole.modules() if hasattr(m, "layers") and hasattr(m, "embed_tokens"))


llama = partial(write_decoder, model_type="llama", begins=True)
SHORT = {"max_length": 48, "batch_tokens": 400, "buckets": [12, 24]}
PACKED = {"max_length": 48, "stream_tokens": 200}
BOTH = ("hf", "fused")
MESSAGES = (Message(role="system", content="{{s}}"), Message(role="u", content="{text}"))
MASKED = {"attention_mask": "padding", "buckets": [], "max_length": 48, "batch_tokens": 120}
CASES = [
    Case("qwen2", "decoder", write_decoder, {"template": CHAT, **SHORT}),
    Case("llama", "decoder", llama, {"template": CHAT, "layers": [-2], **SHORT}),
    Case(
        "mistral",
        "decoder",
        partial(write_decoder, model_type="mistral"),
        {
            "template": CHAT,
            "crop_start": 0,
            "crop_end": 1,
            "norm": "final",
            **SHORT,
            "buckets": [30],
        },
    ),
    Case(
        "qwen3",
        "decoder",
        partial(write_decoder, model_type="qwen3"),
        {"template": CHAT, "layers": [2], "norm": "final", **PACKED},
        BOTH,
    ),
    Case(
        "gemma2",
        "decoder",
        partial(write_decoder, model_type="gemma2", begins=True),
        {"template": "Prompt: {text}", "crop_start": "template-2", "keep_first": 1, **MASKED},
    ),
    Case(
        "gemma3",
        "decoder",
        partial(write_decoder, model_type="gemma3", begins=True),
        {
            "layers": [0, 1, 2, 3],
            "norm": "final",
            "combine": "stack",
            "padding_side": "left",
            **MASKED,
        },
        alone=tower,
    ),
    Case(
        "mistral3",
        "decoder",
        partial(write_decoder, model_type="mistral3", begins=True),
        {
            "chat": ChatOptions(messages=MESSAGES),
            "layers": [3, 1],
            "keep": "all",
            "attention_mask": "padding",
            "max_length": 48,
            "crop_start": 0,
        },
        alone=tower,
    ),
    Case(
        "qwen2_5_vl",
        "decoder",
        partial(write_decoder, model_type="qwen2_5_vl"),
        {
            "chat": ChatOptions(messages=MESSAGES, generation_prompt=True, thinking=False),
            "layers": [1, 2],
            "layer_zscore": True,
            **MASKED,
        },
        alone=tower,
    ),
]
if not OLD:
    write = partial(write_decoder, model_type="qwen3_vl")
    fields = {"template": CHAT, "keep": "all", **MASKED}
    CASES.append(Case("qwen3_vl", "decoder", write, fields, alone=tower))


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    return write_decoder(tmp_path_factory.mktemp("decoder") / "qwen2", corpus)


@pytest.fixture(scope="module")
def begins(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    return llama(tmp_path_factory.mktemp("decoder") / "llama", corpus)


@pytest.fixture(scope="module")
def texts(corpus: list[str]) -> list[str]:
    return ["", "a red fox", *corpus[:4], corpus[0] * 9, "\u8d64\u3044 <|end|> {x}"]


resolved = partial(resolved_of, "decoder", template=CHAT)


def test_tokens_at_the_end_are_cropped(corpus: list[str], texts: list[str], tmp_path: Path) -> None:
    """Also those that the tokenizer adds."""
    folder = write_decoder(tmp_path, corpus, ends=True)
    fields = {"template": CHAT, "crop_end": 2, "layers": [1], **SHORT}
    encoder = built(Case("ends", "decoder", write_decoder, fields), folder)
    reference = reference_of(encoder.resolved)
    for text, found in zip(texts, encode(encoder, texts)[""], strict=True):
        assert difference(found, reference(text, None)[""], exact=True) is None, text


def test_positions_of_a_prompt_that_ends_in_a_space(begins: Path) -> None:
    """As Sana takes them: the first one, and those from the last token of the template alone on."""
    plain = transformers.AutoTokenizer.from_pretrained(str(begins))
    alone = len(plain("Rewrite it: ").input_ids)
    fields = {"template": "Rewrite it: {text}", "crop_start": "template-1", "keep_first": 1}
    tokenizer = resolved(begins, max_length=30, **fields).opened.tokenizer
    captions = tokenizer.encode(["a red fox", "7", "x" * 5000])
    assert (tokenizer.first, tokenizer.longest) == (alone - 1, alone - 2 + 30)
    assert captions.stored == [n - tokenizer.first + 1 for n in captions.num_ids]
    assert captions.stored[2] == 30


def test_the_templates_tokens_are_counted_and_cropped(qwen2: Path, begins: Path) -> None:
    plain = transformers.AutoTokenizer.from_pretrained(str(qwen2))
    before = len(plain("<|user|>Describe the video:\n")["input_ids"])
    tokenizer = resolved(qwen2).opened.tokenizer
    captions = tokenizer.encode(["a red fox", "", "x" * 5000])
    assert captions.first == [before] * 3
    alone = len(plain("a red fox")["input_ids"])
    assert captions.tokens == [alone, 0, 256]
    assert captions.stored == [alone + 2, 2, 256]  # <|end|> and the line break after the caption
    assert captions.truncated == [False, False, True]
    with_begin = resolved(begins).opened.tokenizer.encode([""])
    assert with_begin.first == [before + 1]  # its begin-of-text token stands before, too
    assert resolved(qwen2, crop_start=before).decision == resolved(qwen2).decision
    kept = resolved(qwen2, crop_start=0).opened.tokenizer.encode([""])
    assert (kept.first, kept.stored, kept.tokens) == ([0], [before + 2], [0])


def test_without_a_template_a_begin_token_is_the_captions_own(begins: Path) -> None:
    captions = resolved(begins, template="{text}").opened.tokenizer.encode(["", "a"])
    assert captions.first == [0, 0]
    assert captions.tokens == captions.stored == captions.num_ids == [1, 2]


def test_lengths_count_from_the_crop_on(qwen2: Path) -> None:
    encoder = resolved(qwen2, max_length=40, buckets=(20,), batch_tokens=100)
    first = encoder.opened.tokenizer.empty.first[0]
    assert encoder.opened.tokenizer.longest == first + 40
    assert [length for _, length in encoder.decision.shapes] == [first + 20, first + 40]
    with pytest.raises(InputError, match="buckets has 1: the empty caption has 2 tokens"):
        resolved(qwen2, buckets=(1,))
    # A default bucket that does not hold the empty caption is left out.
    tail = resolved(qwen2, template="{text}" + " and more words" * 12, max_length=100)
    assert tail.decision.shapes[0][1] > 16


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"template": "Prompt: {text}."}, r"'Prompt: '\) changes with the caption that follows"),
        ({"template": "no field"}, r"expected \{text\} in it once"),
        ({"template": "{text} {text}"}, r"expected \{text\} in it once"),
        ({"template": "{text:>4}"}, r"expected \{text\} in it once"),
        ({"template": "{text"}, "is not a format string"),
        ({"template": "{text}"}, "the empty caption has no token to store"),
        ({"crop_end": 2}, "the empty caption has no token to store"),
        ({"crop_end": -1}, "crop_end is -1: below 0"),
        (
            {"crop_start": 5},
            r"crop_start is 5, and with this tokenizer the template has \d+ tokens",
        ),
        ({"layers": ()}, r"layers is \[\]: expected one layer or more"),
        ({"layers": (4,)}, "layers has 4: the model in .* has 3 layers"),
        ({"layers": (1, -3)}, r"with the 3 layers of the model in .* one of them is named twice"),
        ({"layers": (3, 1), "norm": "final"}, "and the last of 2 layers is 1: the final norm"),
        ({"layers": (0,), "norm": "final"}, "layers is the embeddings alone"),
        ({"keep_first": 99}, r"keep_first is 99, and crop_start leaves out only \d+ positions"),
        ({"crop_start": "templat"}, "crop_start is templat: expected template, template-N"),
        ({"crop_start": "template-99"}, r"the template has only \d+ tokens before the caption"),
        ({"padding_side": "left"}, "padding_side is left with attention_mask none"),
        ({"keep": "all", "buckets": (20,)}, "buckets are for keep real"),
        ({"keep": "all", "crop_end": 1}, "crop_end is for keep real"),
        ({"keep": "all", "implementation": "fused"}, "keep is all: fused packs captions"),
        (
            {"keep": "all", "attention_mask": "padding", "padding_side": "left"},
            "keep is all with padding_side left: the positions at the start are pads",
        ),
        ({"chat": ChatOptions(messages=MESSAGES)}, "chat and template are both given"),
        (
            {"stream_tokens": 200},
            r"stream_tokens is 200: the longest caption has \d+ tokens, with its template.",
        ),
        ({"prefix": "shared", "implementation": "hf"}, "prefix is shared: only fused shares it"),
        ({"prefix": "shared", "buckets": (9,)}, "prefix is shared: buckets are given"),
        ({"prefix": "shared", "crop_start": 0}, "prefix is shared: no position before the caption"),
        ({"prefix": "shared", "keep_first": 1}, "prefix is shared: keep_first is 1"),
        (
            {"prefix": "shared", "template": "Describe:\n{text}<|end|>"},
            "prefix is shared: no special token stands before the caption",
        ),
    ],
)
def test_settings_that_cannot_be(qwen2: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        resolved(qwen2, **fields)


def test_a_template_is_not_cut_off_at_its_beginning(qwen2: Path, tmp_path: Path) -> None:
    """Left truncation would take the prompt, and the crop then the caption."""
    left = copied(qwen2, tmp_path / "left", "tokenizer_config.json", truncation_side="left")
    with pytest.raises(InputError, match="truncation_side 'left', which cuts long captions at"):
        resolved(left)


def test_braces_are_written_twice(qwen2: Path) -> None:
    template = '<|user|>{{"prompt": 1}}\n{text}<|end|>'
    encoder = resolved(qwen2, template=template)
    plain = transformers.AutoTokenizer.from_pretrained(str(qwen2))
    ids = encoder.opened.tokenizer.encode(["{x}"]).ids[0].tolist()
    assert ids == plain('<|user|>{"prompt": 1}\n{x}<|end|>')["input_ids"]


@pytest.mark.parametrize(
    ("changes", "fields", "words"),
    [
        ({}, {"buckets": (30,)}, "buckets are given"),
        ({}, {"keep": "all"}, "keep is all, and fused packs captions end to end"),
        ({"hidden_act": "gelu"}, {}, "has the activation 'gelu': expected silu"),
        (
            {"rope_parameters": DYNAMIC, "rope_scaling": DYNAMIC},
            {},
            "the rotary positions .*dynamic",
        ),
    ],
)
def test_what_the_fused_layers_do_not_compute(
    changes: dict[str, Any], fields: dict[str, Any], words: str, qwen2: Path, tmp_path: Path
) -> None:
    """auto takes hf then; asked for, it is refused."""
    folder = copied(qwen2, tmp_path / "other", **changes)
    assert resolved(folder, **fields).decision.implementation == "hf"
    with pytest.raises(InputError, match=words):
        resolved(folder, **{"prefix": "shared", **fields})


def test_a_mask_of_pads_on_the_right_changes_nothing_for_packed_captions(qwen2: Path) -> None:
    masked = resolved(qwen2, attention_mask="padding", implementation="fused")
    assert masked.decision == resolved(qwen2).decision
    assert masked.decision.packed


def test_pads_on_the_left_are_packed_where_that_is_asked_for(
    qwen2: Path, corpus: list[str]
) -> None:
    """Positions are then counted from the caption's start, which moves the last bits."""
    left = {"template": CHAT, "attention_mask": "padding", "padding_side": "left"}
    assert resolved(qwen2, **left).decision.implementation == "hf"
    case = Case("left", "decoder", write_decoder, left)
    hf, fused = (encode(built(case, qwen2, implementation=name), corpus[:12])[""] for name in BOTH)
    for expected, found in zip(hf, fused, strict=True):
        assert difference(found, expected, exact=True) is None


def assert_packed_is_hf(case: Case, folder: Path, texts: list[str], **fields: Any) -> None:
    """Where the family can pack these options at all."""
    packed = {"buckets": None, "keep": "real", "padding_side": "right", "stream_tokens": 256}
    fields = {"implementation": "fused", **packed, **fields}
    fused = built(case, folder, **fields)
    ours = encode(fused, texts)[""]
    hf = encode(built(case, folder, **{**fields, "implementation": "hf"}), texts)[""]
    for text, found, expected in zip(texts, ours, hf, strict=True):
        assert found.shape == expected.shape
        assert float((found - expected).abs().max() / expected.abs().max()) <= 3e-6, text
    for row in (0, 5, len(texts) - 1):
        assert torch.equal(encode(fused, [texts[row]])[""][0], ours[row])


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_packed_captions_of_every_family(case: Case, corpus: list[str], tmp_path: Path) -> None:
    folder = case.write(tmp_path / "model", corpus)
    assert_packed_is_hf(case, folder, ["", "x", *corpus[:12], "long " * 99, "\U0001f525"])


@pytest.mark.parametrize("before", ["none", "rms", "ltx2_range"])
def test_a_stage_behind_packed_captions(
    before: Any, qwen2: Path, corpus: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    save_file({"w": torch.randn(40, 192) / 14, "b": torch.randn(40)}, tmp_path / "p.safetensors")
    project = ProjectOptions(path=str(tmp_path), weight="w", bias="b", before=before)
    options = {"template": CHAT, "layers": [0, 2, 3], "max_length": 48}
    case = Case("project", "decoder", write_decoder, options)
    for combine in ("concat", "stack"):
        assert_packed_is_hf(case, qwen2, ["", *corpus[:20]], project=project, combine=combine)


def test_a_shared_prefix(qwen2: Path, corpus: list[str]) -> None:
    """The streams hold the captions alone; the numbers differ by rounding, and in the
    fingerprint."""
    chat = "<|user|>Describe the video:<|end|>{text}<|end|>"
    case = Case("shared", "decoder", write_decoder, {"template": chat, **PACKED})
    computed, shared = (built(case, qwen2, prefix=prefix) for prefix in ("compute", "shared"))
    assert shared.resolved.spec() != computed.resolved.spec()
    texts = ["", "x", *corpus[:20], "long " * 99, "x"]
    tokenizer = shared.resolved.opened.tokenizer
    captions = tokenizer.encode(texts)
    before, batches = tokenizer.first, [*shared.resolved.batches(captions)]
    assert sum(int(batch.lengths.sum()) for batch in batches) == (
        sum(captions.num_ids) - before * len(texts)
    )
    assert len(batches) < len([*computed.resolved.batches(captions)])
    found, expected = encode(shared, texts)[""], encode(computed, texts)[""]
    for ours, wanted in zip(found, expected, strict=True):
        assert ours.shape == wanted.shape
        assert float((ours - wanted).abs().max() / wanted.abs().max()) <= 3e-6
    for row in (0, 7, 22):
        assert torch.equal(encode(shared, [texts[row]])[""][0], found[row])
    assert torch.equal(found[1], found[-1])
    check_numbers(shared)


def test_what_a_caption_changes_is_not_shared(corpus: list[str], tmp_path: Path) -> None:
    """A line break of the template and the caption's own, or the template's next one, are one."""
    folder = write_decoder(tmp_path, ["a\n\nb\n\n\nc"] * 200 + corpus)
    options = {"template": "<|user|>Q<|end|>\n{text}\nA:", "layers": [2], **PACKED}
    case = Case("merged", "decoder", write_decoder, options)
    computed, shared = (built(case, folder, prefix=prefix) for prefix in ("compute", "shared"))
    tokenizer, texts = shared.resolved.opened.tokenizer, ["", "\nfoo", "\n", "\n\n a", "a fox"]
    kinds = {tuple(ids[: tokenizer.first].tolist()) for ids in tokenizer.encode(texts).ids}
    assert len(kinds) > 1
    assert len(tokenizer.constant) == tokenizer.first - 1
    for ours, wanted in zip(encode(shared, texts)[""], encode(computed, texts)[""], strict=True):
        assert ours.shape == wanted.shape
        assert float((ours - wanted).abs().max() / wanted.abs().max()) <= 3e-6


def test_streamed_weights_give_the_same_bits(
    qwen2: Path, corpus: list[str], tmp_path: Path
) -> None:
    save_file({"w": torch.randn(40, 128)}, tmp_path / "p.safetensors")
    project = ProjectOptions(path=str(tmp_path), weight="w", before="rms")
    options = {"template": CHAT, "layers": [0, 3], "norm": "final", "project": project, **PACKED}
    case = Case("streamed", "decoder", write_decoder, options)
    for prefix in ("compute", "shared"):
        encoder = resolved(qwen2, **{**options, "prefix": prefix})
        captions = encoder.opened.tokenizer.encode(corpus[:30])
        batches = list(encoder.batches(captions))
        expected = [out.wait()[""] for out in built(case, qwen2, prefix=prefix).submit_all(batches)]
        streamed = build(encoder, "cpu", "float32", "stream")
        for found, rows in zip(streamed.submit_all(batches), expected, strict=True):
            assert all(map(torch.equal, found.wait()[""], rows))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_after_the_hidden_state_are_not_loaded(qwen2: Path, dtype: str) -> None:
    case = Case("cut", "decoder", write_decoder, {"template": CHAT, "layers": [-2]})
    encoder = built(case, qwen2, dtype, dtype=dtype)
    assert len(encoder.model.layers) == 2
    resolved = encoder.resolved
    weights = stored_weights(resolved.opened.checkpoint, resolved.family, resolved.options, dtype)
    read = {weight.name for weight in weights}
    left = set(load_file(qwen2 / "model.safetensors")) - read
    assert {name.removeprefix("model.")[:8] for name in left} == {"lm_head.", "layers.2"}
    assert encode(encoder, ["a red fox"])[""][0].isfinite().all()


def test_a_copy_has_no_layer_above_the_highest_that_is_run(
    qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only an encoder that runs no other takes it."""
    monkeypatch.setenv("EMBED_PRECOMPUTE_HOME", str(tmp_path / "home"))
    for layers, held in {(-3,): 1, (-2, 0): 2, (2,): 2, (-1,): 3}.items():
        fields = {"template": CHAT, "layers": layers}
        case = Case("cut", "decoder", write_decoder, fields)
        source = resolved_of("decoder", qwen2, **fields)
        assert source.opened.checkpoint.folder == qwen2
        expected = encode(built(case, qwen2), ["a red fox"])[""]
        spec = source.spec()
        said = list(fetch({"enc": source.options}))
        assert ("layers up to" in said[0]) == (held < 3)
        encoder = built(case, qwen2)
        folder = encoder.resolved.opened.checkpoint.folder
        assert folder.parent == tmp_path / "home" / "checkpoints"
        names = load_file(folder / "model.safetensors")
        assert {name for name in names if "layers." in name} == {
            name
            for name in load_file(qwen2 / "model.safetensors")
            if re.search(rf"layers\.[0-{held - 1}]\.", name)
        }
        assert encoder.resolved.spec() == spec
        assert torch.equal(encode(encoder, ["a red fox"])[""][0], expected[0])
        reference = reference_of(encoder.resolved)("a red fox", None)[""]
        assert difference(expected[0], reference, exact=True) is None
        if held < 3:
            words = rf"with the first {held} layers of .* 3 are needed"
            with pytest.raises(InputError, match=words):
                resolved_of("decoder", folder, template=CHAT, layers=(-1,))


# --- checkpoints with more than a text tower ------------------------------------------------------

TEXT_ALONE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text")
EVERY = (*TEXT_ALONE, "gemma3", "mistral3", "qwen2_5_vl") + (() if OLD else ("qwen3_vl",))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Any:
    @cache
    def write(model_type: str) -> Path:
        folder = tmp_path_factory.mktemp("decoder") / model_type
        return write_decoder(folder, corpus, model_type=model_type, begins=True)

    return write


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_type", EVERY)
def test_a_mask_of_pads_gives_the_pipelines_very_numbers(
    model_type: str, side: str, folder_of: Any
) -> None:
    """The whole model with the plain mask, one caption at the full length: not a bit differs, and
    neither with neighbours that have more pads or none."""
    fields = {"attention_mask": "padding", "padding_side": side, "max_length": 60}
    fields |= {"layers": [1, -1], "norm": "final", "buckets": [], "batch_tokens": 180}
    case = Case("masked", "decoder", write_decoder, fields)
    encoder = built(case, folder_of(model_type))
    expected, texts = reference_of(encoder.resolved), ["a red fox", "", "a b " * 200]
    longest = encoder.resolved.opened.tokenizer.longest
    for text, found in zip(texts, encode(encoder, texts)[""], strict=True):
        whole = expected(text, longest)[""]
        real = whole[: len(found)] if side == "right" else whole[len(whole) - len(found) :]
        if OLD and side == "left" and model_type == "qwen2_5_vl":
            # Its whole model counts positions from the first real token on, in this release.
            assert difference(found, real, exact=True) is None, text
            continue
        assert torch.equal(found, real), text


@pytest.mark.parametrize(
    "prefix", ["", "model.", "language_model.model.", "model.language_model.", "language_model."]
)
def test_a_tower_is_the_same_by_every_releases_names(
    prefix: str, folder_of: Any, tmp_path: Path
) -> None:
    """Only the text tower is read, and of it only the layers that are run."""
    whole = folder_of("gemma3")
    plain = resolved(whole, layers=(1,))
    captions = plain.opened.tokenizer.encode(["a red fox"])
    assert 3 * plain.flops(captions) == resolved(whole).flops(captions)  # one of three layers
    source = Source(plain.opened.checkpoint, plain.family, plain.options)
    tensors = {each.canonical: each for each in source.weights(torch.float32)}
    assert {name.split(".")[0] for name in tensors} == {"layers", "embed_tokens", "norm"}
    assert not any(name.startswith(("layers.1", "layers.2")) for name in tensors)
    folder = tmp_path / "renamed"
    shutil.copytree(whole, folder)
    held = load_file(whole / "model.safetensors")
    renamed = {prefix + each.canonical: held[each.name] for each in tensors.values()}
    renamed |= {name: held[name] for name in held if "vision" in name}
    save_file(renamed | {"lm_head.weight": torch.zeros(4)}, folder / "model.safetensors")
    assert resolved(folder, layers=(1,)).weights == plain.weights
    case = Case("renamed", "decoder", write_decoder, {"layers": [1], "template": CHAT})
    encoders = [built(case, each) for each in (whole, folder)]
    assert torch.equal(*(encode(encoder, ["a red fox"])[""][0] for encoder in encoders))


@pytest.mark.skipif(OLD, reason="this release of transformers saves no other form")
def test_qwen2_5_vl_as_it_was_published(folder_of: Any, tmp_path: Path) -> None:
    """config.json has the text tower's settings at its top."""
    new = folder_of("qwen2_5_vl")
    config = json.loads((new / "config.json").read_bytes())
    text = config.pop("text_config")
    theta = text.pop("rope_parameters")["rope_theta"]
    scaling = {"type": "mrope", "mrope_section": MROPE["mrope_section"]}
    changes = {**text, "rope_theta": theta, "rope_scaling": scaling, "model_type": "qwen2_5_vl"}
    old = shutil.copytree(new, tmp_path / "old")
    (old / "config.json").write_text(json.dumps({**config, **changes}))
    assert resolved(old).weights == resolved(new).weights
    case = Case("old", "decoder", write_decoder, {"template": CHAT})
    assert torch.equal(*(encode(built(case, each), ["a fox"])[""][0] for each in (old, new)))


def test_a_model_that_this_transformers_lacks(
    folder_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(folder_of("qwen3"), tmp_path / "vl", model_type="qwen3_vl")
    monkeypatch.setattr(resolve, "version", lambda name: "4.51.3")
    with pytest.raises(InputError, match=r"'qwen3_vl', which transformers has since 4\.57\.0, and"):
        resolved(folder)


def test_keys_that_a_model_does_not_read(folder_of: Any, tmp_path: Path) -> None:
    """Windows and scales of other models; and windows that a key seems to take away."""
    nested = {"rope_theta": 500.0, "rope_type": "default"}
    full = ["full_attention"] * 3
    for number, (model_type, changes) in enumerate(
        (
            ("llama", {"sliding_window": 4, "query_pre_attn_scalar": 99, "layer_types": full}),
            ("mistral", {"sliding_window": 6, "use_sliding_window": False}),
            ("mistral", {"sliding_window": 6, "max_window_layers": 2}),
            *([] if OLD else [("gemma3_text", {"rope_parameters": nested})]),
        )
    ):
        folder = copied(folder_of(model_type), tmp_path / str(number), **changes)
        case = Case("stray", "decoder", write_decoder, {"layers": [2], "max_length": 48})
        whole = [built(case, folder, implementation=each) for each in BOTH]
        whole.append(built(case, folder, attention_mask="padding", implementation="hf"))
        texts = ["a red fox", "a b " * 99]
        expected = [reference_of(whole[0].resolved)(text, None)[""] for text in texts]
        for encoder in whole:
            for found, wanted in zip(encode(encoder, texts)[""], expected, strict=True):
                assert float((found - wanted).abs().max() / wanted.abs().max()) <= 3e-6, changes
    qwen2 = {"sliding_window": 6, "use_sliding_window": False, "layer_types": None}
    folder = copied(folder_of("qwen2"), tmp_path / "qwen2", **qwen2)
    if OLD:
        with pytest.raises(InputError, match="this release of transformers gives every layer"):
            resolved(folder)
    else:
        resolved(folder)
    folder = copied(folder_of("gemma2"), tmp_path / "gemma2", sliding_window=None)
    with pytest.raises(InputError, match="has sliding_window null: expected a number of tokens"):
        resolved(folder)


def test_a_model_that_is_not_causal(folder_of: Any, tmp_path: Path) -> None:
    folder = copied(folder_of("qwen2"), tmp_path / "qwen2", is_causal=False)
    with pytest.raises(InputError, match=r"is not causal \(config.json has is_causal false\)"):
        resolved(folder)
    config = json.loads((folder_of("gemma3") / "config.json").read_bytes())
    text = {**config["text_config"], "use_bidirectional_attention": True}
    with pytest.raises(InputError, match=r"is not causal .* use_bidirectional_attention true\)"):
        resolved(copied(folder_of("gemma3"), tmp_path / "gemma", text_config=text))


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_trainer_knows_the_pads_that_are_stored(
    side: str, folder_of: Any, tmp_path: Path
) -> None:
    """keep all: every position of one length, and the tokenizer's mask with them."""
    texts = ["a red fox", "", "a b " * 200]
    encoder = {"kind": "decoder", "pretrained": str(folder_of("llama")), "dtype": "float32"}
    encoder |= {"attention_mask": "padding", "padding_side": side, "keep": "all", "max_length": 40}
    encoder |= {"template": CHAT, "crop_start": 0, "batch_tokens": 80}
    config = {
        "captions": {"path": str(write_captions(tmp_path / "captions.parquet", texts))},
        "encoders": {"enc": encoder},
        "output": {"path": str(tmp_path / "out"), "dtype": "float32"},
        "runtime": {"device": "cpu"},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    code, _, log = call("run", str(tmp_path / "job.yaml"))
    assert code == 0, log
    plain = transformers.AutoTokenizer.from_pretrained(folder_of("llama"))
    arguments = {"padding": "max_length", "truncation": True, "max_length": 40}
    prompts = [CHAT.format(text=text) for text in texts]
    wanted = plain(prompts, padding_side=side, return_tensors="pt", **arguments)["attention_mask"]
    dataset = EmbeddingDataset(tmp_path / "out")
    for row, mask in enumerate(wanted.bool()):
        assert torch.equal(dataset[row]["text_enc_token_mask"], mask)
        assert dataset[row]["text_enc"].shape == (40, 64)
    assert torch.equal(dataset.null["text_enc_token_mask"], wanted[1].bool())
    code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep", "--sample", "9")
    assert code == 0, said


def test_captions_that_merge_with_the_template(tmp_path: Path) -> None:
    """Real vectors are counted; a caption of which there is none has a status."""
    lines = ["a\n\nb\n\n\nc Q:\nA:\n\n x red fox\n"] * 300
    model = write_qwen3(tmp_path / "model", lines, layers=1)
    texts = ["a red fox", "\n", "", "x"]
    captions = write_captions(tmp_path / "captions.parquet", texts)
    common = {"kind": "decoder", "pretrained": str(model), "max_length": 30}

    def run(name: str, **fields: Any) -> tuple[int, str]:
        config = {
            "captions": {"path": str(captions), **fields.pop("captions", {})},
            "encoders": {"enc": {**common, **fields}},
            "output": {"path": str(tmp_path / name)},
            "runtime": {"device": "cpu"},
        }
        (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
        code, _, log = call("run", str(tmp_path / "job.yaml"))
        return code, log

    template = "Q:\n{text}\nA:"
    assert run("all", template=template, crop_start=0, keep="all")[0] == 0
    plain = transformers.AutoTokenizer.from_pretrained(model)
    dataset = EmbeddingDataset(tmp_path / "all")
    parts = [plain(part).input_ids for part in template.split("{text}")]
    assert len(plain("Q:\n\nA:").input_ids) < sum(map(len, parts))
    samples = [*map(dataset.__getitem__, range(len(texts))), dataset.null]
    for text, sample in zip([*texts, ""], samples, strict=True):
        wanted = len(plain(template.format(text=text)).input_ids)
        assert int(sample["text_enc_token_mask"].sum()) == wanted, text

    cropped = {"template": "Q:\n{text}", "empty": "space"}
    assert run("cropped", **cropped)[0] == 0
    words = "encoders.enc stores no position of it: its tokens merge with the template's"
    rows = pq.read_table(tmp_path / "cropped" / "manifest.parquet")
    assert rows["status"].to_pylist() == ["ok", "invalid_text", "ok", "ok"]
    assert words in rows["error"][1].as_py()
    write_captions(captions, ["x", "\n"])
    code, log = run("fail", captions={"on_bad_text": "fail"}, **cropped)
    assert code == 2
    assert "row 1 (rows count from 0): " + words in log


def test_plan_shows_the_prompt_and_what_is_taken(folder_of: Any, tmp_path: Path) -> None:
    encoder = {"kind": "decoder", "pretrained": str(folder_of("llama")), "dtype": "float32"}
    encoder["template"] = "<|user|>Describe:\n{text}<|end|><|im_end|>\n"
    captions = str(write_captions(tmp_path / "captions.parquet", ["a red fox"]))
    config = {"captions": {"path": captions}, "encoders": {"enc": encoder}}
    config |= {"output": {"path": str(tmp_path / "out")}, "runtime": {"device": "cpu"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))
    code, said, _ = call("plan", str(tmp_path / "job.yaml"))
    assert code == 0, said
    tokenizer = resolved(folder_of("llama"), template=encoder["template"]).opened.tokenizer
    assert f"prompt {encoder['template']!r}" in said
    assert f"of its tokens {tokenizer.first} before the caption are not stored" in said
    assert "WARNING    <|im_end|>: no special token of this tokenizer" in said
    assert "layer -1, no norm; hidden_states[-1] of transformers has the final norm" in said
    code, said, _ = call("plan", str(tmp_path / "job.yaml"), "--encoders.enc.norm", "final")
    assert "layer -1, its final norm\n" in said


def test_advice_on_length_counts_what_the_template_takes(folder_of: Any, tmp_path: Path) -> None:
    """Whoever follows it finds the shares of bytes and operations that were said, and no cut."""
    encoder = {"kind": "decoder", "pretrained": str(folder_of("qwen2")), "dtype": "float32"}
    encoder["template"] = f"<|user|>{'Describe the video by its content. ' * 6}\n{{text}}<|end|>\n"
    encoder |= {"crop_start": "template", "keep": "all", "max_length": 256, "batch_tokens": 4096}
    captions = str(write_captions(tmp_path / "a.parquet", [f"a fox {i}" for i in range(40)]))
    config = {"captions": {"path": captions}, "encoders": {"enc": encoder}}
    config |= {"output": {"path": str(tmp_path / "out")}, "runtime": {"device": "cpu"}}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(config))

    def taken(*changes: str) -> tuple[float, float, str]:
        code, said, _ = call("plan", str(tmp_path / "job.yaml"), *changes)
        assert code == 0, said
        ((size, unit),) = re.findall(r"\n +text_enc +([\d.]+) (\w+)", said)
        (flops,) = re.findall(r"encoding +([\d.]+) MFLOP a caption", said)
        return float(size) * {"KiB": 1, "MiB": 1024}[unit], float(flops), said

    size, flops, said = taken()
    (length,) = re.findall(r"enc: max_length (\d+) would cut 0 % of", said)
    for what, *change in (
        ("real tokens alone", "--encoders.enc.keep", "real"),
        ("max_length", "--encoders.enc.max_length", length),
    ):
        ((bytes_said, flops_said),) = re.findall(
            rf"enc: {what} .* take ([\d.]+) % of .* and ([\d.]+) % of the operations", said
        )
        smaller, fewer, then = taken(*change)
        assert 100 * smaller / size == pytest.approx(float(bytes_said), rel=0.05)
        assert 100 * fewer / flops == pytest.approx(float(flops_said), rel=0.05)
        assert re.search(r"cut at \d+ +0 ", then)


def test_a_mask_where_a_template_closes_up(corpus: list[str], tmp_path: Path) -> None:
    """With nothing, or a line break, between them the template's two line breaks are one token."""
    folder = write_decoder(tmp_path, ["a\n\nb\n\n\nc"] * 200 + corpus)
    fields = {"template": "Q:\n{text}\nA:", "crop_start": 0, "max_length": 40}
    tokenizer = resolved(folder, keep="all", attention_mask="padding", **fields).opened.tokenizer
    captions = tokenizer.encode(["", "\n", ".", "a red fox"])
    assert len({*captions.num_ids}) > 2
    assert [n + tokenizer.template_stored for n in captions.tokens] == captions.num_ids
    # Where no mask is counted from them, they are the caption's own.
    own = len(tokenizer._backend.encode("a red fox").ids)
    assert resolved(folder, **fields).opened.tokenizer.encode(["", "a red fox"]).tokens == [0, own]


def test_compiled_layers_of_a_decoder_can_be_streamed(qwen2: Path) -> None:
    """On a GPU, too: unlike T5's and CLIP's they are not one graph."""
    encoder = resolved(qwen2, compile=True, buckets=None, stream_tokens=4096)
    assert encoder.decision.implementation == "fused"
    assert is_streamed(encoder, "cuda:0", "stream")


# --- chats ----------------------------------------------------------------------------------------


def test_a_chat_is_its_rendered_template(qwen2: Path, begins: Path, tmp_path: Path) -> None:
    chat = ChatOptions(messages=MESSAGES, generation_prompt=True, thinking=False)
    written = (
        "<|user|>system\n{{s}}<|end|>\n<|user|>u\n{text}<|end|>\n"
        "<|user|>assistant\n(no {{thoughts}})\n"
    )
    encoder = resolved(qwen2, template="{text}", chat=chat)
    assert encoder.spec()["template"] == written
    assert encoder.spec() == resolved(qwen2, template=written).spec()
    # Llama's tokenizer puts a begin-of-text token before a text, and none before a chat.
    plain = transformers.AutoTokenizer.from_pretrained(str(begins))
    messages = [{"role": "system", "content": "{s}"}, {"role": "u", "content": "a {b}"}]
    ids = plain.apply_chat_template(messages, return_dict=True, tokenize=True)["input_ids"]
    chat = ChatOptions(messages=MESSAGES)
    found = resolved(begins, template="{text}", chat=chat).opened.tokenizer.encode(["a {b}"])
    assert found.ids[0].tolist() == ids


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ messages[0]['content'] | trim }}", "changes the caption ' a ', so the prompt is no"),
        ("no caption", "puts the caption into the prompt 0 times: expected once"),
        (
            "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}",
            "puts today's date into the prompt, so another day",
        ),
        ("{{ raise_exception('only one speaker') }}", r"TemplateError: only one speaker\)\. Name"),
    ],
)
def test_chat_templates_that_cannot_be(
    template: str, words: str, corpus: list[str], tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, corpus, chat_template=template)
    make_model("qwen2").save_pretrained(str(tmp_path), safe_serialization=True)
    chat = ChatOptions(messages=(Message(role="user", content="{text}"),))
    with pytest.raises(InputError, match=words):
        resolved(tmp_path, template="{text}", chat=chat)


def test_a_chat_template_that_strips_gets_stripped_captions(
    corpus: list[str], tmp_path: Path
) -> None:
    """Whatever the other steps bring back."""
    strips = "{{ '<|user|>' + messages[0]['content'] | trim + '<|end|>' }}"
    write_tokenizer(tmp_path, corpus, chat_template=strips)
    make_model("qwen2").save_pretrained(str(tmp_path), safe_serialization=True)
    chat = ChatOptions(messages=(Message(role="user", content="{text}"),))
    open_with = partial(resolved, tmp_path, template="{text}", chat=chat)
    good = open_with(text_steps=("html_unescape", "strip"))
    assert good.spec()["template"] == "<|user|>{text}<|end|>"
    for steps in ((), ("strip", "html_unescape"), ("strip", "quoted")):
        with pytest.raises(InputError, match="It strips it: add strip as the last of text_steps"):
            open_with(text_steps=steps)
    with pytest.raises(InputError, match=r"changes the caption ' ', .* It strips it: set empty"):
        open_with(text_steps=("strip",), empty="space")


# --- a stage behind -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "combine", "side"),
    [("ltx2_range", "stack", "left"), ("rms", "concat", "right"), ("none", "concat", "right")],
)
def test_a_projection(
    before: str, combine: str, side: str, qwen2: Path, texts: list[str], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    path = tmp_path / "project.safetensors"
    tensors = {"text.weight": torch.randn(20, 4 * 64) / 16, "text.bias": torch.randn(20)}
    save_file(tensors, path)
    project = ProjectOptions(
        path=str(tmp_path), weight="text.weight", bias="text.bias", before=before
    )
    fields: dict[str, Any] = {"layers": [0, 1, 2, 3], "norm": "final", "combine": combine}
    fields |= {"template": CHAT, "project": project, "attention_mask": "padding"}
    case = Case("project", "decoder", write_decoder, {**fields, "padding_side": side, **SHORT})
    encoder = built(case, qwen2)
    assert [output.width for output in encoder.resolved.outputs] == [20]
    reference = reference_of(encoder.resolved)
    for text, found in zip(texts, encode(encoder, texts)[""], strict=True):
        assert difference(found, reference(text, None)[""], exact=True) is None, text
    digest = encoder.resolved.weights
    save_file({**tensors, "text.bias": torch.zeros(20)}, path)
    assert resolved_of("decoder", qwen2, **fields).weights != digest


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"path": "absent"}, r"project.path is 'absent': there is no such folder, and nothing of"),
        ({"weight": "text.wight"}, "has no tensor 'text.wight': did you mean text.weight?"),
        ({"weight": "wide"}, r"has wide of shape \[20, 65\]: expected \[stored width, 64\], for 1"),
        ({"bias": "wide"}, r"project.bias: .* has wide of shape \[20, 65\]: expected \[20\]"),
        ({"weight": "of.weight"}, r"project.bias is null, and .* has of.bias beside of.weight"),
    ],
)
def test_projections_that_cannot_be(
    fields: dict[str, str], words: str, qwen2: Path, tmp_path: Path
) -> None:
    path = tmp_path / "project.safetensors"
    held = {"text.weight": torch.zeros(20, 64), "wide": torch.zeros(20, 65)}
    save_file({**held, "of.weight": torch.ones(20, 64), "of.bias": torch.ones(20)}, path)
    fields = {"path": str(path), "weight": "text.weight", **fields}
    with pytest.raises(InputError, match=words):
        resolved(qwen2, project=ProjectOptions(**fields))  # type: ignore[arg-type]


def test_a_projection_without_the_bias_beside_it_or_a_shared_range(
    qwen2: Path, tmp_path: Path
) -> None:
    path = tmp_path / "project.safetensors"
    save_file({"of.weight": torch.ones(20, 64), "of.bias": torch.ones(20)}, path)
    left_out = ProjectOptions(path=str(path), weight="of.weight", bias="none", before="ltx2_range")
    encoder = resolved(qwen2, project=left_out)
    assert [*encoder.family.extra_weights(encoder.options, encoder.opened.checkpoint)] == [
        "project.weight"
    ]
    with pytest.raises(InputError, match=r"shared: project\.before is ltx2_range"):
        resolved(qwen2, project=left_out, prefix="shared")


def test_a_token_before_a_projection_does_not_know_its_place_in_bfloat16() -> None:
    """torch's own rsqrt rounds the last few numbers of a tensor otherwise."""
    torch.manual_seed(0)
    projection = Projection(torch.zeros(8, 64 * 3), None, "rms")
    states = (3 * torch.randn(1, 101, 64, 3)).bfloat16()
    real = torch.ones(1, 101, dtype=torch.bool)
    together = projection.prepared(states, real)
    for first in range(0, 95, 7):
        some = slice(first, first + 5)
        assert torch.equal(projection.prepared(states[:, some], real[:, some]), together[:, some])


def test_a_head_alone_is_named(tmp_path: Path, corpus: list[str]) -> None:
    """Another model's checkpoint, and one whose layers are not all there."""
    folder = write_decoder(tmp_path / "qwen2", corpus)
    for number, (changes, words) in enumerate(
        (
            ({"model_type": "gpt2"}, "takes llama, mistral, qwen2, qwen3"),
            ({"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}, "lacks weights"),
            (
                {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2},
                r"has encoder weights that its config.json does not know: (model\.)?layers\.2",
            ),
        )
    ):
        other = copied(folder, tmp_path / str(number), **changes)
        with pytest.raises(InputError, match=words):
            built(CASES[0], other, buckets=None)
