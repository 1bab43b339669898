"""added_tokens from video buckets: sizes, tokens, padded lengths, and Open-Sora's own table."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from jobs import call, write_captions, write_job

from embed_precompute.config.files import load_config, to_yaml
from embed_precompute.encoders.families.t5 import T5Options, length_of_buckets
from embed_precompute.encoders.resolve import open_encoder, resolve
from embed_precompute.encoders.video_buckets import VideoTokensConfig, resolution_sizes
from embed_precompute.errors import InputError

# Of configs/diffusion/train/stage2.py (hpcaitech/Open-Sora): which frames each resolution has, and
# sp_size. Probabilities are all 1.0; batch sizes do not matter here.
STAGE2_FRAMES = {"256px": {*range(1, 130, 4)} - {69}, "768px": {*range(1, 130, 4)}}
STAGE2 = {name: {n: (1.0, 1) for n in frames} for name, frames in STAGE2_FRAMES.items()}
STAGE2_SP_SIZE = 4


def t5(video: VideoTokensConfig, seq_align: int) -> T5Options:
    return T5Options(pretrained="x", seq_align=seq_align, added_tokens=video)


def test_stage2_with_sp_size_4_has_four_padded_lengths() -> None:
    video = VideoTokensConfig(bucket_config=STAGE2)
    encoder = t5(video, STAGE2_SP_SIZE)
    found: Counter[int] = Counter()
    for tokens, buckets in video.by_tokens().items():
        assert (tokens + encoder.padded_length(tokens)) % STAGE2_SP_SIZE == 0
        found[encoder.padded_length(tokens)] += len(buckets)
    assert found == {512: 579, 513: 32, 514: 200, 515: 36}
    with pytest.raises(InputError) as raised:
        length_of_buckets("encoders.t5.added_tokens", encoder, video)
    said = str(raised.value)
    assert "encoders.t5.added_tokens: the buckets with seq_align 4 lead to 4 padded" in said
    assert "513: added_tokens 759, for 256px 9x176x368, 256px 9x368x176, " in said
    assert "and 28 more" in said
    assert "make one dataset per length" in said
    for length, tokens in ((512, 252), (513, 759), (514, 250), (515, 253)):  # what it says to give
        assert f"{length}: added_tokens {tokens}" in said
        assert encoder.padded_length(tokens) == length
    assert length_of_buckets("encoders.t5.added_tokens", t5(video, 1), video) == 512


def test_sizes_of_a_resolution() -> None:
    upright = {(160, 400), (176, 368), (192, 336), (208, 320), (224, 288), (256, 256)}
    sizes = resolution_sizes("256px", 16)
    assert set(sizes) >= upright
    assert {(w, h) for h, w in sizes} == set(sizes), "each size on its side as well"
    assert all(h % 16 == 0 and w % 16 == 0 for h, w in sizes)
    assert all(abs(h * w / 256**2 - 1) < 0.05 for h, w in sizes)
    assert resolution_sizes("256px_ar1:1", 16) == [(256, 256)]
    assert resolution_sizes("768px_max", 16)[0] in resolution_sizes("768px", 16)
    assert (720, 1280) in resolution_sizes("720p", 16)
    assert all(h % 32 == 0 and w % 32 == 0 for h, w in resolution_sizes("768px", 32))

    for name in ("256", "px", "256q", "0px", "256px_ar", "256px_ar7:3", "8px"):
        with pytest.raises(InputError, match=f"bucket_config: '{name}'"):
            resolution_sizes(name, 16)


def test_tokens_of_a_bucket() -> None:
    """A bucket that nothing is drawn from does not count."""
    for bucket, factors, tokens in (
        ((1, 256, 256), (4, 8, 2), 1 * 16 * 16),
        ((5, 256, 256), (4, 8, 2), 2 * 16 * 16),  # a causal autoencoder: 1 + 4 frames
        ((129, 192, 336), (4, 8, 2), 33 * 12 * 21),
        ((128, 768, 768), (4, 32, 1), 32 * 24 * 24),  # a non-causal one: 32 x 4 frames
        ((2, 10, 10), (1, 1, 1), 200),
    ):
        assert list(VideoTokensConfig((bucket,), None, *factors).by_tokens()) == [tokens]
    table = {"256px_ar1:1": {1: (0.0, 9), 5: (0.5, 9), 9: ((1.0, 1.0), 9), 13: ((0.5, 0.5), 9)}}
    buckets = VideoTokensConfig(bucket_config=table).all_buckets()
    assert [bucket.frames for bucket in buckets] == [5, 13]


def test_a_bucket_nothing_is_drawn_from_does_not_count() -> None:
    table = {"256px_ar1:1": {1: (0.0, 9), 5: (0.5, 9), 9: ((1.0, 1.0), 9), 13: ((0.5, 0.5), 9)}}
    buckets = VideoTokensConfig(bucket_config=table).all_buckets()
    assert [bucket.frames for bucket in buckets] == [5, 13]


YAML = """
captions: {path: captions.parquet}
encoders:
  t5:
    kind: t5
    pretrained: models/t5
    seq_align: 4
    added_tokens:
      bucket_config: {256px_ar1:1: {1: [1.0, 130], 5: [[0.5, 0.25], 14]}}
"""


def test_yaml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(YAML)
    config = load_config(path)
    video = config.encoders["t5"].added_tokens
    assert isinstance(video, VideoTokensConfig)
    assert video.bucket_config == {"256px_ar1:1": {1: (1.0, 130), 5: ((0.5, 0.25), 14)}}
    assert list(video.by_tokens()) == [256, 512]
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config))
    assert load_config(again) == config
    for word, value in {"7": 7, "video_tokens": "video_tokens"}.items():
        changed = load_config(path, ["--encoders.t5.added-tokens", word])
        assert changed.encoders["t5"].added_tokens == value
    words = ["--encoders.t5.added_tokens.spatial-compression-ratio", "16"]
    words += ["--encoders.t5.added_tokens.patch_size=1"]
    video = load_config(path, words).encoders["t5"].added_tokens
    assert isinstance(video, VideoTokensConfig)
    assert list(video.by_tokens()) == [256, 512]
    listed = "{bucket_config: null, buckets: [[1, 256, 256]]}"
    video = load_config(path, ["--encoders.t5.added_tokens", listed]).encoders["t5"].added_tokens
    assert video == VideoTokensConfig(buckets=((1, 256, 256),))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--encoders.t5.added_tokens.patch_sze 1", "did you mean patch_size"),
        ("--encoders.t5.added_tokens.patch_size 0", "expected 1 or more"),
        ("--encoders.t5.added_tokens.buckets [[1,256,256]]", "and the other null"),
        ("--encoders.t5.added_tokens.bucket_config null", "and the other null"),
        ("--encoders.t5.added_tokens.bucket_config {}", "no bucket"),
        ("--encoders.t5.added_tokens.bucket_config {9q: {1: [1.0, 1]}}", "no resolution"),
        ("--encoders.t5.added_tokens.bucket_config {9px: {1: [1.0, 1]}}", "too small"),
        ("--encoders.t5.added_tokens.bucket_config {256px: {0: [1.0, 1]}}", "bucket 256px 0x"),
        ("--encoders.t5.added_tokens.buckets [[1,256]]", "a list of 3"),
        (
            "--encoders.t5.added_tokens {buckets: [[1, 248, 256]]}",
            r"1x248x256 has latents of 31 x 32.*multiples of 16",
        ),
        ("--encoders.t5.kind clip", "there is no key encoders.t5.seq_align"),
        ("--encoders.t5.attention_mask padding", "remove both fields"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, words: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(YAML)
    with pytest.raises(InputError, match=said) as raised:
        load_config(path, words.split(" ", 1))
    assert "\n" not in str(raised.value)


def test_a_job_with_buckets(tmp_path: Path, tiny_t5: Path) -> None:
    """One length: it is run at it, and buckets of equal tokens are one specification."""
    captions = write_captions(tmp_path / "captions.parquet", ["a red fox", "two boats", "dawn"])
    both = {"256px_ar1:1": {1: [1.0, 8], 5: [1.0, 4]}}
    sizes = {"patch_size": 1, "spatial_compression_ratio": 16}
    one = {"bucket_config": {"256px_ar1:1": {5: [1.0, 4]}}, **sizes}

    def job(added_tokens: Any) -> str:
        return str(write_job(tmp_path, captions, tiny_t5, None, seq_align=10, **added_tokens))

    code, _, said = call("plan", job({"added_tokens": {"bucket_config": both, **sizes}}))
    assert code == 2
    assert "2 padded lengths" in said
    assert "24: added_tokens 256, for 256px_ar1:1 1x256x256" in said
    assert "28: added_tokens 512, for 256px_ar1:1 5x256x256" in said
    for same in (one, {"buckets": [[5, 256, 256]]}):
        path = job({"added_tokens": same})
        code, _, said = call("run", path)
        assert code == 0, said
    resolved = resolve(open_encoder("t5", load_config(Path(path)).encoders["t5"]))
    assert resolved.decision.padded_length == 28
    assert resolved.spec()["added_tokens"] == [512]
    code, _, said = call("run", job({"added_tokens": 512}))
    assert code == 3, "a number is another rule than a list of buckets"
