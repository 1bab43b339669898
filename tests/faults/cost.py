"""What digests, checksums, fsync and records add, against the time a base-size encoder takes."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from handmade import ENVIRONMENT, make_plan, samples_of
from transformers import T5Config, T5EncoderModel

from embed_precompute.units import EncodedTokens, Unit, UnitWriter
from faults.lab import Finding, Lab

DIM, TOKENS, ROWS = 768, 512, 64
SHARE = 0.05


def cost_integrity(lab: Lab) -> list[Finding]:
    """Units of T5-base vectors written with and without what protects them."""
    target = lab.size(1 << 27, 2 << 30)
    units = max(1, target // (ROWS * TOKENS * DIM * 2))
    caption_s = _caption_seconds(lab.size(1, 4))
    encoding = units * ROWS * caption_s
    findings = []
    for where, ram in (("RAM disk", True), ("disk", False)):
        plain = min(_write(lab, units, ram, protected=False) for _ in range(lab.size(1, 3)))
        whole = min(_write(lab, units, ram, protected=True) for _ in range(lab.size(1, 3)))
        gigabytes = units * ROWS * TOKENS * DIM * 2 / 1e9
        limit = SHARE * units * ROWS / max(1e-9, whole - plain)
        share = (whole - plain) / (encoding + plain)
        findings.append(
            Finding(
                "cost", f"digests, checksums, fsync and records of {gigabytes:.2f} GB on {where}",
                "at most 5 % of the wall time of a base-size encoder's run",
                f"{whole:.2f} s, {plain:.2f} s without: {(whole - plain) / gigabytes:.2f} s per GB "
                f"added, {share:.2%} of a run where T5-base takes {caption_s:.2f} s a caption "
                f"(this CPU); 5 % is kept up to {limit:,.0f} "
                "captions/s even if nothing overlaps",
                share <= SHARE,
            )
        )  # fmt: skip
    return findings


def _caption_seconds(count: int) -> float:
    """What the encoder of T5-base takes for a caption of 512 tokens, random weights."""
    sizes = {"d_model": DIM, "d_ff": 3072, "d_kv": 64, "num_heads": 12, "num_layers": 12}
    model = T5EncoderModel(T5Config(vocab_size=1000, **sizes)).eval()
    ids = torch.ones(1, TOKENS, dtype=torch.long)
    with torch.inference_mode():
        model(ids)
        began = time.monotonic()
        for _ in range(count):
            model(ids)
    return (time.monotonic() - began) / count


def _write(lab: Lab, units: int, ram: bool, *, protected: bool) -> float:
    root = lab.new("cost", ram=ram)
    try:
        with _unprotected() if not protected else _nothing():
            return _write_units(root, units, records=protected)
    finally:
        shutil.rmtree(root)


def _write_units(root: Path, units: int, *, records: bool) -> float:
    plan = make_plan(units * ROWS, ROWS)
    plan.spec["encoders"] = {"t5": {"kind": "t5", "pooled": False, "dim": DIM}}
    texts = [f"caption {i}" for i in range(ROWS)]
    values = torch.randn(8, TOKENS, DIM).to(torch.bfloat16)
    ids = [np.zeros(TOKENS, np.int32) for _ in texts]
    tokens = EncodedTokens(ids, [TOKENS] * ROWS, [False] * ROWS)
    began = time.monotonic()
    for number in range(units):
        samples = samples_of(texts, number * ROWS)
        unit = Unit(number, number * ROWS, ROWS, samples, list(range(ROWS)), {"t5": tokens})
        with UnitWriter(root, plan, unit, ENVIRONMENT) as writer:
            for first in range(0, ROWS, 8):
                writer.write("t5", np.arange(first, first + 8), values)
            if records:
                writer.commit()
            else:
                writer._shard.finish()
                writer._shard.publish()
    return time.monotonic() - began


class _NoDigest:
    def update(self, payload: Any) -> None:
        return

    def hexdigest(self) -> str:
        return "0" * 64

    def digest(self) -> bytes:
        return bytes(32)


@contextmanager
def _unprotected() -> Iterator[None]:
    """No sha256, no row checksums, no fsync."""
    real = hashlib.sha256, xxhash.xxh3_64_intdigest, os.fsync
    hashlib.sha256 = lambda *_: _NoDigest()  # type: ignore[assignment]
    xxhash.xxh3_64_intdigest = lambda *_: 0
    os.fsync = lambda fd: None
    try:
        yield
    finally:
        hashlib.sha256, xxhash.xxh3_64_intdigest, os.fsync = real  # type: ignore[misc]


@contextmanager
def _nothing() -> Iterator[None]:
    yield
