"""The deep check: random samples encoded again from their stored text, by plain transformers.

Guarantees: the embeddings are compared with the family's `reference`, one caption at a time, and
not with the code that made them: float32 within a relative difference of 1e-5, half precision with
a cosine of at least 0.999 for every token. The numbers of tokens are compared too. The null
embedding is always among the samples. Which samples are compared follows from the seed alone.
Costs: loads each encoder in turn, encodes without batches, and reads one rows part for each unit
that a sample falls into.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from embed_precompute.config.files import load_config
from embed_precompute.documents import differing_fields
from embed_precompute.encoders.checkpoint import quiet_transformers
from embed_precompute.encoders.device import difference, distance, resolve_device
from embed_precompute.encoders.resolve import ResolvedEncoder, open_encoder, resolve
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import NULL_UNIT, read_null_record, read_record
from embed_precompute.store.rows import read_samples
from embed_precompute.store.shards import ShardReader

Problem = Callable[[Path, object, object], None]
"""Called with a file, what was found in it and what was expected."""


@dataclasses.dataclass(frozen=True)
class References:
    """The dataset's encoders, found and checked; no model is loaded."""

    device: str
    encoders: Mapping[str, ResolvedEncoder]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What is stored of a sample, or of the null embedding."""

    shard: Path
    name: str
    """The sample's name, for people."""
    text: str
    tokens: Mapping[str, int]
    """Number of tokens, by encoder."""
    embeddings: Mapping[str, torch.Tensor]
    """The embeddings, by tensor."""
    is_null: bool = False


def open_references(root: Path, plan: Plan, device: str = "auto") -> References:
    """Find checkpoints and device, before any long work begins.

    Raises InputError or ConflictError if the checkpoints of the dataset are not at hand.
    """
    path = root / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{root} has no config.yaml, which names the checkpoints: the deep check needs them. "
            "Run the job's command once more (it writes config.yaml), or use --level full."
        )
    configured, folders, encoders = load_config(path).encoders, {}, {}
    # The last run's own folders. run.json may be gone: the configuration names checkpoints too.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        folders = dict(json.loads((root / "run.json").read_bytes())["checkpoints"])
    for name, spec in plan.spec["encoders"].items():
        if name not in configured:
            raise ConflictError(f"config.yaml has no encoder {name!r}, the plan has: restore it.")
        encoder = configured[name]
        if Path(str(folders.get(name))).is_dir():
            encoder = dataclasses.replace(encoder, pretrained=folders[name], revision=None)
        encoders[name] = resolve(open_encoder(name, encoder), stored=spec)
        if fields := differing_fields(spec, encoders[name].spec()):
            raise ConflictError(
                f"encoders.{name} is not the encoder of the dataset: {'; '.join(fields)}. The deep "
                "check needs the checkpoint it was made with; found "
                f"{encoders[name].opened.checkpoint.folder}."
            )
    return References(resolve_device(device), encoders)


def compare_samples(
    root: Path,
    plan: Plan,
    references: References,
    num_ok: Mapping[int, int],
    *,
    null: bool,
    num_samples: int,
    seed: int,
    problem: Problem,
) -> str:
    """Adds a problem for every stored embedding that is not close to a new encoding of its text.

    Returns one line that says how many were compared, and how close they are.

    `num_ok`: the units to draw from, and how many samples of each are ok. `null`: whether the null
    embedding is compared too.
    """
    drawn = [_null_embedding(root, plan)] if null else []
    drawn += _draw_samples(root, plan, num_ok, num_samples, seed)
    compared, worst_relative, worst_cosine = 0, 0.0, 1.0
    for name, encoder in references.encoders.items():
        for sample, tensor, expected in _encode(name, encoder, references.device, drawn, problem):
            stored = sample.embeddings[tensor]
            exact = encoder.options.dtype == "float32" and not encoder.options.tf32
            exact = exact and stored.dtype == torch.float32
            differs = difference(stored, expected, exact=exact)
            if differs is not None:
                found = f"text_{tensor} of {sample.name} with {differs} to the reference"
                problem(sample.shard, found, "what its text gives")
                continue
            relative, cosine = distance(stored, expected)
            compared += 1
            worst_relative = max(worst_relative, relative)
            worst_cosine = min(worst_cosine, cosine)
    return (
        f"{len(drawn) - null} samples{' and the null embedding' if null else ''} encoded again by "
        f"plain transformers (seed {seed}): {compared} embeddings within the tolerance (largest "
        f"relative difference {worst_relative:.2e}, smallest cosine {worst_cosine:.6f})"
    )


def _null_embedding(root: Path, plan: Plan) -> Drawn:
    record = read_null_record(root)
    path = record.shard_path(root)
    shard = ShardReader(path, plan.fingerprint, NULL_UNIT, plan.tensors)
    tokens = {name: sums.tokens for name, sums in record.encoders.items()}
    values = {t.name: shard.row(t.name, 0) for t in plan.tensors}
    return Drawn(path, "the empty caption", "", tokens, values, is_null=True)


def _draw_samples(
    root: Path, plan: Plan, num_ok: Mapping[int, int], num_samples: int, seed: int
) -> Iterator[Drawn]:
    """Draws `num_samples` of the samples with status ok, all equally likely, in stored order."""
    total = sum(num_ok.values())
    wanted = sorted(random.Random(seed).sample(range(total), min(num_samples, total)))
    first = 0
    for unit, count in sorted(num_ok.items()):
        mine = {position - first for position in wanted if first <= position < first + count}
        first += count
        if not mine:
            continue
        record = read_record(root, unit)
        path = record.shard_path(root)
        shard = ShardReader(path, plan.fingerprint, unit, plan.tensors)
        samples = read_samples(record.rows_path(root), plan.tensors)
        ok = (sample for sample in samples if sample.index is not None)
        for position, sample in enumerate(ok):
            if position in mine:
                assert sample.index is not None
                values = {t.name: shard.row(t.name, sample.index) for t in plan.tensors}
                name = f"sample {sample.sample_id!r}"
                yield Drawn(path, name, sample.text or "", sample.tokens, values)


def _encode(
    name: str, encoder: ResolvedEncoder, device: str, drawn: Sequence[Drawn], problem: Problem
) -> Iterator[tuple[Drawn, str, torch.Tensor]]:
    """Yields (sample, tensor, reference embedding) for samples whose number of tokens is right."""
    opened, decision = encoder.opened, encoder.decision
    captions = opened.tokenizer.encode([sample.text for sample in drawn])
    with quiet_transformers():
        reference = encoder.family.reference(
            opened.checkpoint.folder, opened.tokenizer_folder, opened.options, device
        )
        for sample, num_tokens in zip(drawn, captions.tokens, strict=True):
            if sample.tokens[name] != num_tokens:
                found = f"{sample.tokens[name]} tokens of {name} for {sample.name}"
                problem(sample.shard, found, f"{num_tokens}, as its text gives")
                continue
            length = decision.padded_length
            if length is not None and sample.is_null:
                length = decision.null_shape[1]
            text = opened.tokenizer.prepare(sample.text)
            if text is None:
                for tensor, output in encoder.tensors().items():
                    yield sample, tensor, torch.zeros(0, output.width)
                continue
            for suffix, values in reference(text, length).items():
                yield sample, name + suffix, values.cpu()
