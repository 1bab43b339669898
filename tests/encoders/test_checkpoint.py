"""Checkpoints: found, named by a digest of their values, and refused with one clear line."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from family_case import copied
from safetensors.torch import load_file, save_file

from embed_precompute.documents import canonical_json, digest_of
from embed_precompute.encoders.checkpoint import locate
from embed_precompute.encoders.families.base import EncoderConfig
from embed_precompute.encoders.families.clip import ClipOptions
from embed_precompute.encoders.families.t5 import T5Options
from embed_precompute.encoders.resolve import open_encoder, resolve
from embed_precompute.errors import InputError
from make_demo import write_t5


def t5(folder: Path, **fields: Any) -> EncoderConfig:
    return T5Options(pretrained=str(folder), max_length=48, **fields)


def failure(options: EncoderConfig) -> str:
    """The one clear line a configuration ends with."""
    with pytest.raises(InputError) as caught:
        open_encoder("enc", options)
    message = str(caught.value)
    assert message.startswith("encoders.enc")
    assert "\n" not in message
    return message


# -- digests ---------------------------------------------------------------------------------------


def identity(folder: Path, **fields: Any) -> tuple[str, str]:
    opened = open_encoder("enc", t5(folder, **fields))
    return str(resolve(opened).weights), opened.tokenizer.digest


def test_digest_ignores_the_folder_and_how_it_was_saved(tmp_path: Path, tiny_t5: Path) -> None:
    noise = {"_name_or_path": "x", "transformers_version": "9", "torch_dtype": "float16"}
    folder = copied(tiny_t5, tmp_path / "renamed", **noise)
    (folder / "README.md").write_text("notes", encoding="utf-8")
    (folder / "model.fp16.safetensors").write_bytes(b"another file transformers does not load")
    assert identity(folder) == identity(tiny_t5)


def test_the_digest_is_the_same_in_every_release(tiny_t5: Path, tiny_clip: Path) -> None:
    """Of transformers, torch and numpy: these stand for checkpoints in other people's plans."""
    clip = resolve(open_encoder("enc", ClipOptions(pretrained=str(tiny_clip), dtype="float16")))
    assert identity(tiny_t5)[0][:16] == "a03ba941455555bd"
    assert str(clip.weights)[:16] == "1afb2621d5834c57"


def test_digest_changes_with_weights_config_and_what_the_tokenizer_does(
    tmp_path: Path, tiny_t5: Path
) -> None:
    weights, tokenizer = identity(tiny_t5)
    short = open_encoder("enc", T5Options(pretrained=str(tiny_t5), max_length=16))
    assert short.tokenizer.digest == tokenizer  # max_length is in the spec by itself
    folder = copied(tiny_t5, tmp_path / "config", layer_norm_epsilon=1e-5)
    assert identity(folder)[0] != weights
    copied(folder, folder, "tokenizer.json", normalizer=None)
    assert identity(folder)[1] != tokenizer
    folder = shutil.copytree(tiny_t5, tmp_path / "weights")
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert identity(folder)[0] != weights
    assert identity(folder)[1] == tokenizer


def test_hashes_are_remembered_until_the_file_changes(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged or unwritable cache only costs time."""
    home = tmp_path / "home"
    monkeypatch.setenv("EMBED_PRECOMPUTE_HOME", str(home))
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    path = folder / "model.safetensors"
    first = identity(folder)
    (entry,) = (home / "weights").iterdir()
    sound = entry.read_bytes()
    for damage in (b"", b"[]", b'{"digest":1,"sha256":"zz"}', b"\xff", sound.replace(b"a", b"b")):
        entry.write_bytes(damage)
        assert identity(folder) == first
        assert entry.read_bytes() == sound
    assert identity(folder, dtype="float32") != first  # other values, so another entry
    known = {name: "f" * 64 for name in json.loads(sound)["sha256"]}
    entry.write_bytes(canonical_json({"sha256": known, "digest": digest_of(known)}))
    marked = identity(folder)
    assert marked != first  # not read again
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert identity(link) == marked  # the same real path
    os.utime(path, ns=(1, 1))
    assert identity(folder) == first
    moved = tmp_path / "moved"
    shutil.copy2(path, moved)
    os.replace(moved, path)  # same path, size and mtime; another inode
    entries = set(entry.parent.iterdir())
    assert identity(folder) == first
    assert len(set(entry.parent.iterdir()) - entries) == 1
    content, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # as `rsync --inplace --times` does
    os.utime(path, ns=times)  # same path, size, mtime and inode
    assert identity(folder) != first
    path.write_bytes(content)
    monkeypatch.setenv("EMBED_PRECOMPUTE_HOME", str(path))  # a file
    assert identity(folder) == first


def test_damaged_weights(tmp_path: Path, tiny_t5: Path) -> None:
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for damage in (content[:-100], content[:7], b"", content[:8] + b"}" + content[9:]):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"model\.safetensors cannot be read") as caught:
            identity(folder)
        assert "\n" not in str(caught.value)
        assert str(caught.value).startswith("encoders.enc.pretrained: ")


def test_two_values_of_one_weight(tmp_path: Path, tiny_t5: Path) -> None:
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    tensors = load_file(folder / "model.safetensors")
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert identity(folder) == identity(tiny_t5)
    tensors["encoder.embed_tokens.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"has shared\.weight with other values than"):
        identity(folder)


# -- where it is -----------------------------------------------------------------------------------


def test_hub_id_comes_from_the_cache(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    for path in tiny_t5.iterdir():
        shutil.copy(path, snapshot)
    sha256 = "0" * 64
    (snapshot / "model.safetensors").replace(repository / "blobs" / sha256)
    (snapshot / "model.safetensors").symlink_to(repository / "blobs" / sha256)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"revision": "main"}
    assert open_encoder("enc", t5(Path("owner/tiny"), **options)).checkpoint.folder == snapshot
    assert identity(Path("owner/tiny"), **options) == identity(tiny_t5)


def test_a_folder_of_a_hub_repository(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pipelines have them: the weights in one folder, the tokenizer in another."""
    repository = tmp_path / "models--owner--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder, files in (("enc", ("config.json", "model.safetensors")), ("tok", ("t*.json",))):
        (snapshot / folder).mkdir(parents=True)
        for path in (path for name in files for path in tiny_t5.glob(name)):
            shutil.copy(path, snapshot / folder)
    (repository / "refs").mkdir()
    (repository / "refs" / "old").write_text("0" * 40, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fields = {"tokenizer": "owner/tiny/tok", "revision": "old"}  # of the tokenizer too
    opened = open_encoder("enc", t5(Path("owner/tiny/enc"), **fields))
    assert (opened.checkpoint.folder, opened.tokenizer_folder) == (
        snapshot / "enc",
        snapshot / "tok",
    )
    assert identity(Path("owner/tiny/enc"), **fields) == identity(tiny_t5)
    assert locate("here", "owner/tiny/enc", "old", "tensors") == snapshot / "enc"
    assert "owner/tiny/nowhere" in failure(t5(Path("owner/tiny/nowhere"), revision="old"))


def test_the_width_that_a_preset_states(tiny_t5: Path) -> None:
    (output,) = resolve(open_encoder("enc", t5(tiny_t5))).outputs
    assert resolve(open_encoder("enc", t5(tiny_t5, width=output.width))).outputs == (output,)
    with pytest.raises(InputError, match=r"^encoders\.enc\.width is 7, and .* vectors of 64: it"):
        resolve(open_encoder("enc", t5(tiny_t5, width=7)))


def test_what_is_no_checkpoint(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    message = failure(t5(Path("/no/such/folder")))
    assert "'/no/such/folder': there is no such folder, and it is not a hub id" in message
    assert "no such folder" in failure(t5(Path("nobody/no-such-model")))
    assert "only a hub id has revisions" in failure(t5(tiny_t5, revision="main"))
    assert "is a file" in failure(t5(tiny_t5 / "model.safetensors"))
    assert "has no config.json" in failure(t5(tmp_path))
    for content in (b"{", b"[]", b"\xff\xfe"):
        (tmp_path / "config.json").write_bytes(content)
        assert "config.json" in failure(t5(tmp_path))
    assert "'clip_text_model': an encoder of kind t5 takes t5, mt5, umt5" in failure(t5(tiny_clip))
    assert "model_type 't5'" in failure(ClipOptions(pretrained=str(tiny_t5)))
    assert "cannot read" in failure(t5(copied(tiny_t5, tmp_path / "t5", feed_forward_proj=3)))


def test_pickles_are_never_loaded(tmp_path: Path, tiny_t5: Path) -> None:
    folder = shutil.copytree(tiny_t5, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in failure(t5(folder))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = failure(t5(folder))
    assert "only pickled weights (pytorch_model.bin)" in message
    assert message.endswith("embed-precompute fetch CONFIG")


def test_tokenizer_of_another_model(tiny_t5: Path, tmp_path: Path, corpus: list[str]) -> None:
    larger = write_t5(tmp_path / "larger", corpus, vocab_size=1200)
    message = failure(t5(tiny_t5, tokenizer=str(larger)))
    assert message.startswith("encoders.enc.tokenizer")
    assert "ids up to 1199" in message
    assert "1000 embeddings" in message
