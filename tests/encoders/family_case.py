"""The conformance kit's cases: a tiny checkpoint of a family, and the options to run it with.

Each family's own test file, `test_<kind>.py`, has its cases in a list CASES; `test_families.py`
runs every case through the same tests.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from embed_precompute.encoders.encoder import TextEncoder, build
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.families.base import EncoderConfig, Reference
from embed_precompute.encoders.resolve import ResolvedEncoder, open_encoder, resolve


def _alone(folder: Path, model_class: Any, **arguments: Any) -> Any:
    return model_class.from_pretrained(folder, **arguments)


@dataclass(frozen=True)
class Case:
    """One configuration of a family."""

    name: str
    kind: str
    write: Callable[[Path, list[str]], Path]
    """Makes a tiny float32 checkpoint with a tokenizer trained on the corpus in a folder."""
    options: dict[str, Any] = field(default_factory=dict)
    """What is not the default; with small shapes, so that there are several batches."""
    implementations: tuple[str, ...] = ("hf",)
    alone: Callable[..., Any] = _alone
    """(folder, transformers' class, arguments of from_pretrained) -> the text encoder alone."""


def every_case() -> list[Case]:
    """The cases of all families in the registry."""
    cases: list[Case] = []
    for kind in FAMILIES:
        module = importlib.import_module(f"test_{kind}")
        assert module.CASES, f"test_{kind}.py has no CASES"
        cases += module.CASES
    return cases


def parameters() -> list[Any]:
    """(case, implementation) for every implementation that can run here."""
    return [
        pytest.param(
            case,
            implementation,
            id=f"{case.name}-{implementation}",
            marks=[pytest.mark.skip("ColossalAI is not installed")]
            if implementation == "shardformer" and find_spec("colossalai") is None
            else [],
        )
        for case in every_case()
        for implementation in case.implementations
    ]


def resolved_of(kind: str, folder: Path, **fields: Any) -> ResolvedEncoder:
    """An encoder in float32, with these options."""
    fields = {"dtype": "float32", **fields}
    options: EncoderConfig = FAMILIES[kind].options(kind=kind, pretrained=str(folder), **fields)
    return resolve(open_encoder("enc", options))


def encoder_of(kind: str, folder: Path, **fields: Any) -> TextEncoder:
    return build(resolved_of(kind, folder, **fields), "cpu", "float32")


def copied(folder: Path, target: Path, name: str = "config.json", **changes: Any) -> Path:
    """A copy of a checkpoint, or itself, with other values in one of its JSON files."""
    if folder != target:
        shutil.copytree(folder, target)
    value = json.loads((target / name).read_bytes())
    (target / name).write_text(json.dumps({**value, **changes}), encoding="utf-8")
    return target


def resolved(case: Case, folder: Path, **changes: Any) -> ResolvedEncoder:
    """The case's encoder, from its options and `changes`."""
    return resolved_of(case.kind, folder, **{**case.options, **changes})


def built(case: Case, folder: Path, output_dtype: str = "float32", **changes: Any) -> TextEncoder:
    return build(resolved(case, folder, **changes), "cpu", output_dtype)


def reference_of(encoder: ResolvedEncoder, **changes: Any) -> Reference:
    """The family's plain transformers, for the encoder's checkpoint and options."""
    opened = encoder.opened
    options = dataclasses.replace(opened.options, **changes)
    return encoder.family.reference(
        opened.checkpoint.folder, opened.tokenizer_folder, options, "cpu"
    )


Stored = dict[str, list[torch.Tensor]]


def encode(encoder: TextEncoder, texts: Sequence[str], *, null: bool = False) -> Stored:
    """Suffix -> what is stored of each text."""
    resolved = encoder.resolved
    stored: dict[str, dict[int, torch.Tensor]] = {o.suffix: {} for o in resolved.outputs}
    batches = list(resolved.batches(resolved.opened.tokenizer.encode(texts), null=null))
    for batch, pending in zip(batches, encoder.submit_all(batches), strict=True):
        for suffix, values in pending.wait().items():
            stored[suffix].update((row, values[i]) for i, row in enumerate(batch.rows.tolist()))
    return {s: [by_row[row] for row in range(len(texts))] for s, by_row in stored.items()}
