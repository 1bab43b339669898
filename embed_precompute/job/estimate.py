"""What some of the captions tell about a job: tokens, duplicates, operations.

The shard size, the price (`job/price`) and the report are estimated from one reading of 10,000
input rows from all over the table. In the report the numbers of rows, samples and shards are
exact. Figures that need tokens come from those rows, or from all; the report says how many samples
were read. What depends on whole units (equal texts, rows parts) comes from some units that are made
in memory as a run makes them, all but their vectors. Nothing is written.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import xxhash

from embed_precompute.captions.table import CaptionTable
from embed_precompute.encoders.families.base import DTYPE_BYTES
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.job.reuse import Reuse
from embed_precompute.job.units import Unit, make_unit, null_unit
from embed_precompute.samples import Sample, Status
from embed_precompute.steps import byte_size, steps
from embed_precompute.store.plan import Plan
from embed_precompute.store.rows import rows_part_bytes, table_bytes
from embed_precompute.store.shards import shard_bytes

SAMPLED_ROWS, QUICK_ROWS = 10_000, 2_000
MADE_SAMPLES, LEAST_UNITS = 20_000, 2
"""About so many samples are made into units in memory; at least so many units."""
RUNS = 100
PIECE_ROWS, LEAST_ROWS = 10_000, 100
"""Of a run where all rows are looked at."""
PERCENTS = (5, 50, 95, 99)
MAX_BARS, BAR_CHARACTERS = 7, 30
WIDTHS = [step * 10**power for power in range(9) for step in (1, 2, 5)]
EXAMPLES, EXAMPLE_CHARACTERS = 3, 300
HEAVY_BYTES = 20e6
"""`plan` warns where an average caption takes more."""
MANY_UNKNOWN = 0.01
"""Share of captions with an unknown token from which on `plan` and `run` warn."""
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
    with_unknown: int = 0
    """Captions with an unknown token."""
    empty: int = 0
    """Captions that are empty after the encoder's text steps."""
    vectors: Counter[str] = field(default_factory=Counter)
    """Number of stored vectors, by tensor."""
    real: int = 0
    """Vectors of a tensor that stores real tokens alone."""
    whole_characters: int = 0
    """Characters of the captions that are not truncated."""
    flops: float = 0.0
    """Operations of the layers, see `ResolvedEncoder.flops`."""
    real_flops: float = 0.0
    """The same where no pad is run."""

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


@dataclass(frozen=True)
class Run:
    """A run of rows that was looked at."""

    first: int
    rows: int
    samples: int
    size: int
    """Bytes of embeddings, in float32."""
    flops: dict[str, float]
    """Operations by encoder, without those of captions that are copied."""


@dataclass
class Figures:
    """Sums over the samples that were looked at."""

    samples: int = 0
    status: Counter[str] = field(default_factory=Counter)
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
    runs: list[Run] = field(default_factory=list)

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


@dataclass
class UnitSums:
    """Sums over units that were made in memory."""

    units: int = 0
    samples: int = 0
    encoded: int = 0
    """Samples that have an embedding."""
    headers: int = 0
    """Bytes before the tensors of a shard."""
    rows_parts: int = 0
    table: int = 0
    """Bytes in manifest.parquet."""
    ids: int = 0
    """Bytes of all ids."""
    null: int = 0
    """Bytes of the null embedding's shard."""
    tensors: Counter[str] = field(default_factory=Counter)
    """Bytes in shards, by tensor, with its offsets and checksums."""
    own: Counter[str] = field(default_factory=Counter)
    """Vectors by tensor, if each sample had its own."""
    own_flops: dict[str, float] = field(default_factory=dict)
    """Operations if each sample had its own."""
    sizes: list[float] = field(default_factory=list)
    """For each unit, the bytes of its shard's tensors and of its rows part."""
    unit_flops: dict[str, list[float]] = field(default_factory=dict)
    """For each unit, the operations of what is stored, by encoder."""
    merged: list[tuple[float, float]] = field(default_factory=list)
    """(bytes of its shard's tensors, the same if each sample had its own) of each unit."""


class SampledCaptions:
    """Captions from everywhere in a table, read and tokenised when they are first asked for."""

    def __init__(
        self,
        table: CaptionTable,
        encoders: Sequence[ResolvedEncoder],
        num_rows: int,
        last_row_samples: int | None,
        runs: Sequence[tuple[int, int]] = (),
        reuse: Reuse | None = None,
    ) -> None:
        """`num_rows` and `last_row_samples` are those of the scan, or of the stored plan. `runs`:
        (first row, rows) of the runs to look at, if not those of `sampled_runs`. `reuse`: the
        datasets whose captions are counted in `Figures.copied`."""
        self.runs, self._reuse = runs, reuse
        self._table, self.encoders = table, encoders
        self._num_rows, self._last_row_samples = num_rows, last_row_samples
        self.spread = "evenly spread" if not runs else "at the beginnings of row groups"
        self.kept: list[Sample] = []
        """The samples of `figures`, in order."""

    @functools.cached_property
    def figures(self) -> Figures:
        """The figures of 10,000 input rows."""
        return self.measure(SAMPLED_ROWS, keep=True)

    def measured(self, max_rows: int | None) -> Figures:
        """`measure`, or `figures` where they are the same."""
        return self.figures if max_rows == SAMPLED_ROWS else self.measure(max_rows)

    def units(self, plan: Plan, num_samples: int) -> Iterator[Unit]:
        """Some units, one of each of as many equal parts of the plan, as a run reads and tokenises
        them: of about `num_samples` samples. What was read for `figures` is not read again."""
        wanted = max(LEAST_UNITS, -(-num_samples // plan.samples_per_shard))
        count = min(plan.num_units, wanted)
        numbers = one_of_each(plan.num_units, count)
        reader = self._table.reader(self._num_rows, self._last_row_samples)
        has_all = len(self.kept) > 0 and plan.num_rows <= SAMPLED_ROWS
        rows = [sample.row for sample in self.kept]
        for number in steps(numbers, count, "making shards in memory", " shards"):
            first, num_rows = plan.unit_rows(number)
            if has_all:
                begin, end = (bisect.bisect_left(rows, row) for row in (first, first + num_rows))
                samples = self.kept[begin:end]
            else:
                samples = reader.read(first, num_rows)
            yield make_unit(number, first, num_rows, samples, self.encoders)
        reader.close()

    def made_in_memory(self, plan: Plan, num_samples: int) -> UnitSums:
        """Sums over `units`, whose rows parts are written and whose shards are laid out."""
        sums, parts = UnitSums(), list[tuple[bytes, int]]()
        null = null_unit(self.encoders)
        totals = {name: sum(lengths) for name, lengths in null.lengths.items()}
        sizes = shard_bytes(plan.fingerprint, null.number, plan.tensors, 1, totals)
        sums.null = sum(sizes.values())
        for unit in self.units(plan, num_samples):
            totals = {name: sum(lengths) for name, lengths in unit.lengths.items()}
            sizes = shard_bytes(
                plan.fingerprint, unit.number, plan.tensors, unit.num_stored, totals
            )
            sums.headers += sizes.pop("")
            sums.tensors.update(sizes)
            rows = [row for row in unit.stored_row if row is not None]
            own = {name: sum(each[row] for row in rows) for name, each in unit.lengths.items()}
            sums.own.update(own)
            own_sizes = shard_bytes(plan.fingerprint, unit.number, plan.tensors, len(rows), own)
            own_sizes.pop("")
            sums.merged.append((sum(sizes.values()), sum(own_sizes.values())))
            for encoder in self.encoders:
                tokens = unit.tokens[encoder.name]
                sums.unit_flops.setdefault(encoder.name, []).append(encoder.flops(tokens))
                own_flops = sums.own_flops.get(encoder.name, 0.0)
                sums.own_flops[encoder.name] = own_flops + encoder.flops(tokens.select(rows))
            columns = unit.columns(range(unit.num_stored))
            part = rows_part_bytes(unit.number, plan.tensors, columns)
            parts.append((part, len(unit.samples)))
            sums.rows_parts += len(part)
            sums.sizes.append(sum(sizes.values()) + len(part))
            sums.ids += sum(len(each.encode()) for each in columns.sample_id)
            sums.units += 1
            sums.samples += len(unit.samples)
            sums.encoded += len(rows)
        sums.table = table_bytes(plan.tensors, iter(parts))
        return sums

    def measure(self, max_rows: int | None, *, keep: bool = False) -> Figures:
        """Returns the figures of `max_rows` input rows (None: of all). `keep`: the samples are kept
        for `units`."""
        reader = self._table.reader(self._num_rows, self._last_row_samples)
        sums = {encoder.name: TokenFigures() for encoder in self.encoders}
        figures = Figures(noted=reader.noted, first_noted=reader.first_noted, encoders=sums)
        hashes: list[np.ndarray] = []
        runs = self.runs or list(sampled_runs(self._num_rows, max_rows))
        for first, rows in steps(runs, len(runs), "tokenising", " runs of rows"):
            samples = reader.read(first, rows)
            self.kept += samples if keep else ()
            valid = [sample for sample in samples if sample.text is not None]
            texts = [sample.text for sample in valid if sample.text is not None]
            figures.examples += texts[: EXAMPLES - len(figures.examples)]
            figures.samples += len(samples)
            figures.status.update(sample.status.label for sample in samples)
            encoded = [text.encode() for text in texts]
            hashes.append(np.array([xxhash.xxh3_64_intdigest(t) for t in encoded], np.uint64))
            copied = self._reuse.count(texts) if self._reuse is not None else Counter[str]()
            figures.copied.update(copied)
            before, flops = figures.embedding_bytes(self.encoders, "float32"), dict[str, float]()
            for encoder in self.encoders:
                of_encoder = figures.encoders[encoder.name]
                flops_before = of_encoder.flops
                reader.note_unknown(encoder.name, valid, _add(of_encoder, encoder, texts))
                own = 1 - copied[encoder.name] / max(1, len(texts))
                flops[encoder.name] = (of_encoder.flops - flops_before) * own
            size = figures.embedding_bytes(self.encoders, "float32") - before
            figures.runs.append(Run(first, rows, len(samples), size, flops))
        reader.close()
        figures.distinct = len(np.unique(np.concatenate(hashes)))
        return figures


def sampled_runs(num_rows: int, max_rows: int | None) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each run of input rows to look at, in ascending order.

    100 runs, each somewhere in a hundredth of the table: one that is sorted counts as it is, and so
    does one that repeats itself, such as files that are each sorted by length. Every row is as
    likely as another: a run that begins near the end of its hundredth goes on at the beginning of
    it. Which rows they are depends on `num_rows` and `max_rows` alone.
    """
    if max_rows is None or max_rows >= num_rows:
        piece = min(PIECE_ROWS, max(LEAST_ROWS, num_rows // RUNS))
        for first in range(0, num_rows, piece):
            yield first, min(piece, num_rows - first)
        return
    runs = min(RUNS, max_rows)
    firsts = one_of_each(num_rows, runs)
    for i, first in enumerate(firsts):
        start, end = num_rows * i // runs, num_rows * (i + 1) // runs
        rows = min(end - start, max_rows * (i + 1) // runs - max_rows * i // runs)
        if over := max(0, first + rows - end):
            yield start, over
        yield first, rows - over


def one_of_each(count: int, parts: int) -> list[int]:
    """One number out of each of `parts` equal parts of range(count), the same at each call."""
    chance = random.Random(count)
    bounds = [count * i // parts for i in range(parts + 1)]
    return [
        start + int(chance.random() * (end - start)) for start, end in itertools.pairwise(bounds)
    ]


def first_of_row_groups(table: CaptionTable) -> list[tuple[int, int]]:
    """(first row, rows) of 2,000 input rows in at most 100 runs, each at the beginning of a row
    group, where nothing before it has to be decoded."""
    files = table.row_map.files
    firsts = np.cumsum([0, *(file.input.rows for file in files)])
    bounds = [first + file.group_starts for first, file in zip(firsts, files, strict=False)]
    groups = [pair for each in bounds for pair in itertools.pairwise(each.tolist())]
    groups = [(start, end) for start, end in groups if end > start]
    runs = min(RUNS, len(groups))
    chosen = (groups[i] for i in one_of_each(len(groups), runs))
    return [(start, min(QUICK_ROWS // runs, end - start)) for start, end in chosen]


def _add(sums: TokenFigures, encoder: ResolvedEncoder, texts: list[str]) -> list[int]:
    """Returns the number of unknown tokens of each text."""
    tokenizer = encoder.opened.tokenizer
    prepared = [tokenizer.prepare(text) for text in texts]
    captions = tokenizer.encode_prepared(prepared)
    for text, tokens, cut in zip(prepared, captions.tokens, captions.truncated, strict=True):
        (sums.cut if cut else sums.whole)[tokens] += 1
        sums.whole_characters += 0 if cut else len(text or "")
    sums.empty += prepared.count(tokenizer.for_empty)
    sums.flops += encoder.flops(captions)
    sums.real_flops += encoder.flops(captions, pads=False)
    sums.real += sum(captions.stored)
    sums.unknown += sum(captions.unknown)
    sums.with_unknown += len(captions) - captions.unknown.count(0)
    for tensor, output in encoder.tensors().items():
        sums.vectors[tensor] += sum(encoder.stored_lengths(output, captions, null=False))
    return captions.unknown


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
    """The report's line on the tokenizer, and whether it seems not to fit the captions."""
    sums = figures.encoders[encoder.name]
    ratio = sums.characters_per_token
    known = f"{ratio:.1f} characters per token" if ratio < math.inf else "all captions are cut"
    line = f"{encoder.opened.tokenizer.name}, {known}"
    suspicious = ratio < FEW_CHARACTERS and not encoder.opened.tokenizer.by_bytes
    if suspicious:
        line += (
            ": fewer than 2, so it may be another model's tokenizer. Only captions in Chinese, "
            "Japanese or Korean have so few"
        )
    share = sums.with_unknown / max(1, figures.encoded)
    if share > MANY_UNKNOWN:
        suspicious = True
        line += (
            f"; {100 * share:.1f} % of the captions have words that it does not know, such as "
            "those of another script. Each becomes <unk>: captions that differ in these alone get "
            "equal embeddings. Translate them, or leave them out"
        )
    return line, suspicious


def caption_lines(
    sampled: SampledCaptions, figures: Figures, plan: Plan, dtype: str, reuse: Reuse | None = None
) -> list[str]:
    """What the report says of captions and encoders, line by line; `reuse`: the datasets whose
    captions were counted."""
    all_of_them = figures.samples == plan.num_samples
    basis = "all" if all_of_them else f"{figures.samples:,} {sampled.spread}"
    status = ", ".join(f"{name} {count:,}" for name, count in sorted(figures.status.items()))
    duplicates = figures.encoded - figures.distinct
    lines = [f"captions   of {basis} samples: {status}; {duplicates:,} repeat an earlier text"]
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
    return lines


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
        f"{'WARNING':<10} {byte_size(size)} a caption: more than a disk delivers to a training "
        "step. Store what comes behind a matrix of the model (`project`), or fewer `layers`."
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
        f"{'':<10} {byte_size(size)} a caption{source}",
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
