"""Encoders: bitwise invariance, shapes, digests, tokenizer, and every bad checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from embed_precompute.documents import canonical_json
from embed_precompute.encoders.batching import make_batches
from embed_precompute.encoders.digests import file_sha256
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.encoders.resolve import build, resolve
from embed_precompute.encoders.spec import ResolvedEncoder, TextEncoder
from embed_precompute.encoders.tokenizer import PROBES, CaptionTokenizer
from embed_precompute.errors import InputError, InternalError
from make_demo import write_clip, write_t5

if TYPE_CHECKING:
    from conftest import Encode

Edit = Callable[[dict[str, Any]], object]


def t5(folder: Path, **fields: Any) -> EncoderConfig:
    settings: dict[str, Any] = {"max_length": 48, "dtype": "float32", "batch_tokens": 192}
    settings["implementation"] = "hf"
    return EncoderConfig("t5", str(folder), **{**settings, **fields})


def clip(folder: Path, **fields: Any) -> EncoderConfig:
    settings: dict[str, Any] = {"dtype": "float32", "batch_size": 4, "implementation": "hf"}
    return EncoderConfig("clip", str(folder), **{**settings, **fields})


def copied(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


def edit_json(path: Path, edit: Edit) -> None:
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_weights(folder: Path, edit: Edit) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def failure(config: EncoderConfig, load: bool = False) -> str:
    """The one clear line a config ends with; with `load`, only when the model is loaded."""
    if load:
        resolved = resolve("enc", config)
        with pytest.raises(InputError) as caught:
            build(resolved, "cpu", "float32")
    else:
        with pytest.raises(InputError) as caught:
            resolve("enc", config)
    message = str(caught.value)
    assert message.startswith("encoders.enc")
    assert "\n" not in message
    return message


# -- bitwise a function of the caption ---------------------------------------------------------


def encoder_of(
    mode: str, dtype: Any, tiny_t5: Path, tiny_umt5: Path, tiny_clip: Path
) -> TextEncoder:
    configs = {
        "padded": t5(tiny_t5, dtype=dtype, seq_align=64),
        "masked": t5(tiny_t5, dtype=dtype, attention_mask="padding", buckets=(16, 32)),
        "umt5": t5(tiny_umt5, dtype=dtype, attention_mask="padding", buckets=(16,)),
        "clip": clip(tiny_clip, dtype=dtype),
    }
    return build(resolve("enc", configs[mode]), "cpu", dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["padded", "masked", "umt5", "clip"])
def test_neighbours_order_and_row_change_no_bit(
    encode: Encode,
    corpus: list[str],
    tiny_t5: Path,
    tiny_umt5: Path,
    tiny_clip: Path,
    mode: str,
    dtype: str,
) -> None:
    encoder = encoder_of(mode, dtype, tiny_t5, tiny_umt5, tiny_clip)
    texts = ["", *corpus[:20], "a red fox", "x"]
    together = encode(encoder, texts)
    backwards = encode(encoder, texts[::-1])[::-1]
    shifted = encode(encoder, ["something else entirely", *texts])[1:]
    for row, text in enumerate(texts):
        alone = encode(encoder, [text])[0]
        for other in (backwards[row], shifted[row], alone):
            assert torch.equal(together[row], other), text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_without_any_pad_is_no_special_case(
    encode: Encode, corpus: list[str], tiny_t5: Path, dtype: Any
) -> None:
    """transformers 5 drops a mask that masks nothing; then neighbours would choose the kernel."""
    config = t5(tiny_t5, attention_mask="padding", max_length=16, batch_tokens=64, dtype=dtype)
    encoder: Any = build(resolve("enc", config), "cpu", "float32")
    full = [text for text in corpus if len(text) > 200][:4]
    assert {len(ids) for ids in encoder.resolved.tokenizer.encode(full).ids} == {16}
    masks: list[torch.Tensor] = []
    model = encoder._model
    encoder._model = Recorder(model, masks)
    together = encode(encoder, full)
    for text, row in zip(full, together, strict=True):
        assert torch.equal(row, encode(encoder, [text])[0])
    assert len({(mask.shape, mask.dtype) for mask in masks}) == 1
    assert masks[0].ndim == (4 if int(transformers.__version__.split(".")[0]) >= 5 else 2)


class Recorder:
    """A model that keeps the masks it is given."""

    def __init__(self, model: Any, masks: list[torch.Tensor]) -> None:
        self._model, self._masks = model, masks

    def __call__(self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        self._masks.append(attention_mask)
        return self._model(input_ids=input_ids, attention_mask=attention_mask)


def test_padded_t5_and_clip_run_without_a_mask(
    encode: Encode, tiny_t5: Path, tiny_clip: Path
) -> None:
    for config in (t5(tiny_t5), clip(tiny_clip)):
        masks: list[Any] = []
        encoder: Any = build(resolve("enc", config), "cpu", "float32")
        encoder._model = Recorder(encoder._model, masks)
        encode(encoder, ["a red fox", "", "x"])
        assert masks
        assert all(mask is None for mask in masks)


# -- shapes and spec ---------------------------------------------------------------------------


def test_padded_shapes(tiny_t5: Path) -> None:
    resolved = resolve("enc", t5(tiny_t5, seq_align=64, added_tokens=1000))
    assert resolved.padded_length == 88  # 1000 + 88 = 17 * 64
    assert resolved.shapes == ((2, 88),)
    assert resolved.null_shape == (3, 64)
    assert resolve("enc", t5(tiny_t5, batch_tokens=10)).shapes == ((1, 48),)


def test_padded_length_comes_from_the_captions_when_a_column_rules_it(tiny_t5: Path) -> None:
    config = t5(tiny_t5, seq_align=8, added_tokens="video_tokens")
    assert resolve("enc", config, padded_length=55).shapes == ((3, 55),)
    with pytest.raises(InternalError, match="video_tokens"):
        resolve("enc", config)


def test_bucket_shapes(tiny_t5: Path, tiny_clip: Path) -> None:
    masked = resolve("enc", t5(tiny_t5, attention_mask="padding", batch_tokens=64))
    assert masked.shapes == ((4, 16), (2, 32), (1, 48))
    assert masked.null_shape == (4, 16)
    assert masked.padded_length is None
    pooled = resolve("enc", clip(tiny_clip))
    assert pooled.shapes == ((4, 16), (4, 32), (4, 48), (4, 64), (4, 77))
    assert pooled.pooled


@pytest.mark.parametrize("mode", ["padded", "masked", "clip"])
def test_every_forward_has_a_shape_of_the_spec(
    corpus: list[str], tiny_t5: Path, tiny_umt5: Path, tiny_clip: Path, mode: str
) -> None:
    encoder = encoder_of(mode, "float32", tiny_t5, tiny_umt5, tiny_clip)
    resolved = encoder.resolved
    ids = resolved.tokenizer.encode(corpus).ids
    spec = resolved.spec()
    batches = make_batches(
        ids, resolved.shapes, resolved.tokenizer.pad_id, resolved.tokenizer.filler
    )
    used = {batch.input_ids.shape for batch in batches}
    assert used <= {tuple(shape) for shape in spec["shapes"]}
    assert len(used) == len(resolved.shapes)
    odd = next(
        make_batches([resolved.tokenizer.filler], ((5, 7),), resolved.tokenizer.pad_id, ids[0][:1])
    )
    with pytest.raises(InternalError, match="expected"):
        encoder.encode(odd)


def test_null_embedding_runs_in_its_own_shape(tiny_t5: Path) -> None:
    resolved = resolve("enc", t5(tiny_t5, seq_align=64, added_tokens=1000))
    encoder = build(resolved, "cpu", "bfloat16")
    filler = resolved.tokenizer.filler
    shapes = (resolved.null_shape,)
    batch = next(make_batches([filler], shapes, resolved.tokenizer.pad_id, filler))
    output = encoder.encode(batch)
    assert output.shape == (3, 64, 64)
    assert output.dtype == torch.bfloat16
    assert output.is_contiguous()
    assert not output.requires_grad


def test_spec_is_json_and_complete(tiny_t5: Path) -> None:
    spec = resolve("enc", t5(tiny_t5)).spec()
    assert json.loads(canonical_json(spec)) == spec
    assert spec == {
        "kind": "t5",
        "model_type": "t5",
        "weights": spec["weights"],
        "tokenizer": spec["tokenizer"],
        "pad_token_id": 0,
        "max_length": 48,
        "attention_mask": "none",
        "seq_align": 1,
        "added_tokens": 0,
        "dtype": "float32",
        "shapes": [[4, 48]],
        "null_shape": [4, 48],
        "padded_length": 48,
        "outputs": [{"suffix": "", "per": "token", "width": 64, "positions": "all"}],
        "implementation": "hf",
        "compiled": False,
        "tf32": False,
    }
    assert len(spec["weights"]) == len(spec["tokenizer"]) == 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype_is_kept_as_asked(encode: Encode, tiny_t5: Path, tiny_clip: Path, dtype: Any) -> None:
    masked = t5(tiny_t5, dtype=dtype, attention_mask="padding")
    for config in (t5(tiny_t5, dtype=dtype), masked, clip(tiny_clip, dtype=dtype)):
        encoder: Any = build(resolve("enc", config), "cpu", dtype)
        expected = {getattr(torch, dtype)}
        if dtype == "float16" and config.kind == "t5":
            expected.add(torch.float32)  # wo
        assert {p.dtype for p in encoder._model.parameters()} == expected
        output = encode(encoder, ["x"])[0]
        assert output.dtype == getattr(torch, dtype)
        assert output.isfinite().all()


# -- tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "max_length"), [("t5", 512), ("t5", 20), ("clip", 77)])
def test_ids_are_the_fast_tokenizers(
    corpus: list[str], tiny_t5: Path, tiny_clip: Path, kind: str, max_length: int
) -> None:
    folder = tiny_t5 if kind == "t5" else tiny_clip
    ours = CaptionTokenizer("encoders.enc", folder, max_length)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    assert reference.is_fast
    texts = [*corpus, *PROBES]
    tokenized = ours.encode(texts)
    for text, ids, truncated, num_tokens in zip(
        texts, tokenized.ids, tokenized.truncated, tokenized.num_tokens, strict=True
    ):
        whole = reference(text)["input_ids"]
        assert ids.tolist() == reference(text, truncation=True, max_length=max_length)["input_ids"]
        assert truncated == (len(whole) > max_length)
        assert num_tokens == len(ids) <= max_length
        assert ids[-1] == ours.eos_id
    assert any(tokenized.truncated)
    assert ours.filler.tolist() == reference("")["input_ids"]
    assert (ours.pad_id, ours.eos_id) == (reference.pad_token_id, reference.eos_token_id)


def test_unknown_tokens_are_counted(tiny_t5: Path, tiny_clip: Path) -> None:
    texts = ["a red fox", "\u0416 a \u0416", ""]
    assert CaptionTokenizer("e", tiny_t5, 64).encode(texts).num_unknown == [0, 2, 0]
    # CLIP's unknown token is its end token: one per caption is the end, not unknown.
    assert CaptionTokenizer("e", tiny_clip, 64).encode(texts).num_unknown == [0, 0, 0]


def test_no_captions_have_no_tokens(tiny_t5: Path) -> None:
    assert CaptionTokenizer("e", tiny_t5, 64).encode([]).ids == []


def test_tokenizer_from_another_folder(tmp_path: Path, tiny_t5: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_t5 / name, folder)
    bare = copied(tiny_t5, tmp_path / "bare")
    for path in bare.glob("tokenizer*"):
        path.unlink()
    assert "encoders.enc.pretrained" in failure(t5(bare))
    spec = resolve("enc", t5(bare, tokenizer=str(folder))).spec()
    assert spec == resolve("enc", t5(tiny_t5)).spec()
    message = failure(t5(bare, tokenizer=str(tmp_path / "nowhere")))
    assert message.startswith("encoders.enc.tokenizer")


def test_slow_only_tokenizer_is_refused(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "slow")
    (folder / "tokenizer.json").unlink()
    config = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert "only a slow tokenizer (ByT5Tokenizer)" in failure(t5(folder))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda c: c.update(padding_side="left"), "pads on the left"),
        (lambda c: c.pop("pad_token"), "no pad_token"),
    ],
)
def test_unfit_tokenizer_config(tmp_path: Path, tiny_t5: Path, edit: Edit, words: str) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    edit_json(folder / "tokenizer_config.json", edit)
    assert words in failure(t5(folder))


def test_damaged_tokenizer(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    (folder / "tokenizer.json").write_bytes(b'{"version"')
    assert "gives no tokenizer" in failure(t5(folder))


def test_max_length_must_hold_the_empty_caption(tiny_clip: Path) -> None:
    assert "max_length 1 leaves no room" in failure(clip(tiny_clip, max_length=1))
    assert "buckets has 1:" in failure(clip(tiny_clip, buckets=(1, 16)))


def test_tokenizer_of_another_model(tiny_t5: Path, tmp_path: Path, corpus: list[str]) -> None:
    larger = write_t5(tmp_path / "larger", corpus, vocab_size=1200)
    message = failure(t5(tiny_t5, tokenizer=str(larger)))
    assert "ids up to 1199" in message
    assert "1000 embeddings" in message


# -- digests -----------------------------------------------------------------------------------


def identity(folder: Path) -> tuple[str, str]:
    resolved = resolve("enc", t5(folder))
    return resolved.weights, resolved.tokenizer.digest


def test_digest_ignores_the_folder_and_how_it_was_saved(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "renamed")
    (folder / "README.md").write_text("notes", encoding="utf-8")
    (folder / "model.fp16.safetensors").write_bytes(b"another file transformers does not load")
    noise = {"_name_or_path": "x", "transformers_version": "9", "torch_dtype": "float16"}
    edit_json(folder / "config.json", lambda c: c.update(noise))
    assert identity(folder) == identity(tiny_t5)


def test_digest_changes_with_one_byte_of_the_weights(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    weights, tokenizer = identity(folder)
    assert weights != identity(tiny_t5)[0]
    assert tokenizer == identity(tiny_t5)[1]


def test_digest_changes_with_the_config(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    edit_json(folder / "config.json", lambda c: c.update(layer_norm_epsilon=1e-5))
    assert identity(folder)[0] != identity(tiny_t5)[0]


def test_digest_changes_with_what_the_tokenizer_does(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    edit_json(folder / "tokenizer.json", lambda t: t.update(normalizer=None))
    weights, tokenizer = identity(folder)
    assert weights == identity(tiny_t5)[0]
    assert tokenizer != identity(tiny_t5)[1]
    short = resolve("enc", t5(tiny_t5, max_length=16))
    assert short.tokenizer.digest == identity(tiny_t5)[1]  # max_length is in the spec by itself


def test_file_digest_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    first = file_sha256(path)
    (entry,) = (cache / "embed_precompute" / "sha256").iterdir()
    marked = json.loads(entry.read_bytes()) | {"sha256": "f" * 64}
    entry.write_bytes(canonical_json(marked))
    assert file_sha256(path) == "f" * 64
    link = tmp_path / "link"
    link.symlink_to(path)
    assert file_sha256(link) == "f" * 64  # the same real path
    os.utime(path, ns=(1, 1))
    assert file_sha256(path) == first
    moved = tmp_path / "moved"
    shutil.copy2(path, moved)
    os.replace(moved, path)  # same path, size and mtime; another inode
    entries = set(entry.parent.iterdir())
    assert file_sha256(path) == first
    assert len(set(entry.parent.iterdir()) - entries) == 1


def test_a_damaged_or_unwritable_cache_only_costs_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    digest = file_sha256(path)
    (entry,) = (tmp_path / "cache" / "embed_precompute" / "sha256").iterdir()
    for damage in (b"", b"[]", b'{"file":1,"sha256":"zz"}', b"\xff"):
        entry.write_bytes(damage)
        assert file_sha256(path) == digest
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_sha256(path) == digest


# -- checkpoints -------------------------------------------------------------------------------


def test_missing_folder() -> None:
    message = failure(t5(Path("/no/such/folder")))
    assert "'/no/such/folder'" in message
    assert "no such folder" in message
    assert "hub id" in message


def test_hub_id_that_is_not_cached_while_offline() -> None:
    message = failure(EncoderConfig("t5", "nobody/no-such-model"))
    assert "'nobody/no-such-model'" in message
    assert "no such folder" in message


def test_hub_id_comes_from_the_cache_and_blobs_are_not_hashed_again(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "models--owner--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    for path in tiny_t5.iterdir():
        shutil.copy(path, snapshot)
    sha256 = file_sha256(tiny_t5 / "model.safetensors")
    (snapshot / "model.safetensors").replace(repository / "blobs" / sha256)
    (snapshot / "model.safetensors").symlink_to(repository / "blobs" / sha256)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = EncoderConfig("t5", "owner/tiny", revision="main", max_length=48)
    resolved = resolve("enc", config)
    assert resolved.folder == snapshot
    assert resolved.weights == identity(tiny_t5)[0]
    assert file_sha256(snapshot / "model.safetensors") == sha256
    (repository / "blobs" / sha256).write_bytes(b"changed")
    assert file_sha256(snapshot / "model.safetensors") == sha256


def test_revision_is_only_for_the_hub(tiny_t5: Path) -> None:
    assert "only a hub id has revisions" in failure(t5(tiny_t5, revision="main"))


def test_file_instead_of_folder(tiny_t5: Path) -> None:
    assert "is a file" in failure(t5(tiny_t5 / "model.safetensors"))


def test_folder_without_config(tmp_path: Path) -> None:
    assert "has no config.json" in failure(t5(tmp_path))


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_damaged_config(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    assert "config.json" in failure(t5(tmp_path))


def test_other_kind_of_model(tiny_t5: Path, tiny_clip: Path) -> None:
    message = failure(t5(tiny_clip))
    assert "'clip_text_model'" in message
    assert "t5, mt5, umt5" in message
    assert "model_type 't5'" in failure(clip(tiny_t5))


def test_pickle_only(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "pickled")
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in failure(t5(folder))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = failure(t5(folder))
    assert "only pickled weights (pytorch_model.bin)" in message
    assert "T5EncoderModel" in message
    assert "save_pretrained" in message


def sharded(folder: Path) -> Path:
    """The checkpoint in two files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


def test_sharded_checkpoint(encode: Encode, tmp_path: Path, tiny_t5: Path) -> None:
    folder = sharded(copied(tiny_t5, tmp_path / "t5"))
    encoders = [build(resolve("enc", t5(f)), "cpu", "float32") for f in (tiny_t5, folder)]
    whole, parts = (encode(encoder, ["a red fox"])[0] for encoder in encoders)
    assert torch.equal(whole, parts)
    (folder / "model-2.safetensors").unlink()
    assert "model-2.safetensors is missing" in failure(t5(folder))


def test_missing_weights_are_named(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    edit_weights(folder, lambda tensors: tensors.pop(name))
    message = failure(t5(folder), load=True)
    assert name in message
    assert "lacks weights" in message


def test_shared_embedding_under_either_name(encode: Encode, tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    name = "encoder.embed_tokens.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors.pop("shared.weight")}))
    encoders = [build(resolve("enc", t5(f)), "cpu", "float32") for f in (tiny_t5, folder)]
    expected, found = (encode(encoder, ["a red fox"])[0] for encoder in encoders)
    assert torch.equal(found, expected)
    edit_weights(folder, lambda tensors: tensors.pop(name))
    assert "shared.weight" in failure(t5(folder), load=True)


def test_weights_of_layers_the_config_does_not_have(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    edit_json(folder / "config.json", lambda c: c.update(num_layers=1))
    message = failure(t5(folder), load=True)
    assert "encoder.block.1" in message
    assert "does not know" in message


def test_weights_of_another_shape(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    edit_json(folder / "config.json", lambda c: c.update(d_ff=96))
    message = failure(t5(folder), load=True)
    assert "wi_0" in message
    assert "other shapes" in message


def test_truncated_weights(tmp_path: Path, tiny_t5: Path) -> None:
    folder = copied(tiny_t5, tmp_path / "t5")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be loaded" in failure(t5(folder), load=True)


def full_t5(tensors: dict[str, Any]) -> None:
    """What a whole T5 has beside its encoder."""
    width = tensors["shared.weight"].shape[1]
    for name in ("layer.1.EncDecAttention.q", "layer.0.SelfAttention.q"):
        tensors[f"decoder.block.0.{name}.weight"] = torch.zeros(width, width)
    tensors["lm_head.weight"] = torch.zeros_like(tensors["shared.weight"])
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()


def full_clip(folder: Path) -> None:
    """What a whole CLIP of OpenAI has beside its text encoder."""

    def edit(tensors: dict[str, Any]) -> None:
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
        tensors["vision_model.embeddings.class_embedding"] = torch.zeros(32)
        tensors["visual_projection.weight"] = torch.zeros(32, 32)
        tensors["text_projection.weight"] = torch.zeros(64, 64)
        tensors["logit_scale"] = torch.zeros(())

    edit_weights(folder, edit)
    text_config = json.loads((folder / "config.json").read_bytes())
    vision_config = {"model_type": "clip_vision_model", "hidden_size": 48}
    config = {"model_type": "clip", "text_config": text_config, "vision_config": vision_config}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def test_encoder_of_a_whole_model_loads_in_silence(
    encode: Encode,
    tmp_path: Path,
    tiny_t5: Path,
    tiny_clip: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole_t5 = copied(tiny_t5, tmp_path / "t5")
    edit_weights(whole_t5, full_t5)
    whole_clip = copied(tiny_clip, tmp_path / "clip")
    full_clip(whole_clip)
    for part, whole in ((t5(tiny_t5), t5(whole_t5)), (clip(tiny_clip), clip(whole_clip))):
        expected = encode(build(resolve("enc", part), "cpu", "float32"), ["a red fox"])[0]
        found = encode(build(resolve("enc", whole), "cpu", "float32"), ["a red fox"])[0]
        assert torch.equal(found, expected)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_damaged_whole_clip_is_not_silent(tmp_path: Path, tiny_clip: Path) -> None:
    folder = copied(tiny_clip, tmp_path / "clip")
    full_clip(folder)
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    edit_weights(folder, lambda tensors: tensors.pop(name))
    message = failure(clip(folder), load=True)
    assert "lacks weights" in message
    assert "encoder.layers.1.mlp.fc1.weight" in message
    edit_json(folder / "config.json", lambda c: c["text_config"].update(num_hidden_layers=1))
    assert "does not know" in failure(clip(folder), load=True)


# -- CLIP's end token --------------------------------------------------------------------------


def test_clip_must_pool_at_the_tokenizers_end_token(tmp_path: Path, tiny_clip: Path) -> None:
    folder = copied(tiny_clip, tmp_path / "clip")
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=7))
    message = failure(clip(folder))
    assert "ends captions with id" in message
    assert "pools at eos_token_id, 7" in message


def test_clip_with_the_old_rule_needs_the_highest_id(tmp_path: Path, corpus: list[str]) -> None:
    folder = write_clip(tmp_path / "clip", corpus, eos_rule="argmax")
    resolve("enc", clip(folder))

    def add_token(tokenizer: dict[str, Any]) -> None:
        highest = max(token["id"] for token in tokenizer["added_tokens"])
        tokenizer["added_tokens"].append(
            {**tokenizer["added_tokens"][0], "id": highest + 1, "content": "<sks>"}
        )

    edit_json(folder / "tokenizer.json", add_token)
    edit_json(folder / "config.json", lambda c: c.update(vocab_size=2000))
    assert "highest id" in failure(clip(folder))


def test_clip_max_length_within_its_positions(tiny_clip: Path) -> None:
    message = failure(clip(tiny_clip, max_length=78))
    assert message.startswith("encoders.enc.max_length is 78")
    assert "77 positions" in message


# -- the rest ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind", "field"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "t5", "batch_tokens is 192"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't"), "clip", "batch_size is 4"),
    ],
)
def test_out_of_memory_names_the_setting(
    encode: Encode, tiny_t5: Path, tiny_clip: Path, error: Exception, kind: str, field: str
) -> None:
    config = t5(tiny_t5) if kind == "t5" else clip(tiny_clip)
    encoder: Any = build(resolve("enc", config), "cpu", "float32")

    def explode(**inputs: Any) -> Any:
        raise error

    encoder._model = explode
    with pytest.raises(InputError, match=f"encoders.enc.{field}"):
        encode(encoder, ["x"])


def test_other_runtime_errors_stay_what_they_are(encode: Encode, tiny_t5: Path) -> None:
    encoder: Any = build(resolve("enc", t5(tiny_t5)), "cpu", "float32")

    def explode(**inputs: Any) -> Any:
        raise RuntimeError("a bug")

    encoder._model = explode
    with pytest.raises(RuntimeError, match="a bug"):
        encode(encoder, ["x"])


def test_importing_encoders_is_light() -> None:
    code = (
        "import sys, embed_precompute.encoders; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["padded", "masked", "clip"])
def test_cuda_is_bitwise_and_near_the_cpu(
    encode: Encode,
    corpus: list[str],
    tiny_t5: Path,
    tiny_umt5: Path,
    tiny_clip: Path,
    mode: str,
) -> None:
    on_cpu = encoder_of(mode, "float32", tiny_t5, tiny_umt5, tiny_clip)
    resolved: ResolvedEncoder = on_cpu.resolved
    on_cuda = build(resolved, "cuda", "float32")
    texts = ["", *corpus[:12]]
    together, backwards = encode(on_cuda, texts), encode(on_cuda, texts[::-1])[::-1]
    for ours, other, reference in zip(together, backwards, encode(on_cpu, texts), strict=True):
        assert torch.equal(ours, other)
        assert ((ours - reference).abs().max() / reference.abs().max()) < 1e-4
