"""Loading: what it takes of memory, in whatever dtype; layers that do not fit on a device."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jobs import PACKAGE_ROOT, call, clean_environment, dataset_bytes, write_captions, write_job
from safetensors.torch import load_file, save_file

from embed_precompute.encoders import hf, offload
from embed_precompute.encoders.hf import load_checkpoint
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.encoders.resolve import build, resolve
from embed_precompute.encoders.spec import TextEncoder
from embed_precompute.encoders.weights import BLOCK_BYTES, loaded_bytes, read_cast
from embed_precompute.errors import InputError

Encode = Callable[[TextEncoder, Sequence[str]], "list[torch.Tensor]"]
MIB = 1 << 20
RUNTIME = BLOCK_BYTES + 24 * MIB
"""Beside the weights and a tenth of them: a block of a file, and what transformers itself takes."""

# --- memory ---------------------------------------------------------------------------------------

MEASURE = """
import json, re, sys
from pathlib import Path
import torch
from embed_precompute.encoders import hf
from embed_precompute.encoders import offload

def of_process(name):
    text = Path("/proc/self/status").read_text()
    return int(re.search(name + r":\\s+(\\d+)", text)[1]) * 1024

hf.transformers.T5EncoderModel  # imported when first named
dtype = getattr(torch, sys.argv[2])
Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
before, anonymous = of_process("VmRSS"), of_process("RssAnon")
model = hf.load_checkpoint("here", Path(sys.argv[1]), "t5", "t5", dtype=dtype)
weights = offload.num_bytes(model)
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
    config.save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_loading_takes_the_weights_and_a_tenth(large: Path, dtype: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large), dtype],
        env=clean_environment(),
        cwd=PACKAGE_ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    weights, peak, anonymous = map(int, found.stdout.strip("[]\n").split(","))
    assert weights == loaded_bytes([large / "model.safetensors"], "t5", getattr(torch, dtype))
    assert peak <= 1.1 * weights + RUNTIME, f"{peak / weights:.2f} times the weights"
    if dtype == "float32":  # as in the file: pages that all processes of the node share
        assert anonymous <= RUNTIME


# --- in another dtype -----------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path: Path, tiny_t5: Path) -> Path:
    """The tiny T5 in several files."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_t5, folder)
    (folder / "model.safetensors").unlink()
    model = transformers.T5EncoderModel.from_pretrained(str(tiny_t5))
    model.save_pretrained(str(folder), max_shard_size="100KB", safe_serialization=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def as_transformers_loads(folder: Path, kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    classes = {"t5": transformers.T5EncoderModel, "clip": transformers.CLIPTextModel}
    model = classes[kind].from_pretrained(str(folder), torch_dtype=dtype)
    return dict(model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["t5", "sharded", "clip"])
def test_cast_weights_are_those_of_transformers(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    stored: torch.dtype,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr("embed_precompute.encoders.weights.BLOCK_BYTES", 1000)  # many to a tensor
    source = request.getfixturevalue("sharded" if layout == "sharded" else f"tiny_{layout}")
    folder = tmp_path / "stored"
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors = {
            k: v.to(stored) if v.is_floating_point() else v for k, v in load_file(path).items()
        }
        save_file(tensors, path, {"format": "pt"})
    kind = "clip" if layout == "clip" else "t5"
    model_type = "clip_text_model" if layout == "clip" else "t5"
    ours = load_checkpoint("here", folder, kind, model_type, dtype=dtype)
    expected = as_transformers_loads(folder, kind, dtype)
    found = dict(ours.named_parameters())
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert parameter.dtype == expected[name].dtype, name
        assert torch.equal(parameter, expected[name]), name
    files = sorted(folder.glob("*.safetensors"))
    assert (read_cast(files, kind, dtype) is None) == (stored == dtype)


def test_damage_is_named_when_weights_are_cast(tmp_path: Path, tiny_t5: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_t5, folder)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"here: .*damaged cannot be loaded as T5EncoderModel"):
        load_checkpoint("here", folder, "t5", "t5", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_weights_straight_to_a_device_are_the_same(
    request: pytest.FixtureRequest, kind: Any, dtype: Any
) -> None:
    """As a GPU gets them, with the CPU in its place."""
    config = EncoderConfig(kind, str(request.getfixturevalue(f"tiny_{kind}")), dtype=dtype)
    resolved = resolve("enc", dataclasses.replace(config, implementation="hf"))
    direct = hf.load_model(resolved, device_map={"": "cpu"})
    expected = dict(hf.load_model(resolved).named_parameters())
    for name, parameter in direct.named_parameters():
        assert parameter.dtype == expected[name].dtype
        assert torch.equal(parameter, expected[name])


# --- offload --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_t5(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path) -> Path:
    """The tiny T5 with five layers, random ones."""
    folder = tmp_path_factory.mktemp("deep") / "t5"
    shutil.copytree(tiny_t5, folder)
    config = transformers.T5Config.from_pretrained(str(tiny_t5), num_layers=5)
    torch.manual_seed(7)
    transformers.T5EncoderModel(config).save_pretrained(str(folder), safe_serialization=True)
    return folder


def leave_room(patch: pytest.MonkeyPatch, num_bytes: int) -> None:
    """As if the CPU were a GPU on which weights may take so much."""
    patch.setattr(offload, "forward_bytes", lambda resolved, config: 1000)
    patch.setattr(offload, "free_bytes", lambda device: num_bytes + 1000)


def linears_of(module: torch.nn.Module) -> list[torch.nn.Linear]:
    return [each for each in module.modules() if isinstance(each, torch.nn.Linear)]


def encoder_config(mode: str, folder: Path, **fields: Any) -> EncoderConfig:
    kind: Any = "clip" if mode == "clip" else "t5"
    fields = {"dtype": "float32", "compile": False, **fields}
    if fields["implementation"] == "fused" and mode != "padded":
        fields["stream_tokens"] = 256
    if kind == "t5":
        fields |= {"max_length": 32, "attention_mask": "none" if mode == "padded" else "padding"}
    return EncoderConfig(kind, str(folder), **fields)


@pytest.mark.parametrize("implementation", ["hf", "fused"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("mode", "checkpoint"),
    [("padded", "deep_t5"), ("masked", "deep_t5"), ("masked", "tiny_umt5"), ("clip", "tiny_clip")],
)
def test_layers_in_host_memory_change_no_bit(
    request: pytest.FixtureRequest,
    encode: Encode,
    corpus: list[str],
    caplog: pytest.LogCaptureFixture,
    mode: str,
    checkpoint: str,
    dtype: str,
    implementation: str,
) -> None:
    folder = request.getfixturevalue(checkpoint)
    config = encoder_config(mode, folder, implementation=implementation, dtype=dtype)
    texts = ["", *corpus[:9]]
    whole: Any = build(resolve("enc", config), "cpu", "float32")
    layers = offload.layers_of(whole._model, pooled=mode == "clip")
    total = offload.num_bytes(whole._model)
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        leave_room(patch, total - 1024)  # more than CLIP has beside what is in its file
        parts: Any = build(resolve("enc", config), "cpu", "float32")
    waiting = [
        {linear.weight.device.type for linear in linears_of(layer)} == {"meta"}
        for layer in offload.layers_of(parts._model, pooled=mode == "clip")
    ]
    assert waiting == [False] * (len(waiting) - 2) + [True] * 2  # one's place is for the copies
    kept_back = sum(offload.num_bytes(linear) for linear in linears_of(layers[-2:]))
    assert total - parts.weight_bytes() == kept_back
    assert f"encoders.enc: 2 of {len(waiting)} layers" in caplog.text
    for _ in range(2):
        for ours, expected in zip(encode(parts, texts), encode(whole, texts), strict=True):
            assert torch.equal(ours, expected)


def test_what_fits_is_not_offloaded(monkeypatch: pytest.MonkeyPatch, tiny_t5: Path) -> None:
    resolved = resolve("enc", encoder_config("masked", tiny_t5, implementation="fused"))
    whole = build(resolved, "cpu", "float32")
    leave_room(monkeypatch, whole.weight_bytes())
    assert build(resolved, "cpu", "float32").weight_bytes() == whole.weight_bytes()
    leave_room(monkeypatch, whole.weight_bytes() - 1)  # without what a forward needs: 1,000 bytes
    never = build(resolved, "cpu", "float32", may_offload=False)
    assert never.weight_bytes() == whole.weight_bytes()
    compiled = dataclasses.replace(resolved, compiled=True)
    assert build(compiled, "cpu", "float32").weight_bytes() == whole.weight_bytes()


def test_where_it_cannot_work(monkeypatch: pytest.MonkeyPatch, tiny_t5: Path) -> None:
    config = encoder_config("masked", tiny_t5, implementation="fused")
    leave_room(monkeypatch, 10)
    with pytest.raises(InputError, match="not even its embeddings and one layer"):
        build(resolve("enc", config), "cpu", "float32")
    with pytest.raises(InputError, match="the weights do not fit on cpu") as refused:
        build(resolve("enc", config), "cpu", "float32", may_offload=False)
    assert "compile" not in str(refused.value)
    compiled = dataclasses.replace(config, compile=True)
    with pytest.raises(InputError, match="set compile false and give a new"):
        build(resolve("enc", compiled), "cpu", "float32")


def test_the_estimate_of_a_forward(tiny_t5: Path) -> None:
    """Everything a forward of one layer holds, and no less."""
    config = transformers.T5Config.from_pretrained(str(tiny_t5))
    fused = resolve("enc", encoder_config("padded", tiny_t5, implementation="fused"))
    lines, length = fused.shapes[0]
    inner = config.num_heads * config.d_kv
    held = lines * length * (config.d_model + 3 * inner + 2 * config.d_ff) * 4
    estimate = offload.forward_bytes(fused, config)
    assert held < estimate - offload.DEVICE_RESERVE < 3 * held
    reference = resolve("enc", encoder_config("padded", tiny_t5, implementation="hf"))
    scores = 4 * lines * config.num_heads * length**2
    assert offload.forward_bytes(reference, config) == estimate + 2 * scores


def test_a_job_with_layers_in_host_memory(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = write_captions(tmp_path / "captions.parquet", ["a red fox", "x", "two cats"])
    job = write_job(tmp_path, captions, tiny_t5, None)
    assert call("run", str(job))[0] == 0
    whole = dataset_bytes(tmp_path / "out")
    room = sum(path.stat().st_size for path in tiny_t5.glob("*.safetensors")) * 3 // 4
    leave_room(monkeypatch, room)
    code, _, said = call("run", str(job), "--output.path", str(tmp_path / "parts"))
    assert code == 0, said
    assert "stay in host memory" in said
    assert dataset_bytes(tmp_path / "parts") == whole
    code, _, said = call(
        *("run", str(job), "--output.path", str(tmp_path / "never"), "--runtime.offload", "never")
    )
    assert code == 2
    assert "encoders.t5: the weights do not fit on cpu" in said
