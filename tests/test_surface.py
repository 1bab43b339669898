"""The surface is frozen: growth of the CLI or the Python names is a decision, not an accident."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from jobs import call, clean_environment, execute, expect

import embed_precompute
from embed_precompute import errors
from embed_precompute.captions import recipes
from embed_precompute.cli.arguments import SECTIONS as SECTION_NAMES
from embed_precompute.cli.main import main
from embed_precompute.config import schema as config
from embed_precompute.encoders import video_buckets
from embed_precompute.encoders.families import FAMILIES, decoder

CONFIG_OPTIONS = {"--help-config", "--print_config", "--print-config"}
COMMANDS = {
    "run": {"--extend", "--limit", "--reuse", *CONFIG_OPTIONS},
    "plan": {
        *("--calibrate", "--epochs", "--extend", "--gpu", "--limit", "--no-weights", "--ranks"),
        *("--rate", "--reuse", "--sample", "--share", "--training-flops", "--write"),
        *CONFIG_OPTIONS,
    },
    "fetch": {"--output", *CONFIG_OPTIONS},
    "bench": {*("--captions", "--json", "--rounds", "--variants"), *CONFIG_OPTIONS},
    "presets": set(),
    "init": {"--output"},
    "doctor": {"--all", "--json"},
    "status": {"--json"},
    "verify": {"--level", "--sample", "--seed", "--device", "--workers"},
    "repair": {"--failed"},
    "finalize": set(),
    "info": {"--all", "--id", "--similar", "--top"},
    "report": {"--output"},
    "export": {
        *("--captions", "--clip", "--format", "--limit", "--pad-masked", "--t5", "--table-only"),
        *("--trainer-dtype", "--workers"),
    },
}
PUBLIC = {
    *("ConditionDropout", "Config", "EmbeddingDataset", "EmbeddingLoader", "HFEmbedder"),
    *(
        "JoinedDataset",
        "collate_embeddings",
        "dropout_condition",
        "load_config",
        "nearest_captions",
        "prepare",
    ),
    *("prepare_ids", "prompt_similarity", "run", "shardformer_t5"),
}
ENCODER = (
    "kind pretrained revision tokenizer reference width max_length text_steps empty dtype "
    "implementation compile tf32"
)
SECTIONS = {
    recipes.CaptionsConfig: "path text_column id_column recipe normalize on_bad_text",
    recipes.PlainRecipe: "kind",
    recipes.TemplateRecipe: "kind template",
    recipes.OpenSoraRecipe: "kind fps_column fps_max fps_format motion_column",
    FAMILIES["t5"].options: f"{ENCODER} attention_mask keep seq_align added_tokens batch_tokens "
    "buckets stream_tokens",
    FAMILIES["clip"].options: f"{ENCODER} outputs hidden_state projection batch_size "
    "buckets stream_tokens",
    FAMILIES["decoder"].options: f"{ENCODER} template chat crop_start keep_first crop_end "
    "layers norm combine layer_zscore project attention_mask padding_side keep batch_tokens "
    "buckets stream_tokens prefix",
    decoder.ChatOptions: "messages generation_prompt thinking",
    decoder.Message: "role content",
    decoder.ProjectOptions: "path weight bias before",
    video_buckets.VideoTokensConfig: "buckets bucket_config time_compression_ratio "
    "spatial_compression_ratio patch_size",
    config.OutputConfig: "path samples_per_shard dtype codec",
    config.RuntimeConfig: "device weights self_check max_failed_samples on_environment_change "
    "plan_timeout_s prefetch_units write_queue_mb progress_interval_s tracker grace_s",
    config.Config: " ".join(SECTION_NAMES),
}
EXIT_CODES = {
    **{"EXIT_COMPLETE": 0, "EXIT_BUG": 1, "EXIT_USAGE": 2, "EXIT_CONFLICT": 3},
    **{"EXIT_VERIFICATION": 4, "EXIT_INCOMPLETE": 5, "EXIT_FAILED_SAMPLES": 6},
    **{"EXIT_IO": 74, "EXIT_INTERRUPTED": 75},
}


def help_of(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main([*words, "--help"])
    assert ended.value.code == 0
    return out.getvalue()


def options_in(help_text: str) -> set[str]:
    own = help_text.split("Any key of the CONFIG")[0]
    words = own.replace(",", " ").replace("[", " ").replace("]", " ").split()
    return {w for w in words if w.startswith("--") and w not in ("--help", "--section.key")}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_options_are_frozen(name: str) -> None:
    assert options_in(help_of(name)) == COMMANDS[name]


def test_commands_are_frozen() -> None:
    block = help_of().split("COMMAND\n")[1].split("\n\n")[0]
    assert {line.split()[0] for line in block.splitlines()} == set(COMMANDS)


def test_public_names_are_frozen_and_importable() -> None:
    assert set(embed_precompute.__all__) == PUBLIC
    assert {name for name in dir(embed_precompute) if not name.startswith("_")} == PUBLIC
    for name in PUBLIC:
        assert getattr(embed_precompute, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Runn'"):
        embed_precompute.Runn  # noqa: B018


@pytest.mark.parametrize("section", SECTIONS)
def test_configuration_keys_are_frozen(section: type) -> None:
    assert [field.name for field in fields(section)] == SECTIONS[section].split()


def test_exit_codes_are_frozen() -> None:
    found = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert found == EXIT_CODES


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import embed_precompute.cli.main as cli; cli.main(['run', '--help'])", "torch numpy"),
        ("import embed_precompute.store.plan, embed_precompute.store.index", "torch"),
        ("import embed_precompute.encoders.resolve", "torch"),
    ],
)
def test_help_and_listings_bring_no_heavy_library(code: str, heavy: str) -> None:
    absent = {*heavy.split(), "transformers", "pyarrow"}
    at_exit = f"lambda: print({absent} & set(sys.modules))"
    code = f"import atexit, sys; atexit.register({at_exit}); {code}"
    out = subprocess.check_output([sys.executable, "-c", code], env=clean_environment(), text=True)
    assert out.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    "name", ["status", "verify", "repair", "finalize", "info", "report", "export"]
)
def test_a_file_in_the_place_of_a_dataset_is_a_mistake(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    more = [str(tmp_path / "out"), "--format", "opensora"] if name == "export" else []
    code, _, said = call(name, str(tmp_path / "file"), *more)
    assert (code, said.split("error: ")[1]) == (
        2, f"{tmp_path / 'file'} is not a folder. Expected the output.path of a run.\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pln x", "there is no command 'pln': did you mean plan? See embed-precompute --help."),
        ("run x --limt 5", "there is no option --limt: did you mean --limit?"),
        ("run x --limit abc", "argument --limit: 'abc' is not a whole number of 1 or more"),
        ("plan x --sample -1", "argument --sample: '-1' is not a whole number of 0 or more"),
        ("verify x --level ful", "argument --level: invalid choice: 'ful' (choose from"),
        ("status x --jsn", "there is no option --jsn: did you mean --json?"),
        ("resume x", "there is no command 'resume': a run that was stopped goes on when the same"),
        ("run x --resume", "there is no option --resume: a run that was stopped goes on when the"),
        (
            "run x --batch_size 8",
            "there is no option --batch_size: it is a key of the CONFIG, --encoders.NAME.batch_si",
        ),
        ("plan x --no_weights --write", "argument --write: not allowed with argument --no-weights"),
        ("info x s1", "unexpected argument 's1': for one sample give --id s1"),
        ("export x y --format hf", "argument --format: invalid choice: 'hf'"),
        ("status x y", "unexpected argument 'y'"),
        ("run", "the following arguments are required: CONFIG"),
    ],
)
def test_a_wrong_word_is_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words.split())
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"embed-precompute: error: {said}")
    assert line.endswith(" --help.")


def test_a_mistake_has_no_traceback() -> None:
    for words in (["run", "absent.yaml"], ["status", "absent"], ["info", "absent"]):
        said = expect(2, *words)
        assert said.startswith("embed-precompute: error:")
        assert "Traceback" not in said
    unknown = execute("status", "absent", "--nope")
    assert unknown.returncode == 2
    assert "--nope" in unknown.stderr
