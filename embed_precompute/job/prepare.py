"""Everything that is decided before the first unit: plan, encoders, whether the output fits.

Guarantees: a wrong configuration, caption table or checkpoint fails here, before anything is
written. Implementation and shapes of every encoder are decided here, once: with the help of the
stored plan or, if there is none, of the scanned captions. Every rank ends with the same plan, and a
run that would change what the output holds is refused (exit 3) with the name of each differing
field or file. Rows are numbered in the order of the plan's files, whatever the files are called
now; files that `extend` appends come after them.
Costs: each rank hashes the caption files (XXH3: as fast as they are read) and the weights (unless
their digests are cached), and opens the tokenizers. The rank that makes the plan also reads the id
column once (8 bytes of memory per row), and tokenises 10,000 rows of captions if
`samples_per_shard` is auto. No model is loaded and no GPU is touched.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embed_precompute.captions.table import CaptionTable
from embed_precompute.config.schema import Config
from embed_precompute.distributed import DistContext
from embed_precompute.encoders.resolve import ResolvedEncoder, open_encoders, resolve
from embed_precompute.errors import InputError, StorageError, found_by_every_rank, refuse_file
from embed_precompute.job.estimate import (
    SAMPLED_ROWS,
    SampledCaptions,
    example_lines,
    first_of_row_groups,
    tokenizer_line,
)
from embed_precompute.job.price import FILES_PER_UNIT, known_speed, price_of, run_line
from embed_precompute.job.reuse import Reuse
from embed_precompute.store.commit import free_space, remove_dead
from embed_precompute.store.plan import (
    InputFile,
    Inputs,
    Plan,
    auto_samples_per_shard,
    await_plan,
    check_same,
    match_files,
    publish_plan,
    refuse_foreign_folder,
    stored_plan,
)

log = logging.getLogger(__name__)
QUICK_FROM_ROWS = 1_000_000
"""A table with fewer rows is planned in seconds anyway."""


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to run.

    Until `publish` nothing is written: without `--write` the command `plan` only prints a report.
    """

    config: Config
    dist: DistContext
    root: Path
    table: CaptionTable
    encoders: tuple[ResolvedEncoder, ...]
    plan: Plan
    """The published plan, or the one that `publish` will write, which may extend it."""
    sampled: SampledCaptions
    reuse: Reuse | None = None
    """Finished datasets whose embeddings are copied."""


@found_by_every_rank()
def prepare(
    config: Config,
    limit: int | None = None,
    dist: DistContext | None = None,
    *,
    extend: bool = False,
    reuse: Sequence[Path] = (),
    with_weights: bool = True,
) -> Prepared:
    """Check everything and find the plan: the stored one, rank 0's, or one made here.

    With `extend`, caption files that the stored plan lacks become further units. `reuse`: folders
    of finished datasets whose embeddings need not be made again.

    Nothing is written. Rank 0, or a process without peers, makes the plan at once. Another rank
    waits for rank 0's plan, at most `runtime.plan_timeout_s`. If the plan does not come, the rank
    makes it itself; the result is the same. Without weights the plan has neither a fingerprint nor
    an id that mean anything, so it is never compared with the stored one.
    """
    for name, excluded in (("--limit", limit is not None), ("--no-weights", not with_weights)):
        if extend and excluded:
            raise InputError(f"--extend and {name} exclude each other: leave one of them out.")
    if reuse and not with_weights:
        raise InputError(
            "--reuse and --no-weights exclude each other: without weights no encoder is known to "
            "be the same. Leave one of them out."
        )
    dist = dist or DistContext()
    root = output_folder(config)
    columns = [options.integer_column for options in config.encoders.values()]
    table = CaptionTable.open(config.captions, [name for name in columns if name is not None], root)
    opened = open_encoders(config.encoders, with_weights=with_weights, online=not with_weights)
    inputs = _inputs(table, limit)
    stored = stored_plan(root) if with_weights else None
    if not dist.is_main:
        stored = await_plan(root, inputs, config.runtime.plan_timeout_s, extend=extend)
    matched, added = match_files(stored.inputs.files if stored else (), inputs.files)
    table = table.in_order([*(index for index in matched if index is not None), *added])
    is_extended = extend and stored is not None and len(added) > 0 and None not in matched
    if is_extended:
        assert stored is not None
        table.refuse_other_types(len(stored.inputs.files))
    scan = table.scan(limit) if stored is None or is_extended else None
    encoders = tuple(
        resolve(
            each,
            stored.spec["encoders"].get(each.name, {}) if stored else None,
            scan.added_tokens.get(each.options.integer_column) if scan else None,
        )
        for each in opened
    )
    spec = _spec(config, table, encoders)
    olds = Reuse(reuse, root, spec) if reuse else None
    if stored is None:
        assert scan is not None
        sampled = SampledCaptions(table, encoders, scan.num_rows, scan.last_row_samples, reuse=olds)
        plan = Plan.make(
            spec,
            inputs,
            samples_per_shard=_samples_per_shard(config, sampled),
            num_rows=scan.num_rows,
            num_samples=scan.num_samples,
            last_row_samples=scan.last_row_samples,
        )
        return Prepared(config, dist, root, table, encoders, plan, sampled, olds)
    samples_per_shard = config.output.samples_per_shard
    planned = replace(inputs, files=stored.inputs.files) if is_extended else inputs
    check_same(stored, spec, planned, None if samples_per_shard == "auto" else samples_per_shard)
    plan = stored
    if scan is not None:
        plan = stored.extended([inputs.files[index] for index in added], scan.num_samples)
    elif extend and dist.is_main:
        log.info("%s: no caption file was added since its plan was made", root)
    sampled = SampledCaptions(table, encoders, plan.num_rows, plan.last_row_samples, reuse=olds)
    return Prepared(config, dist, root, table, encoders, plan, sampled, olds)


def quick_plan(config: Config, *, online: bool = False) -> tuple[SampledCaptions, Plan] | None:
    """A plan for a first answer, by the footers of a large table and the first rows of some of its
    row groups: there in seconds, while `prepare` reads every byte of the files and every id.

    Its rows are exact, the samples of lists are estimated, and its names mean nothing. None: the
    table is small, or not parquet, or its padded length depends on a column; or a plan is stored.
    `online`: what is missing of config and tokenizer is downloaded.
    """
    if stored_plan(output_folder(config)) is not None:
        return None
    table = CaptionTable.glance(config.captions)
    columns = [options.integer_column for options in config.encoders.values()]
    if table is None or table.num_rows < QUICK_FROM_ROWS or any(columns):
        return None
    opened = open_encoders(config.encoders, with_weights=False, online=online)
    encoders = tuple(resolve(each) for each in opened)
    sampled = SampledCaptions(table, encoders, table.num_rows, None, first_of_row_groups(table))
    samples = sampled.figures.samples / sum(rows for _, rows in sampled.runs) * table.num_rows
    plan = Plan.make(
        _spec(config, table, encoders),
        _inputs(table, None),
        samples_per_shard=_samples_per_shard(config, sampled),
        num_rows=table.num_rows,
        num_samples=round(samples),
        last_row_samples=None,
    )
    return sampled, plan


def _samples_per_shard(config: Config, sampled: SampledCaptions) -> int:
    asked, figures = config.output.samples_per_shard, sampled.figures
    if asked != "auto":
        return asked
    embeddings = figures.embedding_bytes(sampled.encoders, config.output.dtype)
    return auto_samples_per_shard(embeddings / max(1, figures.encoded))


def output_folder(config: Config) -> Path:
    """The dataset's folder. InputError where a file, or other things, are."""
    root = Path(os.path.expanduser(config.output.path))
    refuse_file(root, "output.path")
    refuse_foreign_folder(root)
    return root


def publish(prepared: Prepared) -> Prepared:
    """Write the plan unless it is there; the stored plan, whoever wrote it, is in force.

    Local rank 0 also removes the temporary files of processes that died on this machine: this frees
    the space of a killed job's shards.
    """
    if prepared.dist.local_rank == 0 and (leftovers := remove_dead(prepared.root)):
        log.info("removed temporary files of writers that died here: %d", leftovers)
    return replace(prepared, plan=publish_plan(prepared.root, prepared.plan))


def check_sampled_captions(prepared: Prepared, units_left: Collection[int], device: str) -> None:
    """Log how the tokenizers fit some captions, what the rest of the dataset takes, and whether it
    fits on disk. `device`: its product name.

    Warns if not all of it fits. Raises StorageError (exit 74) if not even one shard fits.
    """
    if not units_left:
        return
    plan, root, figures = prepared.plan, prepared.root, prepared.sampled.figures
    if len(units_left) == plan.num_units:  # a run that goes on said so at its beginning
        for line in example_lines(figures, prepared.encoders):
            log.info("%s", line)
    for encoder in prepared.encoders:
        line, suspicious = tokenizer_line(encoder, figures)
        (log.warning if suspicious else log.info)("%s: tokenizer %s", encoder.opened.where, line)
    price = price_of(prepared.sampled, plan, prepared.config.output.dtype, num_samples=SAMPLED_ROWS)
    dtypes = {encoder.name: encoder.options.dtype for encoder in prepared.encoders}
    log.info("%s", run_line(price, units_left, root, known_speed(dtypes, device)))
    one = int(price.bytes_by_unit[list(units_left)].max())
    needed, files = price.needed(units_left)
    total = int(needed)
    free_bytes, free_files = free_space(root)
    if free_bytes < one or free_files < FILES_PER_UNIT:
        raise StorageError(
            f"{root}: a shard needs about {one:,} bytes and {FILES_PER_UNIT} files; {free_bytes:,} "
            f"bytes and {free_files:,} files are free. The rest of the dataset needs about "
            f"{total:,} bytes. Free some space, or write to another output.path."
        )
    if free_bytes < total or free_files < files:
        log.warning(
            "%s: the rest of the dataset needs about %s bytes and %s files; %s bytes and %s files "
            "are free. The run will stop with exit 74 when they are used up, and go on from there "
            "when there is space.",
            *(root, f"{total:,}", f"{files:,}", f"{free_bytes:,}", f"{free_files:,}"),
        )


def _spec(
    config: Config, table: CaptionTable, encoders: tuple[ResolvedEncoder, ...]
) -> dict[str, Any]:
    """The specification: all that decides what a caption becomes. Its hash is the fingerprint."""
    order = ("ftfy", "nfc", "whitespace")
    return {
        "format_version": Plan.format_version,
        "captions": {
            "recipe": table.recipe.resolved(),
            "normalize": [name for name in order if name in config.captions.normalize],
        },
        "encoders": {encoder.name: encoder.spec() for encoder in encoders},
        "output": {"dtype": config.output.dtype, "codec": config.output.codec},
    }


def _inputs(table: CaptionTable, limit: int | None) -> Inputs:
    return Inputs(
        files=tuple(InputFile(**asdict(file)) for file in table.files),
        text_column=table.config.text_column,
        id_column=table.config.id_column,
        limit=limit,
    )
