"""Print how far our encoders are from a transcription of Open-Sora's text embedder.

Guarantees: the transcription (`reference`) shares no code with the package: transformers' own
tokenizer pads to max_length, more pads follow for seq_align, transformers' own model runs without a
mask. Every implementation sees the same captions in one batch of the same size.
Costs: about a minute on two cores; the encoders are tiny, of the real architectures, with random
weights. Nothing is downloaded.

    python scripts/parity_table.py [--max-length 512]
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers

from embed_precompute.encoders import families
from embed_precompute.encoders.embedder import HFEmbedder
from embed_precompute.encoders.encoder import build
from embed_precompute.encoders.resolve import open_encoder, resolve
from embed_precompute.encoders.shardformer import check_usable
from embed_precompute.errors import InputError
from make_demo import demo_captions, write_clip, write_t5

CORPUS_ROWS = 200
T5_FAMILIES: dict[str, dict[str, Any]] = {
    "T5 v1.1": {"model_type": "t5"},
    "T5 v1.0": {"model_type": "t5", "gated": False},
    "mT5": {"model_type": "mt5"},
    "umT5": {"model_type": "umt5"},
}
CLIP_FAMILIES: dict[str, Literal["first", "argmax"]] = {
    "CLIP, first EOS": "first",
    "CLIP, argmax": "argmax",
}
MODELS: dict[str, Any] = {
    "T5 v1.1": transformers.T5EncoderModel,
    "T5 v1.0": transformers.T5EncoderModel,
    "mT5": transformers.MT5EncoderModel,
    "umT5": transformers.UMT5EncoderModel,
    "CLIP, first EOS": transformers.CLIPTextModel,
    "CLIP, argmax": transformers.CLIPTextModel,
}
FAMILIES = tuple(MODELS)
ALIGNMENTS = {1: 0, 2: 1, 4: 3, 8: 7}
"""seq_align -> the pads that `added_tokens_for` makes it need: as many as it can."""
DTYPES: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; differences are max|a - b| / max|b|, 0 only where bits are equal."""

    family: str
    dtype: str
    attention: str
    seq_align: int
    added_tokens: int
    shape: tuple[int, ...]
    embedder: float
    """HFEmbedder."""
    job: float
    """What a precompute job encodes with `hf`; CLIP runs in the caption's own bucket there."""
    fused: float
    """What it encodes with `fused`, which is what `auto` means."""
    shardformer: float | None
    """HFEmbedder with shardformer; None where it cannot run."""


def write_family(folder: Path, family: str, corpus: Sequence[str]) -> Path:
    """A tiny random checkpoint of the family."""
    if family in CLIP_FAMILIES:
        return write_clip(folder, corpus, eos_rule=CLIP_FAMILIES[family])
    return write_t5(folder, corpus, **T5_FAMILIES[family])


def captions() -> tuple[list[str], list[str]]:
    """The corpus of the tokenizers; eight captions: long, empty, repeated, not ASCII."""
    corpus: list[str] = demo_captions(CORPUS_ROWS).column("text").to_pylist()
    longest = max(corpus, key=len)
    return corpus, [*corpus[:3], "", longest * 12, corpus[0], "café 빨간 赤い", longest]


def added_tokens_for(seq_align: int, max_length: int) -> int:
    """Tokens of a video for which the text needs every pad that seq_align can ask for."""
    return -(max_length + ALIGNMENTS[seq_align]) % seq_align + 40 * seq_align


def reference(
    family: str, folder: Path, *, max_length: int, dtype: str, **hf_kwargs: Any
) -> Callable[[Sequence[str], int, int], torch.Tensor]:
    """Open-Sora's HFEmbedder in our words: (captions, added_tokens, seq_align) -> embeddings."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    name = "torch_dtype" if transformers.__version__.startswith("4.") else "dtype"
    hf_kwargs[name] = getattr(torch, dtype)
    model = MODELS[family].from_pretrained(folder, **hf_kwargs).eval()
    key = "pooler_output" if family in CLIP_FAMILIES else "last_hidden_state"

    def run(texts: Sequence[str], added_tokens: int, seq_align: int) -> torch.Tensor:
        input_ids = tokenizer(
            list(texts),
            truncation=True,
            max_length=max_length,
            padding="max_length",
            return_tensors="pt",
        )["input_ids"]
        while (added_tokens + input_ids.shape[1]) % seq_align:
            pad = torch.full((len(texts), 1), tokenizer.pad_token_id, dtype=torch.int64)
            input_ids = torch.cat([input_ids, pad], dim=1)
        with torch.no_grad():
            output: torch.Tensor = model(input_ids=input_ids, attention_mask=None)[key]
        return output

    return run


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """max|a - b| / max|b|; 0.0 exactly when every bit is equal."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        raise ValueError(f"{ours.shape} {ours.dtype} against {theirs.shape} {theirs.dtype}")
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def encoded_by_job(
    folder: Path, texts: Sequence[str], dtype: Any, *, kind: Any, **fields: Any
) -> torch.Tensor:
    """[B, L, D] or [B, C] as a precompute job computes them."""
    options = families.FAMILIES[kind].options(
        kind=kind, pretrained=str(folder), dtype=dtype, **fields
    )
    resolved = resolve(open_encoder("encoder", options))
    encoder = build(resolved, "cpu", dtype)
    lines: dict[int, torch.Tensor] = {}
    for batch in resolved.batches(resolved.opened.tokenizer.encode(texts)):
        values = encoder.encode(batch)[""]
        lines.update({int(row): values[i] for i, row in enumerate(batch.rows)})
    return torch.stack([lines[row] for row in range(len(texts))])


def rows_of(family: str, folder: Path, dtype: Any, max_length: int, **hf: Any) -> Iterator[Row]:
    """The table's lines of one family and dtype; CLIP with added tokens that need no pad."""
    _, texts = captions()
    is_clip = family in CLIP_FAMILIES
    length = 77 if is_clip else max_length
    theirs = reference(family, folder, max_length=length, dtype=dtype, **hf)
    module: Any = "CLIPTextModel" if is_clip else "T5EncoderModel"
    ours = HFEmbedder(str(folder), length, module, torch_dtype=getattr(torch, dtype), **hf)
    sharded = _shardformer(family, folder, length, dtype)
    for seq_align in ALIGNMENTS:
        added = -length % seq_align if is_clip else added_tokens_for(seq_align, length)
        expected = theirs(texts, added, seq_align)
        fields: dict[str, Any] = {"kind": "clip", "batch_size": len(texts)}
        if not is_clip:
            tokens = len(texts) * expected.shape[1]
            fields = {"kind": "t5", "max_length": length, "batch_tokens": tokens}
            fields |= {"seq_align": seq_align, "added_tokens": added}
        job = {
            name: encoded_by_job(folder, texts, dtype, implementation=name, **fields)
            for name in ("hf", "fused")
        }
        yield Row(
            family=family,
            dtype=dtype,
            attention=str(ours.hf_module.config._attn_implementation),
            seq_align=seq_align,
            added_tokens=added,
            shape=tuple(expected.shape),
            embedder=relative(ours(texts, added, seq_align), expected),
            job=relative(job["hf"], expected),
            fused=relative(job["fused"], expected),
            shardformer=relative(sharded(texts, added, seq_align), expected) if sharded else None,
        )


def _shardformer(family: str, folder: Path, length: int, dtype: str) -> HFEmbedder | None:
    if family in CLIP_FAMILIES:
        return None
    try:
        check_usable("not measured", T5_FAMILIES[family]["model_type"])
    except InputError:
        return None
    return HFEmbedder(str(folder), length, shardformer=True, torch_dtype=getattr(torch, dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description="Our encoders against Open-Sora's semantics.")
    parser.add_argument("--max-length", type=int, default=512, help="T5's (default 512)")
    arguments = parser.parse_args()
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, CPU")
    print("max|a - b| / max|b| against the transcription; 0 where every bit is equal\n")
    head = "family, dtype, attention, seq_align, added, shape, HFEmbedder, hf, fused, shardformer"
    print(f"| {head.replace(', ', ' | ')} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    corpus, _ = captions()
    with tempfile.TemporaryDirectory() as folder:
        for number, family in enumerate(FAMILIES):
            checkpoint = write_family(Path(folder, str(number)), family, corpus)
            for dtype in DTYPES:
                for row in rows_of(family, checkpoint, dtype, arguments.max_length):
                    print(_line(row), flush=True)


def _line(row: Row) -> str:
    numbers = [
        "-" if value is None else "0" if value == 0 else f"{value:.1e}"
        for value in (row.embedder, row.job, row.fused, row.shardformer)
    ]
    shape = " x ".join(map(str, row.shape))
    cells = [row.family, row.dtype, row.attention, row.seq_align, row.added_tokens, shape, *numbers]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
