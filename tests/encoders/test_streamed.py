"""Streamed weights: a whole job, memory, windows, what is refused, a checkpoint that changes.

That every family's bits are those of resident weights: test_families. Killed in the middle of a
window: tests/faults/test_windows.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_case import encode, resolved_of
from jobs import PACKAGE_ROOT, dataset_bytes, edit, expect, run_code, write_captions, write_job
from safetensors.torch import save_file
from test_loading import MIB, RUNTIME, shift, source_of
from torch import nn

from embed_precompute.encoders import encoder as encoder_module
from embed_precompute.encoders.device import check_machine
from embed_precompute.encoders.encoder import (
    FusedEncoder,
    StreamedEncoder,
    TextEncoder,
    build,
    forward_bytes,
    windows,
)
from embed_precompute.encoders.loading import Source, free_memory, loaded_bytes
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.errors import InputError
from embed_precompute.job.progress import Progress
from make_demo import write_t5

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows of several batches."""
    monkeypatch.setattr(encoder_module, "WINDOW_TOKENS", 700)


def masked(folder: Path, **fields: Any) -> ResolvedEncoder:
    """T5 in packed streams."""
    fields = {"attention_mask": "padding", "stream_tokens": 256, "max_length": 48, **fields}
    return resolved_of("t5", folder, **{"implementation": "fused", **fields})


def padded(folder: Path) -> ResolvedEncoder:
    return resolved_of(
        "t5", folder, max_length=48, batch_tokens=200, implementation="fused", dtype="float32"
    )


def streamed(encoder: ResolvedEncoder) -> StreamedEncoder:
    built = build(encoder, "cpu", "float32", "stream")
    assert isinstance(built, StreamedEncoder)
    return built


def linears(encoder: TextEncoder) -> list[nn.Linear]:
    return [each for each in encoder.model.modules() if isinstance(each, nn.Linear)]


# --- the same bytes -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored_as", "place", "dtype"),
    [
        ("bfloat16", 0, "bfloat16"),
        ("bfloat16", 8, "bfloat16"),
        ("float32", 0, "bfloat16"),
        ("float32", 0, "float16"),
    ],
)
def test_weights_that_are_mapped_copied_and_cast(
    tmp_path: Path, corpus: list[str], stored_as: str, place: int, dtype: str
) -> None:
    folder = write_t5(tmp_path / "t5", corpus, dtype=stored_as)
    shift(folder, place)
    encoder = masked(folder, dtype=dtype)
    expected = encode(build(encoder, "cpu", "float32"), corpus[:30])[""]
    assert all(map(torch.equal, encode(streamed(encoder), corpus[:30])[""], expected))


@pytest.fixture
def job(tmp_path: Path, tiny_t5: Path, tiny_clip: Path, corpus: list[str]) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", ["", *corpus[:60]])
    fields = {"attention_mask": "padding", "stream_tokens": 96}
    return write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=40, **fields)


def test_a_whole_job(job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset begun with resident weights is finished with streamed ones; the bar moves within a
    window."""
    expect(0, "run", job)
    expected, shown = dataset_bytes(tmp_path / "out"), list[float]()
    (tmp_path / "out/manifest.json").unlink()
    sorted((tmp_path / "out").glob("shards/*/shard-*1.json"))[0].unlink()
    real = Progress.encoded

    def encoded(self: Progress, unit: int, samples: float) -> None:
        real(self, unit, samples)
        shown.append(self.captions())

    edit(job, "runtime", weights="stream")
    expect(0, "run", job)
    assert dataset_bytes(tmp_path / "out") == expected
    monkeypatch.setattr(Progress, "encoded", encoded)
    monkeypatch.setattr(encoder_module, "WINDOW_TOKENS", 1 << 20)  # a unit is a window
    expect(0, "run", job, "--output.path", tmp_path / "again")
    assert dataset_bytes(tmp_path / "again") == expected
    assert shown == sorted(shown)
    assert len(set(shown)) > 20, "61 captions, two layers of each encoder"


# --- memory ---------------------------------------------------------------------------------------


def test_one_layer_has_weights_at_a_time(tiny_t5: Path) -> None:
    ours = streamed(masked(tiny_t5))
    blocks = ours.model.encoder.block
    assert all(linear.weight.is_meta for linear in linears(ours))
    embeddings = ours.model.encoder.embed_tokens.weight
    assert ours.model.shared.weight.data_ptr() == embeddings.data_ptr(), "held once"
    for number in (0, 1, 0):
        ours._weights.bring(number)
        held = [each for each in linears(ours) if not each.weight.is_meta]
        assert held == [each for each in blocks[number].modules() if isinstance(each, nn.Linear)]
        assert all(each.weight.data_ptr() % 64 == 0 for each in held)


MEASURE = """
import ctypes, re, sys
from pathlib import Path
import transformers
from family_case import encode, resolved_of
from embed_precompute.encoders import encoder as encoder_module
from embed_precompute.encoders.encoder import build

def anonymous():
    ctypes.CDLL(None).malloc_trim(0)  # what the C library holds back is nobody's
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\\s+(\\d+)", text)[1]) * 1024

encoder_module.WINDOW_TOKENS = 4096
transformers.T5EncoderModel  # imported when first named
encoder = resolved_of(
    "t5", Path(sys.argv[1]), dtype="bfloat16", attention_mask="padding", stream_tokens=512,
    max_length=64, implementation="fused",
)
before = anonymous()
built = build(encoder, "cpu", "bfloat16", "stream")
encode(built, ["a red fox"] * 200)
print(anonymous() - before)
"""


@pytest.mark.parametrize(("place", "num_layers"), [(8, 2), (0, 0)])
def test_private_memory_is_two_layers_and_a_window(
    tmp_path: Path, tiny_t5: Path, place: int, num_layers: int
) -> None:
    """Twelve layers of 20 MiB. At odd places of the file they are copied, else mapped."""
    folder = shutil.copytree(tiny_t5, tmp_path / "large")
    shape = {"d_model": 1024, "d_ff": 2048, "d_kv": 64, "num_heads": 16, "num_layers": 12}
    config = transformers.T5Config.from_pretrained(str(tiny_t5), **shape)
    with torch.device("meta"):
        model = transformers.T5EncoderModel(config)
    shapes = {
        n: t.shape for n, t in model.state_dict().items() if n != "encoder.embed_tokens.weight"
    }
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(zeros, folder / "model.safetensors", {"format": "pt"})
    config.save_pretrained(str(folder))
    size = loaded_bytes(source_of(folder), torch.bfloat16)
    paths = [Path(__file__).parent, PACKAGE_ROOT / "tests", PACKAGE_ROOT / "scripts"]
    window = 4096 * 1024 * 2
    shift(folder, place)
    held = int(run_code(MEASURE, folder, paths=paths))
    assert held < num_layers * size / 12 + window + RUNTIME < size / 2, f"{held / MIB:.0f} MiB"


# --- windows --------------------------------------------------------------------------------------


def test_windows_are_of_one_size(tiny_t5: Path, corpus: list[str]) -> None:
    encoder = padded(tiny_t5)  # batches of 4 x 48 tokens, and 700 in a window
    captions = encoder.opened.tokenizer.encode(corpus[:36])
    batches = list(encoder.batches(captions))
    assert [len(window) for window in windows(batches)] == [3, 3, 3]
    assert [each for window in windows(batches) for each in window] == batches
    assert list(windows([])) == []
    assert [len(window) for window in windows(batches[:1])] == [1]


@pytest.mark.parametrize("calls", [1, 3, 6])
def test_a_window_is_left_in_its_middle(tiny_t5: Path, corpus: list[str], calls: int) -> None:
    ours = streamed(padded(tiny_t5))
    batches = list(ours.resolved.batches(ours.resolved.opened.tokenizer.encode(corpus[:24])))
    told: list[float] = []

    def go_on(done: float) -> bool:
        told.append(done)
        return len(told) < calls

    assert list(ours.submit_all(batches, go_on)) == []
    assert told == pytest.approx([n / 12 for n in range(calls)])  # of 2 layers x 6 batches


def test_a_window_that_does_not_fit_in_memory(
    tiny_t5: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = streamed(padded(tiny_t5))
    batches = list(ours.resolved.batches(ours.resolved.opened.tokenizer.encode(corpus[:12])))
    begin = ours._steps.begin

    def failing(ids: torch.Tensor, batch: Any, place: int = 0) -> Any:
        if place == 2:
            raise torch.OutOfMemoryError
        return begin(ids, batch, place)

    monkeypatch.setattr(ours._steps, "begin", failing)
    with pytest.raises(InputError, match=r"residuals of 3 token batches.* make smaller units"):
        list(ours.submit_all(batches))


# --- refused, and auto ----------------------------------------------------------------------------


def test_what_cannot_be_streamed_is_refused_before_anything_is_written(
    job: Path, tmp_path: Path, tiny_t5: Path
) -> None:
    edit(job, "runtime", weights="stream")
    edit(job, "encoders.t5", implementation="hf", stream_tokens=4096)
    said = expect(2, "run", job)
    assert (
        "encoders.t5: runtime.weights is stream: the implementation is hf, and only fused" in said
    )
    assert "Set runtime.weights auto" in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"one graph of all layers.*or compile false"):
        check_machine("cpu", "cuda:0", [masked(tiny_t5, compile=True)], "stream")


def test_auto_streams_what_does_not_fit(
    tiny_t5: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = masked(tiny_t5)
    source = Source(encoder.opened.checkpoint, encoder.family, encoder.options)
    needed = loaded_bytes(source, torch.float32) + forward_bytes(encoder)
    by_hf = masked(tiny_t5, implementation="hf")

    def built(encoder: ResolvedEncoder, free: int | None) -> type:
        monkeypatch.setattr(encoder_module, "free_memory", lambda device: free)
        return type(build(encoder, "cpu", "float32", "auto"))

    with caplog.at_level("INFO"):
        assert built(encoder, needed) is FusedEncoder
        assert built(encoder, None) is FusedEncoder
        assert built(by_hf, 0) is encoder_module.HfEncoder
        assert not caplog.records
        assert built(encoder, needed - 1) is StreamedEncoder
    assert "do not fit in the 0.5 GB that are free on cpu: the weights are streamed" in caplog.text


def test_free_memory_knows_the_limit_of_a_cgroup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = free_memory(CPU)
    assert free is not None
    assert free > 0
    (tmp_path / "memory.max").write_text("12345\n")
    monkeypatch.setattr("embed_precompute.encoders.loading.CGROUPS", tmp_path)
    assert free_memory(CPU) == 12345
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) != 12345


# --- files that change ----------------------------------------------------------------------------


def replaced(path: Path) -> None:
    """Equal in size, another file."""
    copy = path.with_suffix(".new")
    shutil.copy(path, copy)
    os.replace(copy, path)


@pytest.mark.parametrize(
    ("change", "words"),
    [(replaced, "was changed, and"), (Path.unlink, "cannot be read any more")],
)
def test_a_checkpoint_that_changes_under_a_run(
    tmp_path: Path, tiny_t5: Path, change: Callable[[Path], None], words: str
) -> None:
    mine = shutil.copytree(tiny_t5, tmp_path / "mine")
    ours = streamed(masked(mine))
    assert len(encode(ours, ["a red fox"])[""]) == 1
    change(mine / "model.safetensors")

    def again() -> None:
        for number in (0, 1, 0):  # one layer may have been read ahead
            ours._weights.bring(number)

    with pytest.raises(InputError, match=words):
        again()
