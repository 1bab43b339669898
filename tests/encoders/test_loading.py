"""Loading: the memory it takes in any dtype, damaged weights, and a device that is too small.

That the weights are those that transformers loads: test_families.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_case import copied, encode, encoder_of, resolved_of
from jobs import PACKAGE_ROOT, run_code
from safetensors.torch import load_file, save_file

from embed_precompute.encoders import loading, weights
from embed_precompute.encoders.checkpoint import open_checkpoint
from embed_precompute.encoders.encoder import forward_bytes
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.loading import Source, load_model, load_on, loaded_bytes
from embed_precompute.errors import InputError

MIB = 1 << 20
RUNTIME = 48 * MIB
"""Beside the weights and a tenth of them: blocks of files, and what transformers itself takes."""


def source_of(folder: Path, kind: str = "t5") -> Source:
    family = FAMILIES[kind]
    options = family.options(kind=kind, pretrained=str(folder))
    return Source(open_checkpoint("here", str(folder), None, kind, family.models), family, options)


def failure(folder: Path, kind: str = "t5") -> str:
    """The one clear line that loading ends with."""
    with pytest.raises(InputError) as caught:
        encoder_of(kind, folder, implementation="hf")
    message = str(caught.value)
    assert message.startswith("encoders.enc.pretrained")
    assert "\n" not in message
    return message


def edit_weights(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shift(folder: Path, place: int) -> None:
    """Let the weights begin `place` bytes behind a multiple of 64."""
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length] + b" " * ((place - 8 - length) % 64)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from test_loading import source_of
from embed_precompute.encoders.loading import load_model, num_bytes

def of_process(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+)", text)[1]) * 1024

source = source_of(Path(sys.argv[1]))
source.model_class  # imported when first named
dtype = getattr(torch, sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
before, anonymous = of_process("VmRSS"), of_process("RssAnon")
model = load_model(source, dtype)
weights = num_bytes(model)
total = sum(float(p.view(-1)[::256].float().sum()) for p in model.parameters())  # every page
print(json.dumps([weights, of_process("VmHWM") - before, of_process("RssAnon") - anonymous]))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of 135 MB with its decoder, in float32."""
    config = transformers.T5Config(
        vocab_size=8000, d_model=768, d_ff=2048, num_layers=4, num_heads=12,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    tied = [name for name in shapes if name.endswith("embed_tokens.weight")]
    folder = tmp_path_factory.mktemp("large")
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items() if name not in tied}
    save_file(zeros, folder / "model.safetensors", {"format": "pt"})
    shift(folder, 0)
    config.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_the_weights_and_a_tenth(large: Path, dtype: str) -> None:
    paths = [Path(__file__).parent, PACKAGE_ROOT / "tests", PACKAGE_ROOT / "scripts"]
    weights, peak, anonymous = json.loads(run_code(MEASURE, large, dtype, paths=paths))
    assert weights == loaded_bytes(source_of(large), getattr(torch, dtype))
    assert peak <= 1.1 * weights + RUNTIME, f"{peak / weights:.2f} times the weights"
    if dtype == "float32":  # as in the file: pages that all processes of the node share
        assert anonymous <= RUNTIME


# --- several files, many blocks -------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("kind", "dtype"), [("t5", torch.float32), ("t5", torch.float16), ("clip", torch.bfloat16)]
)
def test_cast_block_by_block_from_several_files(
    tiny_t5: Path, tiny_clip: Path, tmp_path: Path, monkeypatch: Any, kind: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(weights, "BLOCK_NUMBERS", 1000)  # many blocks to a tensor
    whole = tiny_t5 if kind == "t5" else tiny_clip
    folder = sharded(shutil.copytree(whole, tmp_path / "sharded"))
    expected = dict(load_model(source_of(whole, kind), dtype).named_parameters())
    for name, parameter in load_model(source_of(folder, kind), dtype).named_parameters():
        assert torch.equal(parameter, expected[name]), name
    (folder / "model-2.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-2\.safetensors is missing"):
        source_of(folder, kind)


@pytest.mark.parametrize(("kind", "dtype"), [("t5", "float32"), ("clip", "float32")])
def test_where_a_file_has_its_weights_changes_no_bit(
    tiny_t5: Path, tiny_clip: Path, tmp_path: Path, kind: str, dtype: str
) -> None:
    """Products are summed in another order where a matrix lies otherwise in memory."""
    folder = shutil.copytree(tiny_t5 if kind == "t5" else tiny_clip, tmp_path / "copy")
    texts, found = ["a red fox", "two children wait beside a frozen lake"], []
    for place in (0, 8, 36):
        shift(folder, place)
        encoder = encoder_of(kind, folder, dtype=dtype)
        assert all(each.data_ptr() % 64 == 0 for each in encoder.model.parameters())
        found.append(torch.cat([each.flatten() for each in encode(encoder, texts)[""]]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_float8_weights_are_cast(tmp_path: Path, tiny_t5: Path) -> None:
    folder = shutil.copytree(tiny_t5, tmp_path / "float8")
    float8 = torch.float8_e4m3fn
    edit_weights(folder, lambda each: each.update({n: t.to(float8) for n, t in each.items()}))
    loaded = dict(load_model(source_of(folder), torch.bfloat16).named_parameters())
    for name, parameter in load_model(source_of(tiny_t5), torch.bfloat16).named_parameters():
        assert loaded[name].dtype == parameter.dtype, name
        assert torch.allclose(loaded[name].float(), parameter.float(), rtol=0.07, atol=0.01), name


# --- damage ---------------------------------------------------------------------------------------


def test_the_shared_embedding_under_either_name(tmp_path: Path, tiny_t5: Path) -> None:
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    name = "encoder.embed_tokens.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: tensors.pop("shared.weight")}))
    expected, found = (encode(encoder_of("t5", f), ["a red fox"])[""][0] for f in (tiny_t5, folder))
    assert torch.equal(found, expected)
    edit_weights(folder, lambda tensors: tensors.pop(name))
    assert "shared.weight" in failure(folder)


def test_weights_of_another_config(tmp_path: Path, tiny_t5: Path) -> None:
    for field, value, words in (
        ("num_layers", 3, ["encoder.block.2.layer.0", "lacks weights"]),
        ("num_layers", 1, ["encoder.block.1", "does not know"]),
        ("d_ff", 96, ["wi_0", "other shapes"]),
    ):
        message = failure(copied(tiny_t5, tmp_path / f"{field}-{value}", **{field: value}))
        assert all(word in message for word in words)


def test_weights_that_transformers_does_not_read(tiny_t5: Path) -> None:
    """As transformers 5.0 does with the shared embedding of Wan's umT5."""
    resolved = resolved_of("t5", tiny_t5)
    source = Source(resolved.opened.checkpoint, resolved.family, resolved.options)
    found = {"mismatched_keys": [], "missing_keys": ["encoder.embed_tokens.weight"]}
    with pytest.raises(InputError, match=r"does not read: encoder\.embed_tokens.* another release"):
        loading._check_loading(source, {**found, "unexpected_keys": ["shared.weight"]})


def test_truncated_weights(tmp_path: Path, tiny_t5: Path) -> None:
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    for dtype in ("float32", "bfloat16"):  # mapped, and cast block by block
        with pytest.raises(InputError, match=r"cannot be read .* Copy or download"):
            encoder_of("t5", folder, dtype=dtype)


# --- a whole model --------------------------------------------------------------------------------


def full_t5(tensors: dict[str, Any]) -> None:
    """What a whole T5 has besides its encoder."""
    width = tensors["shared.weight"].shape[1]
    for name in ("layer.1.EncDecAttention.q", "layer.0.SelfAttention.q"):
        tensors[f"decoder.block.0.{name}.weight"] = torch.zeros(width, width)
    tensors["lm_head.weight"] = torch.zeros_like(tensors["shared.weight"])
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()


def full_clip(folder: Path) -> None:
    """What a whole CLIP of OpenAI has besides its text encoder."""

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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_encoder_of_a_whole_model_loads_in_silence(
    tmp_path: Path, tiny_t5: Path, tiny_clip: Path, capfd: pytest.CaptureFixture[str], dtype: str
) -> None:
    whole_t5 = shutil.copytree(tiny_t5, tmp_path / "t5")
    whole_clip = shutil.copytree(tiny_clip, tmp_path / "clip")
    edit_weights(whole_t5, full_t5)
    full_clip(whole_clip)
    capfd.readouterr()
    for kind, part, whole in (("t5", tiny_t5, whole_t5), ("clip", tiny_clip, whole_clip)):
        encoders = [encoder_of(kind, folder, dtype=dtype) for folder in (part, whole)]
        expected, found = (encode(encoder, ["a red fox"])[""][0] for encoder in encoders)
        assert torch.equal(found, expected)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_a_damaged_whole_clip_is_not_silent(tmp_path: Path, tiny_clip: Path) -> None:
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    full_clip(folder)
    name = "text_model.encoder.layers.1.mlp.fc1.weight"
    edit_weights(folder, lambda tensors: tensors.pop(name))
    message = failure(folder, "clip")
    assert "lacks weights" in message
    assert "encoder.layers.1.mlp.fc1.weight" in message
    text_config = json.loads((folder / "config.json").read_bytes())["text_config"]
    copied(folder, folder, text_config={**text_config, "num_hidden_layers": 1})
    assert "does not know" in failure(folder, "clip")


# --- a device that is too small -------------------------------------------------------------------


def test_what_does_not_fit_on_a_gpu(
    tiny_t5: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """hf leaves the rest in host memory, by accelerate; our own layers cannot."""
    source, gpu = source_of(tiny_t5), torch.device("cuda:1")
    size = loaded_bytes(source, torch.float32)
    asked: list[dict[str, Any]] = []

    def load(source: Source, dtype: torch.dtype, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return torch.nn.Identity()

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(torch.nn.Identity, "to", lambda self, device: self)
    for free, may_split in ((size + 1000, True), (size, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, free))
        load_on(source, torch.float32, gpu, forward_bytes=1000, may_split=may_split)
    assert asked == [{"device_map": {"": "cuda:1"}}] * 2
    with pytest.raises(InputError, match=r"do not fit on cuda:1.*the implementation hf"):
        load_on(source, torch.float64, gpu, forward_bytes=0, may_split=False)
    with caplog.at_level(logging.WARNING):
        load_on(source, torch.float32, gpu, forward_bytes=size // 2, may_split=True)
    assert asked[2:] == [{"device_map": "auto", "max_memory": {1: size - size // 2, "cpu": size}}]
    assert "stays in host memory" in caplog.text


def test_the_estimate_of_a_forward(tiny_t5: Path) -> None:
    """Everything a forward of one layer holds, and no less."""
    config = transformers.T5Config.from_pretrained(str(tiny_t5))
    estimates = {}
    for implementation in ("fused", "hf"):
        resolved = resolved_of("t5", tiny_t5, max_length=32, implementation=implementation)
        estimates[implementation] = forward_bytes(resolved)
    lines, length = resolved.decision.shapes[0]
    inner = config.num_heads * config.d_kv
    held = lines * length * (config.d_model + 3 * inner + 2 * config.d_ff) * 4
    assert held < estimates["fused"] - (1 << 29) < 3 * held
    scores = 4 * lines * config.num_heads * length**2
    assert estimates["hf"] == estimates["fused"] + 2 * scores
