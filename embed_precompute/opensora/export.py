"""Export for Open-Sora v2: `.pt` files, null embeddings and a table its unchanged trainer reads.

The trainer gets, tensor for tensor, what the shards hold. Samples without an embedding are left out
and counted. `export.json` is written last, after every file was loaded back, as Open-Sora loads it,
and compared with the dataset. A rerun writes what is missing or differs; another dataset's export
is refused.

It is a second copy of every embedding, in two files per sample: 4 MiB and 3 KiB with Open-Sora's
encoders. `embed_precompute.opensora.dataset` trains from the shards without that.

Written from scripts/diffusion/train.py and opensora/datasets/{datasets,utils}.py of
https://github.com/hpcaitech/Open-Sora at 7ad6a96 (Apache-2.0).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embed_precompute.documents import differing_fields
from embed_precompute.errors import (
    ConflictError,
    InputError,
    StorageError,
    VerificationError,
    refuse_file,
)
from embed_precompute.opensora.dataset import DONE_FILE, PadMasked, TextPair
from embed_precompute.opensora.lengths import NO_CACHED_TEXT, made_for_patch
from embed_precompute.opensora.table import SAMPLER_COLUMNS, CaptionRows, Entry, TrainerTable
from embed_precompute.steps import steps, worker_processes
from embed_precompute.store.commit import (
    free_space,
    make_folder,
    publish_bytes,
    remove_file,
    remove_leftovers,
    replace_bytes,
)
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.records import (
    FORMAT_VERSION,
    StoredDType,
    document_bytes,
    read_json,
    require_folder,
)
from embed_precompute.train.dataset import EmbeddingDataset

SOURCE_FILE, TABLE = "source.json", "table.parquet"
THREADS = 8
CHUNK = 32
"""Samples that a worker process gets at a time."""
FILES_PER_FOLDER = 1000
TENSORS = ("text_t5", "text_clip")
PT_BYTES = 2048
"""At most what torch.save adds to a tensor's own bytes."""
SPARE_BYTES = 64 << 20
"""Left free for the table."""
FROM_SHARDS = """\
Read the shards directly: in Open-Sora's configuration set
  custom_imports = dict(imports=["embed_precompute.opensora.dataset"], allow_failed_imports=False)
  dataset = dict(type="precomputed_video_text", embeddings="{root}", data_path="{table}", ...)
  cached_text = True"""
FROM_FILES = """\
Switch cached text on, in Open-Sora's configuration and with the table
  dataset = dict(type="cached_video_text", cached_text=True, ...)
  cached_text = True
or on the command line of scripts/diffusion/train.py
  --dataset.type cached_video_text --dataset.cached_text True --cached_text True \
--dataset.data_path {table}"""
FOREIGN_RECIPE = """\
The captions were encoded without Open-Sora's FPS and motion score, with which
its own configurations train. To train as they do, precompute with the recipe
opensora (captions.recipe.kind) and the trainer's own fps_max and vmaf."""
NULL_FILES = """\
patch_size must be 2: with cached text, train.py makes patches of 2 x 2 only. A trainer with
patch_size 1 (Open-Sora's high_compression.py) cannot use cached text.

The trainer loads its null embeddings from paths hard-coded in train.py. Either put
  {t5}  at  /mnt/ddn/sora/tmp_load/null_t5.pt
  {clip}  at  /mnt/ddn/sora/tmp_load/null_clip.pt
or apply scripts/opensora/null_embeddings.patch (git apply, in a clone of Open-Sora) and add
  --null_t5_path {t5} --null_clip_path {clip}"""


@dataclass(frozen=True)
class OpenSoraOptions:
    """What is exported, and how."""

    captions: str | None = None
    """The caption table, when it is no longer where the run found it."""
    t5: str = "t5"
    """The tensor that gives text_t5, named without `text_`."""
    clip: str = "clip"
    """The tensor that gives text_clip."""
    pad_masked: PadMasked = "refuse"
    """How a dataset that stores real positions only is brought to one length."""
    trainer_dtype: StoredDType = "bfloat16"
    """dtype of the null embeddings, which the trainer does not cast."""
    table_only: bool = False
    """Nulls and table, no tensor files: what `embed_precompute.opensora.dataset` needs."""
    limit: int | None = None
    """Only the first samples."""
    workers: int = 1
    """Processes that write the tensor files; 1: threads of this process."""


def export_opensora(root: Path, out: Path, options: OpenSoraOptions) -> Export:
    """Export the dataset in `root` to the folder `out`, or go on with it."""
    export = Export(Path(root).absolute(), Path(out).absolute(), options)
    export.claim()
    export.write_nulls()
    export.require_space()
    export.write_rows()
    return export


@dataclass(frozen=True)
class TensorFiles:
    """The tensor files of an export, written sample by sample; worker processes get a copy."""

    root: Path
    out: Path
    dataset: EmbeddingDataset
    pair: TextPair

    def path(self, tensor: str, entry: Entry) -> str:
        """The path of a sample's file; a folder has at most 1,000."""
        folder, number = divmod(entry.number // FILES_PER_FOLDER, 1000)
        return str(self.out / tensor / f"{folder:03d}/{number:03d}/{entry.number:09d}.pt")

    def write(self, entry: Entry) -> int:
        """Writes the files of one sample; how many were not there yet."""
        sample = self.dataset[entry.index]
        if sample["id"] != entry.sample_id:
            raise VerificationError(
                f"{self.root}: the index names sample {entry.index} {sample['id']!r}, the manifest "
                f"{entry.sample_id!r}. `embed-precompute finalize {self.root}` makes them again."
            )
        pair = self.pair.of(sample)
        return sum(write_pt(Path(self.path(t, entry)), values) for t, values in pair.items())


class Export:
    """One run of an export; its methods are the steps, in order. `lines` is for a person."""

    def __init__(self, root: Path, out: Path, options: OpenSoraOptions) -> None:
        if options.limit is not None and options.limit < 1:
            raise InputError(f"limit is {options.limit}: expected 1 or more.")
        require_folder(root)
        self.root, self.out, self.options = root, out, options
        self.dataset = EmbeddingDataset(root, "rows", copy=False)
        self.pair = TextPair(self.dataset, options.t5, options.clip, options.pad_masked)
        self.captions = CaptionRows(self.dataset, root, options.captions)
        self.files = TensorFiles(self.root, self.out, self.dataset, self.pair)
        self.table = TrainerTable(self.captions, None if options.table_only else self.files.path)
        self.null = self.pair.of(self.dataset.null)
        self.length = self._one_length()
        self.counts = {"rows": 0, "files": 0, "written": 0}

    def _one_length(self) -> int:
        """The vectors of each exported text_t5; InputError where samples differ."""
        index, null_length = DatasetIndex(self.root), len(self.null["text_t5"])
        lengths = np.unique(index.lengths[self.options.t5][np.asarray(index.ok)]).tolist()
        if self.pair.masked or not lengths:
            return null_length
        if len(lengths) > 1:
            raise InputError(
                f"text_{self.options.t5} has sequences of {lengths} vectors: Open-Sora stacks only "
                "equal ones. Make one dataset per length."
            )
        if null_length > lengths[0]:
            raise InputError(
                f"the null embedding has {null_length} vectors, the samples {lengths[0]}: "
                "Open-Sora's trainer only lengthens it. Precompute with a max_length that "
                "seq_align divides."
            )
        return int(lengths[0])

    def claim(self) -> None:
        """Make OUT this dataset's export; ConflictError where it is another's."""
        out, path = self.out, self.out / SOURCE_FILE
        if out == self.root or self.root in out.parents or out in self.root.parents:
            raise InputError(f"{out} and the dataset {self.root} lie in one another: choose apart.")
        refuse_file(out, "OUT")
        if out.is_dir() and not path.exists():
            others = [name for name in os.listdir(out) if not name.startswith(".tmp-")]
            if others:
                raise InputError(
                    f"{out} holds {sorted(others)[0]!r} and no {SOURCE_FILE}: it is not an export. "
                    "Choose a new folder."
                )
        make_folder(out)
        publish_bytes(path, document_bytes(self._identity()))
        found = read_json(path, "export_source")
        found.pop("digest")
        if lines := differing_fields(found, self._identity()):
            raise ConflictError(
                f"{out} is another export; it differs in\n  "
                + "\n  ".join(lines)
                + "\nExport to a new folder, or give the old values back."
            )
        remove_file(out / DONE_FILE)

    def _identity(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "kind": "export_source",
            "format": "opensora",
            "fingerprint": self.dataset.fingerprint,
            "plan_id": self.dataset.manifest.plan_id,
            "t5": self.options.t5,
            "clip": self.options.clip,
            "pad_masked": self.options.pad_masked if self.pair.masked else None,
        }

    def write_nulls(self) -> None:
        """null_t5.pt [1, L, D] and null_clip.pt [1, C], in the trainer's dtype."""
        dtype = getattr(torch, self.options.trainer_dtype)
        for tensor, values in self.null.items():
            path = self.out / f"null_{tensor.removeprefix('text_')}.pt"
            cast = values[None].to(dtype)
            if not bool(torch.isfinite(cast).all()):
                raise InputError(
                    f"{path.name} is not finite in {self.options.trainer_dtype}: choose another "
                    "trainer_dtype."
                )
            write_pt(path, cast)

    def require_space(self) -> None:
        """StorageError before the first tensor file, where bytes or files will not suffice."""
        if self.options.table_only or any((self.out / tensor).exists() for tensor in TENSORS):
            return  # what an earlier run wrote is not needed again
        samples = min(len(self.dataset), self.options.limit or len(self.dataset))
        t5, clip = self.null["text_t5"], self.null["text_clip"]
        numbers = self.length * t5.shape[1] + clip.shape[0]
        needed = samples * (numbers * t5.element_size() + len(TENSORS) * PT_BYTES) + SPARE_BYTES
        free_bytes, free_files = free_space(self.out)
        if needed > free_bytes or len(TENSORS) * samples > free_files:
            raise StorageError(
                f"{self.out}: {samples:,} samples need about {needed:,} bytes in "
                f"{len(TENSORS) * samples:,} files; {free_bytes:,} bytes and {free_files:,} files "
                "are free on its file system. Free some, export fewer samples (--limit), or train "
                "from the shards with embed_precompute.opensora.dataset, which needs no copy."
            )

    def write_rows(self) -> None:
        """Tensor files and the table, a batch of rows at a time; then export.json."""
        workers = self.options.workers
        pool = worker_processes(workers) if workers > 1 else ThreadPoolExecutor(THREADS, "export")
        total = min(len(self.dataset), self.options.limit or len(self.dataset))
        with ExitStack() as stack:
            stack.callback(pool.shutdown, cancel_futures=True)
            stack.enter_context(self.table.writing(self.out / TABLE))
            for written in steps(self._samples(pool), total, "exporting", " samples"):
                self.counts["written"] += written
            if self.counts["rows"] == 0:
                raise InputError(f"nothing to export: no sample is ok ({self._not_ok()}).")
            stored = self.table.finish(self.counts["rows"])
        done = {
            **self._identity(),
            "kind": "export",
            "rows": self.counts["rows"],
            "tensor_files": self.counts["files"],
            "not_ok": dict(self.captions.not_ok),
            "table": {"name": stored.name, "bytes": stored.bytes, "sha256": stored.sha256},
        }
        replace_bytes(self.out / DONE_FILE, document_bytes(done))
        remove_leftovers(self.out)

    def _samples(self, pool: Executor) -> Iterator[int]:
        """Writes all samples; yields for each how many of its files were not there yet."""
        for rows, entries in self.captions.batches(self.options.limit):
            if self.options.table_only:
                yield from [0] * len(entries)
            else:
                yield from pool.map(self.files.write, entries, chunksize=CHUNK)
                self.counts["files"] += len(TENSORS) * len(entries)
            self.table.write(rows, entries)
            self.counts["rows"] += len(entries)

    def _not_ok(self) -> str:
        return ", ".join(f"{label} {n:,}" for label, n in sorted(self.captions.not_ok.items()))

    def lines(self) -> list[str]:
        """The outcome, then what to change in Open-Sora so that it trains from the export."""
        return [*self._outcome(), "", *self._settings()]

    def _outcome(self) -> Iterator[str]:
        table, names = self.table, self.table.schema.names
        yield f"{self.out}: complete, {self.counts['rows']:,} rows in {self.out / TABLE}"
        if self.options.table_only:
            yield "  no tensor files: for the class in embed_precompute.opensora.dataset"
        else:
            yield (
                f"  {self.counts['files']:,} tensor files, {self.counts['written']:,} of them "
                "written now; all read back and equal to the dataset"
            )
        if self.captions.not_ok:
            total = sum(self.captions.not_ok.values())
            yield f"  {total:,} samples without an embedding left out: {self._not_ok()}"
        if table.replaced:
            yield f"  note: replaced columns of the captions: {', '.join(table.replaced)}"
        if table.filled_latents:
            yield (
                f"  note: no latents_path in {table.filled_latents:,} rows: enough for "
                "cached_video=False, not for True"
            )
        for name in SAMPLER_COLUMNS:
            if name not in names:
                yield f"  note: the trainer's sampler also needs the column {name}"
            elif table.nulls[name] and name != "fps":  # without fps it takes every frame
                yield f"  note: {name} is null in {table.nulls[name]:,} rows; the sampler needs it"
        name = self.dataset.tensors[self.options.t5].encoder
        encoder = self.dataset.manifest.spec["encoders"][name]
        if patch := made_for_patch(self.root, name):
            yield f"  note: {NO_CACHED_TEXT % patch}"
        if encoder.get("seq_align", 1) == 1:
            yield "  note: seq_align 1 is for a trainer without sequence parallelism (sp_size 1)"
        if encoder.get("implementation") not in (None, "hf"):
            yield (
                f"  note: encoded with implementation {encoder['implementation']}: equal to "
                "Open-Sora's own embedder up to rounding; only hf gives its bits"
            )

    def _settings(self) -> list[str]:
        settings = ", ".join(self.captions.recipe.trainer_settings())
        table, t5, clip = (self.out / name for name in (TABLE, "null_t5.pt", "null_clip.pt"))
        if settings:
            recipe = f"The captions were encoded with {settings}: keep them in dataset."
        else:
            recipe = FOREIGN_RECIPE
        reading = FROM_SHARDS if self.options.table_only else FROM_FILES
        nulls = NULL_FILES.format(t5=t5, clip=clip)
        return [
            *reading.format(root=self.root, table=table).splitlines(),
            recipe,
            *nulls.splitlines(),
        ]


def write_pt(path: Path, values: torch.Tensor) -> bool:
    """Write a tensor, unless the file holds it already; whether it was written."""
    if holds(path, values):
        return False
    file = io.BytesIO()
    # A clone has a storage of its own: a view would be saved with all that it is a view of.
    torch.save(values.detach().clone(memory_format=torch.contiguous_format), file)
    replace_bytes(path, file.getvalue())
    if not holds(path, values):
        raise VerificationError(
            f"{path} does not hold what was just written to it: the disk or its driver is faulty."
        )
    return True


def holds(path: Path, expected: torch.Tensor) -> bool:
    """Whether a file, loaded as Open-Sora loads it, gives exactly `expected` and nothing more."""
    if not path.exists():
        return False
    try:
        found = torch.load(path, map_location=torch.device("cpu"), weights_only=True)
    except Exception:  # torch raises nearly anything for a damaged file: it is written again
        return False
    return (
        isinstance(found, torch.Tensor)
        and found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.untyped_storage().nbytes() == expected.nbytes
        and torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (found, expected)))
    )
