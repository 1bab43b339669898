"""The conformance kit: what every family in the registry must hold, case by case.

A new family needs no test here: its own test file has cases (`family_case.Case`), and they run
through all of these.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from family_case import Case, built, copied, encode, every_case, parameters, reference_of, resolved
from jobs import call, write_captions

from embed_precompute.documents import canonical_json, to_plain
from embed_precompute.encoders import encoder as encoder_module
from embed_precompute.encoders.device import check_numbers, difference, distance
from embed_precompute.encoders.encoder import build
from embed_precompute.encoders.families.base import Decision, in_dtype
from embed_precompute.encoders.fetch import fetch
from embed_precompute.encoders.loading import Source, load_model, loaded_bytes
from embed_precompute.encoders.resolve import resolve
from embed_precompute.errors import InputError

CASES = every_case()
every_family = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
every_implementation = pytest.mark.parametrize(("case", "implementation"), parameters())


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Any:
    @cache
    def write(name: str) -> Path:
        case = next(case for case in CASES if case.name == name)
        return case.write(tmp_path_factory.mktemp("families") / name, corpus)

    return lambda case: write(case.name)


@pytest.fixture(scope="session")
def texts(corpus: list[str]) -> list[str]:
    """Empty, short, long, cut off, repeated, of other scripts, and odd at both ends."""
    longest = max(corpus, key=len)
    odd = ["  two  spaces\n", "caf\u00e9 \ube68\uac04 \u8d64\u3044", "\U0001f525", "{text} </s>"]
    odd += ["a <pad> b", "[PAD] [SEP]", "<|endoftext|> c", "<|end|> d"]
    return ["", "x", "a red fox", *corpus[:12], longest * 12, corpus[0], longest, *odd]


@every_implementation
def test_float32_is_plain_transformers_one_caption_at_a_time(
    case: Case, implementation: str, folder_of: Any, texts: list[str]
) -> None:
    encoder = built(case, folder_of(case), implementation=implementation)
    reference = reference_of(encoder.resolved)
    found = encode(encoder, texts)
    length = encoder.resolved.decision.padded_length
    for row, text in enumerate(texts):
        expected = reference(text, length)
        assert expected.keys() == found.keys()
        for suffix, values in expected.items():
            problem = difference(found[suffix][row], values, exact=True)
            assert problem is None, (text, suffix, problem)


@every_implementation
def test_half_precision_is_rounding_and_nothing_else(
    case: Case, implementation: str, folder_of: Any, texts: list[str]
) -> None:
    encoder = built(case, folder_of(case), implementation=implementation, dtype="bfloat16")
    exact = reference_of(encoder.resolved, dtype="float32")
    length, worst = encoder.resolved.decision.padded_length, 0.0
    for suffix, rows in encode(encoder, texts).items():
        for text, values in zip(texts, rows, strict=True):
            relative, cosine = distance(values, exact(text, length)[suffix])
            assert cosine > 0.995, (text, suffix)
            worst = max(worst, relative)
    assert 1e-5 < worst < 0.1  # rounded, and it was bfloat16


@every_implementation
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neighbours_order_and_place_change_no_bit(
    case: Case, implementation: str, dtype: str, folder_of: Any, texts: list[str]
) -> None:
    encoder = built(case, folder_of(case), dtype, implementation=implementation, dtype=dtype)
    together = encode(encoder, texts)
    order = np.random.default_rng(3).permutation(len(texts))
    shuffled = encode(encoder, [texts[row] for row in order])
    for suffix, rows in together.items():
        for position, row in enumerate(order):
            assert torch.equal(shuffled[suffix][position], rows[row]), texts[row]
        for row, text in enumerate(texts):
            assert torch.equal(encode(encoder, [text])[suffix][0], rows[row]), text


@every_implementation
def test_the_null_embedding_is_the_empty_captions(
    case: Case, implementation: str, folder_of: Any
) -> None:
    encoder = built(case, folder_of(case), implementation=implementation)
    resolved = encoder.resolved
    padded = resolved.decision.padded_length is not None
    expected = reference_of(resolved)("", resolved.decision.null_shape[1] if padded else None)
    empty = resolved.opened.tokenizer.empty
    for output in resolved.outputs:
        (values,) = encode(encoder, [""], null=True)[output.suffix]
        assert difference(values, expected[output.suffix], exact=True) is None
        vectors = values.view(-1, output.width)
        assert resolved.stored_lengths(output, empty, null=True) == [len(vectors)]


@every_family
def test_tokens_and_spans(case: Case, folder_of: Any, texts: list[str]) -> None:
    """The ids are transformers'; the columns say what the encoder stores of each caption."""
    encoder = resolved(case, folder_of(case))
    tokenizer, options = encoder.opened.tokenizer, encoder.options
    plain = transformers.AutoTokenizer.from_pretrained(str(encoder.opened.tokenizer_folder))
    captions = tokenizer.encode(texts)
    special = {"add_special_tokens": getattr(options, "chat", None) is None}
    for row, text in enumerate(texts):
        prompt, longest = tokenizer.template.format_string.format(text=text), tokenizer.longest
        whole = plain(prompt, **special)["input_ids"]
        cut = plain(prompt, truncation=True, max_length=longest, **special)["input_ids"]
        assert captions.ids[row].tolist() == cut
        assert captions.num_ids[row] == len(captions.ids[row]) <= longest
        assert captions.truncated[row] == (len(whole) > longest)
        assert 0 <= tokenizer.keep_first <= captions.first[row]
        behind = captions.stored[row] - tokenizer.keep_first
        assert 0 <= behind <= captions.extents[row] - captions.first[row]
        assert captions.tokens[row] <= options.max_length
    assert captions.truncated.count(True) >= 1
    built_encoder = built(case, folder_of(case))
    found = encode(built_encoder, texts)
    for output in encoder.outputs:
        lengths = encoder.stored_lengths(output, captions, null=False)
        assert [len(v.view(-1, output.width)) for v in found[output.suffix]] == lengths


@every_family
def test_text_steps_come_before_template_and_tokenizer(case: Case, folder_of: Any) -> None:
    plain = resolved(case, folder_of(case)).opened.tokenizer
    stepped = resolved(case, folder_of(case), text_steps=("lower",), empty="space")
    found = stepped.opened.tokenizer.encode(["A Red FOX", ""]).ids
    for ids, expected in zip(found, plain.encode(["a red fox", " "]).ids, strict=True):
        assert ids.tolist() == expected.tolist()
    assert {**stepped.spec(), "text_steps": [], "empty": "encode"} == resolved(
        case, folder_of(case)
    ).spec()


@every_family
def test_what_was_decided_stands_in_the_spec(case: Case, folder_of: Any) -> None:
    encoder = resolved(case, folder_of(case))
    spec = encoder.spec()
    assert json.loads(canonical_json(spec)) == spec
    again = resolve(encoder.opened, stored=spec)
    assert again.decision == encoder.decision
    assert spec.keys() >= {field for field in Decision.__dataclass_fields__}
    assert spec["kind"] == case.kind
    for shape in (*encoder.decision.shapes, encoder.decision.null_shape):
        assert shape[1] >= 1


@every_family
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_weight_has_the_dtype(case: Case, dtype: str, folder_of: Any) -> None:
    """Cast by us or mapped from the file, the weights are those that transformers loads."""
    encoder = resolved(case, folder_of(case), dtype=dtype, implementation="hf")
    source = Source(encoder.opened.checkpoint, encoder.family, encoder.options)
    asked: torch.dtype = getattr(torch, dtype)
    model = load_model(source, asked)
    direct = dict(load_model(source, asked, device_map={"": "cpu"}).named_parameters())
    for name, parameter in model.named_parameters():
        kept = encoder.family.keeps_float32(name, dtype)
        assert parameter.dtype == (torch.float32 if kept else asked), name
        assert torch.equal(parameter, direct[name]), name
    assert loaded_bytes(source, asked) >= 0.9 * sum(p.nbytes for p in model.parameters())


@every_family
def test_a_copy_of_equal_values_is_the_same_encoder(
    case: Case, folder_of: Any, tmp_path: Path
) -> None:
    """As transformers saves the encoder alone: other names, several files, another config.json."""
    fields = {"dtype": "bfloat16", "implementation": "hf"}
    encoder = resolved(case, folder_of(case), **fields)
    digest, checkpoint = encoder.weights, encoder.opened.checkpoint
    assert digest != resolved(case, folder_of(case), dtype="float32").weights
    source = Source(checkpoint, encoder.family, encoder.options)
    for dtype in ("bfloat16", "float32"):  # the second holds values of the first
        folder = tmp_path / "bfloat16" if dtype == "float32" else checkpoint.folder
        arguments = {**in_dtype(dtype), **encoder.family.model_arguments}
        model = case.alone(folder, source.model_class, **arguments)
        model.save_pretrained(tmp_path / dtype, max_shard_size="100KB")
        for path in [*checkpoint.folder.glob("*token*"), *checkpoint.folder.glob("*.jinja")]:
            shutil.copy(path, tmp_path / dtype)
        assert len(list((tmp_path / dtype).glob("*.safetensors"))) > 1
        assert resolved(case, tmp_path / dtype, **fields).weights == digest


@every_implementation
def test_a_fetched_copy_gives_the_same_bits(
    case: Case, implementation: str, folder_of: Any, texts: list[str], tmp_path: Path
) -> None:
    for dtype in ("float16", "float32", "bfloat16"):
        fields = {"implementation": implementation, "dtype": dtype}
        source = resolved(case, folder_of(case), **fields)
        assert len(list(fetch({"enc": source.options}, tmp_path / dtype))) == 2
        assert resolved(case, tmp_path / dtype / "enc", **fields).spec() == source.spec()
        if dtype == "float16":  # no CPU's dtype
            continue
        encoder = built(case, folder_of(case), dtype, **fields)
        copy = built(case, tmp_path / dtype / "enc", dtype, **fields)
        expected, found = encode(encoder, texts[:6]), encode(copy, texts[:6])
        for suffix, rows in expected.items():
            assert all(map(torch.equal, rows, found[suffix]))


@every_family
def test_whatever_changes_the_numbers_changes_the_digest(
    case: Case, folder_of: Any, tmp_path: Path
) -> None:
    """Every key of config.json, with other values that still give a model of these weights."""
    folder = folder_of(case)
    texts, changed = ["a red fox", "two children wait beside a frozen lake"], 0

    def numbers(folder: Path) -> tuple[str | None, list[torch.Tensor]]:
        encoder = built(case, folder, implementation="hf")
        stored = encode(encoder, texts)
        return encoder.resolved.weights, [each for rows in stored.values() for each in rows]

    digest, expected = numbers(folder)
    config = json.loads((folder / "config.json").read_bytes())
    config.pop("vision_config", None)  # the text encoder has no part in it
    for key, value in config.items():
        for other in others(value):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            with contextlib.suppress(InputError):
                found, states = numbers(copied(folder, tmp_path / "copy", **{key: other}))
                same = all(map(torch.equal, states, expected))
                assert same or found != digest, (key, other)
                changed += not same
    assert changed > 0


def others(value: Any) -> list[Any]:
    """Other values of the same kind."""
    if isinstance(value, dict):
        return [{**value, key: other} for key in value for other in others(value[key])]
    if isinstance(value, bool) or value is None:
        return [not value]
    if isinstance(value, int):
        return [2 * value or 1]
    if isinstance(value, float):
        return [1.5 * value + 1e-3]
    activations = ("relu", "gelu", "silu", "gated-gelu", "quick_gelu")
    return [other for other in activations if value in activations and other != value]


@every_implementation
def test_the_self_check_sees_a_wrong_encoder(
    case: Case, implementation: str, folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = built(case, folder_of(case), implementation=implementation)
    check_numbers(encoder)
    original = encoder.forward

    def wrong(batch: Any) -> dict[str, torch.Tensor]:
        return {suffix: values * 1.001 for suffix, values in original(batch).items()}

    monkeypatch.setattr(encoder, "forward", wrong)
    with pytest.raises(InputError, match=r"encoders.enc: self-check failed on cpu .*difference of"):
        check_numbers(encoder)


@pytest.mark.parametrize(
    "case", [pytest.param(each, id=each.name) for each in CASES if "fused" in each.implementations]
)
def test_streamed_weights_give_the_bits_of_resident_ones(
    case: Case, folder_of: Any, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In windows of several batches; also after transformers' model has had the layers."""
    monkeypatch.setattr(encoder_module, "WINDOW_TOKENS", 700)
    for dtype in ("float32", "bfloat16"):
        decided = resolved(case, folder_of(case), implementation="fused", dtype=dtype)
        expected = encode(build(decided, "cpu", dtype), texts)
        streamed = build(decided, "cpu", dtype, "stream")
        for _ in range(2):
            for suffix, rows in encode(streamed, texts).items():
                assert all(map(torch.equal, rows, expected[suffix])), suffix
            check_numbers(streamed)


@every_family
def test_a_whole_job(case: Case, folder_of: Any, texts: list[str], tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "captions.parquet", [*texts, None])
    encoder = {"kind": case.kind, "pretrained": str(folder_of(case)), **to_plain(case.options)}
    config = {
        "captions": {"path": str(captions)},
        "encoders": {"enc": {"dtype": "float32", **encoder}},
        "output": {"path": str(tmp_path / "out"), "samples_per_shard": 9, "dtype": "float32"},
        "runtime": {"device": "cpu", "self_check": "always"},
    }
    job = tmp_path / "job.yaml"
    job.write_text(yaml.safe_dump(config))
    code, said, log = call("plan", str(job))
    assert code == 0, log
    assert "characters per token" in said
    code, _, log = call("run", str(job))
    assert code == 0, log
    assert "self-check on cpu passed" in log
    code, said, _ = call("verify", str(tmp_path / "out"), "--level", "deep", "--sample", "99")
    assert code == 0, said
    assert f"{len(texts)} samples and the null embedding encoded again" in said
