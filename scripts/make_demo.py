"""Make the demo: captions written here by a small grammar, and tiny T5 and CLIP text encoders.

Guarantees: nothing is downloaded, and the same arguments give the same bytes: captions, tokenizers
and weights. The encoders have the real architectures (names, shapes and configuration files of the
published checkpoints) but random weights: their embeddings mean nothing.
Costs: a few seconds on one core for 3,000 captions; needs pyarrow, tokenizers, safetensors, torch.

    python scripts/make_demo.py OUT [--rows 3000]     # OUT/captions.parquet, OUT/t5, OUT/clip
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from demo_tokenizers import clip_tokenizer, t5_tokenizer

ROW_GROUP_ROWS = 500
CLIP_POSITIONS = 77
RELATIVE_BUCKETS = 32

SUBJECTS = (
    "a red fox", "an old fisherman", "two children", "a paper boat", "a violinist in a grey coat",
    "a flock of starlings", "a robot with one blue eye", "a street vendor", "a black horse",
    "a woman holding a yellow umbrella", "a small sailing boat", "an astronaut", "a ginger cat",
    "a steam train", "three cyclists", "a glass of iced tea", "a lighthouse keeper",
    "a hummingbird", "a chef in a white apron", "a puppy with a wooden stick",
    "a dancer in a long silk dress", "a potter", "a school of silver fish", "an empty swing",
    "a freight truck", "a drone",
)  # fmt: skip
ACTIONS = (
    "walks slowly", "turns towards the camera", "waits without moving",
    "runs through shallow water", "looks up at the sky", "drifts from left to right",
    "spins twice and stops", "climbs the stairs", "disappears into the fog", "crosses the frame",
    "shakes off the rain", "glides above the ground", "rises into the air", "casts a long shadow",
    "moves in and out of focus", "comes to rest", "appears behind a curtain of rain",
    "is reflected in a puddle", "slows down and then speeds up",
)  # fmt: skip
PLACES = (
    "on a windy beach", "in a crowded night market", "beside a frozen lake",
    "under a stone bridge", "in a wheat field at noon", "on the roof of a tall building",
    "in a narrow alley", "at a harbour", "inside an abandoned factory", "on a mountain road",
    "in a quiet library", "near a waterfall", "in a kitchen full of steam",
    "on the surface of the moon", "along a canal", "in a pine forest",
    "between two rows of market stalls", "at an underground station", "in a greenhouse",
)  # fmt: skip
CAMERAS = (
    "the camera pans left", "a slow dolly in", "a handheld shot", "an aerial view",
    "a static wide shot", "the camera circles the scene", "a low angle close-up",
    "a tracking shot from behind", "time-lapse", "the camera tilts upwards",
    "a rack focus to the background", "slow motion at 120 fps",
)  # fmt: skip
STYLES = (
    "cinematic lighting", "golden hour", "35mm film grain", "black and white",
    "soft pastel colours", "overcast light", "neon reflections", "hand-drawn animation",
    "shallow depth of field", "high contrast", "stop motion", "documentary style",
    "misty morning", "photorealistic",
)  # fmt: skip
KOREAN = (
    ("빨간 우산을 든 아이가", "늙은 어부가", "검은 고양이가", "자전거를 탄 두 사람이"),
    ("비 오는 골목에서", "해 질 녘 바닷가에서", "눈 덮인 산길에서", "조용한 강가에서"),
    ("천천히 걸어간다", "카메라를 바라본다", "하늘을 올려다본다", "달리다가 멈춘다", "손을 흔든다"),
)  # fmt: skip
FRENCH = (
    ("une fille au manteau jaune", "un vieux pêcheur", "deux chevaux", "un garçon à vélo"),
    ("traverse la rue", "s'éloigne dans la brume", "regarde la mer", "s'arrête brusquement"),
    ("sous la pluie", "à l'aube", "près du château", "au bord d'un lac gelé"),
)  # fmt: skip
JAPANESE = (
    ("赤い傘の女性が", "小さな船が", "白い犬が", "二人の子供が", "古い電車が"),
    ("雨の街を", "夕暮れの海辺を", "雪の山道を", "静かな川沿いを", "桜の下を"),
    ("ゆっくり進む", "走り抜ける", "歩いている", "横切る", "遠ざかっていく"),
)
EMOJI = ("🌊", "🎬", "🔥", "🌸", "🚲", "🐈", "🌧️", "👩‍🚀")
FRAME_RATES = (12.0, 15.0, 23.976, 24.0, 25.0, 29.97, 30.0, 48.0, 59.94, 60.0)
SIZES = ((256, 256), (480, 848), (720, 1280), (1280, 720), (768, 768))


def _sentence(rng: random.Random) -> str:
    """One shot in English, with one to three of camera and style behind it."""
    parts = [f"{rng.choice(SUBJECTS)} {rng.choice(ACTIONS)} {rng.choice(PLACES)}"]
    parts += rng.sample((*CAMERAS, *STYLES), rng.randint(0, 3))
    return ", ".join(parts)


def _caption(rng: random.Random) -> str:
    """One caption: mostly English, some Korean, French, Japanese, and some with an emoji."""
    kind = rng.random()
    if kind < 0.06:
        return " ".join(rng.choice(words) for words in KOREAN) + "."
    if kind < 0.12:
        return " ".join(rng.choice(words) for words in FRENCH) + "."
    if kind < 0.17:
        return "".join(rng.choice(words) for words in JAPANESE) + "。"
    if kind < 0.20:
        return f"{_sentence(rng)} {rng.choice(EMOJI)}"
    shots = [_sentence(rng) for _ in range(rng.choice((1, 1, 1, 2, 2, 3)))]
    return ". ".join(shot[0].upper() + shot[1:] for shot in shots) + "."


def _row_text(row: int, seed: int) -> str:
    """Row 3 is empty, rows 7, 57, ... are long, rows 11, 51, ... repeat the row before."""
    if row == 3:
        return ""
    if row % 40 == 11:
        row -= 1
    rng = random.Random(f"caption:{seed}:{row}")
    if row % 50 == 7:
        shots = [_sentence(rng) for _ in range(rng.randint(10, 14))]
        return "The film opens slowly. " + ". ".join(shots) + "."
    return _caption(rng)


def demo_captions(num_rows: int, seed: int = 0) -> pa.Table:
    """A caption table as video data sets have them; fewer rows are a prefix of more rows.

    Columns: id and text (string), fps and score_vmafmotion (double), num_frames, height and width
    (int64). Nothing is null. From 12 rows on it holds an empty caption (row 3), captions longer
    than 77 CLIP tokens (rows 7, 57, ...) and duplicates (rows 11, 51, ... repeat the row before).
    """
    texts, rates, motions, frames, heights, widths = [], [], [], [], [], []
    for row in range(num_rows):
        rng = random.Random(f"clip:{seed}:{row}")
        height, width = rng.choice(SIZES)
        texts.append(_row_text(row, seed))
        rates.append(rng.choice(FRAME_RATES))
        motions.append(rng.randint(0, 2000) / 100)
        frames.append(4 * rng.randint(8, 32) + 1)
        heights.append(height)
        widths.append(width)
    return pa.table(
        {
            "id": pa.array([f"clip-{row:07d}" for row in range(num_rows)], pa.string()),
            "text": pa.array(texts, pa.string()),
            "fps": pa.array(rates, pa.float64()),
            "score_vmafmotion": pa.array(motions, pa.float64()),
            "num_frames": pa.array(frames, pa.int64()),
            "height": pa.array(heights, pa.int64()),
            "width": pa.array(widths, pa.int64()),
        }
    )


class Weights:
    """Random tensors by name: the same for one seed, on any machine and torch version."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self._generator = torch.Generator().manual_seed(seed)

    def add(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        """Nearly normal values: sums of four uniforms, which are exact in float64.

        torch.randn gives other last bits on a CPU with other vector instructions.
        """
        uniform = torch.rand(4, *shape, generator=self._generator, dtype=torch.float32)
        values = (uniform.double().sum(0) - 2.0) * (std * 3**0.5) + mean
        self.tensors[name] = values.float()

    def norm(self, name: str, width: int, *, bias: bool) -> None:
        """A layer norm whose scale is not all ones, so that forgetting it would show."""
        self.add(f"{name}.weight", width, mean=1.0, std=0.2)
        if bias:
            self.add(f"{name}.bias", width, std=0.1)

    def linear(self, name: str, inputs: int, outputs: int) -> None:
        self.add(f"{name}.weight", outputs, inputs, std=inputs**-0.5)
        self.add(f"{name}.bias", outputs, std=0.1)


def _save(
    folder: Path, config: dict[str, Any], weights: Weights, dtype: str, tokenizer: Tokenizer
) -> None:
    """config.json, model.safetensors, tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    torch_dtype = {n: getattr(torch, n) for n in ("float32", "bfloat16", "float16")}[dtype]
    stored = {name: tensor.to(torch_dtype) for name, tensor in weights.tensors.items()}
    save_file(stored, str(folder / "model.safetensors"), metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    is_clip = config["model_type"].startswith("clip")
    named = (
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
        if is_clip
        else {"eos_token": "</s>", "pad_token": "<pad>"}
    )
    tokenizer_config = {
        # The class by which both transformers 4 and 5 take tokenizer.json as it is.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CLIP_POSITIONS if is_clip else 512,
        "unk_token": "<|endoftext|>" if is_clip else "<unk>",
        "clean_up_tokenization_spaces": False,
        **named,
    }
    written = {"config.json": {**config, "torch_dtype": dtype}}
    written["tokenizer_config.json"] = tokenizer_config
    for name, value in written.items():
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        (folder / name).write_text(text, encoding="utf-8")


def write_t5(
    folder: Path,
    corpus: Sequence[str],
    *,
    model_type: str = "t5",
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    feed_forward: int = 128,
    gated: bool = True,
    vocab_size: int = 1000,
    dtype: str = "float32",
    seed: int = 0,
    weights: Weights | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write a random T5 encoder and a tokenizer trained on `corpus`; returns `folder`.

    `model_type` is t5, mt5 or umt5 (umt5: a relative bias in every layer). `gated` is v1.1's gated
    gelu; without it, the first T5's relu. Weights are scaled as T5 scales its own at birth, and
    made by `weights`. A `tokenizer` given is taken instead of training one.
    """
    if model_type not in ("t5", "mt5", "umt5"):
        raise ValueError(f"model_type is {model_type!r}: expected t5, mt5 or umt5.")
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}.")
    head_width = width // heads
    weights = weights or Weights(seed)
    weights.add("shared.weight", vocab_size, width, std=1.0)
    for layer in range(layers):
        block = f"encoder.block.{layer}.layer"
        weights.norm(f"{block}.0.layer_norm", width, bias=False)
        for name in "qkvo":
            std = width**-0.5 if name != "q" else (width * head_width) ** -0.5
            weights.add(f"{block}.0.SelfAttention.{name}.weight", width, width, std=std)
        if layer == 0 or model_type == "umt5":
            bias = f"{block}.0.SelfAttention.relative_attention_bias.weight"
            weights.add(bias, RELATIVE_BUCKETS, heads, std=1.0)
        weights.norm(f"{block}.1.layer_norm", width, bias=False)
        dense = f"{block}.1.DenseReluDense"
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            weights.add(f"{dense}.{name}.weight", feed_forward, width, std=width**-0.5)
        weights.add(f"{dense}.wo.weight", width, feed_forward, std=feed_forward**-0.5)
    weights.norm("encoder.final_layer_norm", width, bias=False)
    config = {
        "architectures": [f"{model_type.upper()}EncoderModel"],
        "model_type": model_type,
        "d_model": width,
        "d_kv": head_width,
        "d_ff": feed_forward,
        "num_layers": layers,
        "num_heads": heads,
        "vocab_size": vocab_size,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
        "relative_attention_num_buckets": RELATIVE_BUCKETS,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "is_encoder_decoder": True,
        "tie_word_embeddings": not gated,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    _save(folder, config, weights, dtype, tokenizer or t5_tokenizer(corpus, vocab_size))
    return folder


def write_clip(
    folder: Path,
    corpus: Sequence[str],
    *,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    vocab_size: int = 1000,
    eos_rule: Literal["first", "argmax"] = "first",
    dtype: str = "float32",
    seed: int = 0,
    weights: Weights | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """Write a random CLIP text encoder (77 positions) and its tokenizer; returns `folder`.

    `eos_rule` is where transformers pools: `first` end-of-text token (config.json has its real id),
    or `argmax` of the ids (config.json says 2, as OpenAI's own checkpoints do). `weights` and
    `tokenizer` as in `write_t5`.
    """
    if vocab_size < 514:
        raise ValueError(f"vocab_size is {vocab_size}: expected 514 or more (bytes and specials).")
    if width % heads:
        raise ValueError(f"width {width} is not a multiple of heads {heads}.")
    tokenizer = tokenizer or clip_tokenizer(corpus, vocab_size)
    weights = weights or Weights(seed)
    embeddings = "text_model.embeddings"
    weights.add(f"{embeddings}.token_embedding.weight", vocab_size, width, std=1.0)
    weights.add(f"{embeddings}.position_embedding.weight", CLIP_POSITIONS, width, std=0.5)
    for layer in range(layers):
        prefix = f"text_model.encoder.layers.{layer}"
        weights.norm(f"{prefix}.layer_norm1", width, bias=True)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights.linear(f"{prefix}.self_attn.{name}", width, width)
        weights.norm(f"{prefix}.layer_norm2", width, bias=True)
        weights.linear(f"{prefix}.mlp.fc1", width, 4 * width)
        weights.linear(f"{prefix}.mlp.fc2", 4 * width, width)
    weights.norm("text_model.final_layer_norm", width, bias=True)
    start, end = (tokenizer.token_to_id(f"<|{name}oftext|>") for name in ("start", "end"))
    config = {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": CLIP_POSITIONS,
        "vocab_size": vocab_size,
        "projection_dim": width,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
        "pad_token_id": 1 if eos_rule == "argmax" else end,
        "bos_token_id": 0 if eos_rule == "argmax" else start,
        "eos_token_id": 2 if eos_rule == "argmax" else end,
    }
    _save(folder, config, weights, dtype, tokenizer)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Write demo captions and two tiny encoders.")
    parser.add_argument("out", type=Path, help="folder to write; made when missing")
    parser.add_argument("--rows", type=int, default=3000, help="captions (default 3000)")
    arguments = parser.parse_args()
    captions = demo_captions(arguments.rows)
    arguments.out.mkdir(parents=True, exist_ok=True)
    table_path = arguments.out / "captions.parquet"
    pq.write_table(captions, table_path, row_group_size=ROW_GROUP_ROWS)
    corpus = captions.column("text").to_pylist()
    t5 = write_t5(arguments.out / "t5", corpus)
    clip = write_clip(arguments.out / "clip", corpus)
    print(f"{table_path}: {captions.num_rows} captions, {len(set(corpus))} distinct")
    print(f"{t5}: T5 v1.1 encoder, random weights, width 64")
    print(f"{clip}: CLIP text encoder, random weights, width 64")


if __name__ == "__main__":
    main()
