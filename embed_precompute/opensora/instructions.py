"""What to change in Open-Sora so that it trains from an export: switches, null paths, warnings.

Guarantees: every line follows from the export at hand; keys and paths are those of Open-Sora v2's
scripts/diffusion/train.py and opensora/datasets/datasets.py.
Costs: nothing; text only.
"""

from __future__ import annotations

from collections.abc import Iterator

from embed_precompute.opensora.export import OpenSoraExport
from embed_precompute.opensora.table import SAMPLER_COLUMNS

UPSTREAM_NULLS = "/mnt/ddn/sora/tmp_load"
"""Where scripts/diffusion/train.py has its null embeddings hard-coded."""
PATCH = "scripts/opensora/null_embeddings.patch"


def export_lines(export: OpenSoraExport) -> list[str]:
    """The outcome, then how to train from it; for a person."""
    return [*_outcome(export), *_notes(export), "", *_switches(export), "", *_null_paths(export)]


def _outcome(export: OpenSoraExport) -> Iterator[str]:
    written = export.written
    yield f"{export.out}: complete, {export.num_rows:,} rows in {export.table}"
    if export.options.table_only:
        yield "  no tensor files: for the class in embed_precompute.opensora.dataset"
    else:
        earlier = f" ({written.skipped_units:,} units in an earlier run)"
        yield (
            f"  {written.files:,} tensor files, {written.bytes:,} bytes, each read back and equal "
            f"to its shard{earlier if written.skipped_units else ''}"
        )
    if export.num_parts:
        yield f"  {export.num_parts:,} parts for memory_efficient=True"
    total = sum(export.not_ok.values())
    if total:
        counts = ", ".join(f"{label} {n:,}" for label, n in sorted(export.not_ok.items()))
        kept = export.options.failed == "null"
        what = "pointed at the null embedding" if kept else "left out"
        yield f"  {total:,} samples that are not ok {what}: {counts}"


def _notes(export: OpenSoraExport) -> Iterator[str]:
    if export.replaced:
        yield f"  note: replaced columns of the captions: {', '.join(export.replaced)}"
    if export.filled_latents:
        yield (
            f"  note: no latents_path in {export.filled_latents:,} rows: enough for "
            "cached_video=False, not for True"
        )
    absent = [name for name in SAMPLER_COLUMNS if name not in export.columns]
    if absent:
        yield f"  note: the trainer's sampler also needs the columns {', '.join(absent)}"
    for name in SAMPLER_COLUMNS:
        if export.nulls.get(name, 0):
            yield f"  note: {name} is null in {export.nulls[name]:,} rows; the sampler needs it"
    encoder = export.spec["encoders"][export.options.t5]
    if encoder.get("seq_align", 1) == 1:
        yield "  note: seq_align 1 is for a trainer without sequence parallelism (sp_size 1)"


def _switches(export: OpenSoraExport) -> Iterator[str]:
    if export.options.table_only:
        yield "Read the shards directly: in Open-Sora's configuration set"
        yield (
            '  custom_imports = dict(imports=["embed_precompute.opensora.dataset"], '
            "allow_failed_imports=False)"
        )
        yield (
            f'  dataset = dict(type="precomputed_video_text", embeddings="{export.embeddings}", '
            f'data_path="{export.table}", ...)'
        )
        yield "  cached_text = True"
    else:
        yield "Switch cached text on: three settings of Open-Sora's configuration, and the table"
        yield '  dataset = dict(type="cached_video_text", cached_text=True, ...)'
        yield "  cached_text = True"
        yield "or on the command line of scripts/diffusion/train.py"
        yield (
            "  --dataset.type cached_video_text --dataset.cached_text True --cached_text True "
            f"--dataset.data_path {export.table}"
        )
    if export.num_parts:
        yield "  --dataset.memory_efficient True"
    recipe = export.spec["captions"]["recipe"]
    if recipe["kind"] == "opensora":
        vmaf = recipe["motion_column"] is not None
        yield f"Encoded with fps_max={recipe['fps_max']}, vmaf={vmaf}: keep them in dataset."


def _null_paths(export: OpenSoraExport) -> Iterator[str]:
    yield "The trainer loads its null embeddings from two paths hard-coded in train.py. Either put"
    yield f"  {export.null_t5}  at  {UPSTREAM_NULLS}/null_t5.pt"
    yield f"  {export.null_clip}  at  {UPSTREAM_NULLS}/null_clip.pt"
    yield f"or apply {PATCH} (git apply, in a clone of Open-Sora) and add"
    yield f"  --null_t5_path {export.null_t5} --null_clip_path {export.null_clip}"
