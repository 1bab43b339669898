"""The price of a dataset before a GPU hour is spent: bytes, files, GPU hours, write rate, advice.

Guarantees: no figure without what it assumes beside it. Rows, shards and files are exact. Bytes are
those of whole units that are made in memory as a run makes them, all but their vectors, scaled to
the whole; vectors and operations per caption are those of the sampled captions. If all units were
made, as they are of a small table, the bytes are exact but for a few hundred per unit.
What is left of a begun dataset is the sum over its own units, or over sampled rows next to them.
Costs: no model, no GPU; reading and tokenising some units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from embed_precompute.encoders.families.base import DTYPE_BYTES
from embed_precompute.encoders.peaks import SHARE_OF_PEAK, is_known, known_gpus, peak_flops
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.errors import InputError
from embed_precompute.job.estimate import MADE_SAMPLES, Figures, Run, SampledCaptions
from embed_precompute.steps import byte_size, counted
from embed_precompute.store.commit import UNLIMITED, free_space
from embed_precompute.store.index import index_bytes, index_dtypes, tensor_entries
from embed_precompute.store.plan import Plan

FILES_PER_UNIT = 3
RECORD_BYTES, NULL_RECORD_BYTES, RECORD_BYTES_PER_TENSOR = 1000, 600, 70
"""Of a record; the environment in it is known when the run starts."""
OTHER_BYTES, OTHER_BYTES_PER_FILE = 8000, 230
"""plan.json, manifest.json, config.yaml and run.json; plan.json names each caption file."""
MILLION, TERA = 1e6, 1e12
GPU, CPU = "GPU", "CPU process"
SHORT = 60
"""Seconds of a run; a shorter one has no write rate worth saying."""
SMALL_SHARE = 0.01
"""Of a training step: encoders that cost less are not worth storing."""
CUT_PERCENT, LENGTH_STEP, WORTH = 99, 16, 0.8
"""A lower max_length is advised that leaves so many percent of the captions whole and takes at most
0.8 of the bytes."""


# --- bytes and operations -------------------------------------------------------------------------


@dataclass(frozen=True)
class Price:
    """What a dataset takes; bytes and operations of all units, also of those that are done."""

    plan: Plan
    encoders: tuple[ResolvedEncoder, ...]
    figures: Figures
    dtype: str
    encoded: float
    """Samples that have an embedding."""
    unit_bytes: dict[str, float]
    """What the units take: of shards by tensor, of rows parts, of records."""
    bytes_by_unit: np.ndarray
    """The same, by unit."""
    final_bytes: dict[str, float]
    """What is written once: the null embedding; plan, manifest and index."""
    saved: float
    """Bytes that equal texts of a shard save."""
    flops: dict[str, float]
    """Operations by encoder; equal texts of a shard are encoded once, copied ones not at all."""
    flops_by_unit: dict[str, np.ndarray]
    """The same, by unit."""
    own_flops: dict[str, float]
    """If every sample is encoded, as in a training loop."""
    measured_units: int
    """Units that were made in memory."""
    error: float
    """Two standard errors of the bytes of shards, relative to them; 0: all units were made."""

    @property
    def total(self) -> float:
        return sum(self.unit_bytes.values()) + sum(self.final_bytes.values())

    @property
    def final_files(self) -> int:
        """The files that are written once: null, plans, manifest, index, provenance and card; logs
        are not counted."""
        arrays = len(index_dtypes(tensor_entries(self.plan.tensors)))
        return 2 + 1 + len(self.plan.extends) + 2 + arrays + 3

    def needed(self, left: Collection[int]) -> tuple[float, int]:
        """(bytes, files) that are still to be written when these units have no record."""
        if not left:
            return 0.0, 0
        of_units = float(self.bytes_by_unit[list(left)].sum())
        files = len(left) * FILES_PER_UNIT + self.final_files
        return of_units + sum(self.final_bytes.values()), files

    def flops_of(self, left: Collection[int]) -> dict[str, float]:
        """Operations of these units, by encoder."""
        return {name: float(each[list(left)].sum()) for name, each in self.flops_by_unit.items()}

    @property
    def per_caption(self) -> float:
        """Bytes that training reads of a caption."""
        vectors = sum(self.unit_bytes[f"text_{tensor.name}"] for tensor in self.plan.tensors)
        return (vectors + self.saved) / max(1, self.encoded)


def price_of(
    sampled: SampledCaptions,
    plan: Plan,
    dtype: str,
    figures: Figures | None = None,
    num_samples: int = MADE_SAMPLES,
) -> Price:
    """The price of the dataset of `plan`. `figures`: those of more or other captions than
    `sampled.figures`; `num_samples`: about so many are made into units in memory."""
    figures = figures or sampled.figures
    units = sampled.made_in_memory(plan, num_samples)
    is_whole = units.units == plan.num_units
    scale = plan.num_samples / max(1, units.samples)
    per_sample = plan.num_samples / max(1, figures.samples)
    tensors, own_flops, saved = {}, {}, 0.0
    for encoder in sampled.encoders:
        # Lengths vary from place to place, and the figures are of more places than the units.
        sums = figures.encoders[encoder.name]
        own = units.own_flops[encoder.name]
        own_flops[encoder.name] = own if is_whole else sums.flops * per_sample
        for name, output in encoder.tensors().items():
            vectors = units.own[name] if is_whole else sums.vectors[name] * per_sample
            unmerged = vectors * output.width * DTYPE_BYTES[dtype]
            made = units.own[name]
            size = vectors * units.tensors[name] / made if made else unmerged
            saved += max(0.0, unmerged - size)
            tensors[f"text_{name}"] = size
    encoded = float(units.encoded) if is_whole else figures.encoded * per_sample
    share = figures.samples / plan.num_samples
    places = [(run.size, run.samples) for run in figures.runs]
    errors = (_error(places, share), _error(units.merged, units.units / plan.num_units))
    per_record = RECORD_BYTES_PER_TENSOR * len(plan.tensors)
    record = RECORD_BYTES + per_record
    index = index_bytes(
        plan.tensors,
        samples=plan.num_samples,
        ok=round(encoded),
        units=plan.num_units,
        id_bytes=round(units.ids * scale),
    )
    described = OTHER_BYTES + OTHER_BYTES_PER_FILE * len(plan.inputs.files)
    described += round(units.table * scale) + index
    rows_parts, records = units.rows_parts * scale, (record + units.headers / units.units)
    flops = {
        name: total
        * (sum(units.unit_flops[name]) / max(1.0, units.own_flops[name]))
        * (1 - figures.copied[name] / max(1, figures.encoded))
        for name, total in own_flops.items()
    }
    bounds = np.array([plan.unit_rows(unit) for unit in range(plan.num_units)], np.float64)
    if is_whole:
        bytes_by_unit = np.array(units.sizes)
        by_unit = {name: np.array(each) for name, each in units.unit_flops.items()}
    else:
        parts = _shared_out(rows_parts, bounds[:, 1])
        by_row = _over_units(bounds, figures.runs, [run.size for run in figures.runs])
        bytes_by_unit = parts + _shared_out(sum(tensors.values()), by_row)
        by_unit = {
            name: _over_units(bounds, figures.runs, [run.flops[name] for run in figures.runs])
            for name in flops
        }
    return Price(
        plan=plan,
        encoders=tuple(sampled.encoders),
        figures=figures,
        dtype=dtype,
        encoded=encoded,
        unit_bytes={
            **tensors,
            "rows parts": rows_parts,
            "records, headers": records * plan.num_units,
        },
        bytes_by_unit=bytes_by_unit + records,
        final_bytes={
            "manifest, index": float(described),
            "null embedding": float(units.null + NULL_RECORD_BYTES + per_record),
        },
        saved=saved,
        flops=flops,
        flops_by_unit={name: _shared_out(flops[name], each) for name, each in by_unit.items()},
        own_flops=own_flops,
        measured_units=units.units,
        # The beginnings of row groups may be all alike, as in files that are sorted.
        error=0.0 if is_whole else math.inf if sampled.runs else math.hypot(*errors),
    )


def _over_units(bounds: np.ndarray, runs: Sequence[Run], values: Sequence[float]) -> np.ndarray:
    """What `values` of the runs make for each unit: those of the runs next to it, by its rows.
    `bounds`: (first row, rows) of each unit."""
    per_row = [value / run.rows for value, run in zip(values, runs, strict=True)]
    middles = bounds[:, 0] + bounds[:, 1] / 2
    places = np.array([run.first + run.rows / 2 for run in runs])
    found: np.ndarray = np.interp(middles, places, per_row) * bounds[:, 1]
    return found


def _shared_out(total: float, weights: np.ndarray) -> np.ndarray:
    """`total` in parts that are to each other as `weights`, or equal where these are 0."""
    whole = weights.sum()
    return total * (weights / whole if whole else np.full(len(weights), 1 / len(weights)))


def _error(places: Sequence[tuple[float, float]], share: float) -> float:
    """Two standard errors of a ratio, relative to it: of the sum of the first numbers to that of
    the second. `places` are one each, by chance, of equal parts of the table in order, of which
    `share` was looked at. What differs between neighbours is taken for chance, so the error is
    rather too large."""
    count, size = len(places), sum(size for size, _ in places)
    if count < 2 or share >= 1:
        return 0.0 if share >= 1 else math.inf
    ratio = size / (sum(of for _, of in places) or 1.0)
    excess = [each - ratio * of for each, of in places]
    squares = sum((a - b) ** 2 for a, b in itertools.pairwise(excess)) / 2
    return 2 * math.sqrt(squares * count / (count - 1) * (1 - share)) / (size or 1.0)


# --- speed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """How fast one process encodes, and how that is known; nothing is known without a rate."""

    basis: str
    """What the figure assumes, for people."""
    flops_per_s: Mapping[str, float] = field(default_factory=dict)
    """By encoder."""
    captions_per_s: float | None = None
    """Of all encoders together; then `flops_per_s` is not used."""
    process: str = GPU
    """What hours are said of: a GPU with a process of its own, or a `CPU process`."""

    @property
    def is_known(self) -> bool:
        return bool(self.flops_per_s) or self.captions_per_s is not None

    def seconds(self, price: Price, flops: Mapping[str, float]) -> float:
        """Seconds of one process for these operations of the price."""
        if self.captions_per_s is not None:
            whole = sum(price.own_flops.values()) or 1.0
            return sum(flops.values()) / whole * price.encoded / self.captions_per_s
        return sum(count / self.flops_per_s[name] for name, count in flops.items())


def speed_of_rate(captions_per_s: float, process: str = GPU) -> Speed:
    """As the person says."""
    return Speed(
        f"at {captions_per_s:,.5g} captions/s of one {process}, as --rate says",
        captions_per_s=captions_per_s,
        process=process,
    )


def speed_of_a_cpu() -> Speed:
    """Not known: CPUs differ too much for an assumption."""
    return Speed(
        "no hours are assumed of a CPU (runtime.device): give --calibrate, --rate N (captions/s "
        "of one process), or --gpu NAME for those of a GPU",
        process=CPU,
    )


def known_speed(
    dtypes: Mapping[str, str], device: str, share: float = SHARE_OF_PEAK
) -> Speed | None:
    """A share of a device's peak; None if its peak is not known. `dtypes`: what each encoder
    computes in."""
    peaks = {name: peak_flops(device, dtype) or 0.0 for name, dtype in dtypes.items()}
    if not all(peaks.values()):
        return None
    of = {dtype: f"{peaks[name] / TERA:,.0f} TFLOP/s in {dtype}" for name, dtype in dtypes.items()}
    basis = (
        f"at {100 * share:.3g} % (assumed) of the peak of {device} ({' and '.join(of.values())})"
    )
    return Speed(basis, {name: share * peak for name, peak in peaks.items()})


def speed_of_gpu(dtypes: Mapping[str, str], gpu: str, share: float) -> Speed:
    """`known_speed`. Raises InputError: its peak is not known."""
    speed = known_speed(dtypes, gpu, share)
    if speed is None:
        lacking = " and ".join(
            sorted({each for each in dtypes.values() if not peak_flops(gpu, each)})
        )
        why = f"it has no {lacking}" if is_known(gpu) else f"its peak in {lacking} is not known"
        raise InputError(
            f"--gpu {gpu}: {why}. Known are {', '.join(known_gpus(dtypes.values()))}. Name one of "
            "these with the --share of its peak that yours reaches, or give captions/s as --rate."
        )
    return speed


# --- the report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What a training step costs, as the person says."""

    flops: float
    """Operations of a step per sample, forward and backward."""
    epochs: float | None = None


def names_line(plan: Plan, *, has_weights: bool) -> str:
    """The identities of a plan."""
    if has_weights:
        return f"plan {plan.plan_id[:16]}, fingerprint {plan.fingerprint[:16]}"
    return "plan without weights: its id and fingerprint follow when the weights are there"


def head_lines(plan: Plan) -> list[str]:
    """What the plan is of."""
    lines = [
        f"input      {counted(len(plan.inputs.files), 'file')}, {counted(plan.num_rows, 'row')}, "
        f"{counted(plan.num_samples, 'sample')}"
    ]
    if plan.extends:
        before = plan.extends[-1]
        lines.append(
            f"{'':<10} {counted(len(plan.inputs.files) - before.num_files, 'file')} more, with "
            f"{counted(plan.num_samples - before.num_samples, 'sample')}"
        )
    return lines


def price_lines(
    price: Price,
    left: Collection[int] | None,
    root: Path,
    speed: Speed | None,
    ranks: int,
    training: Training | None = None,
) -> list[str]:
    """The report of `plan` on the output, line by line; `left`: the units without a record, None:
    all. Without `speed` nothing is said of encoding, nor where nothing is left."""
    left = range(price.plan.num_units) if left is None else left
    lines = [*_output_lines(price, left), *_disk_lines(price, left, root)]
    if not left or not sum(price.own_flops.values()):  # no caption has anything to encode
        return lines
    if speed is not None:
        lines += _speed_lines(price, left, speed, ranks)
    lines += [f"{'advice':<10} {line}" for line in _advice(price)]
    if training is not None and speed is not None:
        if speed.is_known:
            lines += _training_lines(price, speed, ranks, training)
        else:
            lines.append("training   not compared: there are no hours, see encoding")
    return lines


def run_line(price: Price, left: Collection[int], root: Path, speed: Speed | None) -> str:
    """The price in one line; `speed` None: this device's peak is not known."""
    needed, files = price.needed(left)
    line = f"price: {byte_size(needed)} in {files:,} files to write, {_free(root)} free"
    flops = price.flops_of(left)
    line += f"; {flop_count(sum(flops.values()))} to compute"
    if speed is not None:
        line += f", {_hours(speed.seconds(price, flops))} {speed.process} hours {speed.basis}"
    return line


def _output_lines(price: Price, left: Collection[int]) -> list[str]:
    plan = price.plan
    _, files = price.needed(left)
    shards = f"{counted(plan.num_units, 'shard')} of up to {plan.samples_per_shard:,} samples"
    done, rest = plan.num_units - len(left), ""
    if done:
        shards += f"; {done:,} of {plan.num_units:,} shards are there already"
        rest = " for the rest"
    if not left:
        return [f"output     {shards}"]
    made = "all of them made in memory"
    if price.measured_units < plan.num_units:
        within = (
            f"within {100 * max(price.error, 0.001):.2g} %"
            if price.error < 1
            else "too few to say how far"
        )
        made = f"{price.measured_units:,} shards made in memory, {within}"
    lines = [
        f"output     {shards}, {files:,} files{rest}; bytes by {made}",
        f"{'':<10} {'':<20} {'the dataset':>14} {'per million samples':>22}",
    ]
    per_million = MILLION / plan.num_samples
    for name, size in {**price.unit_bytes, **price.final_bytes, "in all": price.total}.items():
        scaled = f"{byte_size(size * per_million):>22}" if name != "null embedding" else ""
        lines.append(f"{'':<10} {name:<20} {byte_size(size):>14} {scaled}".rstrip())
    repeated = price.saved / max(1.0, price.saved + sum(price.unit_bytes.values()))
    if repeated >= 0.0005:
        lines.append(
            f"{'':<10} equal texts of a shard are stored once, which saves "
            f"{byte_size(price.saved)} ({100 * repeated:.1f} %); those of several shards are not"
        )
    return lines


def _disk_lines(price: Price, left: Collection[int], root: Path) -> list[str]:
    """What the units that are not committed need, and what is free."""
    free_bytes, free_files = free_space(root)
    if not left:
        return [f"disk       nothing is lacking, {_free(root)} free at {root}"]
    (needed, files), rest = price.needed(left), ""
    if len(left) < price.plan.num_units:
        rest = " for the rest"
    lines = [f"disk       about {byte_size(needed)}{rest}, {_free(root)} free at {root}"]
    if files > free_files:
        lines.append(f"WARNING    {files:,} files are needed, {free_files:,} are free")
    if needed > free_bytes:
        lines.append(
            f"WARNING    {byte_size(needed - free_bytes)} are lacking: the run would stop with "
            "exit 74 and go on when there is space"
        )
    return lines


def _free(root: Path) -> str:
    """Bytes and files."""
    free_bytes, free_files = free_space(root)
    free = byte_size(free_bytes) if free_bytes < UNLIMITED else "an unknown amount"
    return free + (f" and {free_files:,} files" if free_files < UNLIMITED else "")


def _speed_lines(price: Price, left: Collection[int], speed: Speed, ranks: int) -> Iterator[str]:
    captions = price.encoded
    each = {name: count / captions for name, count in price.own_flops.items()}
    by_encoder = ", ".join(f"{name} {flop_count(count)}" for name, count in each.items())
    yield (
        f"encoding   {flop_count(sum(each.values()))} a caption ({by_encoder}): the layers alone, "
        "without what fills up a batch"
    )
    yield f"{'':<10} {speed.basis}"
    flops = price.flops_of(left)
    if speed.is_known and any(flops.values()):
        seconds, whole = speed.seconds(price, flops), speed.seconds(price, price.flops)
        yield from _time_lines(price, left, seconds, whole, speed.process, ranks)
    elif speed.is_known:
        copied = not any(price.flops.values())
        why = (
            "nothing is encoded: all of it is copied" if copied else "no caption is left to encode"
        )
        yield f"{'':<10} {why}"
    if len(left) < ranks:
        yield f"{'':<10} {_idle_ranks(price.plan, left, ranks)}"


def _time_lines(
    price: Price, left: Collection[int], seconds: float, whole: float, process: str, ranks: int
) -> Iterator[str]:
    """The `seconds` of one process for what is left, and for the `whole`; a unit is made by one
    rank."""
    of_all = f" for the rest ({_hours(whole)} for all)" if len(left) < price.plan.num_units else ""
    per_million = _hours(whole * MILLION / price.plan.num_samples)
    wall = seconds * -(-len(left) // ranks) / len(left)
    working = min(ranks, len(left))
    at = counted(ranks, "rank") if working == ranks else f"{working:,} of {counted(ranks, 'rank')}"
    lasts = f"{_hours(wall)} hours" if wall >= SHORT else "less than a minute"
    yield (
        f"{'':<10} {_hours(seconds)} {process} hours{of_all}, {per_million} per million "
        f"samples; {lasts} at {at} (--ranks), loading left out"
    )
    if wall < SHORT:
        return
    rate = float(price.bytes_by_unit[list(left)].sum()) / seconds * working
    files = FILES_PER_UNIT * len(left) / seconds * working
    yield (
        f"{'':<10} the output must take {_rate(rate)} and {_figure(files)} files/s at {at}, or "
        "the encoders wait"
    )


def _idle_ranks(plan: Plan, left: Collection[int], ranks: int) -> str:
    """That ranks get no unit, and a shard size that has one for each, unless units are made already
    or rows with lists cannot be split further."""
    said = (
        f"{counted(len(left), 'shard')} for {counted(ranks, 'rank')}: {ranks - len(left):,} would "
        "have no work"
    )
    smaller = plan.num_samples // ranks
    if len(left) < plan.num_units or min(plan.num_rows, smaller * ranks) < ranks:
        return f"{said}; {counted(len(left), 'rank')} will do"
    return (
        f"{said}. output.samples_per_shard {smaller:,} (not {plan.samples_per_shard:,}) has one "
        "for each"
    )


def _training_lines(price: Price, speed: Speed, ranks: int, training: Training) -> Iterator[str]:
    """Encoding in the training loop against storing."""
    flops = sum(price.own_flops.values())
    share = flops / price.encoded / training.flops
    in_loop, stored = speed.seconds(price, price.own_flops), speed.seconds(price, price.flops)
    weights = sum(
        encoder.sizes.layers * encoder.sizes.linear_weights * DTYPE_BYTES[encoder.options.dtype]
        for encoder in price.encoders
    )
    yield (
        f"training   a step of {flop_count(training.flops)} a sample (--training-flops): encoding "
        f"in the loop adds {100 * share:.2g} % to it, and {byte_size(weights)} of weights to "
        f"each {speed.process}"
    )
    # The GPU trains at the rate at which it encodes: in operations per second.
    samples_per_s = flops / in_loop / training.flops
    yield (
        f"{'':<10} stored, a step reads {byte_size(price.per_caption)} a sample: "
        f"{_rate(price.per_caption * samples_per_s * ranks)} at {counted(ranks, 'rank')}, if "
        f"training too computes {flop_count(flops / in_loop)}/s on a {speed.process}"
    )
    epochs = training.epochs
    if epochs is None:
        yield (
            f"{'':<10} {_hours(in_loop)} {speed.process} hours in the loop for each epoch, "
            f"{_hours(stored)} once and stored (--epochs N compares them)"
        )
    else:
        yield (
            f"{'':<10} {_hours(in_loop * epochs)} {speed.process} hours in the loop over "
            f"{epochs:g} epochs, {_hours(stored)} once and stored in {byte_size(price.total)}"
        )
    if epochs is not None and epochs * in_loop <= stored:
        yield f"{'':<10} don't store: over {epochs:g} epochs that saves no {speed.process} hour"
    elif share < SMALL_SHARE:
        yield (
            f"{'':<10} don't store: encoders below {100 * SMALL_SHARE:g} % of a step hardly pay "
            f"for {byte_size(price.total)}"
        )
    elif epochs is not None:
        saved = (epochs * in_loop - stored) / 3600
        yield (
            f"{'':<10} storing saves {_figure(saved)} {speed.process} hours, "
            f"{_figure(saved / (price.total / 2**40))} for each TiB"
        )


def _advice(price: Price) -> Iterator[str]:
    """What would be cheaper, in figures, and what it changes."""
    for encoder in price.encoders:
        yield from _advice_on_length(encoder, price)
    if price.dtype == "float32":
        half = sum(price.unit_bytes[f"text_{tensor.name}"] for tensor in price.plan.tensors) / 2
        computed = [e.name for e in price.encoders if e.options.dtype != "float32"]
        why = f"; {', '.join(computed)} computes in half precision anyway" if computed else ""
        yield f"output.dtype bfloat16 instead of float32 saves {byte_size(half)}{why}"


def _advice_on_length(encoder: ResolvedEncoder, price: Price) -> Iterator[str]:
    options, length = encoder.options, encoder.decision.padded_length
    sums, captions = price.figures.encoders[encoder.name], price.figures.encoded
    stored = [name for name, o in encoder.tensors().items() if o.positions == "all"]
    if length is None or not stored:
        return
    size = sum(price.unit_bytes[f"text_{name}"] for name in stored)
    others = f": not for {options.reference.partition('@')[0]}" if options.reference else ""
    attended = getattr(options, "attention_mask", None) == "none"
    change = (
        "pads are attended here, so it is another embedding"
        if attended
        else "the model then gets another thing at the pads"
    )
    setting = "attention_mask padding" if attended else "keep real"
    positions = sums.vectors[stored[0]] / captions
    yield (
        f"{encoder.name}: real tokens alone ({setting}) would take "
        f"{100 * sums.real / (captions * positions):.2g} % of {byte_size(size)} and "
        f"{100 * sums.real_flops / sums.flops:.2g} % of the operations. But {change}{others}"
    )
    # max_length counts the tokens that are stored: of the caption, and of a template behind it.
    of_template = encoder.opened.tokenizer.template_stored
    (longest,) = sums.percentiles(CUT_PERCENT)
    shorter = -(-(longest + of_template) // LENGTH_STEP) * LENGTH_STEP
    if shorter > WORTH * options.max_length:
        return
    lengths = (sums.whole + sums.cut).items()
    cut = sum(n for tokens, n in lengths if tokens + of_template > shorter) / captions
    less = options.max_length - shorter
    part = encoder.sizes.flops([length - less]) / encoder.sizes.flops([length])
    yield (
        f"{encoder.name}: max_length {shorter} would cut {100 * cut:.2g} % of the captions and "
        f"take {100 * (1 - less / positions):.2g} % of {byte_size(size)} and {100 * part:.2g} % of "
        f"the operations. But {change}{others}"
    )


def _figure(count: float) -> str:
    """Three digits or more: 0.012, 45.6, 1,234."""
    return f"{count:,.3g}" if count < 1000 else f"{count:,.0f}"


def _hours(seconds: float) -> str:
    return _figure(seconds / 3600)


def flop_count(count: float) -> str:
    """Such as 9.52 TFLOP."""
    for power, unit in ((18, "EFLOP"), (15, "PFLOP"), (12, "TFLOP"), (9, "GFLOP")):
        if count >= 10**power:
            return f"{_figure(count / 10**power)} {unit}"
    return f"{_figure(count / 1e6)} MFLOP"


def _rate(bytes_per_s: float) -> str:
    return f"{_figure(bytes_per_s / 1e6)} MB/s"
