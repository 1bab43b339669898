"""Small jobs for tests: a caption table, tiny encoders, a configuration, and runs of it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from embed_precompute.cli.main import main

PACKAGE_ROOT = Path(__file__).resolve().parents[1]


def write_captions(path: Path, texts: Sequence[str | None], row_group_size: int = 7) -> Path:
    """A caption parquet with string ids `s0`, `s1`, ..."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {"id": [f"s{i}" for i in range(len(texts))], "text": pa.array(texts, pa.string())}
    )
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


def write_job(
    folder: Path,
    captions: Path,
    t5: Path | None,
    clip: Path | None,
    *,
    samples_per_shard: int = 10,
    implementation: str = "auto",
    **t5_fields: Any,
) -> Path:
    """A YAML configuration over tiny encoders: short lengths, few captions in a batch."""
    encoders: dict[str, Any] = {}
    if t5 is not None:
        encoders["t5"] = {
            "kind": "t5",
            "pretrained": str(t5),
            "max_length": 24,
            "dtype": "float32",
            "batch_tokens": 96,
            "implementation": implementation,
            **t5_fields,
        }
    if clip is not None:
        encoders["clip"] = {
            "kind": "clip",
            "pretrained": str(clip),
            "dtype": "float32",
            "batch_size": 4,
            "implementation": implementation,
        }
    config = {
        "captions": {"path": str(captions)},
        "encoders": encoders,
        "output": {
            "path": str(folder / "out"),
            "samples_per_shard": samples_per_shard,
            "dtype": "float32",
        },
        "runtime": {"device": "cpu"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def edit(job: Path, section: str, **fields: Any) -> None:
    """Set fields of a section of a job's configuration, `a.b` for a nested one."""
    loaded = yaml.safe_load(job.read_text())
    owner = loaded
    for part in section.split("."):
        owner = owner.setdefault(part, {})
    owner.update(fields)
    job.write_text(yaml.safe_dump(loaded))


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without a launcher's variables, so that a child starts alone."""
    launchers = ("SLURM_", "TORCHELASTIC_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launchers)}
    path = os.pathsep.join([str(PACKAGE_ROOT), kept.get("PYTHONPATH", "")])
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(extra or {})}


def command(*words: str, nproc: int = 0, torchrun: Sequence[str] = ()) -> list[str]:
    """`embed-precompute WORDS`, alone or under torchrun with `nproc` processes."""
    if nproc == 0:
        return [sys.executable, "-m", "embed_precompute", *words]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={nproc}", *torchrun, "-m", "embed_precompute", *words]


def execute(
    *words: str, nproc: int = 0, env: Mapping[str, str] | None = None, timeout: float = 1800.0
) -> subprocess.CompletedProcess[str]:
    """Run a command of the program to its end."""
    process = subprocess.Popen(
        command(*words, nproc=nproc),
        env=clean_environment(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def run_code(code: str, *arguments: object, paths: Sequence[Path] = ()) -> str:
    """What Python code prints in a process of its own, which must end well."""
    environment = clean_environment()
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), environment["PYTHONPATH"]])
    words = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def call(*words: str) -> tuple[int, str, str]:
    """A command in this process, which spares a start: (exit code, stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return code, out.getvalue(), err.getvalue()


def expect(code: int, *words: object) -> str:
    """A command in this process that has to end with `code`: what it said."""
    found, out, err = call(*map(str, words))
    assert found == code, out + err
    return out + err


def dataset_bytes(root: Path) -> dict[str, bytes]:
    """Every file under the digests, by relative path: what must not depend on how a job ran."""
    provenance = {"config.yaml", "run.json", "README.md", "report.html"}
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in provenance and "logs" not in path.parts
    }
