"""The deep check: random samples encoded again from their stored text, against what is stored.

Guarantees: in the environment that made a unit, and with the implementation that made it, equal
bytes; elsewhere the reference implementation, fp32 within a relative difference of 1e-5, half
precision with a cosine of at least 0.999 for every token. The null embedding is always among them.
The samples follow from the seed alone.
Costs: loads the encoders; one rows part is read for each unit that a sample falls into.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from embed_precompute.audit.findings import Report
from embed_precompute.config.files import load_config
from embed_precompute.config.schema import Config
from embed_precompute.distributed import DistContext
from embed_precompute.documents import differing_fields
from embed_precompute.encoders import resolve as encoder_registry
from embed_precompute.encoders.device import environment, resolve_device
from embed_precompute.encoders.options import EncoderConfig
from embed_precompute.encoders.spec import ResolvedEncoder
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.samples import Status
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import NULL_UNIT, read_null_record, read_record
from embed_precompute.store.rows import StoredSample, read_samples
from embed_precompute.store.shards import ShardReader

REFERENCE = "hf"
MAX_RELATIVE_DIFFERENCE = 1e-5
"""Of float32 that was computed in float32."""
MIN_COSINE = 0.999
"""Of half precision, for every token."""


@dataclasses.dataclass(frozen=True)
class Ready:
    """What encodes the samples again; no model is loaded yet."""

    device: str
    here: Mapping[str, str]
    """The environment."""
    encoders: Mapping[str, ResolvedEncoder]
    """The reference for an implementation that cannot run here."""


@dataclasses.dataclass(frozen=True)
class _Drawn:
    """A stored row that is encoded again."""

    path: Path
    """Its shard."""
    sample: StoredSample
    stored: Mapping[str, torch.Tensor]
    same_environment: bool


class _Tally:
    """What the comparisons gave."""

    def __init__(self) -> None:
        self.equal = self.near = 0
        self.worst_difference, self.worst_cosine = 0.0, 1.0

    def line(self, num_samples: int, with_null: bool, seed: int) -> str:
        null = " and the null embedding" if with_null else ""
        text = (
            f"{num_samples} samples{null} encoded again (seed {seed}): "
            f"{self.equal} embeddings byte-equal"
        )
        if self.near:
            text += (
                f", {self.near} of other environments within the tolerance (largest relative "
                f"difference {self.worst_difference:.2e}, smallest cosine {self.worst_cosine:.6f})"
            )
        return text


def get_ready(root: Path, plan: Plan, device: str = "auto") -> Ready:
    """Finds checkpoints and device, before anything long is begun.

    InputError or ConflictError when the checkpoints of the dataset are not at hand.
    """
    config = _load_config(root)
    device = resolve_device(device, DistContext())
    specs = plan.spec["encoders"]
    encoders = {name: _resolve(name, config.encoders.get(name), specs[name]) for name in specs}
    return Ready(device, environment(device, list(encoders.values())), encoders)


def reencode(report: Report, plan: Plan, ready: Ready, *, num_samples: int, seed: int) -> None:
    """Adds a problem for every sample whose embedding is not what its text gives.

    `report.num_ok` says which units may be drawn from.
    """
    null_sound = report.null_sound
    drawn = [_null(report, plan, ready.here)] if null_sound else []
    drawn += _draw(report, plan, ready.here, num_samples, seed)
    tally = _Tally()
    for tensor in plan.tensors:
        resolved = ready.encoders[tensor.name]
        exact = [d for d in drawn if d.same_environment]
        rest = [d for d in drawn if not d.same_environment]
        if plan.spec["encoders"][tensor.name]["implementation"] != resolved.implementation:
            exact, rest = [], drawn
        for chosen, bitwise in ((exact, True), (rest, False)):
            if chosen:
                encoder = resolved if bitwise else _reference(resolved)
                values = _encode(encoder, ready.device, tensor.dtype, chosen)
                _compare(report, encoder, chosen, values, tally, bitwise=bitwise)
    report.deep = tally.line(len(drawn) - null_sound, null_sound, seed)


def _load_config(root: Path) -> Config:
    """config.yaml of the last run, with the checkpoint folders that run.json names."""
    path = root / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{root} has no config.yaml, which names the checkpoints: the deep check needs them. "
            "Run the job's command once more (it writes config.yaml), or use --level full."
        )
    config = load_config(path)
    folders = {}
    # Provenance, which may be gone: the configuration names the checkpoints too.
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        folders = json.loads((root / "run.json").read_bytes())["checkpoints"]
    encoders = {
        name: dataclasses.replace(encoder, pretrained=folders[name], revision=None)
        if isinstance(folders, dict) and Path(str(folders.get(name))).is_dir()
        else encoder
        for name, encoder in config.encoders.items()
    }
    return dataclasses.replace(config, encoders=encoders)


def _resolve(name: str, config: EncoderConfig | None, spec: Mapping[str, Any]) -> ResolvedEncoder:
    """The encoder of the plan, or the reference where its implementation cannot run here."""
    if config is None:
        raise ConflictError(f"config.yaml has no encoder {name!r}, the plan has: restore it.")
    can_run = encoder_registry.can_run(spec["implementation"], spec["model_type"])
    implementation: Any = spec["implementation"] if can_run else REFERENCE
    compiled = bool(can_run and spec.get("compiled"))
    config = dataclasses.replace(config, implementation=implementation, compile=compiled)
    resolved = encoder_registry.resolve(name, config, spec["padded_length"])
    wanted = {**spec, "implementation": implementation, "compiled": compiled}
    if fields := differing_fields(wanted, resolved.spec()):
        raise ConflictError(
            f"encoders.{name} is not the encoder of the dataset: {'; '.join(fields)}. The deep "
            f"check needs the checkpoint it was made with; found {resolved.folder}."
        )
    return resolved


def _reference(resolved: ResolvedEncoder) -> ResolvedEncoder:
    """The same encoder by the reference implementation, in that one's own shapes."""
    config = dataclasses.replace(resolved.config, implementation="hf", compile=False)
    return encoder_registry.resolve(resolved.name, config, resolved.padded_length)


def _null(report: Report, plan: Plan, here: Mapping[str, str]) -> _Drawn:
    record = read_null_record(report.root)
    path = record.shard_path(report.root)
    shard = ShardReader(path, plan.fingerprint, NULL_UNIT, plan.tensors)
    stored = StoredSample(
        sample_id="",
        row=-1,
        status=Status.OK,
        error=None,
        index=0,
        tokens={name: sums.tokens for name, sums in record.encoders.items()},
        lengths=record.tensors,
        text="",
    )
    values = {t.name: shard.row(t.name, 0) for t in plan.tensors}
    return _Drawn(path, stored, values, record.environment == here)


def _draw(
    report: Report, plan: Plan, here: Mapping[str, str], num_samples: int, seed: int
) -> list[_Drawn]:
    """`num_samples` of all samples whose status is ok, each equally likely."""
    total = sum(report.num_ok.values())
    wanted = sorted(random.Random(seed).sample(range(total), min(num_samples, total)))
    names = [tensor.name for tensor in plan.tensors]
    drawn: list[_Drawn] = []
    first = 0
    for unit, count in sorted(report.num_ok.items()):
        mine = {position - first for position in wanted if first <= position < first + count}
        first += count
        if not mine:
            continue
        record = read_record(report.root, unit)
        path = record.shard_path(report.root)
        shard = ShardReader(path, plan.fingerprint, unit, plan.tensors)
        samples = read_samples(record.rows_path(report.root), plan.tensors)
        ok = (s for s in samples if s.status is Status.OK)
        for position, sample in enumerate(ok):
            if position in mine:
                assert sample.index is not None
                values = {name: shard.row(name, sample.index) for name in names}
                drawn.append(_Drawn(path, sample, values, record.environment == here))
    return drawn


def _encode(
    resolved: ResolvedEncoder, device: str, dtype: str, drawn: Sequence[_Drawn]
) -> list[torch.Tensor]:
    """The embedding of every drawn text, as a unit would store it."""
    encoder = encoder_registry.build(resolved, device, dtype)
    ids = resolved.tokenizer.encode([d.sample.text or "" for d in drawn]).ids
    found: dict[int, torch.Tensor] = {}
    # The null embedding has a shape of its own where the captions' padded length differs.
    nulls = [i for i, d in enumerate(drawn) if d.sample.row < 0]
    captions = [i for i, d in enumerate(drawn) if d.sample.row >= 0]
    for members, null in ((nulls, True), (captions, False)):
        chosen = [ids[i] for i in members]
        for batch in resolved.batches(chosen, null):
            output = encoder.encode(batch)
            for line, row in enumerate(batch.rows.tolist()):
                length = drawn[members[row]].sample.lengths[resolved.name]
                values = output[line] if resolved.pooled else output[line][:length]
                found[members[row]] = values.clone()
    return [found[i] for i in range(len(drawn))]


def _compare(
    report: Report,
    resolved: ResolvedEncoder,
    drawn: Sequence[_Drawn],
    values: Sequence[torch.Tensor],
    tally: _Tally,
    *,
    bitwise: bool,
) -> None:
    name = resolved.name
    tokenized = resolved.tokenizer.encode([d.sample.text or "" for d in drawn])
    in_fp32 = resolved.config.dtype == "float32"
    for each, made, num_tokens in zip(drawn, values, tokenized.num_tokens, strict=True):
        stored = each.stored[name]
        what = f"text_{name} of " + (
            f"sample {each.sample.sample_id!r}" if each.sample.row >= 0 else "the empty caption"
        )
        if each.sample.tokens[name] != num_tokens:
            found = f"{each.sample.tokens[name]} tokens for {what}"
            report.problem(each.path, found, f"{num_tokens}, as its text gives")
            continue
        if made.shape != stored.shape or not bool(torch.isfinite(stored).all()):
            found = f"{what} with shape {list(stored.shape)}, or inf or nan in it"
            report.problem(each.path, found, f"finite, shape {list(made.shape)}")
            continue
        difference, cosine = distance(stored, made)
        if _same_bytes(stored, made):
            tally.equal += 1
        elif bitwise:
            found = f"other bytes in {what} (relative difference {difference:.2e})"
            report.problem(each.path, found, "those its text gives in the same environment")
        elif in_fp32 and stored.dtype == torch.float32 and difference > MAX_RELATIVE_DIFFERENCE:
            found = f"{what} with a relative difference of {difference:.2e} to the reference"
            report.problem(each.path, found, f"at most {MAX_RELATIVE_DIFFERENCE}")
        elif cosine < MIN_COSINE:
            found = f"{what} with a cosine of {cosine:.6f} to the reference in one token"
            report.problem(each.path, found, f"at least {MIN_COSINE}")
        else:
            tally.near += 1
            tally.worst_difference = max(tally.worst_difference, difference)
            tally.worst_cosine = min(tally.worst_cosine, cosine)


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    views = [t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b)]
    return torch.equal(*views)


def distance(stored: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(max|a - b| / max|b|, the smallest cosine of any token); (inf, -1) where one is not finite.

    Both are [L, D] or [C], of equal shape. Two vectors of zeros are equal.
    """
    a, b = stored.double(), reference.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf, -1.0
    scale = float(b.abs().max()) if b.numel() else 0.0
    difference = float((a - b).abs().max()) / scale if scale else float((a != b).any())
    cosines = torch.nn.functional.cosine_similarity(a, b, dim=-1).reshape(-1)
    zero = ((a == 0).all(-1) & (b == 0).all(-1)).reshape(-1)
    cosines = cosines.masked_fill(zero, 1.0)
    return difference, float(cosines.min()) if cosines.numel() else 1.0
