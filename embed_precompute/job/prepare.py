"""Everything that is decided before the first unit: resolved spec, scanned input, plan, estimates.

Guarantees: a wrong configuration, caption table or checkpoint fails here, before anything is
written; every rank ends with the same plan, and a run that would change what the output holds is
refused (exit 3) naming each differing field or file.
Costs: each rank reads the caption files once for their digest (XXH3: as fast as they are read),
tokenizers and weight digests; the rank that makes the plan also reads the id column once (8 bytes a
row) and tokenises the first 10,000 rows. No model and no GPU is touched.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from embed_precompute.captions.files import refuse_output_inside
from embed_precompute.captions.table import CaptionTable, Scan
from embed_precompute.config.schema import Config
from embed_precompute.distributed import DistContext
from embed_precompute.encoders import resolve as encoder_registry
from embed_precompute.encoders.spec import ResolvedEncoder
from embed_precompute.errors import ConflictError, InputError, StorageError
from embed_precompute.samples import Sample
from embed_precompute.store.commit import publish_bytes
from embed_precompute.store.plan import (
    PLAN_FILE,
    InputFile,
    Inputs,
    Plan,
    auto_samples_per_shard,
    check_same,
    read_plan,
)
from embed_precompute.store.records import (
    FORMAT_VERSION,
    MAX_JSON_BYTES,
    committed_units,
    document_bytes,
    read_record,
    refuse_linked_folders,
)
from embed_precompute.store.space import room_at

log = logging.getLogger(__name__)
ROOM_ROWS = 1000
FILES_PER_UNIT = 3
ESTIMATE_ROWS = 10_000
PLAN_POLL_S = 0.2
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Prepared:
    """A job that is ready to run (or, before `publish`, to be looked at)."""

    config: Config
    root: Path
    table: CaptionTable
    encoders: tuple[ResolvedEncoder, ...]
    plan: Plan
    """The published plan, or the one that `publish` will write."""


def prepare(config: Config, limit: int | None = None, dist: DistContext | None = None) -> Prepared:
    """Check everything and give the plan: the stored one, rank 0's, or one made here.

    Nothing is written. Rank 0, or a process without peers, makes the plan at once; another rank
    waits `runtime.plan_timeout_s` for it and then makes the same one.
    """
    dist = dist or DistContext()
    root = output_folder(config)
    refuse_output_inside(config.captions.path, root)
    table = CaptionTable.open(config.captions, _added_token_columns(config))
    stored = _stored_plan(root)
    if stored is None and not dist.is_main:
        stored = _wait_for_plan(root, config.runtime.plan_timeout_s)
    if stored is not None:
        lengths = _stored_padded_lengths(config, stored)
        resolved = _resolve_encoders(_settled(config, stored), lengths, stored.num_samples)
        plan = stored
        _check_stored(config, table, resolved, stored, limit)
    else:
        scan = table.scan(limit)
        resolved = _resolve_encoders(config, _padded_lengths(config, scan), scan.num_samples)
        plan = _make_plan(config, table, scan, resolved, limit)
    return Prepared(config, root, table, resolved, plan)


def output_folder(config: Config) -> Path:
    """The dataset's folder; InputError when something else has its name."""
    root = Path(os.path.expanduser(config.output.path))
    if os.path.lexists(root) and not root.is_dir():
        raise InputError(f"output.path {root} is not a folder: choose another, or move it away.")
    return root


def publish(prepared: Prepared) -> Prepared:
    """Write plan.json unless it is there; the stored plan, whoever wrote it, is in force."""
    refuse_linked_folders(prepared.root)
    if _stored_plan(prepared.root) is None:
        _refuse_foreign_units(prepared)
        payload = document_bytes(prepared.plan)
        if len(payload) > MAX_JSON_BYTES:
            raise InputError(
                f"{PLAN_FILE} would have {len(payload):,} bytes for {len(prepared.table.files):,} "
                f"input files: at most {MAX_JSON_BYTES:,} are read back. Merge the parquet files."
            )
        publish_bytes(prepared.root / PLAN_FILE, payload)
    stored = _stored_plan(prepared.root)
    assert stored is not None
    plan = prepared.plan
    check_same(stored, plan.spec, plan.inputs, plan.samples_per_shard)
    return Prepared(prepared.config, prepared.root, prepared.table, prepared.encoders, stored)


def _refuse_foreign_units(prepared: Prepared) -> None:
    """Where plan.json was lost, the units that are there must be of the plan that is made anew."""
    unit = min(committed_units(prepared.root), default=None)
    if unit is None:
        return
    record = read_record(prepared.root, unit)
    if record.plan_id != prepared.plan.plan_id:
        raise ConflictError(
            f"{prepared.root} has no {PLAN_FILE}, and its units belong to another plan "
            f"({record.plan_id[:16]}, fingerprint {record.fingerprint[:16]}) than this "
            f"configuration makes ({prepared.plan.plan_id[:16]}, fingerprint "
            f"{prepared.plan.fingerprint[:16]}). Give the configuration and captions back that "
            "these units were made with, or write to a new output.path."
        )


def check_room(prepared: Prepared, units_left: Collection[int]) -> None:
    """Whether the rest of the dataset fits where it goes: a warning when not, StorageError (exit
    74) when not even one shard does. An estimate from the dataset's first captions."""
    if not units_left:
        return
    plan, root = prepared.plan, prepared.root
    sample_rows = min(plan.unit_rows(0)[1], ROOM_ROWS)
    reader = prepared.table.reader(plan.num_rows, plan.last_row_samples)
    samples = reader.read(0, sample_rows)
    reader.close()
    # Equal texts of a shard are stored once.
    distinct = list({sample.text: sample for sample in samples}.values())
    per_sample = _bytes_per_sample(prepared.config, prepared.encoders, distinct)
    per_row = per_sample * len(distinct) / sample_rows
    rows = [plan.unit_rows(unit)[1] for unit in units_left]
    # What is left may be the last unit alone, which may be a small one.
    one, total = int(per_row * max(rows)), int(per_row * sum(rows))
    files = len(rows) * FILES_PER_UNIT
    room = room_at(root)
    if room.bytes < one or room.files < FILES_PER_UNIT:
        raise StorageError(
            f"{root}: a shard needs about {one:,} bytes and {FILES_PER_UNIT} files; "
            f"{room.bytes_limit} allows {room.bytes:,} bytes, {room.files_limit} {room.files:,} "
            f"files. The rest of the dataset needs about {total:,} bytes. Make room, or write to "
            "another output.path."
        )
    if room.bytes < total or room.files < files:
        log.warning(
            "%s: the rest of the dataset needs about %s bytes and %s files; %s allows %s bytes, %s "
            "%s files. The run will stop with exit 74 when they are used up, and go on from there "
            "when there is room.",
            root,
            *(f"{total:,}", f"{files:,}", room.bytes_limit, f"{room.bytes:,}"),
            *(room.files_limit, f"{room.files:,}"),
        )


def resolved_spec(
    config: Config, table: CaptionTable, encoders: tuple[ResolvedEncoder, ...]
) -> dict[str, Any]:
    """What a caption becomes; its hash is the fingerprint."""
    order = ("ftfy", "nfc", "whitespace")
    return {
        "format_version": FORMAT_VERSION,
        "captions": {
            "recipe": table.recipe.resolved(),
            "normalize": [name for name in order if name in config.captions.normalize],
        },
        "encoders": {encoder.name: encoder.spec() for encoder in encoders},
        "output": {"dtype": config.output.dtype, "codec": config.output.codec},
    }


def stored_bytes_per_token(encoder: ResolvedEncoder, config: Config) -> int:
    """Bytes of one stored vector of `encoder`."""
    return encoder.dim * DTYPE_BYTES[config.output.dtype]


def _added_token_columns(config: Config) -> list[str]:
    return [e.added_tokens for e in config.encoders.values() if isinstance(e.added_tokens, str)]


def _stored_plan(root: Path) -> Plan | None:
    return read_plan(root) if (root / PLAN_FILE).exists() else None


def _wait_for_plan(root: Path, timeout_s: float) -> Plan | None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        plan = _stored_plan(root)
        if plan is not None:
            return plan
        time.sleep(PLAN_POLL_S)
    return None


def _stored_padded_lengths(config: Config, plan: Plan) -> dict[str, int | None]:
    """Padded lengths as the plan has them. An encoder that the plan has otherwise, or not at all,
    gets one that makes its spec differ, so that the conflict is named."""
    lengths: dict[str, int | None] = {}
    for name, encoder in config.encoders.items():
        stored = plan.spec["encoders"].get(name, {}).get("padded_length")
        padded = encoder.kind == "t5" and encoder.attention_mask == "none"
        by_column = padded and isinstance(encoder.added_tokens, str)
        lengths[name] = encoder.padded_length(0) if stored is None and by_column else stored
    return lengths


def _padded_lengths(config: Config, scan: Scan) -> dict[str, int | None]:
    """The one padded length of each padded T5 encoder; several are an error that lists them."""
    lengths: dict[str, int | None] = {}
    for name, encoder in config.encoders.items():
        if encoder.kind != "t5" or encoder.attention_mask != "none":
            lengths[name] = None
        elif not isinstance(encoder.added_tokens, str):
            lengths[name] = encoder.fixed_padded_length(f"encoders.{name}")
        else:
            rows: dict[int, int] = {}
            for value, count in scan.added_tokens[encoder.added_tokens].items():
                length = encoder.padded_length(value)
                rows[length] = rows.get(length, 0) + count
            if len(rows) > 1:
                listed = ", ".join(f"{length} ({rows[length]} rows)" for length in sorted(rows))
                raise InputError(
                    f"encoders.{name}: column {encoder.added_tokens!r} with seq_align "
                    f"{encoder.seq_align} leads to {len(rows)} padded lengths: {listed}. Pads are "
                    "attended, so one dataset has one length: split the captions and make one "
                    "dataset per length."
                )
            lengths[name] = next(iter(rows), encoder.padded_length(0))
    return lengths


def _settled(config: Config, stored: Plan) -> Config:
    """`config` with the plan's choices where it says `auto`."""
    encoders = {
        name: encoder_registry.settle(encoder, stored.spec["encoders"].get(name, {}))
        for name, encoder in config.encoders.items()
    }
    return replace(config, encoders=encoders)


def _resolve_encoders(
    config: Config, padded_lengths: dict[str, int | None], num_samples: int
) -> tuple[ResolvedEncoder, ...]:
    return tuple(
        encoder_registry.resolve(
            name, config.encoders[name], padded_lengths.get(name), num_samples=num_samples
        )
        for name in sorted(config.encoders)
    )


def _inputs(config: Config, table: CaptionTable, limit: int | None) -> Inputs:
    return Inputs(
        files=tuple(InputFile(**asdict(file)) for file in table.files),
        text_column=config.captions.text_column,
        id_column=config.captions.id_column,
        limit=limit,
    )


def _check_stored(
    config: Config,
    table: CaptionTable,
    encoders: tuple[ResolvedEncoder, ...],
    stored: Plan,
    limit: int | None,
) -> None:
    spec = resolved_spec(config, table, encoders)
    wanted = config.output.samples_per_shard
    inputs = _inputs(config, table, limit)
    check_same(stored, spec, inputs, None if wanted == "auto" else wanted)


def _make_plan(
    config: Config,
    table: CaptionTable,
    scan: Scan,
    encoders: tuple[ResolvedEncoder, ...],
    limit: int | None,
) -> Plan:
    spec = resolved_spec(config, table, encoders)
    samples_per_shard = config.output.samples_per_shard
    if samples_per_shard == "auto":
        rows = min(ESTIMATE_ROWS, scan.num_rows)
        samples = table.reader(scan.num_rows, scan.last_row_samples).read(0, rows)
        samples_per_shard = auto_samples_per_shard(_bytes_per_sample(config, encoders, samples))
    return Plan.make(
        spec,
        _inputs(config, table, limit),
        samples_per_shard=samples_per_shard,
        num_rows=scan.num_rows,
        num_samples=scan.num_samples,
        last_row_samples=scan.last_row_samples,
    )


def _bytes_per_sample(
    config: Config, encoders: tuple[ResolvedEncoder, ...], samples: list[Sample]
) -> float:
    texts = [sample.text for sample in samples if sample.text is not None]
    total = 0.0
    for encoder in encoders:
        vector = stored_bytes_per_token(encoder, config)
        if encoder.pooled:
            total += vector
        elif encoder.padded_length is not None:
            total += vector * encoder.padded_length
        elif texts:
            tokens = encoder.tokenizer.encode(texts).num_tokens
            total += vector * sum(tokens) / len(tokens)
    return total
