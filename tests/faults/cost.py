"""What digests, checksums, fsync and records add, against the time a base-size encoder takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import yaml
from handmade import ENVIRONMENT, make_plan, output, samples_of
from jobs import clean_environment, write_captions
from transformers import T5Config, T5EncoderModel

from embed_precompute.encoders.tokenizer import Tokenized
from embed_precompute.job.units import Unit
from embed_precompute.job.writer import UnitWriter
from embed_precompute.store.plan import Plan
from faults.lab import Finding, Lab
from faults.unprotected import unprotected
from make_demo import write_t5

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
        with nullcontext() if protected else unprotected():
            return _write_units(root, units, records=protected)
    finally:
        shutil.rmtree(root)


def _write_units(root: Path, units: int, *, records: bool) -> float:
    plan = make_plan(units * ROWS, ROWS)
    spec = {**plan.spec, "encoders": {"t5": {"outputs": [output("token", DIM, "all")]}}}
    sizes = {"samples_per_shard": ROWS, "num_rows": units * ROWS, "num_samples": units * ROWS}
    plan = Plan.make(spec, plan.inputs, **sizes)
    texts = [f"caption {i}" for i in range(ROWS)]
    values = torch.randn(8, TOKENS, DIM).to(torch.bfloat16)
    ids = [np.zeros(TOKENS, np.int32) for _ in texts]
    counts, zeros = [TOKENS] * ROWS, [0] * ROWS
    tokens = Tokenized(ids, counts, zeros, counts, counts, [False] * ROWS, zeros)
    began = time.monotonic()
    for number in range(units):
        samples = samples_of(texts, number * ROWS)
        rows = list(range(ROWS))
        first_row, lengths = number * ROWS, {"t5": counts}
        unit = Unit(number, first_row, ROWS, samples, rows, {"t5": tokens}, lengths)
        with UnitWriter(root, plan, unit, ENVIRONMENT) as writer:
            for first in range(0, ROWS, 8):
                writer.write("t5", np.arange(first, first + 8), values)
            if records:
                writer.commit()
            else:
                writer._shard.publish()
    return time.monotonic() - began


def cost_run_ram(lab: Lab) -> list[Finding]:
    """A whole run onto a RAM disk, with and without."""
    return _runs(lab, "RAM disk", ram=True)


def cost_run_disk(lab: Lab) -> list[Finding]:
    """A whole run onto a disk, with and without."""
    return _runs(lab, "disk", ram=False)


def _runs(lab: Lab, where: str, *, ram: bool) -> list[Finding]:
    """The same run twice, of T5-base with random weights: minutes, so in the long form only."""
    if not lab.long:
        return []
    captions = (2 << 30) // (TOKENS * DIM * 2) + 1
    plain = _run(lab, captions, ram, "faults.unprotected")
    whole = _run(lab, captions, ram, "embed_precompute")
    share = (whole - plain) / plain
    return [
        Finding(
            "cost", f"a run of T5-base in {_dtype()} that writes "
            f"{captions * TOKENS * DIM * 2 / 1e9:.2f} GB to a {where}, with and without digests, "
            "checksums and fsync", "at most 5 % of the wall time of a base-size encoder's run",
            f"{whole:.1f} s, {plain:.1f} s without: {share:+.2%} ({captions} captions)",
            share <= SHARE,
        )
    ]  # fmt: skip


def _dtype() -> str:
    """bfloat16 where the processor multiplies it."""
    flags = Path("/proc/cpuinfo").read_text().split()
    return "bfloat16" if {"amx_bf16", "avx512_bf16"} & set(flags) else "float32"


def _run(lab: Lab, captions: int, ram: bool, module: str) -> float:
    """Seconds of `run` by `module`, from its start to its end."""
    folder, out = lab.new("cost-run"), lab.new("cost-out", ram=ram)
    texts = [f"a long caption of scene {i}, " + "with many people, " * 40 for i in range(captions)]
    sizes = {"width": DIM, "layers": 12, "heads": 12, "feed_forward": 2048, "dtype": _dtype()}
    model = write_t5(folder / "t5", texts[:200], **sizes)  # type: ignore[arg-type]
    config = {
        "captions": {"path": str(write_captions(folder / "captions.parquet", texts, 1000))},
        "encoders": {
            "t5": {
                "kind": "t5",
                "pretrained": str(model),
                "max_length": TOKENS,
                "dtype": _dtype(),
                "batch_tokens": 8 * TOKENS,
            }
        },
        "output": {"path": str(out / "dataset"), "dtype": "bfloat16"},
        "runtime": {"device": "cpu"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    env = clean_environment({"OMP_NUM_THREADS": str(os.cpu_count() or 1)})
    env["PYTHONPATH"] = os.pathsep.join([*sys.path, env["PYTHONPATH"]])
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", module, "run", str(path)], env=env, capture_output=True, text=True
    )
    spent = time.monotonic() - began
    stored = sum(shard.stat().st_size for shard in out.rglob("*.safetensors"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert stored > captions * TOKENS * DIM * 2
    shutil.rmtree(folder)
    shutil.rmtree(out)
    return spent
