"""Configuration: YAML, overrides, checks, and the help that is made from the dataclasses."""

from __future__ import annotations

from pathlib import Path

import pytest

from embed_precompute.config.files import describe_keys, load_config, to_yaml
from embed_precompute.config.schema import Config
from embed_precompute.documents import canonical_json, digest_of
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.errors import InputError

YAML = """
captions: {path: captions.parquet}
encoders:
  t5: {kind: t5, pretrained: models/t5}
  clip: {kind: clip, pretrained: models/clip, buckets: [16, 32]}
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(YAML)
    return path


def test_defaults_and_file(yaml_file: Path) -> None:
    config = load_config(yaml_file)
    assert isinstance(config, Config)
    assert config.encoders["t5"].resolved_max_length == 512
    assert config.encoders["clip"].resolved_max_length == 77
    assert config.encoders["clip"].resolved_buckets() == (16, 32, 77)
    assert config.output.samples_per_shard == "auto"


def test_overrides_win_in_both_spellings(yaml_file: Path) -> None:
    words = ["--encoders.t5.max-length", "64", "--output.samples_per_shard=7"]
    words += ["--captions.id-column", "null", "--captions.normalize", "[nfc]"]
    config = load_config(yaml_file, words)
    assert config.encoders["t5"].max_length == 64
    assert config.output.samples_per_shard == 7
    assert config.captions.id_column is None
    assert config.captions.normalize == ("nfc",)


def test_yaml_round_trip(yaml_file: Path, tmp_path: Path) -> None:
    config = load_config(yaml_file, ["--captions.recipe.kind", "opensora"])
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--encoders.t5.max_lenth", "3"], "did you mean max_length"),
        (["--captions.textcolumn", "x"], "did you mean text_column"),
        (["--outptu.path", "x"], "did you mean output"),
        (["--encoders.t5.max_length", "abc"], "abc"),
        (["--encoders.t5.max_length", "0"], "expected 1 or more"),
        (["--encoders.t5.added_tokens", "-1"], "below 0"),
        (["--encoders.clip.seq_align", "4"], "Remove the field"),
        (["--encoders.t5.buckets", "[16]"], "attention_mask padding"),
        (["--encoders.clip.buckets", "[99]"], "1..max_length"),
        (["--captions.recipe.kind", "foo"], "foo"),
        (["--output.samples_per_shard", "0"], "expected 1 or more"),
        (["--encoders", "{t5_xxh3: {kind: t5, pretrained: x}}"], "Choose another name"),
        (["--runtime.device", "tpu"], "expected auto, cpu, cuda"),
        (["--output.path"], "has no value"),
        (["output.path", "x"], "unexpected argument"),
        (["--captions.path.deeper", "x"], "has no keys"),
    ],
)
def test_a_mistake_is_named(yaml_file: Path, words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said) as raised:
        load_config(yaml_file, words)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{text.__class__}", "plain column names"),
        ("{text[0]}", "plain column names"),
        ("{text!r}", "plain column names"),
        ("{text:{fps}}", "plain column names"),
        ("{fps} only", "does not use"),
        ("{text", "not a format string"),
    ],
)
def test_a_template_cannot_reach_beyond_columns(yaml_file: Path, template: str, said: str) -> None:
    words = ["--captions.recipe.kind", "template", "--captions.recipe.template", template]
    with pytest.raises(InputError, match=said):
        load_config(yaml_file, words)


def test_a_file_is_loaded_safely(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("captions: !!python/object/apply:os.system ['echo no']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_config(path)
    with pytest.raises(InputError, match="cannot read"):
        load_config(tmp_path / "absent.yaml")
    path.write_text("captions: {path: x, text_colum: y}\n")
    with pytest.raises(InputError, match=r"captions.text_colum; did you mean text_column"):
        load_config(path)


def test_help_shows_every_key_with_its_docstring() -> None:
    text = describe_keys()
    for key in ("captions.recipe.fps_max", "encoders.NAME.seq_align", "runtime.device"):
        assert f"--{key} " in text
    blocks = text.split("\n  --")
    assert all("\n" in block.strip("\n") for block in blocks), "a key without a docstring"


@pytest.mark.parametrize("seq_align", [1, 2, 8, 64])
@pytest.mark.parametrize("added_tokens", [0, 1, 1000, 1001])
def test_padded_length_is_the_smallest_that_fits(seq_align: int, added_tokens: int) -> None:
    encoder = EncoderConfig(kind="t5", pretrained="x", max_length=77, seq_align=seq_align)
    length = encoder.padded_length(added_tokens)
    fits = [n for n in range(77, 77 + seq_align) if (n + added_tokens) % seq_align == 0]
    assert [length] == fits


def test_canonical_json_is_one_spelling() -> None:
    assert canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(float("nan"))
