"""What runs token batches: transformers' model (`hf`, `shardformer`) or our own layers (`fused`).

Our own layers can be resident, or streamed: then a window of many batches passes each layer before
the next layer's weights come. A loop is turned inside out, and no bit changes.

Guarantees: an embedding is bitwise a function of its caption and of the shape that the caption runs
in; neighbours, place and order change no bit. Every forward has one of the decided shapes. If a
forward does not fit in memory, the error names the setting. `submit` does not wait for a GPU, and
its output stays right if a later forward overwrites that output on the device.
Costs: the weights once (mapped from the file if the file has the dtype asked for), and for `fused`
one set of buffers for a forward. Streamed: two layers instead of the weights, and the residual of a
window, `WINDOW_TOKENS` rows. On a GPU also one copy within the device per output (some tens of
microseconds), and page-locked memory for every output that is on its way or waits for the writer,
rounded up to a power of two.
"""

from __future__ import annotations

import abc
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from embed_precompute.encoders.fused.stream import FusedLayers, one_attention, upload
from embed_precompute.encoders.loading import (
    GB,
    Source,
    free_memory,
    load_on,
    loaded_bytes,
    out_of_memory,
)
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.encoders.streamed import StreamedWeights
from embed_precompute.encoders.tokenizer import TokenBatch
from embed_precompute.errors import InputError, InternalError
from embed_precompute.steps import Work

log = logging.getLogger(__name__)
WINDOW_TOKENS = 65536
"""About this many tokens pass a layer of streamed weights before the next layer comes. The time to
read a layer is then small beside the time to compute with it, on a CPU and behind a GPU's bus."""
RESERVE_BYTES = 1 << 29
"""GPU memory for libraries' workspaces and what the allocator cannot use."""

Embeddings = torch.Tensor | list[torch.Tensor]
"""What a forward made of a batch; [i] is what is stored of its caption i."""
WeightsMode = Literal["resident", "stream", "auto"]
"""See `runtime.weights`."""
GoOn = Callable[[float], bool]
"""Called with the part of the work that is done, from 0 to 1; False: leave the rest."""


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
            return self._download(batch, self.forward(batch))

    def submit_all(
        self, batches: Iterable[TokenBatch], go_on: GoOn = lambda done: True
    ) -> Iterator[PendingOutput]:
        """`submit` the batches one after the other, each when its output is asked for.

        Streamed weights take many batches at a time: the first of them then takes the time of all.
        In between, `go_on` is told which part of `batches` is done beyond those whose output was
        asked for. If it returns False, there are no further outputs.
        """
        return map(self.submit, batches)

    def _download(self, batch: TokenBatch, outputs: Mapping[str, torch.Tensor]) -> PendingOutput:
        return download(
            outputs,
            self._output_dtype,
            self._engine,
            lambda suffix, values: self.cut(batch, suffix, values),
            reused=self.reuses_buffers,
        )

    def encode(self, batch: TokenBatch) -> Mapping[str, Embeddings]:
        """`submit` and wait."""
        return self.submit(batch).wait()

    @contextlib.contextmanager
    def computing(self, batch: TokenBatch, too_large: str = "") -> Iterator[None]:
        """The context of `forward`: no gradients, TF32 as decided; errors of memory name the
        setting, or say `too_large`."""
        setting = torch.backends.cuda.matmul
        before = setting.allow_tf32
        setting.allow_tf32 = self.resolved.options.tf32  # not as the process has set it
        try:
            with torch.inference_mode(), out_of_memory(too_large or self._too_large(batch)):
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
        with one_attention(self.device):
            return self._outputs_of(batch, self.layers(self._ids(batch), batch))

    def _ids(self, batch: TokenBatch) -> torch.Tensor:
        return upload(torch.from_numpy(batch.input_ids).reshape(-1), self.device)

    def _outputs_of(self, batch: TokenBatch, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`values`: what the layers return."""
        (output,) = self.resolved.outputs
        if output.per == "token" and batch.packed:
            values = values[: int(batch.extents.sum())]
        elif output.per == "token":
            values = values.view(*batch.input_ids.shape, -1)
        return {output.suffix: values}


class StreamedEncoder(FusedEncoder):
    """Our own layers, with the weights of one layer at a time."""

    def __init__(
        self, resolved: ResolvedEncoder, device: str, output_dtype: str, weights: StreamedWeights
    ) -> None:
        super().__init__(resolved, device, output_dtype, weights.model)
        assert isinstance(self.layers, FusedLayers), "why_not_streamed says what has no steps"
        self._steps: FusedLayers[Any] = self.layers
        self._weights = weights
        weights.stream(self._steps.blocks)
        log.info(
            "%s: streamed weights, %d layers of %.2f GB",
            *(resolved.opened.where, len(self._steps.blocks), weights.layer_bytes / GB),
        )

    def forward(self, batch: TokenBatch) -> dict[str, torch.Tensor]:
        states = self._before_end([batch], lambda done: True, 1.0)
        assert states is not None
        return self._outputs_of(batch, self._steps.end(states[0]))

    def submit_all(
        self, batches: Iterable[TokenBatch], go_on: GoOn = lambda done: True
    ) -> Iterator[PendingOutput]:
        every = list(batches)
        for window in windows(every):
            states = self._before_end(window, go_on, len(window) / len(every))
            if states is None:
                return
            for batch, state in zip(window, states, strict=True):
                with self.computing(batch):
                    outputs = self._outputs_of(batch, self._steps.end(state))
                    pending = self._download(batch, outputs)
                yield pending

    def _before_end(
        self, window: Sequence[TokenBatch], go_on: GoOn, share: float
    ) -> list[Any] | None:
        """The states of the batches after the last layer; None if `go_on` returned False. `share`:
        the window's part of the work that `go_on` knows."""
        states = []
        too_large = (
            f"{self.resolved.opened.where}: the residuals of {len(window)} token batches do not "
            f"fit in the memory of {self.device} beside two layers. Use a device with more memory, "
            "or make smaller units: lower output.samples_per_shard and give a new output.path."
        )
        for place, batch in enumerate(window):
            self._require_decided(batch)
            with self.computing(batch, too_large):
                states.append(self._steps.begin(self._ids(batch), batch, place))
        done, step = 0.0, share / max(1, len(self._steps.blocks) * len(window))
        for number in range(len(self._steps.blocks)):
            self._weights.bring(number)
            for batch, state in zip(window, states, strict=True):
                if not go_on(done):
                    return None
                with self.computing(batch), one_attention(self.device):
                    self._steps.layer(number, state)
                done += step
        return states


def windows(batches: Sequence[TokenBatch]) -> Iterator[Sequence[TokenBatch]]:
    """`batches` in parts of nearly one size and at most about `WINDOW_TOKENS` tokens."""
    count = -(-sum(batch.input_ids.size for batch in batches) // WINDOW_TOKENS)
    size = max(1, -(-len(batches) // max(1, count)))
    for first in range(0, len(batches), size):
        yield batches[first : first + size]


def build(
    resolved: ResolvedEncoder, device: str, output_dtype: str, weights: WeightsMode = "resident"
) -> TextEncoder:
    """Load the model onto `device` (cpu, cuda, cuda:N); `weights` as runtime.weights.

    Raises InputError: damaged checkpoint, too little memory, or an implementation that cannot run.
    """
    opened, implementation = resolved.opened, resolved.decision.implementation
    source = Source(opened.checkpoint, resolved.family, resolved.options)
    dtype: torch.dtype = getattr(torch, resolved.options.dtype)
    if is_streamed(resolved, device, weights):
        with Work(f"{opened.where}: loading embeddings and norms"):
            streamed = StreamedWeights(source, dtype, torch.device(device))
        return StreamedEncoder(resolved, device, output_dtype, streamed)
    model = load_on(
        source,
        dtype,
        torch.device(device),
        forward_bytes=forward_bytes(resolved),
        may_split=implementation == "hf",
    )
    if implementation == "shardformer":
        from embed_precompute.encoders.shardformer import shardformer_t5

        model = shardformer_t5(model)
    encoder_class = FusedEncoder if implementation == "fused" else HfEncoder
    return encoder_class(resolved, device, output_dtype, model)


def is_streamed(resolved: ResolvedEncoder, device: str, weights: WeightsMode) -> bool:
    """Whether the encoder's weights come layer by layer. Raises InputError: `weights` is stream,
    and they cannot."""
    opened, decision = resolved.opened, resolved.decision
    reason = None
    remedy = "Set runtime.weights auto, which streams what can be and does not fit, or resident"
    if decision.implementation != "fused":
        reason = f"the implementation is {decision.implementation}, and only fused has its layers"
    elif decision.compiled and resolved.family.one_graph and device.startswith("cuda"):
        reason = "compile is true, which makes one graph of all layers on a GPU"
        remedy += ", or compile false with a new output.path"
    if weights == "stream" and reason is not None:
        raise InputError(f"{opened.where}: runtime.weights is stream: {reason}. {remedy}.")
    if weights != "auto" or reason is not None:
        return weights == "stream"
    source = Source(opened.checkpoint, resolved.family, resolved.options)
    size = loaded_bytes(source, getattr(torch, resolved.options.dtype))
    free = free_memory(torch.device(device))
    if free is None or size + forward_bytes(resolved) <= free:
        return False
    log.info(
        "%s: %.1f GB of weights and a forward do not fit in the %.1f GB that are free on %s: the "
        "weights are streamed, layer by layer",
        *(opened.where, size / GB, free / GB, device),
    )
    return True


def forward_bytes(resolved: ResolvedEncoder) -> int:
    """An upper estimate of the bytes that the largest forward takes in addition to the weights."""
    sizes, decision = resolved.family.sizes(resolved.opened.checkpoint), resolved.decision
    dtype: torch.dtype = getattr(torch, resolved.options.dtype)
    shapes = (*decision.shapes, decision.null_shape)
    lines, length = max(shapes, key=lambda shape: shape[0] * shape[1])
    # Norms, and in float16 the residual, are in float32.
    rows = 16 * sizes.width + dtype.itemsize * (4 * sizes.inner + 2 * sizes.hidden)
    # Several layers' outputs are held one by one, and then as one.
    rows += 2 * dtype.itemsize * sum(out.width for out in resolved.outputs if out.per == "token")
    # Only plain attention has a tensor of all scores, and another for their softmax in float32.
    fused = decision.implementation == "fused"
    scores = 0 if fused else sizes.heads * length * (4 + dtype.itemsize)
    return int(lines * length * (rows + scores)) + RESERVE_BYTES
