"""README and docs: their code runs, their commands and keys exist, nothing is out of date."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from jobs import PACKAGE_ROOT, clean_environment, expect
from safetensors.torch import load_file

import configuration_page
from embed_precompute.cli.arguments import command_parser
from embed_precompute.config.files import load_config
from make_demo import demo_captions

DOCS = PACKAGE_ROOT / "docs"
PAGES = [PACKAGE_ROOT / "README.md", PACKAGE_ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
PRESET = Path("configs", "opensora_v2.yaml")
COMMANDS = {
    "python": '[ "$1 $2" = "-m pip" ] && exit\nexec "{python}" "$@"',
    "torchrun": 'exec "{python}" -m torch.distributed.run "$@"',
    "embed-precompute": 'exec "{python}" -m embed_precompute "$@"',
    "pip": "",
}
"""What a virtual environment has after the installation, which tests leave out."""
CHECKS = ("ruff", "mypy", "lint-imports", "zensical")


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of every block of a page; the language of pictures is empty."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    fences = re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)
    assert len(fences) == 2 * len(found), f"{page.name} has a block of another form"
    return found


def commands(page: Path) -> Iterator[list[str]]:
    """Every command of our program on a page, without its name."""
    for language, code in blocks(page):
        lines = code.replace("\\\n", " ").splitlines() if language == "bash" else []
        for line in lines:
            words = shlex.split(line, comments=True)
            name = next((w for w in ("embed-precompute", "embed_precompute") if w in words), None)
            if name is not None:
                yield words[words.index(name) + 1 :]


def write_commands(folder: Path, scripts: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, script in scripts.items():
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script.format(python=sys.executable)}\n", encoding="utf-8")
        path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> Path:
    """Our scripts and configurations, with captions, and the preset with tiny checkpoints."""
    for name in ("scripts", "configs"):
        shutil.copytree(PACKAGE_ROOT / name, tmp_path / name)
    preset = yaml.safe_load((tmp_path / PRESET).read_text(encoding="utf-8"))
    preset["encoders"]["t5"] |= {"pretrained": str(tiny_t5), "max_length": 64, "width": None}
    preset["encoders"]["clip"] |= {"pretrained": str(tiny_clip), "width": None}
    (tmp_path / PRESET).write_text(yaml.safe_dump(preset), encoding="utf-8")
    pq.write_table(demo_captions(20), tmp_path / "captions.parquet")
    write_commands(tmp_path / ".venv" / "bin", COMMANDS)
    return tmp_path


def execute(words: list[str], folder: Path) -> None:
    path = f"{folder / '.venv' / 'bin'}:{os.environ['PATH']}"
    settings = {"ROWS": "200", "DEMO": "demo", "STACK": "current", "PYTEST_ARGS": ""}
    done = subprocess.run(
        words,
        cwd=folder,
        env=clean_environment({"PATH": path, **settings}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


def run_blocks(page: Path, folder: Path, elsewhere: set[str]) -> None:
    """Every block of a page in order: each of bash by itself, then those of Python as one program.

    A block that is `elsewhere` has a test of its own. A block that is neither code nor a picture
    fails.
    """
    python = ""
    for language, code in blocks(page):
        runs = language in ("bash", "python")
        assert runs or "┌" in code, f"{page.name}: no picture, and nobody runs it:\n{code}"
        if language == "python":
            python += code
        elif language == "bash" and code.strip() not in elsewhere:
            execute(["bash", "-euc", code], folder)
    execute([sys.executable, "-c", python], folder)


def test_the_blocks_of_readme_run(checkout: Path, tiny_t5: Path) -> None:
    """With T5 as the hub has it: a pickle."""
    preset = yaml.safe_load((checkout / PRESET).read_text(encoding="utf-8"))
    folder = shutil.copytree(tiny_t5, checkout / "google" / "t5-v1_1-xxl")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    preset["encoders"]["t5"]["pretrained"] = "google/t5-v1_1-xxl"
    (checkout / PRESET).write_text(yaml.safe_dump(preset), encoding="utf-8")
    run_blocks(PACKAGE_ROOT / "README.md", checkout, elsewhere={"scripts/test.sh"})


def test_the_blocks_of_the_training_page_run(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(checkout)
    words = ["run", str(PRESET), "--captions.path", "captions.parquet", "--output.path"]
    for out in ("out", "demo/out"):
        expect(0, *words, out)
    run_blocks(DOCS / "training.md", checkout, elsewhere=set())


def test_the_script_that_tests_runs_every_check(checkout: Path) -> None:
    note = 'echo "$(basename "$0") $*" >> ran'
    write_commands(
        checkout / ".venv-test" / "bin",
        {"python": note, "pip": note, **dict.fromkeys(CHECKS, note)},
    )
    execute(["scripts/test.sh"], checkout)
    ran = (checkout / "ran").read_text(encoding="utf-8")
    for check in (*CHECKS, "ruff format --check", "zensical build --strict", "python -m pytest"):
        assert f"\n{check}" in ran


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_keys_exist(page: Path, tmp_path: Path) -> None:
    for words in commands(page):
        arguments, overrides = command_parser().parse_known_args(words)
        if hasattr(arguments, "config"):
            path = PACKAGE_ROOT / arguments.config
            load_config(path if path.exists() else arguments.config, overrides)
        else:
            assert not overrides, f"{page.name}: {words}"
    for language, code in blocks(page):
        if language == "python":
            compile(code, page.name, "exec")
        elif language == "yaml":
            preset: dict[str, Any] = yaml.safe_load((PACKAGE_ROOT / PRESET).read_text("utf-8"))
            for name, options in yaml.safe_load(code)["encoders"].items():
                preset["encoders"][name] |= options
            (tmp_path / "config.yaml").write_text(yaml.safe_dump(preset), encoding="utf-8")
            load_config(tmp_path / "config.yaml", [])


def test_the_configuration_page_is_fresh() -> None:
    written = configuration_page.PAGE.read_text(encoding="utf-8")
    assert written == configuration_page.page(), "python scripts/configuration_page.py"
    assert "<" not in re.sub("`[^`]*`", "", written), "it would be read as a tag of HTML"


def test_the_architecture_page_names_every_module() -> None:
    words = re.findall(r"`([\w/]+)`", (DOCS / "architecture.md").read_text(encoding="utf-8"))
    package = PACKAGE_ROOT / "embed_precompute"
    files = (path.relative_to(package) for path in package.rglob("*.py"))
    modules = {str(path.with_suffix("")) for path in files if not path.name.startswith("__")}
    folders = {str(Path(module).parent) for module in modules}
    assert modules - set(words) == set(), "not on the page"
    named = {word for word in words if word.split("/")[0] in folders and "/" in word}
    assert named - modules - folders == set(), "on the page, and gone"


def test_the_site_has_every_page() -> None:
    site = yaml.safe_load((PACKAGE_ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = [page for entry in site["nav"] for page in entry.values()]
    assert sorted(listed) == sorted(path.name for path in DOCS.glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """The builder checks those within docs/; README and CONTRIBUTING are not on the site."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target.split("#")[0]).exists() or target.startswith("#"), target
