"""What a run would make, before it makes it: the figures behind `embed-precompute plan`.

Guarantees: rows, samples and shards are exact; figures that need tokens come from a stated number
of captions and are scaled up, or from all of them. Nothing is written.
Costs: reading and tokenising those captions, in pieces of 10,000 (8 bytes a caption are kept to
find duplicates).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import xxhash

from embed_precompute.encoders.spec import ResolvedEncoder
from embed_precompute.job.prepare import FILES_PER_UNIT, Prepared, stored_bytes_per_token
from embed_precompute.samples import Sample, Status
from embed_precompute.store.space import UNLIMITED, room_at

PIECE_ROWS = 10_000
ROWS_BYTES_PER_SAMPLE = 60
"""A rows part's bytes per sample beside the text, compressed: measured, an estimate."""


@dataclass
class TokenFigures:
    """Sums over the captions that were tokenised with one encoder."""

    tokens: int = 0
    longest: int = 0
    truncated: int = 0
    unknown: int = 0


@dataclass
class Figures:
    """Sums over the captions that were looked at."""

    samples: int = 0
    status: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    distinct: int = 0
    encoders: dict[str, TokenFigures] = field(default_factory=dict)

    @property
    def encoded(self) -> int:
        return self.status[Status.OK.label]


def measure(prepared: Prepared, max_samples: int | None) -> Figures:
    """Tokenise the first `max_samples` samples (None: all) with every encoder."""
    figures = Figures(encoders={encoder.name: TokenFigures() for encoder in prepared.encoders})
    hashes: list[np.ndarray] = []
    for samples in _pieces(prepared, max_samples):
        texts = [sample.text for sample in samples if sample.text is not None]
        figures.samples += len(samples)
        figures.status.update(sample.status.label for sample in samples)
        figures.text_bytes += sum(len(text.encode()) for text in texts)
        hashes.append(np.array([xxhash.xxh3_64_intdigest(t.encode()) for t in texts], np.uint64))
        for encoder in prepared.encoders:
            tokenized = encoder.tokenizer.encode(texts)
            sums = figures.encoders[encoder.name]
            sums.tokens += sum(tokenized.num_tokens)
            sums.longest = max([sums.longest, *tokenized.num_tokens])
            sums.truncated += sum(tokenized.truncated)
            sums.unknown += sum(tokenized.num_unknown)
    figures.distinct = len(np.unique(np.concatenate(hashes))) if hashes else 0
    return figures


def _pieces(prepared: Prepared, max_samples: int | None) -> Iterator[list[Sample]]:
    plan = prepared.plan
    reader = prepared.table.reader(plan.num_rows, plan.last_row_samples)
    left = plan.num_samples if max_samples is None else max_samples
    for first in range(0, plan.num_rows, PIECE_ROWS):
        samples = reader.read(first, min(PIECE_ROWS, plan.num_rows - first))[:left]
        left -= len(samples)
        yield samples
        if left <= 0:
            return


def estimate_lines(prepared: Prepared, max_samples: int | None) -> list[str]:
    """The report of `embed-precompute plan`, line by line."""
    plan = prepared.plan
    figures = measure(prepared, max_samples)
    lines = [
        f"plan {plan.plan_id[:16]}, fingerprint {plan.fingerprint[:16]}",
        f"input      {len(plan.inputs.files):,} files, {plan.num_rows:,} rows, "
        f"{plan.num_samples:,} samples",
    ]
    all_of_them = figures.samples == plan.num_samples
    basis = "all" if all_of_them else f"the first {figures.samples:,}"
    status = ", ".join(f"{name} {count:,}" for name, count in sorted(figures.status.items()))
    duplicates = figures.encoded - figures.distinct
    lines.append(f"captions   of {basis} samples: {status}; {duplicates:,} repeat an earlier text")
    for encoder in prepared.encoders:
        lines += _encoder_lines(encoder, figures)
    lines += _disk_lines(prepared, figures)
    return lines


def _encoder_lines(encoder: ResolvedEncoder, figures: Figures) -> list[str]:
    sums = figures.encoders[encoder.name]
    count, tokens = max(1, figures.encoded), max(1, sums.tokens)
    shapes = ", ".join(f"{batch}x{length}" for batch, length in encoder.shapes)
    if encoder.pooled:
        stored = f"stored: one vector of {encoder.dim}"
    elif encoder.padded_length is not None:
        stored = f"stored: padded length {encoder.padded_length} x {encoder.dim}"
    else:
        stored = f"stored: real tokens x {encoder.dim}"
    return [
        f"{encoder.name:<10} {sums.tokens:,} tokens, mean {sums.tokens / count:.1f}, longest "
        f"{sums.longest}; {sums.truncated:,} truncated at {encoder.config.resolved_max_length}; "
        f"<unk> {100 * sums.unknown / tokens:.3f} %",
        f"{'':<10} {stored}; forwards of {shapes}; implementation {encoder.implementation}",
    ]


def _disk_lines(prepared: Prepared, figures: Figures) -> list[str]:
    plan = prepared.plan
    scale = plan.num_samples / max(1, figures.samples)
    total = scale * (figures.text_bytes + ROWS_BYTES_PER_SAMPLE * figures.samples)
    for encoder in prepared.encoders:
        vectors: float = figures.encoded
        if not encoder.pooled:
            sums = figures.encoders[encoder.name]
            length = encoder.padded_length
            vectors = sums.tokens if length is None else figures.encoded * length
        total += scale * vectors * stored_bytes_per_token(encoder, prepared.config)
    room = room_at(prepared.root)
    free = room.bytes
    files = plan.num_units * FILES_PER_UNIT + 4
    lines = [
        f"output     {plan.num_units:,} shards of up to {plan.samples_per_shard:,} samples, about "
        f"{files:,} files",
        f"disk       about {_size(total)} (equal texts in a shard are stored once, which can only "
        f"make it less), {_free(free)} free at {prepared.root} ({room.bytes_limit})",
    ]
    if files > room.files:
        lines.append(
            f"WARNING    {room.files_limit} allows {room.files:,} more files, {files:,} are needed"
        )
    if total > free:
        lines.append(
            f"WARNING    {room.bytes_limit} lacks {_size(total - free)}: the run would stop with "
            "exit 74 and go on when there is space"
        )
    return lines


def _free(count: int) -> str:
    return _size(count) if count < UNLIMITED else "an unknown amount"


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"
