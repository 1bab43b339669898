"""Small datasets without any encoder: an embedding is a function of its text. And forged ones."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from embed_precompute.encoders.tokenizer import Tokenized
from embed_precompute.job.units import Unit
from embed_precompute.job.writer import UnitWriter
from embed_precompute.samples import Sample, Status
from embed_precompute.store.commit import digest_file, publish_bytes, publish_bytes_by_content
from embed_precompute.store.index import Manifest
from embed_precompute.store.manifest import finalize
from embed_precompute.store.plan import InputFile, Inputs, Plan, read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    ROWS,
    NullRecord,
    UnitRecord,
    document_bytes,
    read_json,
    read_record,
    record_path,
    unit_path,
)
from embed_precompute.store.rows import SampleColumns, StoredSample, read_samples, rows_part_bytes

DIMS = {"clip": 3, "t5": 4}
ENVIRONMENT = {"torch": "2.0", "device": "cpu"}


def embedding(name: str, text: str, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """What `name` gives for `text`: clip [3]; t5 [words + 1, 4]."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {text}".encode()))
    shape = (DIMS["clip"],) if name == "clip" else (len(text.split()) + 1, DIMS["t5"])
    return torch.randn(shape, generator=generator).to(dtype)


def output(per: str, width: int, positions: str | None) -> dict[str, Any]:
    """An output of an encoder, as a spec lists it."""
    return {"suffix": "", "per": per, "width": width, "positions": positions}


def make_plan(
    num_rows: int,
    samples_per_shard: int,
    num_samples: int | None = None,
    *,
    text_column: str | tuple[str, ...] = "text",
    **captions: Any,
) -> Plan:
    """A plan over one input file; `captions` goes into the spec."""
    spec = {
        "format_version": 1,
        "captions": {"recipe": {"kind": "none"}, "normalize": [], **captions},
        "encoders": {
            "clip": {"kind": "clip", "outputs": [output("caption", DIMS["clip"], None)]},
            "t5": {"kind": "t5", "outputs": [output("token", DIMS["t5"], "real")]},
        },
        "output": {"dtype": "bfloat16", "codec": "raw"},
    }
    file = InputFile("a.parquet", 1, num_rows, footer_sha256="0" * 64, content_xxh3="0" * 32)
    return Plan.make(
        spec,
        Inputs((file,), text_column=text_column, id_column="id"),
        samples_per_shard=samples_per_shard,
        num_rows=num_rows,
        num_samples=num_rows if num_samples is None else num_samples,
    )


def write_plan(root: Path, plan: Plan) -> None:
    publish_bytes(root / "plan.json", document_bytes(plan))


def words_as_tokens(texts: Sequence[str]) -> Tokenized:
    """A token for each word and one for the end; texts over 40 characters count as truncated."""
    counts = [len(text.split()) + 1 for text in texts]
    zeros = [0] * len(texts)
    ids = [np.zeros(count, np.int32) for count in counts]
    return Tokenized(ids, counts, zeros, counts, counts, [len(t) > 40 for t in texts], zeros, zeros)


def write_unit(
    root: Path,
    plan: Plan,
    number: int,
    samples: Sequence[Sample],
    environment: dict[str, str] = ENVIRONMENT,
) -> UnitRecord | NullRecord:
    """Commit unit `number` (or NULL_UNIT) with these samples; a text of "nan" is not finite."""
    row_of: dict[str, int] = {}
    stored = [None if s.text is None else row_of.setdefault(s.text, len(row_of)) for s in samples]
    texts = list(row_of)
    captions = words_as_tokens(texts)
    tokens = dict.fromkeys(DIMS, captions)
    lengths = {n: [1] * len(texts) if n == "clip" else captions.num_ids for n in DIMS}
    first_row, num_rows = (0, 0) if number == NULL_UNIT else plan.unit_rows(number)
    unit = Unit(number, first_row, num_rows, list(samples), stored, tokens, lengths)
    with UnitWriter(root, plan, unit, environment) as writer:
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


def write_samples(root: Path, plan: Plan, *units: Sequence[Sample]) -> None:
    """Plan, null embedding and the first units, with these samples.

    As in a run, units that have a record stay as they are.
    """
    write_plan(root, plan)
    for number, samples in enumerate([[Sample("", 0, "")], *units], NULL_UNIT):
        if not record_path(root, number).exists():
            write_unit(root, plan, number, samples)


def write_units(
    root: Path, texts: Sequence[str | None], samples_per_shard: int = 3, first: int = 0, **spec: Any
) -> Plan:
    """Plan, null embedding and every unit of a dataset that is not finalised; ids from s`first`."""
    plan = make_plan(len(texts), samples_per_shard, **spec)
    samples = [
        dataclasses.replace(sample, sample_id=f"s{first + sample.row}")
        for sample in samples_of(texts)
    ]
    units = [plan.unit_rows(unit) for unit in range(plan.num_units)]
    write_samples(root, plan, *(samples[begin : begin + count] for begin, count in units))
    return plan


def write_dataset(
    root: Path, texts: Sequence[str | None], samples_per_shard: int = 3, first: int = 0, **spec: Any
) -> Manifest:
    """A finalised dataset; gives its manifest."""
    write_units(root, texts, samples_per_shard, first, **spec)
    return finalize(root).manifest


# --- files, and files changed by one who makes the digests right ----------------------------------


class Paths(NamedTuple):
    shard: Path
    rows: Path
    record: Path


def paths_of(root: Path, unit: int) -> Paths:
    """The files of a committed unit."""
    record = read_record(root, unit)
    return Paths(record.shard_path(root), record.rows_path(root), record_path(root, unit))


def rewrite_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes a document, and makes its digest right."""
    content = read_json(path)
    change(content)
    path.write_bytes(document_bytes(content))


def restate(root: Path, unit: int, kind: str, path: Path) -> Path:
    """Makes a unit's record name what its `shard` or `rows` file at `path` holds now, and gives the
    file its content name."""
    ending = "".join(path.suffixes)
    stored = publish_bytes_by_content(unit_path(root, unit, ending), path.read_bytes())
    entry = {"name": stored.name, "bytes": stored.bytes, "sha256": stored.sha256}
    rewrite_json(record_path(root, unit), lambda record: record["files"].update({kind: entry}))
    return path.with_name(stored.name)


def columns_of(samples: Sequence[StoredSample]) -> SampleColumns:
    def by_name(field: str) -> dict[str, list[Any]]:
        names = {name for sample in samples for name in getattr(sample, field)}
        return {name: [getattr(sample, field).get(name) for sample in samples] for name in names}

    columns: dict[str, Any] = {
        name: [getattr(sample, name) for sample in samples]
        for name in ("sample_id", "row", "status", "error", "index", "text")
    }
    return SampleColumns(**columns, **{f: by_name(f) for f in ("tokens", "truncated", "lengths")})


def forge_rows(
    root: Path, unit: int, change: Callable[[list[StoredSample]], list[StoredSample]]
) -> None:
    """Changes a unit's rows part; its record names it, and says of its rows what it said before."""
    tensors = read_plan(root).tensors
    path = paths_of(root, unit).rows
    samples = change(list(read_samples(path, tensors)))
    forged = unit_path(root, unit, ROWS)
    forged.write_bytes(rows_part_bytes(unit, tensors, columns_of(samples)))
    restate(root, unit, "rows", forged)
    forged.unlink()
    path.unlink(missing_ok=True)


def restate_derived(root: Path, name: str) -> None:
    """Puts the present size and digest of file `name` into manifest.json."""
    stored = digest_file(root / name)
    entry = {"bytes": stored.bytes, "sha256": stored.sha256}
    rewrite_json(root / "manifest.json", lambda manifest: manifest["files"].update({name: entry}))


def files_of(root: Path) -> list[str]:
    """Every file of a dataset, by relative path."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def open_below(folder: Path) -> list[str]:
    """The files below a folder that this process has open."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return [link for link in links if link.startswith(f"{folder}/")]


def leftovers(folder: Path) -> list[str]:
    """Temporary files."""
    return [path.name for path in folder.rglob(".tmp-*")]
