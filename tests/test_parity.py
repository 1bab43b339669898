"""The hf encoder against a transcription of Open-Sora's embedder, one caption at a time.

The transcription shares no code with the package: AutoTokenizer pads to max_length, more pads
follow for seq_align, the model runs without a mask (or, masked, on the real tokens alone).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.encoders.resolve import build, resolve
from embed_precompute.encoders.spec import TextEncoder
from make_demo import write_clip, write_t5

if TYPE_CHECKING:
    from conftest import Encode

TOLERANCE = 1e-5
MAX_LENGTH = 60
MODELS: dict[str, Any] = {
    "t5": transformers.T5EncoderModel,
    "relu": transformers.T5EncoderModel,
    "umt5": transformers.UMT5EncoderModel,
    "mt5": transformers.MT5EncoderModel,
    "clip": transformers.CLIPTextModel,
}

Reference = Callable[[str], torch.Tensor]


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def assert_parity(
    encode: Encode, encoder: TextEncoder, reference: Reference, texts: Sequence[str]
) -> None:
    differences = [
        relative_difference(ours, reference(text))
        for text, ours in zip(texts, encode(encoder, texts), strict=True)
    ]
    worst = max(range(len(texts)), key=differences.__getitem__)
    print(f"worst of {len(texts)}: {differences[worst]:.2e} for {texts[worst]!r}")
    assert differences[worst] <= TOLERANCE, texts[worst]


@pytest.fixture(scope="module")
def texts(corpus: list[str]) -> list[str]:
    """Short, long (truncated), empty, repeated, and not ASCII."""
    longest = max(corpus, key=len)
    return [
        *corpus[:10],
        "",
        longest,
        corpus[0],
        "caf\u00e9 \ube68\uac04 \u8d64\u3044",
        longest[1:],
    ]


@pytest.fixture(scope="module")
def checkpoints(
    tmp_path_factory: pytest.TempPathFactory, corpus: list[str], tiny_t5: Path, tiny_umt5: Path
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parity")
    return {
        "t5": tiny_t5,
        "umt5": tiny_umt5,
        "relu": write_t5(folder / "relu", corpus, gated=False, seed=1),
        "mt5": write_t5(folder / "mt5", corpus, model_type="mt5", seed=2),
    }


def reference_t5(kind: str, folder: Path, *, seq_align: int, added_tokens: int) -> Reference:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = MODELS[kind].from_pretrained(folder).eval()

    def run(text: str) -> torch.Tensor:
        input_ids = tokenizer(
            [text],
            truncation=True,
            max_length=MAX_LENGTH,
            padding="max_length",
            return_tensors="pt",
        )["input_ids"]
        length = input_ids.shape[1]
        if (added_tokens + length) % seq_align != 0:
            missing = seq_align - (added_tokens + length) % seq_align
            input_ids = torch.nn.functional.pad(
                input_ids, (0, missing), value=tokenizer.pad_token_id
            )
        with torch.no_grad():
            output = model(input_ids=input_ids, attention_mask=None)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    return run


def reference_unpadded(kind: str, folder: Path, max_length: int) -> Reference:
    """Only the real tokens: no pads, no mask."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = MODELS[kind].from_pretrained(folder).eval()

    def run(text: str) -> torch.Tensor:
        tokens = tokenizer([text], truncation=True, max_length=max_length, return_tensors="pt")
        with torch.no_grad():
            output = model(input_ids=tokens["input_ids"])
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden

    return run


@pytest.mark.parametrize("seq_align", [1, 8, 64])
@pytest.mark.parametrize("added_tokens", [0, 1000, 1001])
def test_padded_t5_is_open_soras(
    encode: Encode, tiny_t5: Path, texts: list[str], seq_align: int, added_tokens: int
) -> None:
    config = EncoderConfig(
        "t5",
        str(tiny_t5),
        max_length=MAX_LENGTH,
        seq_align=seq_align,
        added_tokens=added_tokens,
        dtype="float32",
        batch_tokens=400,
    )
    encoder = build(resolve("t5", config), "cpu", "float32")
    length = encoder.resolved.padded_length
    assert length is not None
    assert length >= MAX_LENGTH
    assert (length + added_tokens) % seq_align == 0
    assert encoder.resolved.shapes == ((400 // length, length),)
    reference = reference_t5("t5", tiny_t5, seq_align=seq_align, added_tokens=added_tokens)
    assert_parity(encode, encoder, reference, texts)


def test_parity_would_see_other_pads_and_other_text(tiny_t5: Path, texts: list[str]) -> None:
    """The reference itself: four more pads move every position by far more than the tolerance."""
    short = reference_t5("t5", tiny_t5, seq_align=1, added_tokens=0)
    longer = reference_t5("t5", tiny_t5, seq_align=64, added_tokens=0)
    assert longer(texts[0]).shape[0] == short(texts[0]).shape[0] + 4
    for before, after in zip(short(texts[0]), longer(texts[0])[:MAX_LENGTH], strict=True):
        assert relative_difference(before, after) > 100 * TOLERANCE
    assert relative_difference(short(texts[0]), short(texts[1])) > 0.1


@pytest.mark.parametrize("kind", ["umt5", "relu", "mt5"])
def test_padded_relatives_of_t5(
    encode: Encode, checkpoints: dict[str, Path], texts: list[str], kind: str
) -> None:
    config = EncoderConfig(
        "t5",
        str(checkpoints[kind]),
        max_length=MAX_LENGTH,
        seq_align=64,
        added_tokens=1000,
        dtype="float32",
        batch_tokens=400,
    )
    encoder = build(resolve("t5", config), "cpu", "float32")
    reference = reference_t5(kind, checkpoints[kind], seq_align=64, added_tokens=1000)
    assert_parity(encode, encoder, reference, texts)


@pytest.mark.parametrize("kind", ["t5", "umt5", "relu"])
def test_masked_t5_is_the_real_tokens_alone(
    encode: Encode, checkpoints: dict[str, Path], texts: list[str], kind: str
) -> None:
    config = EncoderConfig(
        "t5",
        str(checkpoints[kind]),
        max_length=120,
        attention_mask="padding",
        dtype="float32",
        batch_tokens=480,
    )
    encoder = build(resolve("t5", config), "cpu", "float32")
    assert_parity(encode, encoder, reference_unpadded(kind, checkpoints[kind], 120), texts)


@pytest.mark.parametrize("eos_rule", ["first", "argmax"])
def test_clip_is_open_soras_whatever_the_bucket(
    encode: Encode, tmp_path: Path, corpus: list[str], texts: list[str], eos_rule: Any
) -> None:
    folder = write_clip(tmp_path / "clip", corpus, eos_rule=eos_rule)
    config = EncoderConfig("clip", str(folder), dtype="float32", batch_size=4)
    encoder = build(resolve("clip", config), "cpu", "float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = MODELS["clip"].from_pretrained(folder).eval()

    def reference(text: str) -> torch.Tensor:
        input_ids = tokenizer(
            [text], truncation=True, max_length=77, padding="max_length", return_tensors="pt"
        )["input_ids"]
        assert input_ids.shape == (1, 77)
        with torch.no_grad():
            pooled: torch.Tensor = model(input_ids=input_ids, attention_mask=None).pooler_output
        return pooled[0]

    # A caption that names the end token itself is pooled there, in the reference as in ours.
    assert_parity(encode, encoder, reference, [*texts, "stop <|endoftext|> here", "\U0001f525"])


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_bfloat16_is_near_float32(
    encode: Encode, tiny_t5: Path, texts: list[str], mask: Any
) -> None:
    """Rounding to 8 bits of mantissa, not another computation."""

    def encoded(dtype: Any) -> list[torch.Tensor]:
        config = EncoderConfig(
            "t5", str(tiny_t5), max_length=64, attention_mask=mask, dtype=dtype, batch_tokens=256
        )
        return encode(build(resolve("t5", config), "cpu", "float32"), texts)

    pairs = zip(encoded("bfloat16"), encoded("float32"), strict=True)
    differences = [relative_difference(low, high) for low, high in pairs]
    assert 0 < max(differences) < 0.1


def test_float16_keeps_wo_in_float32(encode: Encode, tiny_t5: Path, texts: list[str]) -> None:
    config = EncoderConfig(
        "t5", str(tiny_t5), max_length=MAX_LENGTH, dtype="float16", batch_tokens=256
    )
    encoder: Any = build(resolve("t5", config), "cpu", "float16")
    dtypes = {name: parameter.dtype for name, parameter in encoder._model.named_parameters()}
    kept = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert kept == {name for name in dtypes if ".wo." in name}
    reference = reference_t5("t5", tiny_t5, seq_align=1, added_tokens=0)
    for text, ours in zip(texts, encode(encoder, texts), strict=True):
        assert ours.dtype == torch.float16
        assert relative_difference(ours, reference(text)) < 1e-2
