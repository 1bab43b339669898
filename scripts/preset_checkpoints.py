"""Tiny random checkpoints of the encoders that presets name, with tokenizers of their kind.

Guarantees: the real special tokens and prompts of chat templates, real architectures, real forms on
disk (with a vision tower, with a head, the text tower alone); weights that hide nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from make_demo import write_clip, write_t5

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>")
GEMMA = ("<pad>", "<eos>", "<bos>", "<unk>")
QWEN_CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
"""What Qwen2.5's and Qwen3's own chat templates make of a system and a user message."""
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 700,
    "max_position_embeddings": 4096,
}


def write_tokenizer(
    folder: Path,
    corpus: Sequence[str],
    special: Sequence[str],
    *,
    begin: str | None = None,
    metaspace: bool = False,
    **names: str,
) -> None:
    """Byte pairs, of bytes as Llama's and Qwen's or of characters with metaspace as Gemma's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None))
    alphabet: list[str] = pre_tokenizers.ByteLevel.alphabet()
    if metaspace:
        alphabet = [chr(code) for code in range(0x21, 0x7F)] + ["\u2581", "\n"]
        tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
        tokenizer.decoder = decoders.Metaspace()
    else:
        words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        rest = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        split = pre_tokenizers.Split(Regex(words + rest), "isolated")
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(special),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    if begin is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=None, special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    make: Any = transformers.PreTrainedTokenizerFast
    fast = make(tokenizer_object=tokenizer, **names)
    fast.padding_side = "right"
    if special is QWEN:
        fast.chat_template = QWEN_CHAT
    fast.save_pretrained(str(folder))


def save(folder: Path, model: Any) -> Path:
    """Save a model with random weights that hide nothing: norms that are not 1, biases not 0."""
    torch.manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.normal_(0.0 if "Gemma" in type(model).__name__ else 1.0, 0.2)
            else:
                weight.normal_(0.0, weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.2)
    model.save_pretrained(str(folder), safe_serialization=True)
    return folder


def write_llama(folder: Path, corpus: Sequence[str]) -> Path:
    names: dict[str, Any] = {
        "eos_token": "<|eot_id|>",
        "pad_token": "<|end|>",
        "bos_token": LLAMA[0],
    }
    write_tokenizer(folder, corpus, LLAMA, begin=LLAMA[0], **names)
    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=5)
    return save(folder, transformers.LlamaModel(config))


def write_qwen3(
    folder: Path, corpus: Sequence[str], *, layers: int, name: str = "Qwen3Model"
) -> Path:
    write_tokenizer(folder, corpus, QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    config = transformers.Qwen3Config(**SIZES, num_hidden_layers=layers)
    return save(folder, getattr(transformers, name)(config))


def write_qwen_vl(folder: Path, corpus: Sequence[str], *, name: str, layers: int = 4) -> Path:
    """Qwen2.5-VL or Qwen3-VL, whole with a tiny vision tower, or its text tower alone."""
    write_tokenizer(folder, corpus, QWEN, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    family = name.split("VL", maxsplit=1)[0] + "VL"
    model = getattr(transformers, name)
    sections = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    text = {**SIZES, "num_hidden_layers": layers, "rope_scaling": sections}
    if name.endswith("TextModel"):
        return save(folder, model(getattr(transformers, f"{family}TextConfig")(**text)))
    sight: dict[str, Any] = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    sight |= {"out_hidden_size": 32, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}
    tokens = {"image_token_id": 600, "video_token_id": 601}
    tokens |= {"vision_start_token_id": 602, "vision_end_token_id": 603}
    config = getattr(transformers, f"{family}Config")(
        text_config=text, vision_config=sight, **tokens
    )
    return save(folder, model(config))


def write_gemma2(folder: Path, corpus: Sequence[str]) -> Path:
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    write_tokenizer(folder, corpus, GEMMA, begin="<bos>", metaspace=True, **names)
    more: dict[str, Any] = {"sliding_window": 64, "query_pre_attn_scalar": 8}
    config = transformers.Gemma2Config(**SIZES, **more, num_hidden_layers=4)
    return save(folder, transformers.Gemma2Model(config))


def write_gemma3(folder: Path, corpus: Sequence[str]) -> Path:
    """With a tiny vision tower; every second layer sees 64 tokens only."""
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    write_tokenizer(folder, corpus, GEMMA, begin="<bos>", metaspace=True, **names)
    more = {"sliding_window": 64, "sliding_window_pattern": 2, "query_pre_attn_scalar": 8}
    text = {**SIZES, **more, "num_hidden_layers": GEMMA3_LAYERS}
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sight |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=sight, mm_tokens_per_image=4, image_token_index=699
    )
    return save(folder, transformers.Gemma3ForConditionalGeneration(config))


GEMMA3_LAYERS = 4


def write_projected_clip(
    folder: Path, corpus: Sequence[str], *, width: int, pad: str | None = None
) -> Path:
    """CLIP as SD3 has it, with its projection; `pad`: another pad token than the end token."""
    write_clip(folder, corpus, width=width)
    path = folder / "model.safetensors"
    values = torch.randn(width, width, generator=torch.Generator().manual_seed(1)) / 8
    save_file({**load_file(path), "text_projection.weight": values}, path, {"format": "pt"})
    change(folder / "config.json", architectures=["CLIPTextModelWithProjection"])
    if pad is not None:
        change(folder / "tokenizer_config.json", pad_token=pad)
    return folder


def change(path: Path, **values: Any) -> None:
    """Set values of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_bytes()), **values}), encoding="utf-8")


def write_byt5(folder: Path, corpus: Sequence[str]) -> Path:
    """ByT5's 256 bytes and its 128 other tokens; its tokenizer has no vocabulary file."""
    write_t5(folder, corpus, vocab_size=384)
    for path in folder.glob("*token*"):
        path.unlink()
    transformers.ByT5Tokenizer().save_pretrained(str(folder))
    return folder


CONNECTOR = "connector/diffusion_pytorch_model.safetensors"


def write_ltx2(folder: Path, corpus: Sequence[str]) -> Path:
    write_gemma3(folder, corpus)
    (folder / CONNECTOR).parent.mkdir()
    values = torch.randn(32, 32 * (GEMMA3_LAYERS + 1), generator=torch.Generator().manual_seed(1))
    save_file({"text_proj_in.weight": values / 12}, folder / CONNECTOR)
    return folder
