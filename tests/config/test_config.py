"""Configuration: YAML, overrides, what is said of mistakes, and the help made from dataclasses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jobs import call

from embed_precompute.captions.recipes import OpenSoraRecipe, PlainRecipe, TemplateRecipe, as_one
from embed_precompute.cli.main import main
from embed_precompute.config import keys
from embed_precompute.config.files import load_config, to_yaml
from embed_precompute.config.schema import Config
from embed_precompute.encoders.families.clip import ClipOptions
from embed_precompute.errors import InputError

CONFIGS = Path(__file__).parents[2] / "configs"
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


def mistake(path: Path, *words: str) -> str:
    """What is said, in one line."""
    with pytest.raises(InputError) as raised:
        load_config(path, words)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_defaults_and_file(yaml_file: Path) -> None:
    config = load_config(yaml_file)
    assert isinstance(config, Config)
    assert config.captions.recipe == PlainRecipe()
    assert config.encoders["t5"].max_length == 512
    assert config.encoders["clip"] == ClipOptions(pretrained="models/clip", buckets=(16, 32))
    assert config.output.samples_per_shard == "auto"


def test_overrides_win_in_both_spellings(yaml_file: Path) -> None:
    words = ["--encoders.t5.max-length", "64", "--output.samples_per_shard=7"]
    words += ["--captions.normalize", "[nfc]", "--runtime.grace_s", "5"]
    words += ["--encoders.t5.compile=true", "--encoders.x.pretrained=y", "--encoders.x.kind=clip"]
    config = load_config(yaml_file, words)
    assert (config.encoders["t5"].max_length, config.encoders["t5"].compile) == (64, True)
    assert config.output.samples_per_shard == 7
    assert config.captions.normalize == ("nfc",)
    assert config.runtime.grace_s == 5.0
    assert list(config.encoders) == ["t5", "clip", "x"]
    replaced = load_config(yaml_file, ["--encoders", "{x: {kind: clip, pretrained: y}}"])
    assert list(replaced.encoders) == ["x"]


@pytest.mark.parametrize("text", ["5", "true", "a: b", "[x", "null", ""])
def test_text_stays_text_where_text_is_wanted(yaml_file: Path, text: str) -> None:
    words = ["--captions.text_column", text, "--captions.id_column", text]
    captions = load_config(yaml_file, words).captions
    assert captions.text_column == text
    assert captions.id_column == (None if text in ("null", "") else text)  # where it is allowed


def test_recipes(yaml_file: Path) -> None:
    words = ["--captions.recipe.fps_max", "24", "--captions.recipe.kind", "opensora"]
    assert load_config(yaml_file, words).captions.recipe == OpenSoraRecipe(fps_max=24)
    several = ["--captions.recipe", "[{kind: template, template: 'a {text}'}, {kind: opensora}]"]
    recipes = load_config(yaml_file, several).captions.recipe
    assert recipes == (TemplateRecipe(template="a {text}"), OpenSoraRecipe())
    yaml_file.write_text(YAML.replace("parquet}", "parquet, recipe: {kind: opensora, fps_max: 9}}"))
    assert load_config(yaml_file).captions.recipe == OpenSoraRecipe(fps_max=9)
    replaced = load_config(yaml_file, ["--captions.recipe", "{kind: none}"])
    assert replaced.captions.recipe == PlainRecipe()
    said = mistake(yaml_file, "--captions.recipe.kind", "none")
    assert said == (
        "--captions.recipe.kind: there is no key captions.recipe.fps_max: expected kind. To choose "
        "another kind, give all its keys: --captions.recipe '{kind: ..., ...}'."
    )


def test_yaml_round_trip(yaml_file: Path, tmp_path: Path) -> None:
    for words in (
        [],
        ["--captions.recipe={kind: opensora, motion_column: null}", "--captions.normalize=[nfc]"],
        ["--captions.recipe", "[{kind: none}, {kind: template, template: '{text}: é'}]"],
        ["--encoders.t5.added_tokens", "{buckets: [[1, 256, 256]]}", "--output.path", "1e3"],
    ):
        config = load_config(yaml_file, words)
        again = tmp_path / "again.yaml"
        again.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(again) == config


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--encoders.t5.max_lenth 3", "did you mean max_length?"),
        ("--captions.textcolumn x", "no key captions.textcolumn: did you mean text_column?"),
        ("--outptu.path x", "--outptu.path: there is no key outptu: did you mean output?"),
        (
            "--output out2",
            "has keys of its own: expected --output.path out2.",
        ),
        ("--encoders.t5.max_length abc", "--encoders.t5.max_length is 'abc': expected a whole num"),
        ("--encoders.t5.max_length -1", "max_length is -1: expected 1 or more"),
        ("--encoders.t5.kind llama", "--encoders.t5.kind is 'llama': expected t5 or clip"),
        ("--encoders.t5.kind T5", "--encoders.t5.kind is 'T5': did you mean t5? Expected t5 or cl"),
        ("--encoders.T5.max_length 64", "encoders has no T5: did you mean t5? Expected t5 or clip"),
        ("--encoders.t6.max_length 64", "encoders has no t6: expected t5 or clip."),
        ("--encoders.t5.buckets [16]", "attention_mask padding"),
        ("--encoders.t5.added_tokens {bukets: 1}", "no key encoders.t5.added_tokens.bukets: did"),
        ("--encoders {t5_xxh3: {kind: t5, pretrained: x}}", "Choose another name"),
        ("--captions.path ", "--captions.path is empty: expected a file"),
        ("--captions.recipe.fps_max 8", "--captions.recipe.fps_max: captions.recipe.kind is miss"),
        ("--captions.recipe none", "is 'none': expected a mapping with a kind, such as '{kind: n"),
        ("--captions.recipe x", "--captions.recipe is 'x': expected a mapping with a kind or a l"),
        ("--encoders.t5.max_length null", "max_length is null: expected a whole number"),
        ("--encoders.t5.max_length true", "max_length is true: expected a whole number"),
        ("--captions.recipe [{kind: opensora, fps_mx: 1}]", "key captions.recipe[0].fps_mx: did"),
        ("--captions.recipe {kind: opensora, fps_max: 0}", "--captions.recipe.fps_max is 0: expec"),
        ("--captions.recipe []", "--captions.recipe is an empty list"),
        ("--captions.normalize [nfc", "'[nfc' is not valid YAML"),
        ("--captions.on_bad_text Fail", "--captions.on_bad_text is 'Fail': did you mean fail?"),
        ("--captions.path.deeper x", "captions.path has no keys of its own"),
        ("--output.samples_per_shard 0", "--output.samples_per_shard is 0: expected 1 or more"),
        ("--runtime.device tpu", "--runtime.device is 'tpu': expected auto, cpu, cuda"),
        ("--runtime.grace_s -1", "--runtime.grace_s is -1.0: expected 0 to"),
        ("--output.path", "--output.path has no value"),
        ("--output.path --captions.path", "--output.path has no value"),
        ("output.path x", "unexpected argument 'output.path'"),
    ],
)
def test_a_mistake_on_the_command_line_is_named(yaml_file: Path, words: str, said: str) -> None:
    found = mistake(yaml_file, *words.split(" ", 1))
    assert said in found
    assert str(yaml_file) not in found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("path: captions", "pth: captions"), "there is no key captions.pth: did you mean path?"),
        (("{path: captions.parquet}", "{}"), "captions.path is missing"),
        (("kind: t5, ", ""), "encoders.t5.kind is missing"),
        (("models/t5", "5"), "encoders.t5.pretrained is 5: expected text"),
        (("[16, 32]", "[16, x]"), "encoders.clip.buckets[1] is 'x': expected a whole number"),
        (("[16, 32]", "[99]"), "buckets has 99: expected 1 to max_length"),
        (("encoders:", "encoder:"), "there is no key encoder: did you mean encoders?"),
        (("parquet}", "parquet, recipe: {kind: none, template: x}}"), "captions.recipe.template"),
        (("parquet}", "parquet, recipe: {kind: template}, recipe: 3}"), "captions.recipe is 3"),
        (("captions: {path: captions.parquet}", "captions: [1"), "is not valid YAML"),
        (("captions:", "captions: !!python/object/apply:os.system"), "is not valid YAML"),
        ((YAML, "- a"), "holds list: expected the keys captions, encoders, output, runtime"),
    ],
)
def test_a_mistake_in_the_file_is_named(
    yaml_file: Path, change: tuple[str, str], said: str
) -> None:
    """Also where the command line gives another, sound key."""
    yaml_file.write_text(YAML.replace(*change))
    for words in ([], ["--output.path", "x"], ["--encoders.t5.seq_align", "2"]):
        found = mistake(yaml_file, *words)
        assert found.startswith(str(yaml_file)), found
        assert said in found


def test_a_mistake_of_both_together_names_what_was_given(yaml_file: Path) -> None:
    words = ["--encoders.t5.pretrained", "x", "--encoders.t5.kind", "llama"]
    assert mistake(yaml_file, *words).startswith("--encoders.t5.kind is 'llama': expected t5 or")
    words = ["--encoders.clip.max_length", "20", "--output.path", "x"]
    said = mistake(yaml_file, *words)
    assert said.startswith("--encoders.clip.max_length is 20, and buckets has 32")
    words = ["--encoders.t5.max_length", "5000"]
    assert load_config(yaml_file, words).encoders["t5"].max_length == 5000  # there are no streams
    said = mistake(yaml_file, *words, "--encoders.t5.attention_mask", "padding")
    assert said.startswith("--encoders.t5.max_length: encoders.t5.stream_tokens is 4096: expected")
    yaml_file.write_text(YAML.replace("[16, 32]", "3"))
    said = mistake(yaml_file, "--captions.recipe.kind", "none", "--captions.recipe.template", "x")
    assert said.startswith("--captions.recipe.template: there is no key captions.recipe.template")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("absent.yaml", "cannot read the configuration"),
        ("google/t5", "No such file or directory. Expected a YAML file with the keys captions, "),
        ("a.CSV", "a.CSV is a caption table: expected a YAML file"),
        ("a.parquet", "a.parquet."),
        ("out", "out/config.yaml?"),
        (".", "is a folder: expected a YAML file"),
    ],
)
def test_a_file_that_cannot_be_read(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.yaml").touch()
    found = mistake(tmp_path / name)
    assert said in found
    assert str(tmp_path / name) in found
    assert ("--captions.path" in found) == name.startswith("a.")


# --- help --------------------------------------------------------------------------------------


def test_every_key_has_a_docstring_a_type_and_a_default() -> None:
    """Keys of all kinds stand first; then those of one kind, and those whose default is another."""
    listed = {key.name: key for group in keys.key_groups() for key in group.keys}
    assert {"captions.recipe.fps_max", "encoders.NAME.seq_align", "runtime.device"} <= set(listed)
    assert all(key.doc and key.type and key.default for key in listed.values())
    text, page = keys.describe_keys(), keys.markdown()
    for name in listed:
        assert f"  --{name}  (" in text
        assert f"| `{name}` |" in page
    assert "captions.recipe, kind opensora: Open-Sora v2's own" in text
    groups = {g.name: {key.name: key.default for key in g.keys} for g in keys.key_groups()}
    kind, length = "encoders.NAME.kind", "encoders.NAME.max_length"
    assert groups["encoders.NAME"][kind] == "required"
    assert groups["encoders.NAME, kind t5"][length] == "default 512"
    assert groups["encoders.NAME, kind clip"][length] == "default 77"
    for name in ("t5", "clip"):
        own = groups[f"encoders.NAME, kind {name}"]
        assert kind not in own
        assert "encoders.NAME.pretrained" not in own


@pytest.mark.parametrize("command", ["run", "plan", "bench"])
def test_help_fits_two_screens_and_the_keys_have_their_own(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for option, most in (("--help", 48), ("--help-config", 1000)):
        with pytest.raises(SystemExit, match=r"^0$"):
            main([command, option])
        out = capsys.readouterr().out
        assert len(out.splitlines()) <= most
        assert ("--captions.text_column" in out) == (option == "--help-config")


def test_print_config_is_a_configuration(yaml_file: Path) -> None:
    words = ["--output.path", "elsewhere"]
    wanted = load_config(yaml_file, words)
    code, out, _ = call("run", str(yaml_file), "--print_config", *words)
    assert code == 0
    yaml_file.write_text(out)
    assert load_config(yaml_file) == wanted


@pytest.mark.parametrize("name", ["demo", "opensora_v2"])
def test_presets_load(name: str) -> None:
    """With the text that Open-Sora v2 trains on: its image.py has fps_max=24 and vmaf=True."""
    config = load_config(CONFIGS / f"{name}.yaml")
    assert set(config.encoders) == {"t5", "clip"}
    motion = "score_vmafmotion"
    assert config.captions.recipe == OpenSoraRecipe(fps_max=24, motion_column=motion)
    readme = (CONFIGS.parent / "README.md").read_text()
    assert f"the columns `fps` and\n`{motion}`" in readme
    plain = re.search(r"`(--captions.*null)`", readme)
    assert plain is not None
    recipe = load_config(CONFIGS / f"{name}.yaml", plain[1].split()).captions.recipe
    assert recipe == OpenSoraRecipe(fps_max=24, fps_column=None)
    assert as_one(recipe).columns == ()
