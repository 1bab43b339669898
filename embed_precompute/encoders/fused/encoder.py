"""Our own encoder body: T5 and CLIP as one stream of tokens, attention strictly inside a caption.

Guarantees: the numbers of the transformers model up to rounding (fp32: relative difference below
3e-6). Every forward has one shape, [T] tokens, and attention runs per caption at the caption's own
length, so an embedding is bitwise a function of the caption and T: neighbours, place in the stream
and order change no bit. Nor does a CPU's number of threads, at the shapes of T5 base, XXL and CLIP
L with products of 2,048 rows and more (measured); of fewer rows, libraries split some sums among
threads. On a CPU without matrix hardware for half precision, bfloat16 and float16 weights are
computed with in float32, which is hundreds of times faster there and no less exact.
Costs: the weights once, as `hf` holds them (memory-mapped where the file has their dtype, so that
ranks of one node share them), and one set of buffers for T tokens (see `stream`).

The mathematics follows transformers' modeling_t5.py, modeling_umt5.py and modeling_clip.py.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from embed_precompute.encoders import hf, offload
from embed_precompute.encoders.batching import TokenBatch
from embed_precompute.encoders.fused.clip import ClipBody
from embed_precompute.encoders.fused.stream import Group, Workspace, groups_of, one_attention
from embed_precompute.encoders.fused.t5 import T5Body
from embed_precompute.encoders.spec import ResolvedEncoder
from embed_precompute.encoders.transfers import Copies, Lines, Pending, upload
from embed_precompute.errors import InternalError


class Body(Protocol):
    """The layers of one model over a stream."""

    def __call__(
        self, ids: torch.Tensor, batch: TokenBatch, groups: list[Group], keep: torch.Tensor | None
    ) -> torch.Tensor:
        """[T] ids -> [T, D], after the final norm; rows of no caption mean nothing.

        `keep` [C]: only these rows are wanted, [C, D]. The tensor may be one that the next forward
        overwrites.
        """
        ...


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that products run in: float32 on a CPU that has no hardware for `dtype`."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    supported: bool = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype if supported else torch.float32


def longest_of(resolved: ResolvedEncoder) -> int:
    """Tokens of the longest caption, pads that are attended included."""
    if resolved.padded_length is not None:
        return max(resolved.padded_length, resolved.null_shape[1])
    return resolved.config.resolved_max_length


class FusedEncoder:
    """A text encoder with our own body."""

    def __init__(
        self, resolved: ResolvedEncoder, device: str, output_dtype: str, *, may_offload: bool
    ) -> None:
        self.resolved = resolved
        self._device = torch.device(device)
        self._copies = Copies(self._device, getattr(torch, output_dtype))
        self._shapes = {*resolved.shapes, resolved.null_shape}
        dtype: torch.dtype = getattr(torch, resolved.config.dtype)
        self._model: Any = hf.load_on(resolved, self._device, may_offload=may_offload)
        self._body: Body
        if resolved.compiled and self._device.type == "cuda":
            from embed_precompute.encoders.fused import graph

            self._body = graph.body(self._model, longest_of(resolved), pooled=resolved.pooled)
        else:
            make = ClipBody if resolved.pooled else T5Body
            computed = compute_dtype(dtype, self._device)
            workspace = Workspace(
                self._device,
                computed,
                make.product_rows(self._model.config, computed),
                compiled=resolved.compiled,
                converts=computed != dtype,
            )
            self._body = make(self._model, workspace, longest_of(resolved))

    def weight_bytes(self) -> int:
        """See `TextEncoder.weight_bytes`."""
        return offload.num_bytes(self._model)

    def encode(self, batch: TokenBatch) -> Lines:
        """See `TextEncoder.encode`."""
        return self.submit(batch).wait()

    def submit(self, batch: TokenBatch) -> Pending:
        """See `TextEncoder.submit`."""
        frame = batch.input_ids.shape
        if frame not in self._shapes or batch.packed is not self.resolved.packed:
            kind = "packed" if self.resolved.packed else "one caption a line"
            raise InternalError(
                f"A batch is {frame}, packed {batch.packed}: expected {self._shapes}, {kind}. "
                "ResolvedEncoder.batches makes them."
            )
        message = hf.forward_too_large(self.resolved, batch, self._device)
        with (
            torch.inference_mode(),
            hf.out_of_memory(message),
            hf.tf32(self.resolved),
            one_attention(self._device),
        ):
            ids = upload(torch.from_numpy(batch.input_ids).reshape(-1), self._device)
            if self.resolved.pooled:
                keep = upload(torch.from_numpy(self._end_of_text(batch)), self._device)
                pooled = self._body(ids, batch, groups_of(batch), keep)
                return self._copies.download(pooled, reused=True)
            stream = self._body(ids, batch, groups_of(batch), None)
            if not batch.packed:
                return self._copies.download(stream.view(*frame, -1), reused=True)
            lengths: list[int] = batch.lengths.tolist()
            return self._copies.download(stream[: sum(lengths)], lengths, reused=True)

    def _end_of_text(self, batch: TokenBatch) -> np.ndarray:
        """Where each caption is pooled in the stream: its first end-of-text token."""
        stream = batch.input_ids.reshape(-1)
        eos = self.resolved.tokenizer.eos_id
        return np.array(
            [
                start + int(np.argmax(stream[start : start + length] == eos))
                for start, length in zip(batch.starts.tolist(), batch.lengths.tolist(), strict=True)
            ],
            dtype=np.int64,
        )


def build(
    resolved: ResolvedEncoder, device: str, output_dtype: str, *, may_offload: bool
) -> FusedEncoder:
    """See `encoders.build`."""
    return FusedEncoder(resolved, device, output_dtype, may_offload=may_offload)
