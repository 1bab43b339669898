"""Export for Open-Sora v2: `.pt` files, null embeddings and a table its unchanged trainer reads.

Guarantees: the trainer gets, tensor for tensor, what the shards hold; samples without an embedding
are left out or given the null embedding, and counted; export.json is written last, after everything
was read back. A rerun goes on where the last one stopped; another dataset's export is never mixed
in.
Costs: a second copy of every embedding, in two files per sample: 4 MiB and 1.5 KiB with Open-Sora's
encoders. `embed_precompute.opensora.dataset` trains from the shards without any of that.

Written from scripts/diffusion/train.py and opensora/datasets/{datasets,utils}.py of
https://github.com/hpcaitech/Open-Sora (Apache-2.0).
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from embed_precompute.documents import differing_fields
from embed_precompute.encoders.options import DType
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.opensora.source import CaptionRows, Entry, Source, Subset, captions_path
from embed_precompute.opensora.table import (
    HOT_COLUMNS,
    TrainerTable,
    check_table,
    clear_parts,
    open_table,
    write_parts,
)
from embed_precompute.opensora.tensors import (
    TensorFiles,
    Written,
    null_path,
    pt_bytes,
    replace_pt,
    require_room,
    tensor_path,
)
from embed_precompute.opensora.text_pair import PadMasked, TextPair, pad_to
from embed_precompute.store.check import check_null
from embed_precompute.store.commit import (
    StoredFile,
    make_folder,
    publish_bytes,
    remove_file,
    remove_leftovers,
    replace_bytes,
)
from embed_precompute.store.records import FORMAT_VERSION, NULL_UNIT, document_bytes, read_json
from embed_precompute.store.shards import ShardReader

SOURCE_FILE, DONE_FILE, TABLE = "source.json", "export.json", "table"


@dataclass(frozen=True)
class OpenSoraOptions:
    """What is exported, and how."""

    captions: str | None = None
    """The caption table, when it is no longer where the run found it."""
    t5: str = "t5"
    """The encoder that gives text_t5."""
    clip: str = "clip"
    """The encoder that gives text_clip."""
    failed: Literal["drop", "null"] = "drop"
    """Samples that are not ok: left out, or pointed at the null embedding."""
    pad_masked: PadMasked = "refuse"
    """How a dataset with attention_mask padding is brought to one length."""
    trainer_dtype: DType = "bfloat16"
    """dtype of the null embeddings, which the trainer does not cast."""
    table: Literal["parquet", "csv"] = "parquet"
    """Form of the trainer's table."""
    memory_efficient: bool = False
    """Also the table in 10,000 parts, for Open-Sora's memory_efficient=True."""
    table_only: bool = False
    """Nulls and table, no tensor files: what `embed_precompute.opensora.dataset` needs."""
    path_prefix: str | None = None
    """Folder of the export as the trainer sees it; where it is written when not given."""
    limit: int | None = None
    """Only the first samples."""
    ids: frozenset[str] | None = None
    """Only these samples."""
    recheck: bool = False
    """Read every tensor file again, those an earlier run has verified too."""


@dataclass(frozen=True)
class OpenSoraExport:
    """A finished export; paths are as the trainer sees them."""

    out: Path
    options: OpenSoraOptions
    table: str
    null_t5: str
    null_clip: str
    embeddings: Path
    """The dataset that was exported."""
    num_rows: int
    num_parts: int
    written: Written
    not_ok: dict[str, int]
    """Samples that are not ok, by status: left out, or given the null embedding."""
    columns: tuple[str, ...]
    replaced: tuple[str, ...]
    """Columns of the captions that the table has with other values."""
    filled_latents: int
    nulls: dict[str, int]
    """Nulls of the table, by column."""
    spec: dict[str, Any]


def read_ids(path: Path) -> frozenset[str]:
    """Sample ids, one per line; empty lines are left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as ids, one per line: {error}.") from None
    return frozenset(line for line in lines if line)


def export_opensora(root: Path, out: Path, options: OpenSoraOptions) -> OpenSoraExport:
    """Export the dataset in `root` to the folder `out`, or go on with it."""
    job = _Job(Path(root).absolute(), Path(out).absolute(), options)
    job.check_options()
    job.claim()
    job.write_nulls()
    job.require_room()
    stored, num_rows = job.write_rows()
    num_parts = job.write_parts(num_rows)
    return job.finish(stored, num_rows, num_parts)


class _Job:
    """One run of an export; its methods are the steps, in order."""

    def __init__(self, root: Path, out: Path, options: OpenSoraOptions) -> None:
        self.root, self.out, self.options = root, out, options
        self.source = Source(root, Subset(options.failed == "null", options.limit, options.ids))
        self.plan = self.source.plan
        self.spec: dict[str, Any] = self.plan.spec
        self.pair = TextPair(self.spec, options.t5, options.clip, options.pad_masked)
        self.prefix = (options.path_prefix or str(out)).rstrip("/")
        self.table_path = out / f"{TABLE}.{options.table}"
        self.captions = CaptionRows(self.plan, options.captions or captions_path(root))
        path_of = None if options.table_only else self._path_of
        self.table = TrainerTable(self.captions, self.spec["captions"]["recipe"], path_of)
        self.files = TensorFiles(out, self.plan, self.pair, options.recheck)
        self.sample_bytes = 0

    def _path_of(self, kind: str, entry: Entry) -> str:
        path = null_path(kind) if entry.stored is None else tensor_path(kind, entry.number)
        return f"{self.prefix}/{path}"

    def check_options(self) -> None:
        """Whatever can be refused before anything is written."""
        lengths = self.source.sequence_lengths(self.pair.t5)
        if not self.pair.masked and len(lengths) > 1:
            raise InputError(
                f"text_{self.pair.t5} has several lengths, {lengths} (length: samples): Open-Sora "
                "stacks only equal ones. Make one dataset per length."
            )
        if not self.options.memory_efficient:
            return
        if self.options.table == "csv":
            raise InputError("memory_efficient needs a parquet table: Open-Sora refuses CSV there.")
        absent = [name for name in HOT_COLUMNS if name not in self.table.schema.names]
        if absent:
            raise InputError(
                f"the captions have no {', '.join(absent)}: with memory_efficient Open-Sora reads "
                f"{', '.join(HOT_COLUMNS)} of the table. Add the columns, or export without."
            )
        if "." in f"{self.prefix}/{TABLE}":
            raise InputError(
                f"{self.prefix}/{TABLE}.parquet: with memory_efficient Open-Sora cuts this path at "
                "its first dot to find the parts. Export to a folder whose full path has no dot, "
                "or give such a path (a link) as path_prefix."
            )

    def claim(self) -> None:
        """OUT is this dataset's export, from now on or since an earlier run."""
        out, path = self.out, self.out / SOURCE_FILE
        if out == self.root or self.root in out.parents or out in self.root.parents:
            raise InputError(f"{out} and the dataset {self.root} lie in one another: choose apart.")
        if out.is_dir() and not path.exists():
            others = [name for name in os.listdir(out) if not name.startswith(".tmp-")]
            if others:
                raise InputError(
                    f"{out} holds {sorted(others)[0]!r} and no {SOURCE_FILE}: it is not an export. "
                    "Choose a new folder."
                )
        make_folder(out)
        identity = {
            "format_version": FORMAT_VERSION,
            "kind": "export_source",
            "format": "opensora",
            "fingerprint": self.plan.fingerprint,
            "plan": self.plan.plan_id,
            "t5": self.options.t5,
            "clip": self.options.clip,
            "pad_masked": self.options.pad_masked if self.pair.masked else None,
        }
        if not publish_bytes(path, document_bytes(identity)):
            lines = differing_fields(read_json(path, "export_source"), identity)
            named = [line for line in lines if not line.startswith("digest")]
            raise ConflictError(
                f"{out} is another export; it differs in\n  "
                + "\n  ".join(named)
                + "\nExport to a new folder, or give the old values back."
            )
        remove_file(out / DONE_FILE)

    def write_nulls(self) -> None:
        """null_t5.pt [1, L, D] and null_clip.pt [1, C], and what stands in for missing samples."""
        path = check_null(self.root, self.plan).shard_path(self.root)
        shard = ShardReader(path, self.plan.fingerprint, NULL_UNIT, self.plan.tensors)
        t5 = self.pair.sequence(shard.row(self.pair.t5, 0))
        clip = shard.row(self.pair.clip, 0)
        length = t5.shape[0] if self.pair.masked else self._stored_length(t5.shape[0])
        if t5.shape[0] > length:
            raise InputError(
                f"the null embedding has {t5.shape[0]} vectors, the samples {length}: Open-Sora's "
                "trainer only lengthens it. Precompute with a max_length that seq_align divides."
            )
        dtype = getattr(torch, self.options.trainer_dtype)
        for name, values in (("null_t5.pt", t5), ("null_clip.pt", clip)):
            cast = values[None].to(dtype)
            if not bool(torch.isfinite(cast).all()):
                raise InputError(
                    f"{name} is not finite in {self.options.trainer_dtype}: choose another "
                    "trainer_dtype."
                )
            replace_pt(self.out / name, cast, "the empty caption")
        t5 = pad_to(t5, length, "repeat_last")
        if self.options.failed == "null" and not self.options.table_only:
            replace_pt(self.out / null_path("t5"), t5, "the empty caption")
            replace_pt(self.out / null_path("clip"), clip, "the empty caption")
        self.sample_bytes = len(pt_bytes(t5)) + len(pt_bytes(clip))

    def _stored_length(self, null_length: int) -> int:
        """The one length of the samples' text_t5."""
        return next(iter(self.source.sequence_lengths(self.pair.t5)), null_length)

    def require_room(self) -> None:
        if self.options.table_only:
            return
        sizes = self.source.index.shards[:, 1].tolist()
        done = sum(n for unit, n in enumerate(sizes) if self.files.record_path(unit).exists())
        require_room(self.out, self.sample_bytes, max(0, self.source.most_entries - done))

    def write_rows(self) -> tuple[StoredFile, int]:
        """Tensor files unit by unit, and the table's rows beside them."""
        num_rows = 0
        with open_table(self.table_path, self.table.schema) as file:
            for unit, entries in self.source.units():
                if not self.options.table_only:
                    self.files.write_unit(unit, entries)
                first, count = unit.record.first_row, unit.record.num_rows
                for rows, here, texts in self.captions.batches(first, count, entries):
                    places = [self.captions.place(entry.row) for entry in here]
                    file.write(self.table.batch(rows, here, texts), places)
                    num_rows += rows.num_rows
            if num_rows == 0:
                raise InputError(
                    f"nothing to export: none of the {sum(self.source.not_ok.values()):,} samples "
                    f"asked for has an embedding ({dict(self.source.not_ok)})."
                )
            return file.finish(), num_rows

    def write_parts(self, num_rows: int) -> int:
        """The memory-efficient split, or the end of an earlier run's, which would not fit now."""
        if self.options.memory_efficient:
            return write_parts(self.table_path, num_rows)
        clear_parts(self.table_path)
        return 0

    def finish(self, stored: StoredFile, num_rows: int, num_parts: int) -> OpenSoraExport:
        """Check the table and publish export.json."""
        nulls = check_table(self.table_path, num_rows, self.options.memory_efficient)
        digest = None if self.options.ids is None else sorted(self.options.ids)
        options = {**dataclasses.asdict(self.options), "ids": digest}
        done = {
            "format_version": FORMAT_VERSION,
            "kind": "export",
            "format": "opensora",
            "fingerprint": self.plan.fingerprint,
            "plan": self.plan.plan_id,
            "rows": num_rows,
            "parts": num_parts,
            "tensor_files": self.files.written.files,
            "tensor_bytes": self.files.written.bytes,
            "not_ok": dict(self.source.not_ok),
            "options": {key: value for key, value in options.items() if key != "recheck"},
            "table": {"name": stored.name, "bytes": stored.bytes, "sha256": stored.sha256},
        }
        replace_bytes(self.out / DONE_FILE, document_bytes(done))
        remove_leftovers(self.out)
        return OpenSoraExport(
            out=self.out,
            options=self.options,
            table=f"{self.prefix}/{self.table_path.name}",
            null_t5=f"{self.prefix}/null_t5.pt",
            null_clip=f"{self.prefix}/null_clip.pt",
            embeddings=self.root,
            num_rows=num_rows,
            num_parts=num_parts,
            written=self.files.written,
            not_ok=dict(self.source.not_ok),
            columns=tuple(self.table.schema.names),
            replaced=tuple(self.table.replaced),
            filled_latents=self.table.filled_latents,
            nulls=nulls,
            spec=self.spec,
        )
