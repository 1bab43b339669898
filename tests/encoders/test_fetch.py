"""`fetch`: a copy is whole or not there, has the fingerprint of its source, and is found again.

That it gives the same bits in every family: test_families.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from jobs import (
    PACKAGE_ROOT,
    clean_environment,
    dataset_bytes,
    edit,
    execute,
    expect,
    run_code,
    write_captions,
    write_job,
)
from safetensors.torch import load_file, save_file

from embed_precompute.encoders import fetch as module
from embed_precompute.encoders import weights

COMMIT = "1234" * 10


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EMBED_PRECOMPUTE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "checkpoints"


def as_pickle(source: Path, target: Path, *, files: int = 1, legacy: bool = False) -> Path:
    """The checkpoint with a decoder, its embedding under three names, as torch.save writes it."""
    shutil.copytree(source, target)
    tensors: dict[str, Any] = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    if "shared.weight" in tensors:
        for part in ("encoder", "decoder"):
            tensors[f"{part}.embed_tokens.weight"] = tensors["shared.weight"]
        tensors["lm_head.weight"] = torch.zeros(7, 7)
        tensors["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(3).t()
    names = sorted(tensors)
    weight_map = {}
    for number in range(files):
        part = {name: tensors[name] for name in names[number::files]}
        file = f"pytorch_model-{number}.bin" if files > 1 else "pytorch_model.bin"
        torch.save(part, target / file, _use_new_zipfile_serialization=not legacy)
        weight_map |= dict.fromkeys(part, file)
    if files > 1:
        index = json.dumps({"weight_map": weight_map})
        (target / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    return target


def fingerprint(job: Path) -> str:
    return expect(0, "plan", job).split("fingerprint ")[1].split()[0]


def test_a_pickle_becomes_a_dataset_of_the_same_bytes(
    tmp_path: Path,
    tiny_t5: Path,
    tiny_clip: Path,
    corpus: list[str],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", corpus[:20])
    (tmp_path / "plain").mkdir()
    (tmp_path / "pickled").mkdir()
    t5, clip = tmp_path / "t5", tmp_path / "clip"
    as_pickle(tiny_t5, t5)
    as_pickle(tiny_clip, clip, legacy=True)
    plain = write_job(tmp_path / "plain", captions, tiny_t5, tiny_clip, dtype="bfloat16")
    job = write_job(tmp_path / "pickled", captions, t5, tiny_clip, dtype="bfloat16")
    override = ["--encoders.clip.pretrained", str(clip)]
    for command in ("plan", "run"):
        said = expect(2, command, job, *override)
        assert said.endswith(f"embed-precompute fetch {job} {' '.join(override)}\n")
    said = expect(0, "fetch", job, *override)
    assert f"t5: converting {t5}" in said
    assert len(list(home.iterdir())) == 2
    with monkeypatch.context() as patch:  # what fetch hashed is not hashed again
        patch.setattr(weights, "_sha256", None)
        expect(0, "plan", job, *override)
    said = expect(0, "fetch", job, *override)
    assert said.count("already there") == 2
    assert "converting" not in said
    expect(0, "run", plain)
    expect(0, "run", job, *override)
    expected, found = (dataset_bytes(tmp_path / name / "out") for name in ("plain", "pickled"))
    assert found == expected
    expect(0, "verify", tmp_path / "pickled" / "out", "--level", "deep")
    shutil.rmtree(t5)  # 44 GB that nobody needs any more
    expect(0, "run", job, *override)


def test_a_snapshot_of_the_hub(
    tmp_path: Path, tiny_t5: Path, corpus: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "hub" / "models--owner--tiny"
    snapshot = as_pickle(tiny_t5, repository / "snapshots" / COMMIT, files=2)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (repository / "blobs").mkdir()
    sha256 = hashlib.sha256((snapshot / "pytorch_model-0.bin").read_bytes()).hexdigest()
    blob = repository / "blobs" / sha256
    (snapshot / "pytorch_model-0.bin").replace(blob)
    (snapshot / "pytorch_model-0.bin").symlink_to(blob)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    captions = write_captions(tmp_path / "captions.parquet", corpus[:20])
    job = write_job(tmp_path, captions, Path("owner/tiny"), None)
    said = expect(2, "plan", job)
    assert "only pickled weights (pytorch_model-0.bin, pytorch" in said
    assert f"No copy that fetch made of it is in {home} (EMBED_PRECOMPUTE_HOME names" in said
    assert "without weights" in expect(0, "plan", job, "--no-weights")
    expect(0, "fetch", job)
    (folder,) = home.iterdir()
    assert folder.name.startswith("tiny-")
    origin = json.loads((folder / "fetched.json").read_bytes())
    assert (origin["pretrained"], origin["revision"]) == ("owner/tiny", "main")
    assert origin["commit"] == COMMIT
    assert origin["sha256"]["pytorch_model-0.bin"] == sha256
    assert len(origin["sha256"]["pytorch_model-1.bin"]) == 64
    edit(job, "encoders.t5", revision="main")
    said = expect(0, "fetch", job, "--output", tmp_path / "copies")
    words = said.split("use them with ")[1].split()
    assert words[-2:] == ["--encoders.t5.revision", "null"]
    expect(0, "plan", job, *words)
    edit(job, "encoders.t5", revision=None)
    shutil.rmtree(tmp_path / "hub")
    found = fingerprint(job)
    assert "without weights" in expect(0, "plan", job, "--no-weights")
    edit(job, "encoders.t5", pretrained=str(tiny_t5))
    assert fingerprint(job) == found
    edit(job, "encoders.t5", pretrained="owner/tiny", revision="another")
    assert "no such folder" in expect(2, "plan", job)


KILLED = """
import os, signal, sys
from embed_precompute.cli.main import main
from embed_precompute.encoders import fetch

left = int(sys.argv[2])
write_at = fetch._write_at

def write(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write_at(*arguments)

fetch._write_at = write
main(["fetch", sys.argv[1]])
"""


def test_killed_in_the_conversion(
    tmp_path: Path, tiny_t5: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing half is found, the next fetch clears up and makes the same bytes, and a living one is
    left alone."""
    captions = write_captions(tmp_path / "captions.parquet", ["a red fox"])
    job = write_job(tmp_path, captions, as_pickle(tiny_t5, tmp_path / "t5", files=2), None)
    expect(0, "fetch", job)
    (undisturbed,) = home.iterdir()
    expected = (undisturbed / "model.safetensors").read_bytes()
    shutil.rmtree(undisturbed)
    words = [sys.executable, "-c", KILLED, str(job), "9"]
    assert subprocess.run(words, env=clean_environment(), check=False).returncode == -9
    (left,) = home.iterdir()
    assert (left / "model.safetensors").stat().st_size == len(expected)
    assert "only pickled weights" in expect(2, "plan", job)
    living = left.with_name(f"{left.name[:-8]}11111111")
    living.mkdir()
    handle = os.open(living, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert "interrupted" in expect(75, "fetch", job)
    assert list(home.iterdir()) == [living]
    expect(0, "fetch", job)
    assert len(list(home.iterdir())) == 2
    assert (undisturbed / "model.safetensors").read_bytes() == expected
    os.close(handle)


def test_a_source_that_changed_is_not_stood_for(
    tmp_path: Path, tiny_t5: Path, corpus: list[str], home: Path
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", corpus[:20])
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    job = write_job(tmp_path, captions, folder, None)
    first = fingerprint(job)
    expect(0, "fetch", job)
    (copy,) = home.iterdir()
    assert fingerprint(job) == first
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed = fingerprint(job)
    assert changed != first
    assert "converting" in expect(0, "fetch", job)
    assert list(home.iterdir()) == [copy]
    assert fingerprint(job) == changed


def test_into_a_folder(tmp_path: Path, tiny_t5: Path, corpus: list[str]) -> None:
    captions = write_captions(tmp_path / "captions.parquet", corpus[:20])
    job = write_job(tmp_path, captions, tiny_t5, None)
    out = tmp_path / "models"
    assert f"--encoders.t5.pretrained {out / 't5'}" in expect(0, "fetch", job, "--output", out)
    assert "already there" in expect(0, "fetch", job, "--output", out)
    said = expect(0, "fetch", job, "--output", out, "--output.path", tmp_path / "here")
    assert "--output.path is where run writes. fetch writes to the cache folder, or" in said
    said = expect(2, "fetch", job, "--output", job)
    assert f"--output {job}: {job} is not a folder. Choose another" in said
    found = fingerprint(job)
    edit(job, "encoders.t5", pretrained=str(out / "t5"))
    assert fingerprint(job) == found
    for damage in (b'{"dtype":"bfloat16"}', b"[]", b"{"):
        (out / "t5" / "fetched.json").write_bytes(damage)
        said = expect(2, "fetch", job, "--output", out)
        assert f"{out / 't5'} exists, and is no copy of" in said


class Malice:
    def __reduce__(self) -> Any:
        return os.mkdir, ("harmed",)


def test_pickles_that_are_not_weights(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = as_pickle(tiny_t5, tmp_path / "t5")
    job = write_job(tmp_path, tmp_path, folder, None)
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    for content, words in (
        (Malice(), "cannot be read as weights"),
        ([1, 2], "holds no table of weights"),
        ({"encoder.x": torch.zeros(2, dtype=torch.complex64)}, "encoder.x in torch.complex64"),
        (whole[: len(whole) // 2], "cannot be read as weights"),
        (b"", "cannot be read as weights"),
    ):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        said = expect(2, "fetch", job)
        assert words in said
        assert said.count("\n") == 1
    assert not Path("harmed").exists()
    path.unlink()
    assert "holds no weights" in expect(2, "fetch", job)


@pytest.mark.parametrize("form", ["pickle", "safetensors"])
def test_a_shard_that_is_missing_or_too_short(form: str, tmp_path: Path, tiny_t5: Path) -> None:
    """The message names the file."""
    folder = as_pickle(tiny_t5, tmp_path / "t5", files=2)
    if form == "safetensors":
        index = json.loads((folder / "pytorch_model.bin.index.json").read_bytes())
        for old in folder.glob("*.bin"):
            tensors = torch.load(old, weights_only=True)
            held = {name: each.clone().contiguous() for name, each in tensors.items()}
            save_file(held, old.with_suffix(".safetensors"))
            old.unlink()
        names = {
            key: name.replace(".bin", ".safetensors") for key, name in index["weight_map"].items()
        }
        (folder / "pytorch_model.bin.index.json").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    job = write_job(tmp_path, tmp_path, folder, None)
    (path,) = folder.glob("pytorch_model-1.*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    said = expect(2, "fetch", job).splitlines()[-1]
    assert f"encoders.t5.pretrained: {path} cannot be read" in said
    path.unlink()
    said = expect(2, "fetch", job).splitlines()[-1]
    assert f"{path} is missing, but the index of {folder} names it" in said
    path.write_bytes(whole)
    expect(0, "fetch", job)


def test_a_checkpoint_that_run_would_refuse(tmp_path: Path, tiny_t5: Path, home: Path) -> None:
    folder = as_pickle(tiny_t5, tmp_path / "t5")
    job = write_job(tmp_path, tmp_path, folder, None)
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    lacking = {key: value for key, value in tensors.items() if key != name}
    for held, words in ((lacking, name), (tensors, "tokenizer")):
        torch.save(held, folder / "pytorch_model.bin")
        if words == "tokenizer":
            (folder / "tokenizer.json").unlink()
        said = expect(2, "fetch", job).splitlines()[-1]
        assert said.startswith("embed-precompute: error: encoders.t5.pretrained")
        assert words in said
        assert str(folder) in said
        assert ".fetch-" not in said
    assert list(home.iterdir()) == []


def test_encoders_of_another_width_are_all_refused_before_any_is_fetched(
    tmp_path: Path, tiny_t5: Path, tiny_clip: Path, home: Path
) -> None:
    job = write_job(tmp_path, tmp_path, tiny_t5, tiny_clip)
    edit(job, "encoders.t5", width=4096)
    said = expect(2, "fetch", job)
    assert f"encoders.t5.width is 4096, and {tiny_t5} makes vectors of 64" in said
    assert not home.exists(), "clip is right, and not converted either"
    edit(job, "encoders.clip", width=768)
    said = expect(2, "fetch", job)
    assert "error: clip, t5 cannot be opened. The first: encoders.clip.width is 768" in said
    edit(job, "encoders.clip", width=None)
    edit(job, "encoders.t5", width=None)
    expect(0, "fetch", job)


def test_too_little_space(
    tmp_path: Path, tiny_t5: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(tmp_path, tmp_path, tiny_t5, None)
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert "1,000 are free" in expect(74, "fetch", job)
    assert list(home.iterdir()) == []


MEASURE = """
import re, sys, threading, time
from pathlib import Path
import torch, transformers
from embed_precompute.cli.main import main

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

peak = before = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)

threading.Thread(target=watch, daemon=True).start()
assert main(["fetch", sys.argv[1]]) == 0
print("grew by", peak - before)
"""


def test_memory_is_a_few_blocks(tmp_path: Path, tiny_t5: Path) -> None:
    """The whole command, once the libraries are imported: the bound in docs/checkpoints.md. Each of
    the two pickles would break it, and so would the copy; weights lie transposed, too."""
    folder, layers = shutil.copytree(tiny_t5, tmp_path / "t5"), 20
    config = json.loads((folder / "config.json").read_bytes())
    config |= {"d_ff": 40_000, "num_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    ones = [name for name in tensors if ".block.1." in name]
    wide = torch.zeros(64, 40_000)
    for layer in range(layers):
        for name in ones:
            shape = {"wi_0": wide.t(), "wi_1": wide.t(), "wo": wide}
            tensor = shape.get(name.split(".")[-2], tensors[name])
            tensors[name.replace(".block.1.", f".block.{layer}.")] = tensor
    weight_map = {}
    for number in range(2):
        names, file = sorted(tensors)[number::2], f"pytorch_model-{number}.bin"
        torch.save({name: tensors[name].clone() for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index, encoding="utf-8")
    job = write_job(tmp_path, tmp_path, folder, None, dtype="bfloat16")
    said = run_code(MEASURE, job)
    assert ": 308.0 MB in bfloat16" in said
    assert int(said.split("grew by ")[1]) < (128 << 20) + (16 << 20) * module.num_threads()


def test_the_command_alone(tmp_path: Path, tiny_t5: Path) -> None:
    """A process of its own, as on a login node: nothing of a run is there."""
    job = write_job(tmp_path, tmp_path, as_pickle(tiny_t5, tmp_path / "t5"), None)
    done = execute("fetch", str(job))
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_a_copy_that_lost_its_weights_is_made_again(
    tmp_path: Path, tiny_clip: Path, home: Path
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", ["a", "b"])
    job = write_job(tmp_path, captions, None, tiny_clip)
    expect(0, "fetch", job)
    (folder,) = home.iterdir()
    (folder / "model.safetensors").unlink()
    assert f"{folder / 'model.safetensors'} is missing" in expect(2, "plan", job)
    assert "converting" in expect(0, "fetch", job)
    (folder / "fetched.json").write_bytes(b"{")
    assert "fetched.json cannot be read. Make it again: embed-prec" in expect(2, "plan", job)
    assert "clip: making it again: " in expect(0, "fetch", job)
    assert "already there" in expect(0, "fetch", job)
    assert f"{captions} is not a folder" in expect(2, "fetch", job, "--output", captions)
    assert "is not a folder" in expect(2, "fetch", job, "--output", captions / "below")


def test_two_fetches_that_publish_at_once(
    tmp_path: Path, tiny_clip: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", ["a", "b"])
    job = write_job(tmp_path, captions, None, tiny_clip)
    rename, meanwhile = os.rename, iter([True])

    def slow(source: Path, target: Path) -> None:
        if not target.name.endswith("-old") and next(meanwhile, False):
            expect(0, "fetch", job)  # another process is faster
        rename(source, target)

    monkeypatch.setattr(module.os, "rename", slow)
    expect(0, "fetch", job)
    assert len(list(home.iterdir())) == 1
    assert "already there" in expect(0, "fetch", job)
    expect(0, "plan", job)


def test_the_benchmark_runs(tmp_path: Path) -> None:
    """On a small checkpoint; docs/checkpoints.md has its figures of a large one."""
    script = PACKAGE_ROOT / "scripts" / "benchmarks" / "fetch.py"
    words = [sys.executable, str(script), "--layers", "2", "--width", "64"]
    done = subprocess.run(
        words, env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "8 captions: largest difference to the pickle's embeddings 0.0\n" in done.stdout
    assert done.stdout.endswith("run again: equal files, 0 left over\n")
