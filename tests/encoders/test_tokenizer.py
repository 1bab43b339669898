"""The tokenizer of a checkpoint: what is counted, and what is refused. Ids: test_families."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from family_case import copied

from embed_precompute.encoders.byte_tokenizer import ByteTokenizer
from embed_precompute.encoders.families.t5 import T5Options
from embed_precompute.encoders.resolve import open_encoder, resolve
from embed_precompute.encoders.tokenizer import PROBES, CaptionTokenizer
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
    slow = {"tokenizer_class": "CanineTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(slow), encoding="utf-8")
    with pytest.raises(InputError, match=r"only a slow tokenizer \(CanineTokenizer\)"):
        tokenizer(folder)


@pytest.mark.filterwarnings("ignore:This sequence already has")
def test_bytes_are_byt5s_ids() -> None:
    """Special tokens too, with the white space that they take, and a text with its own end."""
    slow: Any = transformers.ByT5Tokenizer()
    color = transformers.AddedToken("<color-1>", special=True, rstrip=True)
    slow.add_tokens([color, transformers.AddedToken("<color-10>", special=True)])
    ours, rng = ByteTokenizer(slow), random.Random(0)
    pieces = ["</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_12", "<color-1>", "<color-10>"]
    pieces += [" ", "  ", "\t", "\x1c", "\x85", "\u3000", "\u200b", "a", "\u00e9", "\U0001f525"]
    pieces += ["<", "<p", "</", "s>", "<0x41>", "\n", "\0"]
    texts = [*PROBES, *("".join(rng.choices(pieces, k=rng.randrange(9))) for _ in range(1500))]
    expected = slow(texts)["input_ids"]
    assert [each.ids for each in ours.encode_batch_fast(texts)] == expected
    for length in (2, 5, 30):
        for side in ("right", "left"):
            slow.truncation_side = side
            ours.enable_truncation(length, direction=side)
            cut = slow(texts, truncation=True, max_length=length)["input_ids"]
            found = ours.encode_batch_fast(texts)
            assert [each.ids for each in found] == cut
            longer = [len(ids) > length for ids in expected]
            assert [each.overflowing for each in found] == longer
