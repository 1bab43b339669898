"""What the first captions tell about a job: tokens, bytes, duplicates; the report of `plan`.

The shard size, the free space that is needed and the report are estimated from one reading of the
first captions. In the report the numbers of rows, samples and shards are exact. Figures that need
tokens come from the first captions, or from all; the report says how many were read. Only the disk
size is scaled up to the whole dataset. Nothing is written.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from embed_precompute.captions.reader import CaptionReader
from embed_precompute.captions.table import CaptionTable
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.samples import Sample, Status
from embed_precompute.store.commit import UNLIMITED, free_space
from embed_precompute.store.plan import Plan

FIRST_SAMPLES = 10_000
PIECE_ROWS = 10_000
ROWS_BYTES_PER_SAMPLE = 60
"""Estimated bytes of a sample in a rows part, compressed, without the text; measured once."""
FILES_PER_UNIT = 3
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
EXAMPLES, EXAMPLE_CHARACTERS = 3, 300
FEW_CHARACTERS = 2.0
"""With fewer characters per token than this, a tokenizer is probably another model's."""


@dataclass
class TokenFigures:
    """Sums over the captions that were tokenised with one encoder."""

    tokens: int = 0
    longest: int = 0
    truncated: int = 0
    unknown: int = 0
    vectors: Counter[str] = field(default_factory=Counter)
    """Number of stored vectors, by tensor."""
    whole_characters: int = 0
    whole_tokens: int = 0
    """Number of tokens of the captions that are not truncated; `whole_characters` counts the
    characters of the same captions."""


@dataclass
class Figures:
    """Sums over the samples that were looked at."""

    samples: int = 0
    status: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    distinct: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    """Counts of unusual input: empty captions, rows where a column of the recipe is null."""
    encoders: dict[str, TokenFigures] = field(default_factory=dict)
    examples: list[str] = field(default_factory=list)
    """The first texts as they are encoded."""

    @property
    def encoded(self) -> int:
        return self.status[Status.OK.label]

    def embedding_bytes(self, encoders: Sequence[ResolvedEncoder], dtype: str) -> int:
        """Number of bytes of the embeddings of all samples; equal texts are counted each time."""
        return sum(
            self.encoders[encoder.name].vectors[tensor] * output.width * DTYPE_BYTES[dtype]
            for encoder in encoders
            for tensor, output in encoder.tensors().items()
        )


class FirstCaptions:
    """The first captions of a table, read and tokenised when they are first asked for."""

    def __init__(
        self,
        table: CaptionTable,
        encoders: Sequence[ResolvedEncoder],
        num_rows: int,
        last_row_samples: int | None,
    ) -> None:
        """`num_rows` and `last_row_samples` are those of the scan, or of the stored plan."""
        self._table, self.encoders = table, encoders
        self._num_rows, self._last_row_samples = num_rows, last_row_samples

    @functools.cached_property
    def figures(self) -> Figures:
        """The figures of the first 10,000 samples."""
        return self.measure(FIRST_SAMPLES)

    def measure(self, max_samples: int | None) -> Figures:
        """Returns the figures of the first `max_samples` samples (None: of all)."""
        reader = self._table.reader(self._num_rows, self._last_row_samples)
        sums = {encoder.name: TokenFigures() for encoder in self.encoders}
        figures = Figures(noted=reader.noted, encoders=sums)
        hashes: list[np.ndarray] = []
        for samples in self._pieces(reader, max_samples):
            texts = [sample.text for sample in samples if sample.text is not None]
            figures.examples += texts[: EXAMPLES - len(figures.examples)]
            figures.samples += len(samples)
            figures.status.update(sample.status.label for sample in samples)
            encoded = [text.encode() for text in texts]
            figures.text_bytes += sum(map(len, encoded))
            hashes.append(np.array([xxhash.xxh3_64_intdigest(t) for t in encoded], np.uint64))
            for encoder in self.encoders:
                _add(figures.encoders[encoder.name], encoder, texts)
        figures.distinct = len(np.unique(np.concatenate(hashes))) if hashes else 0
        return figures

    def _pieces(self, reader: CaptionReader, max_samples: int | None) -> Iterator[list[Sample]]:
        left = max_samples
        for first in range(0, self._num_rows, PIECE_ROWS):
            rows = min(PIECE_ROWS, self._num_rows - first)
            samples = reader.read(first, rows if left is None else min(rows, left))
            samples = samples if left is None else samples[:left]
            left = None if left is None else left - len(samples)
            yield samples
            if left is not None and left <= 0:
                break
        reader.close()


def _add(sums: TokenFigures, encoder: ResolvedEncoder, texts: list[str]) -> None:
    captions = encoder.opened.tokenizer.encode(texts)
    sums.tokens += sum(captions.tokens)
    sums.longest = max([sums.longest, *captions.tokens])
    sums.truncated += sum(captions.truncated)
    sums.unknown += sum(captions.unknown)
    whole = [row for row, cut in enumerate(captions.truncated) if not cut]
    sums.whole_characters += sum(len(texts[row]) for row in whole)
    sums.whole_tokens += sum(captions.tokens[row] for row in whole)
    for tensor, output in encoder.tensors().items():
        sums.vectors[tensor] += sum(encoder.stored_lengths(output, captions, null=False))


def example_lines(figures: Figures) -> list[str]:
    """The first texts, quoted, so that a wrong recipe shows; of a long text only the two ends."""
    half = EXAMPLE_CHARACTERS // 2
    short = (
        text if len(text) <= EXAMPLE_CHARACTERS else f"{text[:half]} ... {text[-half:]}"
        for text in figures.examples
    )
    return [f"encoded as {text!r}" for text in short]


def tokenizer_line(encoder: ResolvedEncoder, figures: Figures) -> tuple[str, bool]:
    """The report's line on the tokenizer, and whether the tokenizer seems to be another model's."""
    sums = figures.encoders[encoder.name]
    ratio = sums.whole_characters / max(1, sums.whole_tokens)
    line = f"{encoder.opened.tokenizer.name}, {ratio:.1f} characters per token"
    suspicious = sums.whole_tokens > 0 and ratio < FEW_CHARACTERS
    if suspicious:
        line += (
            ": fewer than 2, so it may be another model's tokenizer. Only captions in Chinese, "
            "Japanese or Korean have so few"
        )
    return line, suspicious


def estimate_lines(
    first: FirstCaptions, plan: Plan, root: Path, dtype: str, max_samples: int | None
) -> list[str]:
    """The report, line by line, from the first `max_samples` samples (None: of all)."""
    figures = first.figures if max_samples == FIRST_SAMPLES else first.measure(max_samples)
    lines = [
        f"plan {plan.plan_id[:16]}, fingerprint {plan.fingerprint[:16]}",
        f"input      {len(plan.inputs.files):,} files, {plan.num_rows:,} rows, "
        f"{plan.num_samples:,} samples",
    ]
    if plan.extends:
        before = plan.extends[-1]
        lines.append(
            f"{'':<10} {len(plan.inputs.files) - before.num_files:,} files with "
            f"{plan.num_samples - before.num_samples:,} samples extend those before"
        )
    all_of_them = figures.samples == plan.num_samples
    basis = "all" if all_of_them else f"the first {figures.samples:,}"
    status = ", ".join(f"{name} {count:,}" for name, count in sorted(figures.status.items()))
    duplicates = figures.encoded - figures.distinct
    lines.append(f"captions   of {basis} samples: {status}; {duplicates:,} repeat an earlier text")
    lines += [f"{'':<10} {count:,} {what}" for what, count in sorted(figures.noted.items())]
    lines += example_lines(figures)
    for encoder in first.encoders:
        lines += _encoder_lines(encoder, figures)
    embeddings = figures.embedding_bytes(first.encoders, dtype)
    rows = figures.text_bytes + ROWS_BYTES_PER_SAMPLE * figures.samples
    scale = plan.num_samples / max(1, figures.samples)
    return lines + _disk_lines(plan, root, scale * (rows + embeddings))


def _encoder_lines(encoder: ResolvedEncoder, figures: Figures) -> list[str]:
    sums, decision = figures.encoders[encoder.name], encoder.decision
    count, tokens = max(1, figures.encoded), max(1, sums.tokens)
    shapes = ", ".join(f"{batch}x{length}" for batch, length in decision.shapes)
    stored = []
    for tensor, output in encoder.tensors().items():
        vectors = {"all": f"padded length {decision.padded_length} x", "real": "real tokens x"}
        what = vectors.get(output.positions or "", "one vector of")
        stored.append(f"text_{tensor}: {what} {output.width}")
    tokenizer, suspicious = tokenizer_line(encoder, figures)
    return [
        f"{encoder.name:<10} {sums.tokens:,} tokens, mean {sums.tokens / count:.1f}, longest "
        f"{sums.longest}; {sums.truncated:,} truncated at {encoder.options.max_length}; "
        f"<unk> {100 * sums.unknown / tokens:.3f} %",
        f"{'WARNING' if suspicious else '':<10} tokenizer {tokenizer}",
        f"{'':<10} stored: {', '.join(stored)}; forwards of {shapes}; implementation "
        f"{decision.implementation}",
    ]


def _disk_lines(plan: Plan, root: Path, total: float) -> list[str]:
    free_bytes, free_files = free_space(root)
    free = _size(free_bytes) if free_bytes < UNLIMITED else "an unknown amount"
    files = plan.num_units * FILES_PER_UNIT + 4
    lines = [
        f"output     {plan.num_units:,} shards of up to {plan.samples_per_shard:,} samples, about "
        f"{files:,} files",
        f"disk       about {_size(total)} (equal texts in a shard are stored once, which can only "
        f"make it less), {free} free at {root}",
    ]
    if files > free_files:
        lines.append(f"WARNING    {files:,} files are needed, {free_files:,} are free")
    if total > free_bytes:
        lines.append(
            f"WARNING    {_size(total - free_bytes)} are lacking: the run would stop with exit 74 "
            "and go on when there is space"
        )
    return lines


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"
