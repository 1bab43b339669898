"""The variants of an encoder: ours as a job runs them, and transformers as others run it.

Guarantees: every variant encodes the same captions with the same weights; of those that pad all to
one length, whose forwards cost the same, only the first are run, and counted for all. Ours (`hf`,
`fused`, `shardformer`) run in the forwards that a job has: streams are full, with more of the same
captions, and count by what they hold of those given. A peer gets what its users give it:
transformers' plain mask of ones and zeros, batches of 32 padded to their longest, or all padded to
max_length.
What cannot run here is an InputError with the reason.
Costs: the transformers variants share one copy of the weights (an eager one has its own); the
others load their own.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from embed_precompute.bench.workload import WINDOW, Ids
from embed_precompute.encoders import hf, offload
from embed_precompute.encoders import resolve as encoder_registry
from embed_precompute.encoders.batching import TokenBatch, make_batch
from embed_precompute.encoders.options import Implementation
from embed_precompute.encoders.spec import ResolvedEncoder, TextEncoder
from embed_precompute.encoders.transfers import Pending
from embed_precompute.errors import InputError

REFERENCE: Implementation = "hf"
BASE = "fused"
"""What all the others are compared with."""


@dataclass(frozen=True)
class Own:
    """An implementation of ours, in a job's forwards."""

    implementation: Implementation
    compiled: bool = False


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


MODES: dict[str, dict[str, Own | Peer]] = {
    "t5, attention_mask none": {
        "hf": Own("hf"),
        "hf-eager": Peer("job", attention="eager"),
        "hf-compile": Peer("job", compiled="static"),
        "fused": Own("fused"),
        "fused-compile": Own("fused", compiled=True),
        "shardformer": Own("shardformer"),
    },
    "t5, attention_mask padding": {
        "hf-pad": Peer("pad"),
        "hf-random": Peer("random"),
        "hf-sorted": Peer("sorted"),
        "hf-sorted-compile": Peer("sorted", compiled="dynamic"),
        "hf": Own("hf"),
        "fused": Own("fused"),
        "fused-compile": Own("fused", compiled=True),
    },
    "clip": {
        "hf-pad": Peer("pad"),
        "hf-eager": Peer("pad", attention="eager"),
        "hf-pad-compile": Peer("pad", compiled="static"),
        "hf-sorted": Peer("sorted"),
        "hf": Own("hf"),
        "fused": Own("fused"),
        "fused-compile": Own("fused", compiled=True),
    },
}
"""The variants of each kind of encoder, in the order of the table."""
NAMES = tuple(dict.fromkeys(name for variants in MODES.values() for name in variants))


def check_names(names: Sequence[str] | None) -> None:
    """Raise InputError for a variant that does not exist."""
    unknown = [name for name in names or () if name not in NAMES]
    if unknown:
        raise InputError(f"--variants has {', '.join(unknown)}: known are {', '.join(NAMES)}.")


def mode_of(resolved: ResolvedEncoder) -> str:
    """Which of `MODES` this is."""
    if resolved.pooled:
        return "clip"
    return f"t5, attention_mask {resolved.config.attention_mask}"


def as_implementation(
    resolved: ResolvedEncoder, implementation: Implementation, *, compiled: bool = False
) -> ResolvedEncoder:
    """The same encoder by another implementation of ours. Raises InputError: it cannot be that."""
    buckets = resolved.config.buckets if implementation == REFERENCE else None
    config = dataclasses.replace(
        resolved.config, implementation=implementation, compile=compiled, buckets=buckets
    )
    return encoder_registry.resolve(resolved.name, config, resolved.padded_length)


PADDED_TOKENS = 1 << 14
"""From so many tokens on, forwards that only differ in ids are not run but counted."""


@dataclass(frozen=True)
class Forwards:
    """What a variant runs."""

    batches: list[TokenBatch]
    times: float = 1.0
    """How often each forward counts."""


class VariantMaker:
    """Makes the variants of one encoder."""

    def __init__(self, resolved: ResolvedEncoder, ids: Ids, device: str, output_dtype: str) -> None:
        """`resolved` is the reference, `hf`."""
        self._resolved, self._ids = resolved, ids
        self._device, self._output_dtype = device, output_dtype
        self._models: dict[str | None, Any] = {}

    def make(self, name: str) -> tuple[TextEncoder, Forwards]:
        """A variant and its forwards. Raises InputError: why there is none."""
        mode = mode_of(self._resolved)
        if name not in MODES[mode]:
            raise InputError(f"it is no variant of {mode}: {', '.join(MODES[mode])}.")
        variant = MODES[mode][name]
        if (isinstance(variant, Own) and variant.compiled) or "compile" in name:
            _require_compiler()
        if isinstance(variant, Own):
            return self._own(variant)
        return self._peer(variant)

    def _own(self, variant: Own) -> tuple[TextEncoder, Forwards]:
        if variant.implementation == REFERENCE:
            model = self._model(None)
            encoder: TextEncoder = hf.HfEncoder(
                self._resolved, self._device, self._output_dtype, model
            )
        else:
            resolved = as_implementation(
                self._resolved, variant.implementation, compiled=variant.compiled
            )
            encoder = encoder_registry.build(resolved, self._device, self._output_dtype)
        if not encoder.resolved.packed:
            return encoder, Forwards(list(encoder.resolved.batches(self._ids)))
        given = topped_up(self._ids, encoder.resolved.shapes[0][1])
        times = sum(map(len, self._ids)) / sum(map(len, given))
        return encoder, Forwards(list(encoder.resolved.batches(given)), times)

    def _peer(self, variant: Peer) -> tuple[TextEncoder, Forwards]:
        model = self._model(variant.attention)
        if variant.attention is not None and self._chosen_attention() == variant.attention:
            raise InputError(f"transformers chooses {variant.attention} here by itself: see hf.")
        encoder = PeerEncoder(
            self._resolved, self._device, self._output_dtype, model, variant.compiled
        )
        return encoder, self._frames(variant)

    def _frames(self, variant: Peer) -> Forwards:
        resolved, ids = self._resolved, self._ids
        if variant.frames == "job":
            return Forwards(list(resolved.batches(ids)))
        order = list(range(len(ids)))
        if variant.frames == "sorted":
            order.sort(key=lambda row: len(ids[row]))
        pads = variant.frames == "pad"
        batches: list[TokenBatch] = []
        encoded = 0
        for start in range(0, len(order), WINDOW):
            rows = order[start : start + WINDOW]
            longest = max(len(ids[row]) for row in rows)
            frame = (len(rows), resolved.config.resolved_max_length if pads else longest)
            tokenizer = resolved.tokenizer
            batches.append(make_batch(ids, rows, frame, tokenizer.pad_id, tokenizer.filler))
            encoded += len(rows)
            if pads and encoded * frame[1] >= PADDED_TOKENS:
                break
        return Forwards(batches, times=len(ids) / encoded)

    def _model(self, attention: str | None) -> Any:
        if attention not in self._models:
            asked = {} if attention is None else {"attn_implementation": attention}
            with hf.out_of_memory(hf.weights_too_large(self._resolved, self._device)):
                model = hf.load_model(self._resolved, **asked).to(self._device)
            self._models[attention] = model
        return self._models[attention]

    def _chosen_attention(self) -> str:
        return str(self._model(None).config._attn_implementation)


def topped_up(ids: Ids, stream: int) -> Ids:
    """`ids`, and behind them as many of them again as their streams have room for: a job's streams
    are full, and one that is not would seem cheap, for its attention has little to do."""
    given = list(ids)
    room = -sum(map(len, ids)) % stream
    while fitting := [tokens for tokens in ids if len(tokens) <= room]:
        for tokens in fitting:
            if len(tokens) <= room:
                given.append(tokens)
                room -= len(tokens)
    return given


class PeerEncoder:
    """A transformers text encoder as its users run it, on batches of any shape."""

    def __init__(
        self,
        resolved: ResolvedEncoder,
        device: str,
        output_dtype: str,
        model: Any,
        compiled: Literal["static", "dynamic"] | None,
    ) -> None:
        self.resolved = resolved
        self._model, self._device = model, torch.device(device)
        self._output_dtype: torch.dtype = getattr(torch, output_dtype)
        self._output = "pooler_output" if resolved.pooled else "last_hidden_state"
        self._forward: Callable[..., Any] = model
        self._freezes = compiled == "static" and self._device.type == "cpu"
        if compiled is not None:
            self._forward = torch.compile(model, dynamic=compiled == "dynamic")

    def weight_bytes(self) -> int:
        """See `TextEncoder.weight_bytes`; shared with the other peers of the same attention."""
        return offload.num_bytes(self._model)

    def submit(self, batch: TokenBatch) -> Pending:
        """See `TextEncoder.submit`: at once, as its users do."""
        return Pending(self.encode(batch))

    def encode(self, batch: TokenBatch) -> torch.Tensor:
        """See `TextEncoder.encode`; `batch` may have any shape."""
        message = hf.forward_too_large(self.resolved, batch, self._device)
        with (
            torch.inference_mode(),
            hf.out_of_memory(message),
            hf.tf32(self.resolved),
            self._frozen(),
        ):
            input_ids = torch.from_numpy(batch.input_ids).to(self._device)
            output = self._forward(input_ids=input_ids, attention_mask=self._mask(batch))
            embeddings: torch.Tensor = getattr(output, self._output)
            return embeddings.to(self._output_dtype).cpu().contiguous()

    def _mask(self, batch: TokenBatch) -> torch.Tensor | None:
        if self.resolved.config.attention_mask == "none":
            return None
        place = torch.arange(batch.input_ids.shape[1])
        real = place[None, :] < torch.from_numpy(batch.lengths)[:, None]
        return real.to(torch.int64).to(self._device)

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


def _require_compiler() -> None:
    if encoder_registry.compiler() is None:
        raise InputError(
            "torch.compile needs a C++ compiler, and neither g++ nor clang++ is in PATH (CXX names "
            "another)."
        )
