"""Every preset against the text encoding of the pipeline that it follows, on tiny random models.

Where the shapes are the pipeline's own, each bit is equal. The positions that are stored and the
null embedding are the pipeline's, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import presets_table
from embed_precompute.config.files import load_config, preset_paths
from embed_precompute.encoders.resolve import open_encoder, resolve

FEW = 7
"""The first captions tell most; with --long all are compared."""
MOST_FUSED = 3e-6
MOST_SHIFTED = 1e-5
"""Where the pipeline pads on the left: the same caption at higher positions, whose float32 angles
have fewer digits."""


def test_every_preset_is_compared() -> None:
    assert {path.stem for path in preset_paths()} == set(presets_table.PRESETS)


@pytest.mark.parametrize("name", ["sana", "lumina2"])
def test_a_negative_prompt_without_its_instruction(
    name: str, tmp_path: Path, corpus: list[str]
) -> None:
    """With the three options that docs/presets.md names."""
    pytest.importorskip("diffusers", minversion="0.42")
    folder = presets_table.write_gemma2(tmp_path, corpus)
    words = ["template", "{text}", "crop_start", "0", "keep_first", "0"]
    words += ["pretrained", str(folder), "tokenizer", "null", "width", "null", "dtype", "float32"]
    keys = [f"--encoders.gemma.{word}" for word in words[::2]]
    pairs = [word for pair in zip(keys, words[1::2], strict=True) for word in pair]
    options = load_config(name, pairs).encoders["gemma"]
    exact = presets_table.exact(name, options, [])
    (ours,) = presets_table.encoded(resolve(open_encoder("enc", exact)), [])[""]
    pipe = presets_table.pipeline(
        {"sana": "SanaPipeline", "lumina2": "Lumina2Pipeline"}[name],
        tokenizer=presets_table.tokenizer(folder),
        text_encoder=presets_table.model("Gemma2Model", folder),
        system_prompt="",
    )
    with torch.no_grad():
        *_, values, mask = pipe.encode_prompt("a fox", device="cpu")
    assert torch.equal(ours, values[0][mask[0].bool()])


@pytest.mark.parametrize("name", presets_table.PRESETS)
def test_a_preset_is_its_pipeline(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    long = request.config.getoption("--long")
    captions = presets_table.CAPTIONS[: None if long else FEW]
    try:
        rows = presets_table.rows_of(name, tmp_path, captions)
    except presets_table.NotHereError as error:
        pytest.skip(str(error))
    for row in rows:
        assert row.hf == 0.0, row
        most = MOST_SHIFTED if presets_table.PRESETS[name].pads_left else MOST_FUSED
        assert row.fused is None or row.fused <= most, row
