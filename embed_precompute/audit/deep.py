"""The deep check: random samples encoded again from their stored text, by plain transformers.

Guarantees: the embeddings are compared with the family's `reference`, one caption at a time, and
not with the code that made them: float32 within a relative difference of 1e-5, half precision with
a cosine of at least 0.999 for every token. So are the numbers of tokens. The null embedding is
always among them. Which samples are compared follows from the seed alone.
Costs: loads each encoder in turn, and encodes without batches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from embed_precompute.audit.draw import Drawn, draw_samples, null_embedding
from embed_precompute.audit.findings import Report
from embed_precompute.config.files import load_config
from embed_precompute.documents import differing_fields
from embed_precompute.encoders.checkpoint import quiet_transformers
from embed_precompute.encoders.device import difference, distance, resolve_device
from embed_precompute.encoders.families.base import EncoderConfig
from embed_precompute.encoders.resolve import ResolvedEncoder, open_encoder, resolve
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.store.plan import Plan


@dataclasses.dataclass(frozen=True)
class References:
    """The dataset's encoders, found and checked; no model is loaded."""

    device: str
    encoders: Mapping[str, ResolvedEncoder]


def open_references(root: Path, plan: Plan, device: str = "auto") -> References:
    """Find checkpoints and device, before anything long is begun.

    Raises InputError or ConflictError when the checkpoints of the dataset are not at hand.
    """
    configured = _configured_encoders(root)
    encoders = {}
    for name, spec in plan.spec["encoders"].items():
        if name not in configured:
            raise ConflictError(f"config.yaml has no encoder {name!r}, the plan has: restore it.")
        encoders[name] = resolve(open_encoder(name, configured[name]), stored=spec)
        if fields := differing_fields(spec, encoders[name].spec()):
            raise ConflictError(
                f"encoders.{name} is not the encoder of the dataset: {'; '.join(fields)}. The deep "
                "check needs the checkpoint it was made with; found "
                f"{encoders[name].opened.checkpoint.folder}."
            )
    return References(resolve_device(device), encoders)


def _configured_encoders(root: Path) -> dict[str, EncoderConfig]:
    """Those of the last run's config.yaml, with the checkpoint folders that run.json names."""
    path = root / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{root} has no config.yaml, which names the checkpoints: the deep check needs them. "
            "Run the job's command once more (it writes config.yaml), or use --level full."
        )
    folders = {}
    # Provenance, which may be gone: the configuration names the checkpoints too.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        folders = json.loads((root / "run.json").read_bytes())["checkpoints"]
    return {
        name: dataclasses.replace(encoder, pretrained=folders[name], revision=None)
        if isinstance(folders, dict) and Path(str(folders.get(name))).is_dir()
        else encoder
        for name, encoder in load_config(path).encoders.items()
    }


def compare_samples(
    report: Report, plan: Plan, references: References, *, num_samples: int, seed: int
) -> None:
    """Add a problem for every sample whose embeddings are not what its text gives."""
    drawn = [null_embedding(report.root, plan)] if report.null_sound else []
    drawn += draw_samples(report, plan, num_samples, seed)
    compared, worst_relative, worst_cosine = 0, 0.0, 1.0
    for name, encoder in references.encoders.items():
        for sample, tensor, expected in _encode(report, name, encoder, references.device, drawn):
            stored = sample.embeddings[tensor]
            exact = encoder.options.dtype == "float32" and not encoder.options.tf32
            exact = exact and stored.dtype == torch.float32
            problem = difference(stored, expected, exact=exact)
            if problem is not None:
                found = f"text_{tensor} of {sample.name} with {problem} to the reference"
                report.problem(sample.shard, found, "what its text gives")
                continue
            relative, cosine = distance(stored, expected)
            compared += 1
            worst_relative = max(worst_relative, relative)
            worst_cosine = min(worst_cosine, cosine)
    null = " and the null embedding" if report.null_sound else ""
    report.deep = (
        f"{len(drawn) - report.null_sound} samples{null} encoded again by plain transformers (seed "
        f"{seed}): {compared} embeddings within the tolerance (largest relative difference "
        f"{worst_relative:.2e}, smallest cosine {worst_cosine:.6f})"
    )


def _encode(
    report: Report, name: str, encoder: ResolvedEncoder, device: str, drawn: Sequence[Drawn]
) -> Iterator[tuple[Drawn, str, torch.Tensor]]:
    """(sample, tensor, the reference's embedding), of the samples with the right tokens."""
    opened, decision = encoder.opened, encoder.decision
    captions = opened.tokenizer.encode([sample.text for sample in drawn])
    with quiet_transformers():
        reference = encoder.family.reference(
            opened.checkpoint.folder, opened.tokenizer_folder, opened.options, device
        )
        for sample, num_tokens in zip(drawn, captions.tokens, strict=True):
            if sample.tokens[name] != num_tokens:
                found = f"{sample.tokens[name]} tokens of {name} for {sample.name}"
                report.problem(sample.shard, found, f"{num_tokens}, as its text gives")
                continue
            length = decision.padded_length
            if length is not None and sample.is_null:
                length = decision.null_shape[1]
            for suffix, values in reference(sample.text, length).items():
                yield sample, name + suffix, values.cpu()
