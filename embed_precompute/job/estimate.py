"""What some of the captions tell about a job: tokens, bytes, duplicates; the report of `plan`.

The shard size, the free space that is needed and the report are estimated from one reading of
10,000 input rows that lie evenly over the table. In the report the numbers of rows, samples and
shards are exact. Figures that need tokens come from those rows, or from all; the report says how
many samples were read. Only the disk size is scaled up to the whole dataset. Nothing is written.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from embed_precompute.captions.table import CaptionTable
from embed_precompute.encoders.families.base import DTYPE_BYTES
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.job.claims import Committed
from embed_precompute.job.reuse import Reuse
from embed_precompute.samples import Status
from embed_precompute.steps import counted, steps
from embed_precompute.store.commit import UNLIMITED, free_space
from embed_precompute.store.plan import Plan

SAMPLED_ROWS = 10_000
RUNS = 100
PIECE_ROWS = 10_000
PERCENTS = (5, 50, 95, 99)
MAX_BARS, BAR_CHARACTERS = 7, 30
WIDTHS = [step * 10**power for power in range(9) for step in (1, 2, 5)]
ROWS_BYTES_PER_SAMPLE = 60
"""Estimated bytes of a sample in a rows part, compressed, without the text; measured once."""
FILES_PER_UNIT = 3
EXAMPLES, EXAMPLE_CHARACTERS = 3, 300
HEAVY_BYTES = 20e6
"""`plan` warns where an average caption takes more."""
FEW_CHARACTERS = 2.0
"""With fewer characters per token than this, a tokenizer is probably another model's."""


@dataclass
class TokenFigures:
    """Sums over the captions that were tokenised with one encoder."""

    whole: Counter[int] = field(default_factory=Counter)
    """Captions that are not truncated, by their number of tokens."""
    cut: Counter[int] = field(default_factory=Counter)
    """Truncated captions, by the number of tokens that is left."""
    unknown: int = 0
    empty: int = 0
    """Captions that are empty after the encoder's text steps."""
    vectors: Counter[str] = field(default_factory=Counter)
    """Number of stored vectors, by tensor."""
    whole_characters: int = 0
    """Characters of the captions that are not truncated."""

    @property
    def tokens(self) -> int:
        return sum(tokens * count for tokens, count in (self.whole + self.cut).items())

    @property
    def characters_per_token(self) -> float:
        """Of the captions that are not truncated; inf where there is none."""
        tokens = sum(tokens * count for tokens, count in self.whole.items())
        return self.whole_characters / tokens if tokens else math.inf

    def percentiles(self, *percents: int) -> list[int]:
        """The least number of tokens that so many percent of the captions do not exceed."""
        lengths = sorted((self.whole + self.cut).items())
        ends = np.cumsum([count for _, count in lengths])
        wanted = [np.searchsorted(ends, ends[-1] * percent / 100) for percent in percents]
        return [lengths[at][0] for at in wanted]


@dataclass
class Figures:
    """Sums over the samples that were looked at."""

    samples: int = 0
    status: Counter[str] = field(default_factory=Counter)
    text_bytes: int = 0
    distinct: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    """Counts of unusual input: empty captions, rows where a column of the recipe is null."""
    first_noted: dict[str, str] = field(default_factory=dict)
    """Where the first of each of them is, and of the samples of each status but ok."""
    encoders: dict[str, TokenFigures] = field(default_factory=dict)
    copied: Counter[str] = field(default_factory=Counter)
    """Captions that another dataset has, by encoder."""
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


class SampledCaptions:
    """Captions from everywhere in a table, read and tokenised when they are first asked for."""

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
        """The figures of 10,000 input rows."""
        return self.measure(SAMPLED_ROWS)

    def measure(self, max_rows: int | None, reuse: Reuse | None = None) -> Figures:
        """Returns the figures of `max_rows` input rows (None: of all).

        `reuse`: the datasets whose captions are counted in `Figures.copied`.
        """
        reader = self._table.reader(self._num_rows, self._last_row_samples)
        sums = {encoder.name: TokenFigures() for encoder in self.encoders}
        figures = Figures(noted=reader.noted, first_noted=reader.first_noted, encoders=sums)
        hashes: list[np.ndarray] = []
        runs = list(sampled_runs(self._num_rows, max_rows))
        for first, rows in steps(runs, len(runs), "tokenising", " runs of rows"):
            samples = reader.read(first, rows)
            texts = [sample.text for sample in samples if sample.text is not None]
            figures.examples += texts[: EXAMPLES - len(figures.examples)]
            figures.samples += len(samples)
            figures.status.update(sample.status.label for sample in samples)
            encoded = [text.encode() for text in texts]
            figures.text_bytes += sum(map(len, encoded))
            hashes.append(np.array([xxhash.xxh3_64_intdigest(t) for t in encoded], np.uint64))
            if reuse is not None:
                figures.copied.update(reuse.count(texts))
            for encoder in self.encoders:
                _add(figures.encoders[encoder.name], encoder, texts)
        reader.close()
        figures.distinct = len(np.unique(np.concatenate(hashes)))
        return figures


def sampled_runs(num_rows: int, max_rows: int | None) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each run of input rows to look at, in ascending order.

    100 runs, each in the middle of a hundredth of the table, so that a table that is sorted by
    length or by source counts as it is. A run lies in one row group, or in two.
    """
    if max_rows is None or max_rows >= num_rows:
        for first in range(0, num_rows, PIECE_ROWS):
            yield first, min(PIECE_ROWS, num_rows - first)
        return
    runs = min(RUNS, max_rows)
    for i in range(runs):
        start, end = num_rows * i // runs, num_rows * (i + 1) // runs
        rows = min(end - start, max_rows * (i + 1) // runs - max_rows * i // runs)
        yield start + (end - start - rows) // 2, rows


def _add(sums: TokenFigures, encoder: ResolvedEncoder, texts: list[str]) -> None:
    tokenizer = encoder.opened.tokenizer
    prepared = [tokenizer.prepare(text) for text in texts]
    captions = tokenizer.encode_prepared(prepared)
    for text, tokens, cut in zip(prepared, captions.tokens, captions.truncated, strict=True):
        (sums.cut if cut else sums.whole)[tokens] += 1
        sums.whole_characters += 0 if cut else len(text or "")
    sums.empty += prepared.count(tokenizer.for_empty)
    sums.unknown += sum(captions.unknown)
    for tensor, output in encoder.tensors().items():
        sums.vectors[tensor] += sum(encoder.stored_lengths(output, captions, null=False))


def example_lines(figures: Figures, encoders: Sequence[ResolvedEncoder]) -> list[str]:
    """The first texts as they are encoded, quoted, so that a wrong recipe shows; of a long text
    only the two ends. A line for each encoder where one has text steps."""
    half, lines = EXAMPLE_CHARACTERS // 2, []
    own_steps = any(encoder.options.text_steps for encoder in encoders)
    for text in figures.examples:
        for encoder in encoders if own_steps else encoders[:1]:
            by = f" by {encoder.name}" if own_steps else ""
            prepared = encoder.opened.tokenizer.prepare(text)
            if prepared is not None and len(prepared) > EXAMPLE_CHARACTERS:
                prepared = f"{prepared[:half]} ... {prepared[-half:]}"
            shown = "nothing" if prepared is None else repr(prepared)
            lines.append(f"encoded{by} as {shown}")
    return lines


def tokenizer_line(encoder: ResolvedEncoder, figures: Figures) -> tuple[str, bool]:
    """The report's line on the tokenizer, and whether the tokenizer seems to be another model's."""
    ratio = figures.encoders[encoder.name].characters_per_token
    known = f"{ratio:.1f} characters per token" if ratio < math.inf else "all captions are cut"
    line = f"{encoder.opened.tokenizer.name}, {known}"
    suspicious = ratio < FEW_CHARACTERS and not encoder.opened.tokenizer.by_bytes
    if suspicious:
        line += (
            ": fewer than 2, so it may be another model's tokenizer. Only captions in Chinese, "
            "Japanese or Korean have so few"
        )
    return line, suspicious


def estimate_lines(
    sampled: SampledCaptions,
    plan: Plan,
    root: Path,
    dtype: str,
    max_rows: int | None,
    *,
    reuse: Reuse | None = None,
) -> list[str]:
    """The report, line by line, from `max_rows` input rows (None: from all).

    `reuse`: the datasets whose captions are counted.
    """
    if reuse is None and max_rows == SAMPLED_ROWS:
        figures = sampled.figures
    else:
        figures = sampled.measure(max_rows, reuse)
    names = f"plan {plan.plan_id[:16]}, fingerprint {plan.fingerprint[:16]}"
    left = set(range(plan.num_units))
    if all(spec["weights"] is not None for spec in plan.spec["encoders"].values()):
        left = Committed(root, plan).left()
    else:  # such a plan has no identity, so nothing says that the units there are its own
        names = "plan without weights: its id and fingerprint follow when the weights are there"
    lines = [
        names,
        f"input      {counted(len(plan.inputs.files), 'file')}, {counted(plan.num_rows, 'row')}, "
        f"{counted(plan.num_samples, 'sample')}",
    ]
    if plan.extends:
        before = plan.extends[-1]
        lines.append(
            f"{'':<10} {counted(len(plan.inputs.files) - before.num_files, 'file')} more, with "
            f"{counted(plan.num_samples - before.num_samples, 'sample')}"
        )
    all_of_them = figures.samples == plan.num_samples
    basis = "all" if all_of_them else f"{figures.samples:,} evenly spread"
    status = ", ".join(f"{name} {count:,}" for name, count in sorted(figures.status.items()))
    duplicates = figures.encoded - figures.distinct
    lines.append(f"captions   of {basis} samples: {status}; {duplicates:,} repeat an earlier text")
    for what, count in sorted((figures.noted + figures.status).items()):
        if what in figures.first_noted:  # not ok
            lines.append(f"{'':<10} {what}: {count:,}, such as {figures.first_noted[what]}")
    lines += example_lines(figures, sampled.encoders)
    for encoder in sampled.encoders:
        lines += _encoder_lines(encoder, figures, dtype)
    if reuse is not None:
        lines += reuse.lines()
        for encoder in sampled.encoders:
            copied = figures.copied[encoder.name]
            share = copied / max(1, figures.encoded)
            line = f"{copied:,} of {figures.encoded:,} captions ({100 * share:.2f} %) are copied"
            whole = f"; about {round(share * plan.num_samples):,} of all" * (not all_of_them)
            lines.append(f"{'reuse':<10} {encoder.name}: {line}{whole}")
    embeddings = figures.embedding_bytes(sampled.encoders, dtype)
    rows = figures.text_bytes + ROWS_BYTES_PER_SAMPLE * figures.samples
    scale = plan.num_samples / max(1, figures.samples)
    scale *= sum(plan.unit_rows(unit)[1] for unit in left) / plan.num_rows
    return lines + _disk_lines(plan, root, len(left), scale * (rows + embeddings))


def _encoder_lines(encoder: ResolvedEncoder, figures: Figures, dtype: str) -> list[str]:
    sums, decision = figures.encoders[encoder.name], encoder.decision
    size = figures.embedding_bytes([encoder], dtype) / max(1, figures.encoded)
    shapes = ", ".join(f"{batch}x{length}" for batch, length in decision.shapes)
    stored = []
    for tensor, output in encoder.tensors().items():
        what = {"real": "real tokens x", "real+1": "real tokens and a pad x"}.get(
            output.positions or "", "one vector of"
        )
        if output.positions == "all":
            (length,) = encoder.stored_lengths(output, encoder.opened.tokenizer.empty, null=False)
            what = f"padded length {length} x"
        stored.append(f"text_{tensor}: {what} {output.width}")
    tokenizer, suspicious = tokenizer_line(encoder, figures)
    if not figures.encoded:
        return [f"{encoder.name:<10} no caption to encode"]
    tokens, longest = sums.tokens, max(sums.whole + sums.cut)
    heavy = (
        f"{'WARNING':<10} {_size(size)} a caption: more than a disk delivers to a training step. "
        "Store what comes behind a matrix of the model (`project`), or fewer `layers`."
    )
    source = f"; as in {encoder.options.reference}" if encoder.options.reference else ""
    emptied = []
    if sums.empty and (encoder.options.text_steps or encoder.options.empty != "encode"):
        for_empty = encoder.opened.tokenizer.for_empty
        what = "nothing is stored" if for_empty is None else f"encoded as {for_empty!r}"
        shown = f"{sums.empty:,} of {figures.encoded:,} captions, {what}"
        emptied = [f"{'':<10} empty after text_steps: {shown}"]
    shares = zip(PERCENTS, sums.percentiles(*PERCENTS), strict=True)
    return [
        f"{encoder.name:<10} {tokens:,} tokens, mean {tokens / figures.encoded:.1f}, "
        + ", ".join(f"p{percent} {length}" for percent, length in shares)
        + f", max {longest}; <unk> {100 * sums.unknown / max(1, tokens):.3f} %",
        *emptied,
        *_prompt_lines(encoder),
        *(f"{'':<10} {line}" for line in _histogram(sums, encoder.options.max_length)),
        f"{'WARNING' if suspicious else '':<10} tokenizer {tokenizer}",
        f"{'':<10} stored: {', '.join(stored)}; forwards of {shapes}; implementation "
        f"{decision.implementation}",
        f"{'':<10} {_size(size)} a caption{source}",
        *([heavy] if size > HEAVY_BYTES else []),
    ]


def _prompt_lines(encoder: ResolvedEncoder) -> list[str]:
    """The prompt around captions, if there is one, and what of the model is taken."""
    tokenizer, lines = encoder.opened.tokenizer, []
    template, cropped = tokenizer.template, tokenizer.first - tokenizer.keep_first
    if template.before or template.after:
        lines.append(f"{'':<10} prompt {template.format_string!r}")
        lines.append(
            f"{'':<10} of its tokens {cropped} before the caption are not stored, "
            f"{tokenizer.template_stored} are"
        )
    if unknown := tokenizer.unknown_marks:
        lines.append(
            f"{'WARNING':<10} {', '.join(unknown)}: no special token of this tokenizer, so the "
            "model reads it letter by letter"
        )
    taken = encoder.options.taken
    return [*lines, *([f"{'':<10} {taken}"] if taken else [])]


def _histogram(sums: TokenFigures, max_length: int) -> list[str]:
    """How many captions have how many tokens, in at most 7 bars, and how many are truncated."""
    longest = max(1, *sums.whole)
    width = next(w for w in WIDTHS if w * MAX_BARS >= longest)
    starts = range(0, longest, width)
    counts = {f"{w + 1} to {min(w + width, longest)}": 0 for w in starts}
    labels = list(counts)
    if 0 in sums.whole:
        counts = {"0": sums.whole[0], **counts}
    for tokens, count in sums.whole.items():
        if tokens:
            counts[labels[(tokens - 1) // width]] += count
    counts[f"cut at {max_length}"] = sum(sums.cut.values())
    most, percent = max(counts.values()), 100 / sum(counts.values())
    return [
        f"{label:>12} {_bar(count / most):<{BAR_CHARACTERS}} {count:>9,} {count * percent:6.2f} %"
        for label, count in counts.items()
    ]


def _bar(share: float) -> str:
    """A bar of `share` of the full width, in eighths of a character; empty for 0 alone."""
    eighths = math.ceil(share * BAR_CHARACTERS * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _disk_lines(plan: Plan, root: Path, units_left: int, total: float) -> list[str]:
    """What the units that are not committed need, `total` bytes, and what is free."""
    free_bytes, free_files = free_space(root)
    free = _size(free_bytes) if free_bytes < UNLIMITED else "an unknown amount"
    files = units_left * FILES_PER_UNIT + 4
    shards = f"{counted(plan.num_units, 'shard')} of up to {plan.samples_per_shard:,} samples"
    done, rest = plan.num_units - units_left, ""
    if done:
        shards += f"; {done:,} of {plan.num_units:,} shards are there already"
        rest = " for the rest"
    if not units_left:
        return [f"output     {shards}", f"disk       nothing is lacking, {free} free at {root}"]
    lines = [
        f"output     {shards}, about {files:,} files{rest}",
        f"disk       about {_size(total)}{rest} (equal texts in a shard are stored once, which can "
        f"only make it less), {free} free at {root}",
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
