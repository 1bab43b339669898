"""Small finished datasets without any encoder: an embedding is a function of its text."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embed_precompute.documents import digest_of
from embed_precompute.job.units import EncodedTokens, Unit
from embed_precompute.job.writer import UnitWriter
from embed_precompute.samples import Sample, Status
from embed_precompute.store.manifest import finalize
from embed_precompute.store.plan import Inputs, Plan
from embed_precompute.store.records import NULL_UNIT

DIMS = {"clip": 3, "t5": 4}
ENVIRONMENT = {"torch": "2.0", "device": "cpu"}


def embedding(name: str, text: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What `name` gives for `text`: clip [3]; t5 [words + 1, 4]."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {text}".encode()))
    shape = (DIMS["clip"],) if name == "clip" else (len(text.split()) + 1, DIMS["t5"])
    return torch.randn(shape, generator=generator).to(dtype)


def make_plan(
    num_rows: int, samples_per_shard: int, num_samples: int | None = None, **captions: Any
) -> Plan:
    """A plan over one input file; `captions` goes into the spec."""
    spec = {
        "format_version": 1,
        "captions": {"recipe": {"kind": "none"}, "normalize": [], **captions},
        "encoders": {
            name: {"kind": name, "pooled": name == "clip", "dim": dim} for name, dim in DIMS.items()
        },
        "output": {"dtype": "bfloat16", "codec": "raw"},
    }
    file = {"path": "a.parquet", "bytes": 1, "rows": num_rows, "footer_sha256": "0" * 64}
    file["content_xxh3"] = "0" * 32
    return Plan(
        fingerprint=digest_of(spec),
        spec=spec,
        inputs=Inputs(files=(file,), text_column="text", id_column="id"),
        num_rows=num_rows,
        num_samples=num_rows if num_samples is None else num_samples,
        last_row_samples=None,
        samples_per_shard=samples_per_shard,
        rows_per_unit=samples_per_shard,
    )


def write_plan(root: Path, plan: Plan) -> None:
    from embed_precompute.store.commit import publish_bytes
    from embed_precompute.store.sealed import seal

    publish_bytes(root / "plan.json", seal(plan.to_json()))


def write_unit(root: Path, plan: Plan, number: int, samples: Sequence[Sample]) -> dict[str, Any]:
    """Commit unit `number` (or NULL_UNIT) with these samples; a text of "nan" is not finite."""
    row_of: dict[str, int] = {}
    stored = [None if s.text is None else row_of.setdefault(s.text, len(row_of)) for s in samples]
    texts = list(row_of)
    tokens = {}
    for name in DIMS:
        ids = [np.zeros(len(text.split()) + 1, np.int32) for text in texts]
        lengths = [1 if name == "clip" else len(row) for row in ids]
        tokens[name] = EncodedTokens(ids, lengths, [len(text) > 40 for text in texts])
    first_row, num_rows = (0, 0) if number == NULL_UNIT else plan.unit_rows(number)
    unit = Unit(number, first_row, num_rows, list(samples), stored, tokens)
    with UnitWriter(root, plan, unit, ENVIRONMENT) as writer:
        for name in DIMS:
            for row, text in enumerate(texts):
                values = embedding(name, text)
                values = values * torch.nan if text == "nan" else values
                writer.write(name, np.array([row]), values[None])
        return writer.commit()


def write_null(root: Path, plan: Plan) -> None:
    write_unit(root, plan, NULL_UNIT, [Sample("", 0, "")])


def samples_of(texts: Sequence[str | None], first: int = 0) -> list[Sample]:
    """One sample per text; None is a null caption. Ids are `s0`, `s1`, ..."""
    return [
        Sample(f"s{row}", row, text)
        if text is not None
        else Sample(f"s{row}", row, None, Status.NULL_TEXT, "text is null")
        for row, text in enumerate(texts, first)
    ]


def write_units(
    root: Path, texts: Sequence[str | None], samples_per_shard: int = 3, first: int = 0, **spec: Any
) -> Plan:
    """Plan, null embedding and every unit of a dataset that is not finalised; ids from s`first`."""
    plan = make_plan(len(texts), samples_per_shard, **spec)
    write_plan(root, plan)
    write_null(root, plan)
    for unit in range(plan.num_units):
        begin, count = plan.unit_rows(unit)
        samples = [
            Sample(f"s{first + begin + i}", s.row, s.text, s.status, s.error)
            for i, s in enumerate(samples_of(texts[begin : begin + count], begin))
        ]
        write_unit(root, plan, unit, samples)
    return plan


def write_dataset(
    root: Path, texts: Sequence[str | None], samples_per_shard: int = 3, first: int = 0, **spec: Any
) -> dict[str, Any]:
    """A finalised dataset; gives the content of manifest.json."""
    write_units(root, texts, samples_per_shard, first, **spec)
    return finalize(root)
