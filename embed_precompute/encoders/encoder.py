"""What runs token batches: transformers' model (`hf`, `shardformer`) or our own layers (`fused`).

Guarantees: an embedding is bitwise a function of its caption and of the shape that the caption runs
in; neighbours, place and order change no bit. Every forward has one of the decided shapes. If a
forward does not fit in memory, the error names the setting. `submit` does not wait for a GPU, and
its output stays right if a later forward overwrites that output on the device.
Costs: the weights once (mapped from the file if the file has the dtype asked for), and for `fused`
one set of buffers for a forward. On a GPU also one copy within the device per output (some tens of
microseconds), and page-locked memory for every output that is on its way or waits for the writer,
rounded up to a power of two.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from embed_precompute.encoders.fused.stream import one_attention, upload
from embed_precompute.encoders.loading import Source, load_on, out_of_memory
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.encoders.tokenizer import TokenBatch
from embed_precompute.errors import InternalError

RESERVE_BYTES = 1 << 29
"""GPU memory for libraries' workspaces and what the allocator cannot use."""

Embeddings = torch.Tensor | list[torch.Tensor]
"""What a forward made of a batch; [i] is what is stored of its caption i."""


class PendingOutput:
    """The output of a forward that may still be on its way."""

    def __init__(
        self,
        outputs: Mapping[str, Embeddings],
        events: Sequence[torch.cuda.Event] = (),
        finite: Mapping[str, Embeddings] | None = None,
    ) -> None:
        """`outputs` and `finite` may be read when all `events` have happened.

        `finite`: for each stored vector, whether the device found neither inf nor nan in it.
        """
        self._outputs, self._events, self._finite = outputs, events, finite or {}

    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        events: Any = self._events  # torch's events have untyped methods
        return all(event.query() for event in events)

    def wait(self) -> Mapping[str, Embeddings]:
        """The embeddings on the CPU, by suffix. Raises errors that the GPU reported."""
        for event in self._events:
            event.synchronize()
        return self._outputs

    def finite(self) -> dict[str, list[bool]]:
        """After `wait`: for each caption, whether its embedding holds no inf or nan, by suffix.

        Empty if the device did not look.
        """
        return {
            suffix: [bool(each.numpy().all()) for each in flags]
            for suffix, flags in self._finite.items()
        }


class CopyEngine:
    """Copies from one NVIDIA GPU to the host while the GPU computes, on a CUDA stream of its
    own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """A host tensor of the shape and dtype of `like` that the GPU can write by itself.

        torch's allocator of page-locked memory reuses the buffer when no view of it is left. The
        allocator knows which copies into the buffer are still under way.
        """
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
        """Copy after all work that is queued on the GPU by now, in parallel with work that is
        queued later. Returns an event at the end of the copy. Nobody else may write `source`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event.record(self._stream)
        source.record_stream(self._stream)  # its memory is reused only after the copy
        return event


def copy_engine(device: torch.device) -> CopyEngine | None:
    """A copy engine for a GPU; None for a CPU, whose tensors are on the host already."""
    return CopyEngine(device) if device.type == "cuda" else None


def download(
    outputs: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
    engine: CopyEngine | None,
    cut: Callable[[str, torch.Tensor], Embeddings],
    *,
    reused: bool,
) -> PendingOutput:
    """Begin to copy every output to the host in `dtype`.

    `cut(suffix, copy)` returns what is stored of each caption. `reused`: a later forward overwrites
    these tensors. A GPU also looks for inf and nan, which takes the host a pass over the numbers.
    """
    arrived: dict[str, Embeddings] = {}
    finite: dict[str, Embeddings] = {}
    events = []

    def copied(engine: CopyEngine, source: torch.Tensor) -> torch.Tensor:
        target = engine.host_buffer(source)
        events.append(engine.copy(source, target))
        return target

    for suffix, values in outputs.items():
        # Copied within the device first, so that a later forward need not wait for the bus.
        source = values.to(dtype, copy=reused).contiguous()
        if engine is None:
            arrived[suffix] = cut(suffix, source)
            continue
        arrived[suffix] = cut(suffix, copied(engine, source))
        flags = torch.isfinite(source).all(-1, keepdim=True)
        finite[suffix] = cut(suffix, copied(engine, flags))
    return PendingOutput(arrived, events, finite)


class TextEncoder(abc.ABC):
    """A frozen text encoder on a device."""

    reuses_buffers: bool
    """A forward overwrites the outputs of the forward before."""

    def __init__(
        self, resolved: ResolvedEncoder, device: str, output_dtype: str, model: Any
    ) -> None:
        """`model`: transformers' model, loaded on the device; `build` makes it."""
        self.resolved, self.model = resolved, model
        self.device = torch.device(device)
        self._output_dtype: torch.dtype = getattr(torch, output_dtype)
        self._engine = copy_engine(self.device)
        self._outputs = {output.suffix: output for output in resolved.outputs}

    @abc.abstractmethod
    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        """Suffix -> the output on the device.

        Per token: [B, L, D], or [T, D] if packed. Per caption: [number of captions, D].
        """

    def submit(self, batch: TokenBatch) -> PendingOutput:
        """Begin the forward of a batch that `ResolvedEncoder.batches` made.

        `PendingOutput.wait` returns, by suffix, what is stored of each caption, on the CPU,
        contiguous, in the output dtype: [B, L, D] if all positions are stored, a list of [length,
        D] if real positions are stored, [number of captions, D] for an output per caption. Captions
        that only fill up the batch are included. On a CPU the forward is over when this returns.
        """
        self._require_decided(batch)
        with self.computing(batch):
            return download(
                self.forward(batch),
                self._output_dtype,
                self._engine,
                lambda suffix, values: self.cut(batch, suffix, values),
                reused=self.reuses_buffers,
            )

    def encode(self, batch: TokenBatch) -> Mapping[str, Embeddings]:
        """`submit` and wait."""
        return self.submit(batch).wait()

    @contextlib.contextmanager
    def computing(self, batch: TokenBatch) -> Iterator[None]:
        """The context of `forward`: no gradients, TF32 as decided; errors of memory name the
        setting."""
        setting = torch.backends.cuda.matmul
        before = setting.allow_tf32
        setting.allow_tf32 = self.resolved.options.tf32  # not as the process has set it
        try:
            with torch.inference_mode(), out_of_memory(self._too_large(batch)):
                yield
        finally:
            setting.allow_tf32 = before

    def cut(self, batch: TokenBatch, suffix: str, values: torch.Tensor) -> Embeddings:
        """What is stored of each caption, cut from the `values` that `forward` returned."""
        if self._outputs[suffix].per == "caption":
            return values
        kept = self.resolved.opened.tokenizer.keep_first
        if self._outputs[suffix].positions == "all":
            stored = values[:, self.resolved.opened.tokenizer.first :]
            return torch.cat([values[:, :kept], stored], 1) if kept else stored.contiguous()
        rows = values.reshape(-1, values.shape[-1])
        starts, first = batch.starts.tolist(), (batch.starts + batch.first).tolist()
        counts = (batch.stored - kept).tolist()
        cut = [rows[start : start + n] for start, n in zip(first, counts, strict=True)]
        if not kept:
            return cut
        return [
            torch.cat([rows[start : start + kept], rest])
            for start, rest in zip(starts, cut, strict=True)
        ]

    def _require_decided(self, batch: TokenBatch) -> None:
        decision = self.resolved.decision
        shapes = {*decision.shapes, decision.null_shape}
        if batch.input_ids.shape not in shapes or batch.packed is not decision.packed:
            raise InternalError(
                f"A batch is {batch.input_ids.shape}, packed {batch.packed}: expected one of "
                f"{sorted(shapes)}, packed {decision.packed}. ResolvedEncoder.batches makes them."
            )

    def _too_large(self, batch: TokenBatch) -> str:
        resolved, (captions, length) = self.resolved, batch.input_ids.shape
        field, what = resolved.family.batch_setting, f"{captions} captions x {length} tokens"
        if batch.packed:
            field, what = "stream_tokens", f"{length} tokens"
        return (
            f"{resolved.opened.where}.{field} is {getattr(resolved.options, field)}: a forward of "
            f"{what} does not fit in the memory of {self.device}. Lower it and give a new "
            "output.path (batch shapes are part of the fingerprint)."
        )


class HfEncoder(TextEncoder):
    """transformers' model; each line of a batch is one padded caption."""

    reuses_buffers = False

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        ids = upload(torch.from_numpy(batch.input_ids), self.device)
        lengths = upload(torch.from_numpy(batch.lengths), self.device)
        resolved = self.resolved
        return resolved.family.forward(self.model, resolved.options, ids, lengths)


class FusedEncoder(TextEncoder):
    """Our own layers over the weights of transformers' model; captions packed if possible."""

    reuses_buffers = True

    def __init__(
        self, resolved: ResolvedEncoder, device: str, output_dtype: str, model: Any
    ) -> None:
        super().__init__(resolved, device, output_dtype, model)
        decision, tokenizer = resolved.decision, resolved.opened.tokenizer
        longest = tokenizer.longest
        if decision.padded_length is not None:
            longest = max(decision.padded_length, decision.null_shape[1])
        self.layers = resolved.family.fused_layers(
            model, resolved.options, longest, tokenizer, compiled=decision.compiled
        )

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        ids = upload(torch.from_numpy(batch.input_ids).reshape(-1), self.device)
        with one_attention(self.device):
            values = self.layers(ids, batch)
        (output,) = self.resolved.outputs
        if output.per == "token" and batch.packed:
            values = values[: int(batch.lengths.sum())]
        elif output.per == "token":
            values = values.view(*batch.input_ids.shape, -1)
        return {output.suffix: values}


def build(resolved: ResolvedEncoder, device: str, output_dtype: str) -> TextEncoder:
    """Load the model onto `device` (cpu, cuda, cuda:N).

    Raises InputError: damaged checkpoint, too little memory, or an implementation that cannot run.
    """
    opened, implementation = resolved.opened, resolved.decision.implementation
    source = Source(opened.checkpoint, resolved.family, resolved.options)
    model = load_on(
        source,
        getattr(torch, resolved.options.dtype),
        torch.device(device),
        forward_bytes=forward_bytes(resolved),
        may_split=implementation == "hf",
    )
    if implementation == "shardformer":
        from embed_precompute.encoders.shardformer import shardformer_t5

        model = shardformer_t5(model)
    encoder_class = FusedEncoder if implementation == "fused" else HfEncoder
    return encoder_class(resolved, device, output_dtype, model)


def forward_bytes(resolved: ResolvedEncoder) -> int:
    """An upper estimate of the bytes that the largest forward takes in addition to the weights."""
    sizes, decision = resolved.family.sizes(resolved.opened.checkpoint), resolved.decision
    dtype: torch.dtype = getattr(torch, resolved.options.dtype)
    shapes = (*decision.shapes, decision.null_shape)
    lines, length = max(shapes, key=lambda shape: shape[0] * shape[1])
    # Norms, and in float16 the residual, are in float32.
    rows = 16 * sizes.width + dtype.itemsize * (4 * sizes.inner + 2 * sizes.hidden)
    # Only plain attention has a tensor of all scores, and another for their softmax in float32.
    fused = decision.implementation == "fused"
    scores = 0 if fused else sizes.heads * length * (4 + dtype.itemsize)
    return int(lines * length * (rows + scores)) + RESERVE_BYTES
