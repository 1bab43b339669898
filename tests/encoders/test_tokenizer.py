"""The tokenizer of a checkpoint: what is counted, and what is refused. Ids: test_families."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from family_case import copied

from embed_precompute.encoders.families.t5 import T5Options
from embed_precompute.encoders.resolve import open_encoder, resolve
from embed_precompute.encoders.tokenizer import CaptionTokenizer
from embed_precompute.errors import InputError

NEEDED = ("eos_token", "pad_token")


def tokenizer(folder: Path, max_length: int = 64) -> CaptionTokenizer:
    return CaptionTokenizer("encoders.enc", folder, max_length, NEEDED)


def test_unknown_tokens_are_counted(tiny_t5: Path, tiny_clip: Path) -> None:
    texts = ["a red fox", "\u0416 a \u0416", ""]
    assert tokenizer(tiny_t5).encode(texts).unknown == [0, 2, 0]
    # CLIP's unknown token is its end token: one per caption is the end, not unknown.
    assert tokenizer(tiny_clip).encode(texts).unknown == [0, 0, 0]


def test_a_tokenizer_from_another_folder(tmp_path: Path, tiny_t5: Path) -> None:
    folder, bare = tmp_path / "tokenizer", tmp_path / "bare"
    folder.mkdir()
    shutil.copytree(tiny_t5, bare)
    for path in bare.glob("tokenizer*"):
        path.rename(folder / path.name)
    with pytest.raises(InputError, match=r"encoders\.enc\.pretrained"):
        open_encoder("enc", T5Options(pretrained=str(bare)))
    specs = [
        resolve(open_encoder("enc", T5Options(pretrained=str(weights), tokenizer=words))).spec()
        for weights, words in ((bare, str(folder)), (tiny_t5, None))
    ]
    assert specs[0] == specs[1]
    with pytest.raises(InputError, match=r"encoders\.enc\.tokenizer"):
        open_encoder("enc", T5Options(pretrained=str(bare), tokenizer=str(tmp_path / "nowhere")))


@pytest.mark.parametrize("model", ["tiny_t5", "tiny_clip"])
def test_two_swapped_entries_are_another_tokenizer(
    model: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Also entries that no text of the fixed set has."""
    folder = shutil.copytree(request.getfixturevalue(model), tmp_path / "copy")
    same = tokenizer(folder).digest
    assert same == tokenizer(request.getfixturevalue(model)).digest
    path = folder / "tokenizer.json"
    content = json.loads(path.read_bytes())
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # of [token, score]
        vocabulary[-2:] = vocabulary[:-3:-1]
    else:
        (first, one), (second, two) = sorted(vocabulary.items(), key=lambda each: each[1])[-2:]
        vocabulary.update({first: two, second: one})
    path.write_text(json.dumps(content))
    assert tokenizer(folder).digest != same


def test_unfit_slow_missing_and_damaged_tokenizers(tmp_path: Path, tiny_t5: Path) -> None:
    """A pad token is needed where pads can be attended: test_decoder has one without."""
    changes: dict[str, Any]
    for changes, words in (
        ({"padding_side": "left"}, "pads on the left"),
        ({"pad_token": None}, "no pad_token"),
    ):
        folder = copied(tiny_t5, tmp_path / words, "tokenizer_config.json", **changes)
        with pytest.raises(InputError, match=words):
            tokenizer(folder)
    folder = shutil.copytree(tiny_t5, tmp_path / "t5")
    (folder / "tokenizer.json").write_bytes(b'{"version"')
    with pytest.raises(InputError, match="gives no tokenizer"):
        tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    slow = {"tokenizer_class": "ByT5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(slow), encoding="utf-8")
    with pytest.raises(InputError, match=r"only a slow tokenizer \(ByT5Tokenizer\)"):
        tokenizer(folder)
