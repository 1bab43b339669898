"""Bench our encoders next to transformers as others call it, on real or made-up captions.

All variants of an encoder get the same captions: windows that lie evenly over a corpus sorted by
length, shuffled. So a batch that is one window has the padding of a whole-corpus sort, and all
windows together have the corpus' mix of lengths. A peer gets what its users give it: transformers'
plain mask of ones and zeros, batches of 32 padded to their longest, or all padded to max_length.
Of batches that differ only in their ids the first few are run and counted for all.

    python scripts/benchmarks/peers.py CONFIG [--synthetic] [--captions N] [--variants NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from embed_precompute.bench.compare import BenchReport, machine, with_table
from embed_precompute.bench.measure import (
    OURS,
    Contestant,
    Maker,
    as_implementation,
    bench_encoder,
    maker,
)
from embed_precompute.config.files import load_config
from embed_precompute.config.schema import Config
from embed_precompute.encoders.device import compiler, resolve_device
from embed_precompute.encoders.encoder import HfEncoder
from embed_precompute.encoders.loading import Source, load_model
from embed_precompute.encoders.resolve import ResolvedEncoder, open_encoder, resolve
from embed_precompute.encoders.tokenizer import TokenBatch, Tokenized, make_batch
from embed_precompute.errors import InputError

WINDOW = 32
"""Captions of one forward of a peer that pads to the longest."""
NUM_WINDOWS = 6
PADDED_TOKENS = 1 << 14
"""From so many tokens on, forwards that only differ in ids are not run but counted."""
SYNTHETIC_CORPUS = 16_384
SEED = 0
LENGTH_QUANTILES = (
    (0.0, 2), (0.05, 3), (0.10, 5), (0.25, 10), (0.50, 16), (0.70, 25), (0.75, 32), (0.80, 52),
    (0.85, 139), (0.90, 151), (0.95, 170), (0.99, 226), (0.999, 282), (1.0, 512),
)  # fmt: skip
"""Share of captions -> T5 tokens, of 15,811 public video captions and prompts: mean 43."""
WORDS = ("a", "red", "fox", "runs", "over", "the", "old", "stone", "bridge", "at", "dawn", "snow")


@dataclass(frozen=True)
class Peer:
    """transformers, as others call it."""

    frames: Literal["job", "pad", "random", "sorted"]
    """job: as `hf`; pad: all at max_length; random: 32 as they come, padded to their longest;
    sorted: the same of captions sorted by length."""
    attention: str | None = None
    """None: what transformers chooses."""
    compiled: Literal["static", "dynamic"] | None = None
    """torch.compile for one shape (with the weights frozen in, on a CPU), or for all."""


PEERS: dict[str, dict[str, Peer]] = {
    "padded": {
        "hf-eager": Peer("job", attention="eager"),
        "hf-compile": Peer("job", compiled="static"),
    },
    "masked": {
        "hf-pad": Peer("pad"),
        "hf-random": Peer("random"),
        "hf-sorted": Peer("sorted"),
        "hf-sorted-compile": Peer("sorted", compiled="dynamic"),
    },
    "pooled": {
        "hf-pad": Peer("pad"),
        "hf-eager": Peer("pad", attention="eager"),
        "hf-pad-compile": Peer("pad", compiled="static"),
        "hf-sorted": Peer("sorted"),
    },
}


def mode_of(encoder: ResolvedEncoder) -> str:
    """Which of `PEERS` it has."""
    (output,) = encoder.outputs
    if output.per == "caption":
        return "pooled"
    return "padded" if output.positions == "all" else "masked"


class PeerEncoder(HfEncoder):
    """A transformers text encoder as its users run it, on batches of any shape."""

    def __init__(
        self, resolved: ResolvedEncoder, device: str, output_dtype: str, model: Any, peer: Peer
    ) -> None:
        super().__init__(resolved, device, output_dtype, model)
        self._call: Callable[..., Any] = model
        self._freezes = peer.compiled == "static" and self.device.type == "cpu"
        if peer.compiled is not None:
            self._call = torch.compile(model, dynamic=peer.compiled == "dynamic")

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        mask = None
        if mode_of(self.resolved) == "masked":
            position = torch.arange(batch.input_ids.shape[1])
            mask = (position[None, :] < torch.from_numpy(batch.lengths)[:, None]).to(torch.int64)
            mask = mask.to(self.device)
        with self._frozen():
            ids = torch.from_numpy(batch.input_ids).to(self.device)
            output = self._call(input_ids=ids, attention_mask=mask)
        pooled = self.resolved.outputs[0].per == "caption"
        return {"": output.pooler_output if pooled else output.last_hidden_state}

    def _require_decided(self, batch: TokenBatch) -> None:
        """Any shape will do."""

    @contextlib.contextmanager
    def _frozen(self) -> Iterator[None]:
        """torch.compile reads whether to freeze when it traces, not when it is called."""
        if not self._freezes:
            yield
            return
        import torch._inductor.config as inductor

        settings: Any = inductor
        with settings.patch(freezing=True):
            yield


def peer_maker(peer: Peer) -> Maker:
    """Makes a peer for `bench_encoder`."""

    def make(
        encoder: ResolvedEncoder, captions: Tokenized, device: str, output_dtype: str
    ) -> Contestant:
        reference = as_implementation(encoder, "hf")
        if peer.compiled is not None and compiler() is None:
            raise InputError("torch.compile needs a C++ compiler: g++ or clang++ in PATH.")
        opened = reference.opened
        source = Source(opened.checkpoint, reference.family, opened.options)
        asked: dict[str, Any] = (
            {} if peer.attention is None else {"attn_implementation": peer.attention}
        )
        dtype: torch.dtype = getattr(torch, opened.options.dtype)
        model = load_model(source, dtype, **asked).to(device)
        if peer == Peer("job", attention=load_model(source, dtype).config._attn_implementation):
            raise InputError(f"transformers chooses {peer.attention} by itself: see hf.")
        built = PeerEncoder(reference, device, output_dtype, model, peer)
        batches = list(frames(reference, captions, peer.frames))
        share = len(captions) / sum(len(batch.rows) for batch in batches)
        return Contestant(built, batches, [share] * len(batches))

    return make


def frames(
    encoder: ResolvedEncoder, captions: Tokenized, how: Literal["job", "pad", "random", "sorted"]
) -> Iterator[TokenBatch]:
    """The batches of a peer."""
    if how == "job":
        yield from encoder.batches(captions)
        return
    order = list(range(len(captions)))
    if how == "sorted":
        order.sort(key=lambda row: captions.num_ids[row])
    tokenizer, encoded = encoder.opened.tokenizer, 0
    for first in range(0, len(order), WINDOW):
        rows = order[first : first + WINDOW]
        longest = max(captions.num_ids[row] for row in rows)
        length = tokenizer.longest if how == "pad" else longest
        shape = (len(rows), length)
        yield make_batch(captions, rows, shape, tokenizer.pad_id or 0, tokenizer.empty)
        encoded += len(rows)
        if how == "pad" and encoded * length >= PADDED_TOKENS:
            return


def chosen_texts(
    encoder: ResolvedEncoder, corpus: Sequence[str], num_captions: int | None
) -> list[str]:
    """Windows of the corpus, shuffled; where every caption has one length, its first captions."""
    if encoder.decision.padded_length is not None:
        return list(corpus[: num_captions or encoder.decision.shapes[0][0]])
    lengths = np.array(encoder.opened.tokenizer.encode(corpus).num_ids)
    chosen = np.concatenate(windows(lengths, num_captions or NUM_WINDOWS * WINDOW))
    rows = np.random.default_rng(SEED).permutation(chosen)
    return [corpus[row] for row in rows.tolist()]


def windows(lengths: NDArray[np.integer[Any]], num_captions: int) -> list[NDArray[np.intp]]:
    """About `num_captions` indices of `lengths`: runs of the sorted order, evenly spaced.

    A run has `WINDOW` captions (fewer when fewer are asked for) and lies in the middle of its part
    of the order; where all captions are wanted, the last run may be shorter.
    """
    order = np.argsort(lengths, kind="stable")
    size = min(WINDOW, num_captions)
    count = num_captions // size
    if count * size >= len(order):
        return [order[start : start + size] for start in range(0, len(order), size)]
    part = len(order) / count
    starts = [int(number * part + (part - size) / 2) for number in range(count)]
    return [order[start : start + size] for start in starts]


def synthetic_texts(num_captions: int) -> list[str]:
    """Captions of short words whose numbers follow `LENGTH_QUANTILES`, in random order."""
    shares, tokens = zip(*LENGTH_QUANTILES, strict=True)
    at = (np.arange(num_captions) + 0.5) / num_captions
    lengths = np.rint(np.interp(at, shares, tokens)).astype(np.int64)
    rng = np.random.default_rng(SEED)
    return [" ".join(rng.choice(WORDS, max(1, n - 1))) for n in rng.permutation(lengths).tolist()]


def compare(
    config: Config,
    num_captions: int | None = None,
    num_rounds: int = 5,
    variants: Sequence[str] | None = None,
    *,
    synthetic: bool = False,
) -> BenchReport:
    """Measure every encoder of `config` and its peers; `synthetic`: no table is read."""
    device = resolve_device(config.runtime.device)
    if synthetic:
        opened = [open_encoder(name, options) for name, options in sorted(config.encoders.items())]
        encoders = [resolve(each, added_tokens={0: 1}) for each in opened]
        corpus = synthetic_texts(SYNTHETIC_CORPUS)
    else:
        prepared, corpus = with_table(config)
        encoders = list(prepared.encoders)
    benches = []
    for encoder in encoders:
        makers: Mapping[str, Maker] = {
            **{name: peer_maker(peer) for name, peer in PEERS[mode_of(encoder)].items()},
            **{n: maker(n) for n in OURS if OURS[n][0] in encoder.family.implementations},
        }
        wanted = {name: make for name, make in makers.items() if not variants or name in variants}
        texts = chosen_texts(encoder, corpus, num_captions)
        dtype = config.output.dtype
        benches.append(bench_encoder(encoder, texts, wanted, num_rounds, device, dtype))
    return BenchReport(machine(device), benches)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our encoders and transformers' users'.")
    parser.add_argument("config", type=Path)
    parser.add_argument("--captions", type=int, help="windows of 32 (default 192, or one batch)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--synthetic", action="store_true", help="made-up captions, no table")
    parser.add_argument("--json", type=Path, help="write the figures there")
    arguments = parser.parse_args()
    report = compare(
        load_config(arguments.config),
        arguments.captions,
        arguments.rounds,
        arguments.variants,
        synthetic=arguments.synthetic,
    )
    print("\n".join(report.lines()))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(report.to_json(), indent=2) + "\n")


if __name__ == "__main__":
    main()
