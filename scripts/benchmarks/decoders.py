"""Bench decoder-only models of real shapes with random weights, and print a table of each question.

packed: captions in the templates of video models, packed (`fused`), next to transformers padded to
the preset's length, in random batches of 32, sorted, and sorted and compiled. layers: what it saves
to leave out the layers after the last one that is taken. prefix: what a shared template saves, for
short captions, and how far the embeddings are from those without sharing.

The width is divided by `--divide` (the width of a head is not), and `--layers` layers are measured;
the time is that of the linears nearly alone, so the ratios hold for the depth of the real model.
The vocabulary is small: a byte pair encoding of the captions, with one token that templates are
made of. A checkpoint that is in the folder already is used again.

    python scripts/benchmarks/decoders.py FOLDER packed layers prefix [--captions FILE] [--divide 2]
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent.parent))  # scripts/
sys.path.insert(0, str(Path(__file__).parent))

import peers
from embed_precompute.bench.measure import Contestant, EncoderBench, Maker, bench_encoder, maker
from embed_precompute.encoders.checkpoint import quiet_transformers
from embed_precompute.encoders.device import environment, resolve_device
from embed_precompute.encoders.encoder import build
from embed_precompute.encoders.families.decoder import DecoderOptions
from embed_precompute.encoders.resolve import ResolvedEncoder, open_encoder, resolve
from embed_precompute.encoders.tokenizer import Tokenized
from make_demo import demo_captions

MARK, END = "<|template|>", "<|end|>"
VOCABULARY = 8192
SHORT = 50
"""Tokens of a caption of `prefix`, with the end of the template."""


@dataclass(frozen=True)
class Shape:
    """A published model's sizes."""

    kind: str
    """transformers' class without Config or Model."""
    width: int
    hidden: int
    heads: int
    key_heads: int
    head_width: int
    layers: int

    def divided(self, by: int, layers: int) -> Shape:
        """Narrower by `by`, with `layers` layers."""
        groups = self.heads // self.key_heads
        key_heads = max(1, self.key_heads // by)
        return dataclasses.replace(
            self,
            width=self.width // by,
            hidden=self.hidden // by,
            heads=key_heads * groups,
            key_heads=key_heads,
            layers=layers,
        )


@dataclass(frozen=True)
class Model:
    """A video model's encoder and its template."""

    shape: Shape
    before: int
    """Tokens of the template before a caption."""
    max_length: int
    used: int
    """The highest layer that is taken."""


LLAMA_8B = Shape("Llama", 4096, 14336, 32, 8, 128, 32)
QWEN2_7B = Shape("Qwen2", 3584, 18944, 28, 4, 128, 28)
QWEN3_4B = Shape("Qwen3", 2560, 9728, 32, 8, 128, 36)
QWEN3_32B = Shape("Qwen3", 5120, 25600, 64, 8, 128, 64)
MISTRAL_24B = Shape("Mistral", 5120, 32768, 32, 8, 128, 40)
GEMMA2_2B = Shape("Gemma2", 2304, 9216, 8, 4, 256, 26)
MODELS = {
    "HunyuanVideo": Model(LLAMA_8B, 95, 256, 30),
    "HunyuanVideo 1.5": Model(QWEN2_7B, 108, 1000, 26),
    "Z-Image": Model(QWEN3_4B, 3, 512, 35),
    "Sana": Model(GEMMA2_2B, 230, 300, 26),
    "Flux.2 dev": Model(MISTRAL_24B, 40, 512, 30),
    "MiniMax-H3": Model(QWEN3_32B, 0, 1024, 50),
}
PACKED = ("HunyuanVideo", "HunyuanVideo 1.5", "Z-Image", "Sana")
CUT = ("MiniMax-H3", "Flux.2 dev", "HunyuanVideo")
PREFIXES = (95, 230)
VARIANTS = ("fused", "hf-pad", "hf-random", "hf-sorted", "hf-sorted-compile")


def main() -> None:
    arguments = _parser().parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    corpus = _corpus(arguments.captions)
    arguments.device = resolve_device(arguments.device)
    print(", ".join(f"{k} {v}" for k, v in environment(arguments.device).items()), flush=True)
    for name in arguments.tables:
        print()
        {"packed": packed, "layers": layers, "prefix": prefix}[name](arguments, corpus)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Decoders of real shapes, side by side.")
    parser.add_argument("folder", type=Path, help="checkpoints go there")
    parser.add_argument("tables", nargs="+", choices=("packed", "layers", "prefix"))
    parser.add_argument("--captions", type=Path, help="parquet with a column text (default: demo)")
    parser.add_argument("--divide", type=int, default=2, help="of the widths (2); layers: 8")
    parser.add_argument("--layers", type=int, default=2, help="measured; layers: all (default 2)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--num-captions", type=int, default=192, help="default 192")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--device", default="auto", help="as runtime.device")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), help="of packed and layers")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    return parser


def packed(arguments: argparse.Namespace, corpus: list[str]) -> None:
    """fused next to transformers as others call it."""
    print("| template of | tokens: template, caption | fused: captions/s | of GEMM | fused is |")
    print("|---|---|---|---|---|", flush=True)
    for name in arguments.models or PACKED:
        model = MODELS[name]
        shape = model.shape.divided(arguments.divide, arguments.layers)
        encoder = _encoder(arguments, shape, corpus, model.before, model.max_length)
        texts = peers.chosen_texts(encoder, corpus, arguments.num_captions)
        makers = {
            **{each: peers.peer_maker(peer) for each, peer in peers.PEERS["masked"].items()},
            "fused": maker("fused"),
        }
        makers = {each: makers[each] for each in arguments.variants}
        found = _bench(arguments, encoder, texts, makers)
        ratios, own = [], "-"
        for measured in found.measured:
            figures = found.figures(measured)
            if measured.variant == "fused":
                own = f"{figures['captions_per_s']:,.1f} | {figures['of_gemm']:.2f}"
            elif figures["fused_is"] is not None:
                ratios.append(f"{figures['fused_is']:.2f}x {measured.variant}")
        ratios += [f"{variant}: {reason}" for variant, reason in found.left_out.items()]
        tokens = encoder.opened.tokenizer.encode(texts).num_ids
        length = statistics.median(tokens) - model.before
        print(
            f"| {name} | {model.before}, {length:.0f} | {own} | {', '.join(ratios)} |", flush=True
        )


def layers(arguments: argparse.Namespace, corpus: list[str]) -> None:
    """All layers next to those that are used; narrow, for there are many."""
    print("| model | layers | used | time with those | captions/s |")
    print("|---|---|---|---|---|", flush=True)
    for name in arguments.models or CUT:
        model = MODELS[name]
        shape = model.shape.divided(max(8, arguments.divide), model.shape.layers)
        encoder = _encoder(arguments, shape, corpus, model.before, model.max_length)
        texts = peers.chosen_texts(encoder, corpus, arguments.num_captions)
        makers = {"all": _with(), "used": _with(layers=(model.used,))}
        found = _bench(arguments, encoder, texts, makers)
        ratio, speed = _ratio(found, "used", "all"), _speed(found, "used")
        print(
            f"| {name} | {shape.layers} | {model.used} | {ratio:.2f} | {speed:,.1f} |", flush=True
        )


def prefix(arguments: argparse.Namespace, corpus: list[str]) -> None:
    """A shared template next to a computed one."""
    print("| prefix | caption | shared is | captions/s | largest difference |")
    print("|---|---|---|---|---|", flush=True)
    shape = LLAMA_8B.divided(arguments.divide, arguments.layers)
    for before in PREFIXES:
        encoder = _encoder(arguments, shape, corpus, before, 256)
        texts = _of_length(encoder, corpus, SHORT, arguments.num_captions)
        makers = {"compute": _with(), "shared": _with(prefix="shared")}
        found = _bench(arguments, encoder, texts, makers)
        ratio, speed = _ratio(found, "compute", "shared"), _speed(found, "shared")
        apart = _difference(arguments, encoder, texts[:16])
        print(f"| {before} | {SHORT} | {ratio:.2f}x | {speed:,.1f} | {apart:.1e} |", flush=True)


def _bench(
    arguments: argparse.Namespace,
    encoder: ResolvedEncoder,
    texts: Sequence[str],
    makers: dict[str, Maker],
) -> EncoderBench:
    return bench_encoder(
        encoder, texts, makers, arguments.rounds, arguments.device, arguments.dtype
    )


def _with(**options: Any) -> Maker:
    """Makes `fused` with other options."""

    def make(
        encoder: ResolvedEncoder, captions: Tokenized, device: str, output_dtype: str
    ) -> Contestant:
        return maker("fused")(_changed(encoder, **options), captions, device, output_dtype)

    return make


def _changed(encoder: ResolvedEncoder, **options: Any) -> ResolvedEncoder:
    changed = dataclasses.replace(encoder.options, **options)
    return resolve(dataclasses.replace(encoder.opened, options=changed))


def _ratio(found: EncoderBench, above: str, below: str) -> float:
    seconds = {measured.variant: measured.round_s for measured in found.measured}
    pairs = zip(seconds[above], seconds[below], strict=True)
    return statistics.median(one / other for one, other in pairs)


def _speed(found: EncoderBench, variant: str) -> float:
    seconds = {measured.variant: measured.round_s for measured in found.measured}
    return found.num_captions / statistics.median(seconds[variant])


def _difference(
    arguments: argparse.Namespace, encoder: ResolvedEncoder, texts: Sequence[str]
) -> float:
    """max |a - b| / max |b| of embeddings with a shared prefix and without."""
    captions, stored = encoder.opened.tokenizer.encode(texts), []
    for setting in ("compute", "shared"):
        variant = _changed(encoder, implementation="fused", prefix=setting)
        built = build(variant, arguments.device, "float32")
        rows: dict[int, torch.Tensor] = {}
        for batch in variant.batches(captions):
            values = built.encode(batch)[""]
            rows |= {row: values[line] for line, row in enumerate(batch.rows.tolist())}
        stored.append(torch.cat([rows[row] for row in range(len(texts))]))
    computed, shared = stored
    return float((shared - computed).abs().max() / computed.abs().max())


def _of_length(
    encoder: ResolvedEncoder, corpus: Sequence[str], length: int, count: int
) -> list[str]:
    """Captions that are cut off to `length` tokens, with the template's end."""
    tokenizer = encoder.opened.tokenizer
    long = [text for text in corpus if len(text) > 2 * length] or list(corpus)
    texts: list[str] = []
    for number in range(count):
        words = " ".join(long[(number + each) % len(long)] for each in range(length)).split()
        low, high = 1, min(len(words), length)
        while low < high:  # the most words that fit
            middle = (low + high + 1) // 2
            tokens = tokenizer.encode([" ".join(words[:middle])]).num_ids[0] - tokenizer.first
            low, high = (middle, high) if tokens <= length else (low, middle - 1)
        texts.append(" ".join(words[:low]))
    return texts


def _encoder(
    arguments: argparse.Namespace, shape: Shape, corpus: list[str], before: int, max_length: int
) -> ResolvedEncoder:
    options = DecoderOptions(
        pretrained=str(_checkpoint(arguments.folder, shape, arguments.dtype, corpus)),
        template=f"{MARK * before}{{text}}{END}",
        max_length=max_length,
        dtype=arguments.dtype,
    )
    return resolve(open_encoder("decoder", options))


def _checkpoint(folder: Path, shape: Shape, dtype: str, corpus: list[str]) -> Path:
    """A random checkpoint, with a tokenizer of its own."""
    target = folder / f"{shape.kind}-{shape.width}-{shape.layers}-{dtype}"
    if (target / "tokenizer.json").exists():  # written last
        return target
    config = getattr(transformers, f"{shape.kind}Config")(
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.head_width,
        num_hidden_layers=shape.layers,
        vocab_size=VOCABULARY,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with quiet_transformers():
        model = getattr(transformers, f"{shape.kind}Model")(config).to(getattr(torch, dtype))
        model.save_pretrained(str(target))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, MARK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast: Any = transformers.PreTrainedTokenizerFast
    fast = fast(tokenizer_object=tokenizer, eos_token=END)
    fast.save_pretrained(str(target))
    return target


def _corpus(captions: Path | None) -> list[str]:
    table = demo_captions(3000) if captions is None else pq.read_table(captions, columns=["text"])
    return [text for text in table.column("text").to_pylist() if text]


if __name__ == "__main__":
    main()
