"""Status and info: how far a dataset is, and what it holds.

Nothing is written, and an unfinished dataset is described as far as it goes.
Costs: status lists the folders, and reads every record of an unfinished dataset. Info also reads
the numbers of tokens in manifest.parquet.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embed_precompute.documents import flatten
from embed_precompute.job.metrics import read_effort
from embed_precompute.samples import Status, count_failed
from embed_precompute.steps import counted
from embed_precompute.store.index import EnvironmentCount, read_manifest
from embed_precompute.store.plan import Plan, read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    TokenCounts,
    committed_units,
    encoder_fingerprints,
    read_record,
    record_path,
)
from embed_precompute.store.rows import columns_of

SHARES = (0.05, 0.5, 0.95, 1.0)
"""Percentiles that info names."""


@dataclass(frozen=True)
class DatasetStatus:
    """How much of a dataset is made."""

    root: Path
    plan: Plan
    units_committed: int
    null_committed: bool
    samples: dict[str, int]
    """Number of samples of the committed units, by status label."""
    finalised: bool
    units_beyond: int = 0
    """Number of units that the plan does not have: an extension was taken back."""
    readable: int = 0
    """Number of samples that can be read while the dataset is extended: those it had before."""

    @property
    def complete(self) -> bool:
        """Everything is committed and the manifest is written: training can read it."""
        return self.finalised and self.null_committed and not self.units_left

    @property
    def units_left(self) -> int:
        return self.plan.num_units - self.units_committed

    @property
    def failed_samples(self) -> int:
        """Number of samples that got no embedding through a fault of ours (inf or nan)."""
        return count_failed(self.samples)

    def to_json(self) -> dict[str, Any]:
        return {
            "complete": self.complete,
            "finalised": self.finalised,
            "fingerprint": self.plan.fingerprint,
            "plan": self.plan.plan_id,
            "units": self.plan.num_units,
            "units_committed": self.units_committed,
            "units_left": self.units_left,
            "null_committed": self.null_committed,
            "samples": self.plan.num_samples,
            "samples_committed": sum(self.samples.values()),
            "status": self.samples,
            "failed_samples": self.failed_samples,
        }

    def lines(self) -> list[str]:
        """For a person."""
        by_status = ", ".join(f"{label} {n:,}" for label, n in self.samples.items() if n)
        lines = [
            f"{self.root}: {'complete' if self.complete else 'incomplete'}, "
            f"{self.units_committed:,} of {self.plan.num_units:,} units committed, "
            f"{self.units_left:,} left",
            f"  {sum(self.samples.values()):,} of {self.plan.num_samples:,} samples: "
            f"{by_status or 'none yet'}",
        ]
        if not self.null_committed:
            lines.append("  the null embedding is not made yet")
        if self.failed_samples:
            lines.append(
                f"  {counted(self.failed_samples, 'sample')} failed: the status column of "
                "manifest.parquet names them (before that is there, each unit's rows part)"
            )
        if self.readable:
            lines.append(f"  it is being extended; its first {self.readable:,} samples can be read")
        if self.units_beyond:
            lines.append(
                f"  {counted(self.units_beyond, 'unit')} of an extension whose plan is gone: "
                f"`embed-precompute repair {self.root}` moves "
                f"{'it' if self.units_beyond == 1 else 'them'} away"
            )
        if self.units_left or not self.null_committed:
            lines.append("  not finalised: run the job again to go on, unless it is running")
        elif not self.finalised and not self.units_beyond:
            lines.append(f"  not finalised: run `embed-precompute finalize {self.root}`")
        return lines


def read_status(root: Path) -> DatasetStatus:
    """How far the dataset in `root` is. Raises InputError if there is none."""
    root = Path(root)
    plan, manifest = read_plan(root), None
    with contextlib.suppress(FileNotFoundError):
        manifest = read_manifest(root)
    finalised = manifest is not None and manifest.plan_id == plan.plan_id
    readable = 0
    if manifest is not None and not finalised and plan.as_of(manifest.plan_id) is not None:
        readable = manifest.counts.samples
    every = committed_units(root)
    committed = [unit for unit in every if unit < plan.num_units]
    beyond = len(every) - len(committed)
    samples = {status.label: 0 for status in Status}
    if manifest is not None and finalised and len(committed) == plan.num_units:
        samples |= manifest.counts.status
    else:
        for unit in committed:
            for label, count in read_record(root, unit).status.items():
                samples[label] += count
    null = record_path(root, NULL_UNIT).exists()
    return DatasetStatus(root, plan, len(committed), null, samples, finalised, beyond, readable)


def failure_line(root: Path) -> str:
    """What failed in a finished dataset, and what helps; "" if nothing did."""
    count = count_failed(read_manifest(root).counts.status)
    if not count:
        return ""
    plan, names = read_plan(root), ("sample_id", "row", "error")
    batches = columns_of(root, plan.tensors, names, Status.NON_FINITE)
    ids, rows, errors = next(tuple(found.values()) for found in batches if found["row"])
    return (
        f"{counted(count, 'sample')} failed, first {ids[0]!r}, {plan.place(rows[0])}: {errors[0]}. "
        f"`embed-precompute repair {root} --failed` opens their units, then the next run makes "
        "them again; a run alone does not"
    )


def dataset_lines(root: Path) -> list[str]:
    """What the dataset in `root` is: what it holds, how it was made, what that cost."""
    status = read_status(root)
    plan, inputs = status.plan, status.plan.inputs
    manifest = read_manifest(status.root) if status.finalised else None
    limit = "" if inputs.limit is None else f", limited to {inputs.limit:,} samples"
    extended = f", extended {counted(len(plan.extends), 'time')}" if plan.extends else ""
    files = counted(len(inputs.files), "file")
    lines = [
        *status.lines(),
        f"captions     {files}, {plan.num_rows:,} rows, text column "
        f"{inputs.text_column!r}, id column {inputs.id_column!r}{limit}{extended}",
        f"recipe       {recipe_words(plan.spec.get('captions'))}",
    ]
    for name, encoder in sorted(plan.spec["encoders"].items()):
        lines.append(f"{name:<12} {encoder_words(name, encoder, plan)}")
        if manifest is not None and name in manifest.counts.encoders:
            sums = manifest.counts.encoders[name]
            lines.append(f"{'':<12} {_token_words(status.root, name, sums, plan)}")
    if manifest is not None:
        noted = sorted(manifest.counts.noted.items())
        lines += [f"noted        {what}: {count:,}" for what, count in noted]
    size = 0
    for path in status.root.glob("shards/*/shard-*"):
        with contextlib.suppress(OSError):  # a job that runs may just have removed it
            size += path.stat().st_size
    each = f", {size / samples:,.0f} a sample" if (samples := sum(status.samples.values())) else ""
    lines.append(f"bytes        {size:,} in shards, rows parts and records{each}")
    if manifest is not None:
        lines.append(
            f"{'':<12} {manifest.counts.stored:,} embeddings by each encoder: equal captions of a "
            "shard share one"
        )
    effort = read_effort(status.root)
    cost = "not known: logs/ has no metrics" if effort is None else effort.line()
    lines.append(f"time         {cost}")
    for made in manifest.environments if manifest is not None else ():
        lines.append(f"environment  {environment_words(made)}")
    lines.append(f"identity     fingerprint {plan.fingerprint[:16]}, plan {plan.plan_id[:16]}")
    return lines


def environment_words(made: EnvironmentCount) -> str:
    """Where units were made."""
    found, names = made.environment, ("device", "torch", "transformers")
    what = ", ".join(f"{name} {found[name]}" for name in names if name in found)
    return f"{what} ({counted(made.units, 'unit')})"


def recipe_words(captions: Any) -> str:
    """What becomes of a caption before it is tokenised; the specification itself if it is not as
    this version writes it."""
    try:
        recipe = captions["recipe"]
        words = []
        for each in recipe if isinstance(recipe, list) else [recipe]:
            settings = ", ".join(f"{key} {value}" for key, value in each.items() if key != "kind")
            kind = "the caption as it is" if each["kind"] == "none" else each["kind"]
            words.append(f"{kind} ({settings})" if settings else kind)
        line = ", then ".join(words)
        normalize = ", ".join(captions["normalize"])
    except (LookupError, TypeError, AttributeError):
        return str(captions)
    return f"{line}; normalised by {normalize}" if normalize else line


def encoder_words(name: str, encoder: dict[str, Any], plan: Plan) -> str:
    """One encoder and its tensors."""
    tensors = "; ".join(
        f"text_{tensor.name} [{'' if tensor.per_caption else 'L, '}{tensor.width}] {tensor.dtype}"
        for tensor in plan.tensors
        if tensor.encoder == name
    )
    words = [
        str(encoder[key]) for key in ("model_type", "dtype", "implementation") if key in encoder
    ]
    if encoder.get("padded_length"):
        words.insert(1, f"padded to {encoder['padded_length']} tokens")
    weights = str(encoder.get("weights", "not known"))
    return f"{', '.join(words)}, weights {weights[:8]} -> {tensors}"


def _token_words(root: Path, name: str, sums: TokenCounts, plan: Plan) -> str:
    """Tokens of an encoder: their sum, their percentiles, how many captions are truncated."""
    counts: Counter[int] = Counter()
    for columns in columns_of(root, plan.tensors, [f"{name}_tokens"]):
        counts.update(columns[f"{name}_tokens"])
    total, below, marks = counts.total(), 0, list[int]()
    for tokens, count in sorted(counts.items()):
        below += count
        while len(marks) < len(SHARES) and below >= SHARES[len(marks)] * total:
            marks.append(tokens)
    words = f"{sums.tokens:,} tokens"
    if marks:
        words += f" (a caption: p5 {marks[0]}, p50 {marks[1]}, p95 {marks[2]}, most {marks[3]})"
    share = 100 * sums.truncated / max(1, total)
    words += f"; {sums.truncated:,} captions truncated ({share:.1f} %)"
    if plan.spec["encoders"][name].get("empty") == "nothing":
        words += f"; of {counts[0]:,} empty captions nothing is stored"
    return words


def all_lines(root: Path) -> list[str]:
    """Everything that `dataset_lines` leaves out: identities, specification, environments."""
    plan = read_plan(root)
    lines = [f"fingerprint {plan.fingerprint}", f"plan {plan.plan_id}"]
    fingerprints = encoder_fingerprints(plan.spec)
    lines += [f"encoder {name}, fingerprint {each}" for name, each in fingerprints.items()]
    lines += [f"{key}: {value}" for key, value in sorted(flatten(plan.spec).items())]
    with contextlib.suppress(FileNotFoundError):
        for made in read_manifest(root).environments:
            what = ", ".join(f"{key} {value}" for key, value in sorted(made.environment.items()))
            lines.append(f"{counted(made.units, 'unit')} made with {what}")
    return lines
