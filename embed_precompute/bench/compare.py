"""Measure an encoder side by side: our implementations, and transformers as others call it.

Guarantees: all variants of an encoder get the same captions (`workload`) and take turns in one
process (`measure`). The report states device, versions and what the C library's allocator was told,
on which a CPU's figures depend. Nothing is written, no dataset touched.
Costs: what `measure` says, encoder after encoder; a variant with torch.compile takes half a minute
to start.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from embed_precompute.bench.measure import bench_encoder
from embed_precompute.bench.report import BenchReport, Difference, EncoderBench, Measured
from embed_precompute.bench.variants import REFERENCE, as_implementation, check_names
from embed_precompute.bench.workload import (
    MAX_CORPUS,
    SYNTHETIC_CORPUS,
    Ids,
    corpus_windows,
    synthetic_corpus,
    synthetic_lengths,
)
from embed_precompute.config.schema import Config
from embed_precompute.distributed import DistContext
from embed_precompute.encoders import resolve as encoder_registry
from embed_precompute.encoders.device import environment, resolve_device
from embed_precompute.encoders.spec import ResolvedEncoder
from embed_precompute.errors import InputError
from embed_precompute.job.prepare import prepare

__all__ = ["BenchReport", "Difference", "EncoderBench", "Measured", "bench"]

ALLOCATOR = ("LD_PRELOAD", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def bench(
    config: Config,
    num_captions: int | None = None,
    num_rounds: int = 5,
    variants: Sequence[str] | None = None,
    *,
    synthetic: bool = False,
) -> BenchReport:
    """Measure every encoder of `config`.

    `variants`: names out of `variants.NAMES`; all when not given. `num_captions` are chosen by
    `workload.corpus_windows`; when not given 192, or one batch where all captions have one length.
    `synthetic`: no table is read, lengths and ids are made up. Raises InputError as a run would:
    captions, checkpoints; and when no variant can be measured.
    """
    check_names(variants)
    device = resolve_device(config.runtime.device, DistContext())
    encoders, texts = (_without_table(config), None) if synthetic else _with_table(config)
    benches = []
    for encoder in encoders:
        reference = as_implementation(encoder, REFERENCE)
        workload = corpus_windows(reference, _corpus(reference, texts), num_captions)
        if texts is None:
            workload = dataclasses.replace(workload, chosen=f"synthetic, {workload.chosen}")
        measured = bench_encoder(
            reference,
            workload,
            variants,
            device=device,
            output_dtype=config.output.dtype,
            num_rounds=num_rounds,
        )
        benches.append(measured)
    if not any(each.measured for each in benches):
        told = [f"{each.name}, {n}: {why}" for each in benches for n, why in each.left_out.items()]
        raise InputError("nothing could be measured:\n  " + "\n  ".join(told))
    return BenchReport(_environment(device), benches)


def _with_table(config: Config) -> tuple[Sequence[ResolvedEncoder], list[str]]:
    """The encoders, and the texts of the first `MAX_CORPUS` samples."""
    with tempfile.TemporaryDirectory() as folder:  # an output without a plan; nothing is put there
        output = dataclasses.replace(config.output, path=str(Path(folder, "none")))
        prepared = prepare(dataclasses.replace(config, output=output), MAX_CORPUS)
    plan = prepared.plan
    reader = prepared.table.reader(plan.num_rows, plan.last_row_samples)
    samples = reader.read(0, plan.num_rows)
    reader.close()
    texts = [sample.text for sample in samples if sample.text is not None]
    if not texts:
        raise InputError(
            f"captions.path {config.captions.path!r}: none of the first {len(samples)} samples has "
            "a text. Give a table with captions, or --synthetic."
        )
    return prepared.encoders, texts


def _without_table(config: Config) -> list[ResolvedEncoder]:
    """The encoders; one whose padded length a column decides gets that of no added token."""
    resolved = []
    for name in sorted(config.encoders):
        encoder = config.encoders[name]
        by_column = isinstance(encoder.added_tokens, str)
        length = encoder.padded_length(0) if by_column else None
        resolved.append(encoder_registry.resolve(name, encoder, length))
    return resolved


def _corpus(resolved: ResolvedEncoder, texts: list[str] | None) -> Ids:
    if texts is None:
        lengths = synthetic_lengths(SYNTHETIC_CORPUS)
        return synthetic_corpus(resolved.tokenizer, lengths.tolist())
    return resolved.tokenizer.encode(texts).ids


def _environment(device: str) -> dict[str, str]:
    here = environment(device)
    found = {name: here[name] for name in ("device", "torch", "transformers", "cpu_capability")}
    found["threads"] = str(torch.get_num_threads())
    chosen = [f"{name}={os.environ[name]}" for name in ALLOCATOR if os.environ.get(name)]
    found["allocator"] = " ".join(chosen) or "default"
    try:
        found["colossalai"] = importlib.metadata.version("colossalai")
    except importlib.metadata.PackageNotFoundError:
        found["colossalai"] = "not installed"
    return found
