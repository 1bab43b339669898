"""An encoder with everything decided, and what every implementation of one can do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from embed_precompute.encoders.batching import Shape, TokenBatch, make_batches, pack
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.encoders.tokenizer import CaptionTokenizer

if TYPE_CHECKING:
    from embed_precompute.encoders.transfers import Lines, Pending


@dataclass(frozen=True)
class ResolvedEncoder:
    """One encoder with everything decided: checkpoint, tokenizer, shapes, implementation."""

    name: str
    config: EncoderConfig
    folder: Path
    tokenizer: CaptionTokenizer
    model_type: str
    weights: str
    """Digest of weights and config.json."""
    dim: int
    pooled: bool
    """True: one vector per caption (CLIP); False: one per stored token (T5)."""
    shapes: tuple[Shape, ...]
    """(B, L) of every forward, short ones first."""
    null_shape: Shape
    """(B, L) of the forward that makes the null embedding."""
    padded_length: int | None
    """T5 with attention_mask none: the one L, and the stored length. None otherwise."""
    implementation: str
    compiled: bool
    """The fused layers go through torch.compile."""

    @property
    def packed(self) -> bool:
        """Captions lie end to end in streams of one length, instead of one a line."""
        return self.implementation == "fused" and self.padded_length is None

    def batches(
        self, ids: Sequence[np.ndarray[Any, Any]], null: bool = False
    ) -> Iterator[TokenBatch]:
        """The forwards that encode captions `ids` ([tokens] each); `null`: the empty caption."""
        tokenizer = self.tokenizer
        if self.packed:
            return pack(ids, self.shapes[0][1], tokenizer.pad_id)
        shapes = (self.null_shape,) if null else self.shapes
        return make_batches(ids, shapes, tokenizer.pad_id, tokenizer.filler)

    def every_shape(self) -> Iterator[TokenBatch]:
        """One forward of each shape, of the empty caption: what must fit in memory."""
        tokenizer = self.tokenizer
        if self.packed:
            yield from self.batches([tokenizer.filler])
            return
        for shape in sorted({*self.shapes, self.null_shape}):
            yield from make_batches(
                [tokenizer.filler], (shape,), tokenizer.pad_id, tokenizer.filler
            )

    def _output(self) -> dict[str, Any]:
        positions = "real" if self.padded_length is None else "all"
        return {
            "suffix": "",
            "per": "caption" if self.pooled else "token",
            "width": self.dim,
            "positions": None if self.pooled else positions,
        }

    def spec(self) -> dict[str, Any]:
        """What of this encoder changes bytes, as JSON: its part of the fingerprint."""
        return {
            "kind": self.config.kind,
            "model_type": self.model_type,
            "weights": self.weights,
            "tokenizer": self.tokenizer.digest,
            "pad_token_id": self.tokenizer.pad_id,
            "max_length": self.config.resolved_max_length,
            "attention_mask": self.config.attention_mask,
            "seq_align": self.config.seq_align,
            "added_tokens": self.config.added_tokens_spec(),
            "dtype": self.config.dtype,
            "shapes": [list(shape) for shape in self.shapes],
            "null_shape": list(self.null_shape),
            "padded_length": self.padded_length,
            "outputs": [self._output()],
            "implementation": self.implementation,
            "compiled": self.compiled,
            "tf32": self.config.tf32,
        }


class TextEncoder(Protocol):
    """Runs token batches through a frozen text encoder."""

    resolved: ResolvedEncoder

    def submit(self, batch: TokenBatch) -> Pending:
        """Begin the forward of a batch; on a CPU it is over when this returns.

        `Pending.wait` gives the embeddings on the CPU, contiguous, in the output dtype; [i] is
        caption i. [B, L, D] (t5) or [B, C] (clip), filler included; with attention_mask padding the
        positions behind a line's length mean nothing. Of a packed batch of t5 a list of
        [length, D].
        `batch` is one that `ResolvedEncoder.batches` gives.
        """
        ...

    def encode(self, batch: TokenBatch) -> Lines:
        """`submit` and wait."""
        ...

    def weight_bytes(self) -> int:
        """Bytes that the model's weights take on the device."""
        ...
