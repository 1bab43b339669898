"""One forward, and which of its samples are to blame when it fails.

Guarantees: a sample that the encoder cannot take does not stop the run: it gets the reason, and its
neighbours the embeddings they would have had, for an embedding does not depend on them. What is no
sample's fault (memory, a device that is lost, an encoder that fails for the empty caption too) is
raised as it came.
Costs: nothing while all goes well; one forward per caption of a batch that fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from embed_precompute.encoders.batching import TokenBatch, make_batches, pack
from embed_precompute.encoders.spec import TextEncoder
from embed_precompute.encoders.transfers import Lines, Pending
from embed_precompute.errors import EmbedPrecomputeError

MAX_REASON = 200


@dataclass(frozen=True)
class Forward:
    """A forward that was begun."""

    batch: TokenBatch
    pending: Pending
    failed: Mapping[int, str] = field(default_factory=dict)
    """A reason for every caption (of `batch.rows`) without an embedding."""

    def ready(self) -> bool:
        """Whether `pending.wait` would return at once."""
        return self.pending.ready()


def begin(encoder: TextEncoder, batch: TokenBatch) -> Forward:
    """Begin the forward of a batch. What fails later, while it is waited for, is an error of the
    device and no sample's fault."""
    try:
        return Forward(batch, encoder.submit(batch))
    except (EmbedPrecomputeError, MemoryError):
        raise
    except Exception as error:
        if _lost_device(error):
            raise
        lines, failed = _one_by_one(encoder, batch, error)
        return Forward(batch, Pending(lines), failed)


def _lost_device(error: Exception) -> bool:
    """After such an error every further forward fails, whatever it holds."""
    kind = getattr(torch, "AcceleratorError", None)
    return (kind is not None and isinstance(error, kind)) or "CUDA error" in str(error)


def _one_by_one(
    encoder: TextEncoder, batch: TokenBatch, first_error: Exception
) -> tuple[Lines, dict[int, str]]:
    try:
        empty = encoder.encode(_alone(encoder, batch, None))
    except Exception:
        raise first_error from None  # not even the empty caption: no sample is to blame
    # Those that fail keep the empty caption's, which are not stored.
    lines = [empty[0]] * len(batch.lengths)
    reasons: dict[int, str] = {}
    for line, row in enumerate(batch.rows.tolist()):
        try:
            encoded = encoder.encode(_alone(encoder, batch, line))
        except EmbedPrecomputeError:
            raise
        except Exception as error:
            text = " ".join(str(error).split())[:MAX_REASON]
            reasons[row] = f"the encoder failed: {type(error).__name__}: {text}"
        else:
            lines[line] = encoded[0].clone()  # its whole forward's memory is not kept
    return torch.stack(lines) if isinstance(empty, torch.Tensor) else lines, reasons


def _alone(encoder: TextEncoder, batch: TokenBatch, caption: int | None) -> TokenBatch:
    """A batch of the same shape with one caption of `batch` in it, or none, and filler."""
    tokenizer = encoder.resolved.tokenizer
    ids = [tokenizer.filler if caption is None else batch.tokens(caption)]
    frame = (int(batch.input_ids.shape[0]), int(batch.input_ids.shape[1]))
    if batch.packed:
        return next(pack(ids, frame[1], tokenizer.pad_id))
    return next(make_batches(ids, (frame,), tokenizer.pad_id, tokenizer.filler))
