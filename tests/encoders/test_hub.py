"""`fetch` from a hub on loopback with the real client: what is downloaded, pinned, resumed and
refused, and that nothing but `fetch` asks the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from family_case import resolved_of
from hub_server import TOKEN, Hub, serve, sha
from huggingface_hub import constants
from jobs import call, edit, execute, expect, write_captions, write_job
from safetensors.torch import load_file, save_file

from embed_precompute.encoders.hub import download
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.errors import StorageError
from embed_precompute.job import prepare

SMALL = ["config.json", "tokenizer.json", "tokenizer_config.json"]
OTHERS = [
    "README.md",
    "tf_model.h5",
    "flax_model.msgpack",
    "onnx/model.onnx",
    "vae/model.safetensors",
]
WEIGHTS, NEWER = "model.safetensors", "b" * 40


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, which the client in this process asks; the cache folders are empty."""
    monkeypatch.setenv("EMBED_PRECOMPUTE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serve() as hub:
        go_online(monkeypatch, hub.url)
        yield hub
    monkeypatch.undo()
    new_sessions()


def go_online(monkeypatch: pytest.MonkeyPatch, url: str, *, offline: bool = False) -> None:
    """As HF_ENDPOINT and HF_HUB_OFFLINE do, which are read when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for module in (constants, huggingface_hub.file_download):
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    new_sessions()


def new_sessions() -> None:
    """A session of the client before 1.0 knows whether it is offline."""
    if reset := getattr(huggingface_hub.utils, "reset_sessions", None):
        reset()


def published(
    source: Path,
    root: Path,
    inside: str = "",
    *,
    form: str = "safetensors",
    files: int = 1,
    variant: str = "",
    tied: bool = True,
) -> Path:
    """A repository as it is published: the whole model, and what nobody here needs."""
    folder = root / inside
    folder.mkdir(parents=True, exist_ok=True)
    for name in SMALL:
        shutil.copy(source / name, folder / name)
    tensors: dict[str, Any] = load_file(source / "model.safetensors")
    tensors["decoder.final_layer_norm.weight"] = torch.ones(64)
    if not tied:
        for part in ("encoder", "decoder"):
            tensors[f"{part}.embed_tokens.weight"] = tensors["shared.weight"].clone()
        tensors["lm_head.weight"] = torch.zeros(1000, 64)
    if variant:
        tensors = {name: tensor.half() for name, tensor in tensors.items()}
    stem, suffix = ("model", "safetensors") if form == "safetensors" else ("pytorch_model", "bin")
    dot, weight_map = f".{variant}" * bool(variant), {}
    for number in range(files):
        part = {name: tensors[name] for name in sorted(tensors)[number::files]}
        count = f"-{number + 1:05}-of-{files:05}" if files > 1 else ""
        file = f"{stem}{dot}{count}.{suffix}"
        weight_map |= dict.fromkeys(part, file)
        if form == "safetensors":
            save_file(part, folder / file, metadata={"format": "pt"})
        else:
            torch.save(part, folder / file)
    if files > 1:
        index = folder / f"{stem}.{suffix}.index{dot}.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in OTHERS:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"not needed")
    return root


def job_of(tmp_path: Path, pretrained: str = "owner/tiny", **fields: Any) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", ["a red fox", "a frozen lake"])
    return write_job(tmp_path, captions, Path(pretrained), None, **fields)


def encoder(pretrained: Any = "owner/tiny", **fields: Any) -> ResolvedEncoder:
    return resolved_of("t5", pretrained, max_length=24, **fields)


def origin(tmp_path: Path) -> Any:
    (copy,) = (tmp_path / "home" / "checkpoints").iterdir()
    return json.loads((copy / "fetched.json").read_bytes())


# -- what is downloaded ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "files", "tied", "inside"),
    [
        ("safetensors", 1, True, "text_encoder_2"),
        ("safetensors", 3, False, ""),
        ("pickle", 1, False, ""),
        ("pickle", 3, True, "text_encoder_2"),
    ],
)
def test_every_form_is_the_same_encoder_and_nothing_else_is_downloaded(
    form: str, files: int, tied: bool, inside: str, hub: Hub, tmp_path: Path, tiny_t5: Path
) -> None:
    folder = published(tiny_t5, tmp_path / "repo", inside, form=form, files=files, tied=tied)
    if form == "safetensors":  # the same in a pickle, and rounded
        published(tiny_t5, folder, inside, form="pickle", files=2)
        published(tiny_t5, folder, inside, variant="fp16")
    hub.add("owner/tiny", folder)
    name = "/".join(["owner/tiny", inside]).rstrip("/")
    expect(0, "fetch", job_of(tmp_path, name))
    stem = {"safetensors": "model", "pickle": "pytorch_model"}[form]
    wanted = [
        path.relative_to(folder).as_posix()
        for path in (folder / inside).iterdir()
        if path.suffix == ".json"
        or (path.name.startswith((f"{stem}.", f"{stem}-")) and "fp16" not in path.name)
    ]
    assert hub.files() == sorted(wanted)
    found, hub.log[:] = encoder(name), []
    assert found.spec() == encoder(tiny_t5).spec()
    assert found.opened.checkpoint.folder.parent == tmp_path / "home" / "checkpoints"
    assert "already there" in expect(0, "fetch", job_of(tmp_path, name))
    assert hub.files() == []


def test_a_variant_is_taken_where_it_is_alone(hub: Hub, tmp_path: Path, tiny_t5: Path) -> None:
    """Beside full precision it is not even downloaded, see above."""
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "repo", variant="fp16", files=2))
    job = job_of(tmp_path)
    said = expect(0, "fetch", job)
    assert "no other weights than the variant model.fp16-00001-of-00002.safetensors" in said
    plain = shutil.copytree(tiny_t5, tmp_path / "plain")
    halves = {name: each.half() for name, each in load_file(plain / "model.safetensors").items()}
    save_file(halves, plain / "model.safetensors")
    assert encoder().spec() == encoder(plain).spec()
    assert "holds only a variant of the weights (model.fp16" in expect(
        2, "plan", job, "--encoders.t5.pretrained", tmp_path / "repo"
    )


def test_a_variant_in_the_cache_does_not_stand_for_full_precision(
    hub: Hub, tmp_path: Path, tiny_t5: Path
) -> None:
    """As a pipeline in float16 leaves it there."""
    folder = published(tiny_t5, tmp_path / "repo", form="pickle")
    hub.add("owner/tiny", published(tiny_t5, folder, variant="fp16"))
    huggingface_hub.snapshot_download("owner/tiny", allow_patterns=["*.json", "*.fp16.*"])
    hub.log.clear()
    expect(0, "fetch", job_of(tmp_path))
    assert hub.files() == ["pytorch_model.bin"]
    assert encoder().spec() == encoder(tiny_t5).spec()


def pipeline(source: Path, root: Path, *, newer: bool = False) -> Path:
    """A repository with the tokenizer in a folder of its own; `newer`: both are others."""
    folder = published(source, root, "text_encoder")
    (folder / "tokenizer").mkdir()
    for name in SMALL[1:]:
        (folder / "text_encoder" / name).rename(folder / "tokenizer" / name)
    if newer:
        words, weights = folder / "tokenizer/tokenizer.json", folder / "text_encoder" / WEIGHTS
        words.write_text(
            json.dumps(json.loads(words.read_bytes()) | {"normalizer": {"type": "Lowercase"}})
        )
        tensors = load_file(weights)
        tensors["encoder.final_layer_norm.weight"] += 1
        save_file(tensors, weights)
    return folder


def pipeline_job(tmp_path: Path, **fields: Any) -> Path:
    return job_of(tmp_path, "owner/tiny/text_encoder", tokenizer="owner/tiny/tokenizer", **fields)


def fingerprint(job: Path, *words: Any) -> str:
    return expect(0, "plan", job, *words).split("fingerprint ")[1].split()[0]


@pytest.mark.parametrize("tokenizer", ["owner/tiny/tokenizer", "owner/words/tokenizer"])
def test_a_tokenizer_of_the_hub_is_in_the_copy(
    tokenizer: str, hub: Hub, tmp_path: Path, tiny_t5: Path
) -> None:
    """So the download may go, and the copy stays one encoder when the branches move."""
    for name in ("owner/tiny", "owner/words"):
        hub.add(name, pipeline(tiny_t5, tmp_path / name))
    job = job_of(tmp_path, "owner/tiny/text_encoder", tokenizer=tokenizer)
    expect(0, "fetch", job)
    first = fingerprint(job)
    for name in ("owner/tiny", "owner/words"):
        hub.add(name, pipeline(tiny_t5, tmp_path / "new" / name, newer=True), NEWER)
    shutil.rmtree(tmp_path / "cache")
    assert fingerprint(job) == first
    hub.log.clear()
    said = expect(0, "fetch", job)
    assert "already there" in said
    assert f"this copy is of commit {'a' * 40}, and stays" in said
    assert hub.files() == []
    assert fingerprint(job) == first
    assert not (tmp_path / "cache").exists()


def test_one_commit_is_fetched(hub: Hub, tmp_path: Path, tiny_t5: Path) -> None:
    """Of weights and tokenizer, whatever the branch has, in the cache folder and elsewhere."""
    old = pipeline(tiny_t5, tmp_path / "old")
    hub.add("owner/tiny", old)
    hub.add("owner/tiny", pipeline(tiny_t5, tmp_path / "new", newer=True), NEWER)
    job, own = pipeline_job(tmp_path, revision="a" * 40), ["--encoders.t5.revision", "null"]
    expected = fingerprint(
        job,
        *own,
        *("--encoders.t5.pretrained", old / "text_encoder"),
        *("--encoders.t5.tokenizer", old / "tokenizer"),
    )
    expect(0, "fetch", job)  # while nothing of main is here
    assert fingerprint(job) == expected
    expect(0, "fetch", job, *own)
    assert fingerprint(job, *own) != expected
    words = expect(0, "fetch", job, "--output", tmp_path / "o").split("use them with ")[1].split()
    assert fingerprint(job, *words) == expected
    expect(0, "fetch", job, *words)  # a copy of the copy
    assert fingerprint(job, *words) == expected
    assert fingerprint(job) == expected


def test_a_tokenizer_of_the_same_folder(hub: Hub, tmp_path: Path, tiny_t5: Path) -> None:
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "repo"))
    expect(0, "fetch", job_of(tmp_path, tokenizer="owner/tiny"))
    assert encoder(tokenizer="owner/tiny").spec() == encoder(tiny_t5).spec()


def test_a_damaged_copy_is_refused_and_made_again(hub: Hub, tmp_path: Path, tiny_t5: Path) -> None:
    """Of the commit that it was of."""
    hub.add("owner/tiny", pipeline(tiny_t5, tmp_path / "old"))
    job = pipeline_job(tmp_path)
    expect(0, "fetch", job)
    first = fingerprint(job)
    hub.add("owner/tiny", pipeline(tiny_t5, tmp_path / "new", newer=True), NEWER)
    (copy,) = (tmp_path / "home" / "checkpoints").iterdir()

    def files() -> dict[Path, bytes]:
        found = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
        del found[copy / "fetched.json"]  # it has times
        return found

    whole = files()
    weights, words = copy / WEIGHTS, copy / "tokenizer" / "tokenizer_config.json"
    tail = whole[weights][:-40_000] + bytes(40_000)
    for path, content, what in (
        (weights, tail, "has other values than fetch wrote"),
        (weights, whole[weights][:-5000], f"{weights} is not what fetch wrote"),
        (weights, None, f"{weights} is missing"),
        (words, b"{}", f"{words} is not what fetch wrote"),
        (copy / "config.json", None, "config.json is missing"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        for command in ("plan", "run") if content is tail else ("plan",):
            said = expect(2, command, job)
            assert f"encoders.t5.pretrained: the copy of owner/tiny/text_encoder in {copy}" in said
            assert what in said
            assert said.endswith(f"Make it again: embed-precompute fetch {job}\n")
        if content is None:
            shutil.rmtree(tmp_path / "cache")
        said = expect(0, "fetch", job)
        assert "t5: making it again: " in said
        assert files() == whole
    assert fingerprint(job) == first
    assert "already there" in expect(0, "fetch", job)


# -- what is pinned --------------------------------------------------------------------------------


def test_a_branch_that_moves(
    hub: Hub, tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "old"))
    job = job_of(tmp_path)
    assert f"(commit {'a' * 40})" in expect(0, "fetch", job)
    assert (origin(tmp_path)["revision"], origin(tmp_path)["commit"]) == ("main", "a" * 40)
    assert "moved" not in expect(0, "fetch", job)
    first = encoder().weights
    new = published(tiny_t5, tmp_path / "new")
    tensors = load_file(new / "model.safetensors")
    tensors["encoder.final_layer_norm.weight"] += 1
    save_file(tensors, new / "model.safetensors")
    hub.add("owner/tiny", new, NEWER)
    said = expect(0, "fetch", job)
    assert f"main of owner/tiny has moved on the hub: this copy is of commit {'a' * 40}" in said
    assert f"set encoders.t5.revision to {NEWER} and run fetch again" in said
    assert encoder().weights == first
    edit(job, "encoders.t5", revision=NEWER)
    assert "moved" not in expect(0, "fetch", job)
    assert encoder(revision=NEWER).weights not in (first, None)
    assert encoder().weights == first
    # Where the hub cannot be asked the copy is as good.
    go_online(monkeypatch, "http://127.0.0.1:9")
    assert "already there" in expect(0, "fetch", job)


def test_nothing_but_fetch_asks_the_hub(hub: Hub, tmp_path: Path, tiny_t5: Path) -> None:
    """Commands of their own, as a user starts them, with a hub that would answer."""
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "repo", form="pickle"))
    hub.add("owner/words", published(tiny_t5, tmp_path / "words"))
    job = job_of(tmp_path, tokenizer="owner/words")
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "cache")}
    done = execute("run", str(job), env=env)
    assert done.returncode == 2
    assert "nothing of the hub's revision main is on this machine" in done.stderr
    assert hub.log == []
    done = execute("fetch", str(job), env=env)
    assert done.returncode == 0, done.stderr
    assert "commit aaaa" in done.stdout
    assert hub.log != []
    hub.log.clear()
    for words in (("plan", str(job)), ("run", str(job)), ("verify", str(tmp_path / "out"))):
        done = execute(*words, *(["--level", "deep"] if words[0] == "verify" else []), env=env)
        assert done.returncode == 0, done.stderr
    assert hub.log == []


def test_the_first_answer_asks_no_hub(
    hub: Hub, tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no weights, but only --no-weights says that they are not wanted."""
    monkeypatch.setattr(prepare, "QUICK_FROM_ROWS", 1)
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "repo"))
    job = job_of(tmp_path)
    assert expect(2, "plan", job).endswith(f"a network: embed-precompute fetch {job}\n")
    assert hub.log == []
    assert "A first answer" in expect(0, "plan", job, "--no-weights")
    assert hub.files() == SMALL


# -- what breaks -----------------------------------------------------------------------------------


def test_a_connection_that_breaks_is_taken_up_where_it_broke(
    hub: Hub, tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # it is 10 MB
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "repo", form="pickle"))
    hub.breaks["pytorch_model.bin"] = [100_000]
    job = job_of(tmp_path)
    if call("fetch", str(job))[0] != 0:  # huggingface_hub 0.x leaves it to the next start
        expect(0, "fetch", job)
    name = "pytorch_model.bin"
    assert [each for each in hub.files() if name in each] == [name, f"{name} bytes=100000-"]
    assert encoder().spec() == encoder(tiny_t5).spec()


def test_a_download_that_failed_goes_on_with_what_is_missing(
    hub: Hub, tmp_path: Path, tiny_t5: Path
) -> None:
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "repo", files=3))
    damaged, job = "model-00003-of-00003.safetensors", job_of(tmp_path)
    hub.too_long.add(damaged)
    said = expect(2, "fetch", job)
    assert damaged in said
    assert "what is whole is not downloaded again" in said
    assert said.count("\n") == 1
    hub.too_long.clear()
    hub.log.clear()
    expect(0, "fetch", job)
    assert all(name.startswith(damaged) for name in hub.files())
    assert encoder().spec() == encoder(tiny_t5).spec()


@pytest.mark.parametrize("revision", [None, "a" * 40])
@pytest.mark.parametrize("last", SMALL[1:])
def test_a_download_that_failed_among_the_small_files(
    last: str,
    revision: str | None,
    hub: Hub,
    tmp_path: Path,
    tiny_t5: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is there of them could be a tokenizer, but another one."""
    hub.add("owner/tiny", pipeline(tiny_t5, tmp_path / "repo"))
    job, get = pipeline_job(tmp_path, revision=revision), huggingface_hub.hf_hub_download

    def broken(repo_id: str, name: str, **fields: Any) -> str:
        if name.endswith(last):
            raise ConnectionError("broken off")
        return get(repo_id, name, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "hf_hub_download", broken)
        assert "broken off" in expect(2, "fetch", job)
    with monkeypatch.context() as patch:
        go_online(patch, "http://127.0.0.1:9")
        assert "could not be downloaded" in expect(2, "fetch", job)
    new_sessions()
    expect(0, "fetch", job)
    names = {"pretrained": "owner/tiny/text_encoder", "tokenizer": "owner/tiny/tokenizer"}
    assert encoder(**names, revision=revision).spec() == encoder(tiny_t5).spec()
    (copy,) = (tmp_path / "home" / "checkpoints").iterdir()
    assert sorted(path.name for path in (copy / "tokenizer").iterdir()) == SMALL[1:]


def test_small_files_that_are_not_in_the_cache_are_asked_for(
    hub: Hub, tmp_path: Path, tiny_t5: Path
) -> None:
    """Another program left enough of them there to look whole."""
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "repo"))
    huggingface_hub.snapshot_download("owner/tiny", allow_patterns=["tokenizer.json", "config*"])
    hub.log.clear()
    expect(0, "fetch", job_of(tmp_path))
    assert hub.files() == [WEIGHTS, "tokenizer_config.json"]
    assert encoder().spec() == encoder(tiny_t5).spec()


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_a_part_that_is_there_needs_no_space(
    hub: Hub, tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """huggingface_hub 0.36 goes on with it."""
    name = "pytorch_model.bin"
    file = published(tiny_t5, tmp_path / "repo", form="pickle") / name
    hub.add("owner/tiny", tmp_path / "repo")
    blobs = tmp_path / "cache" / "models--owner--tiny" / "blobs"
    blobs.mkdir(parents=True)
    content = file.read_bytes()
    (blobs / f"{sha(file, 'sha256')}.incomplete").write_bytes(content[:-1000])
    for free, code in ((999, 74), (1000, 0)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            if code:
                with pytest.raises(StorageError, match="the download needs 1,000 bytes, 999 are"):
                    download("here", "owner/tiny", None, lambda _: [name])
            else:
                folder = download("here", "owner/tiny", None, lambda _: [name])
    assert (folder / name).read_bytes() == content


def test_a_file_of_the_cache_that_was_damaged(hub: Hub, tmp_path: Path, tiny_t5: Path) -> None:
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "repo"))
    job = job_of(tmp_path)
    expect(0, "fetch", job)
    shutil.rmtree(tmp_path / "home")
    blob = next(tmp_path.glob("cache/*/snapshots/*/model.safetensors")).resolve()
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(content)
    said = expect(2, "fetch", job).splitlines()[-1]
    assert f"Remove {blob}, and run fetch again" in said
    assert list((tmp_path / "home" / "checkpoints").iterdir()) == []
    blob.unlink()
    expect(0, "fetch", job)
    assert encoder().spec() == encoder(tiny_t5).spec()


def test_what_the_hub_does_not_give(
    hub: Hub, tmp_path: Path, tiny_t5: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what to do, before anything large is downloaded."""
    hub.add("owner/tiny", published(tiny_t5, tmp_path / "repo", form="pickle", files=2))
    hub.add("owner/gated", published(tiny_t5, tmp_path / "gated"), gated=True)
    hub.add("owner/clip", shutil.copytree(tiny_clip, tmp_path / "clip"))
    hub.add("owner/lacks", published(tiny_t5, tmp_path / "lacks", files=2))
    (tmp_path / "lacks" / "model-00002-of-00002.safetensors").unlink()
    hub.add("owner/none", published(tiny_t5, tmp_path / "none"))
    (tmp_path / "none" / "model.safetensors").unlink()

    def failure(name: str, code: int = 2, **fields: Any) -> str:
        said = expect(code, "fetch", job_of(tmp_path, name, **fields)).splitlines()
        assert len(said) == 1
        return said[0].removeprefix("embed-precompute: error: encoders.t5.pretrained: ")

    gated = failure("owner/gated")
    assert gated.startswith("the hub's owner/gated is gated, and cannot be read without a token.")
    assert f"licence at {hub.url}/owner/gated, log in as the user who did (hf auth login" in gated
    assert failure("owner/nothing").startswith(
        "the hub's owner/nothing: there is no such repository, or it is private and cannot be read "
        "without a token. Check the name; for a private one log in first (hf auth login, or"
    )
    assert "has no revision 'v9'. Expected a branch" in failure("owner/tiny", revision="v9")
    assert "has no files in 'text_encoder_9'" in failure("owner/tiny/text_encoder_9")
    assert "an encoder of kind t5 takes" in failure("owner/clip")
    lacks = "owner/lacks has no model-00002-of-00002.safetensors, which its index of weights names"
    assert failure("owner/lacks").startswith(lacks)
    assert "holds no weights" in failure("owner/none")
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: free)
        assert "HF_HUB_CACHE to a folder on another disk" in failure("owner/tiny", 74)
    assert not any(name.endswith((".bin", ".safetensors")) for name in hub.files())
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "cannot be read with the token given" in failure("owner/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    expect(0, "fetch", job_of(tmp_path, "owner/gated"))
    shutil.rmtree(tmp_path / "cache")
    go_online(monkeypatch, "http://127.0.0.1:9")
    down = failure("owner/tiny")
    assert "could not be downloaded from http://127.0.0.1:9 (" in down
    assert "Check the network" in down
    go_online(monkeypatch, hub.url, offline=True)
    assert "HF_HUB_OFFLINE forbids to download it" in failure("owner/tiny")
