"""F14: samples that fail are recorded and bounded; an encoder that raises loses nothing."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.lab import TEXTS, Lab
from handmade import paths_of
from jobs import call, edit, expect, write_captions, write_job
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from embed_precompute import EmbeddingDataset
from embed_precompute.encoders.encoder import TextEncoder
from embed_precompute.job.writer import UnitWriter
from embed_precompute.store.plan import read_plan
from embed_precompute.store.rows import read_samples

ROWS = 30
FAILING = [f"Zq {i}" for i in range(8)]
FINE = [f"scene {i}" for i in range(32)]


def spoil(patch: pytest.MonkeyPatch, texts: list[str]) -> None:
    """What the encoders give for `texts` is not finite."""
    original = UnitWriter.write

    def write(self: Any, name: str, rows: Any, values: Any, *more: Any) -> None:
        unit = self._unit
        bad = {row for row, s in zip(unit.stored_row, unit.samples, strict=True) if s.text in texts}
        each = zip(rows.tolist(), values, strict=False)
        original(self, name, rows, [v * torch.nan if row in bad else v for row, v in each], *more)

    patch.setattr(UnitWriter, "write", write)


@pytest.mark.parametrize("implementation", ["fused", "hf"])
def test_f14_a_failed_sample_has_a_status_and_its_neighbours_their_bytes(
    implementation: str, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lab.job(ROWS)
    for encoder in ("t5", "clip"):
        edit(job.path, f"encoders.{encoder}", implementation=implementation)
    with monkeypatch.context() as patch:
        spoil(patch, [TEXTS[3], TEXTS[14]])
        said = expect(6, "run", job.path)
    line = (
        f"  2 samples failed, first 's3', captions-{ROWS}.parquet, row 3 (row 3 of the dataset): "
        f"text_clip holds inf or nan. `embed-precompute repair {job.root} --failed` opens"
    )
    assert line in said
    assert "2 samples failed" in (job.root / "logs" / "rank-00000.log").read_text()
    counts = json.loads((job.root / "manifest.json").read_text())["counts"]["status"]
    assert {label: n for label, n in counts.items() if n} == {"ok": ROWS - 2, "non_finite": 2}
    tensors = read_plan(job.root).tensors
    units = range(job.num_units - 1)
    samples = [s for u in units for s in read_samples(paths_of(job.root, u).rows, tensors)]
    failed = [s for s in samples if s.status.label == "non_finite"]
    assert [(s.sample_id, s.error) for s in failed] == [
        (sample_id, "text_clip holds inf or nan") for sample_id in ("s3", "s14")
    ]
    with pytest.raises(KeyError, match="non_finite"):
        EmbeddingDataset(job.root).index_of("s3")
    expect(0, "verify", job.root, "--level", "deep", "--sample", ROWS)
    assert "2 samples failed, first 's3'" in expect(6, "finalize", job.root)
    expect(6, "run", job.path)  # a rerun does not help
    expect(6, "status", job.root)
    expect(5, "repair", job.root, "--failed")
    expect(0, "run", job.path)
    expect(0, "status", job.root)
    if implementation == "fused":
        job.assert_undisturbed()


def test_f14_too_many_failed_samples_stop_the_run(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lab.job(ROWS)
    with monkeypatch.context() as patch:
        spoil(patch, TEXTS[6:9])
        said = expect(5, "run", job.path, "--runtime.max_failed_samples", "2")
    assert "3 samples failed, more than runtime.max_failed_samples (2)" in said
    assert "sample 's6', row 6" in said
    assert not (job.root / "manifest.json").exists()
    job.assert_nothing_left()
    job.assert_resumes()


def test_f14_a_rerun_does_not_lift_the_limit(tiny_t5: Path, tmp_path: Path) -> None:
    """One token of `FAILING`, and of no `FINE` text, is not a number in these weights."""
    broken = shutil.copytree(tiny_t5, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(broken)
    used = {i for text in ["", *FINE] for i in tokenizer(text).input_ids} | {tokenizer.pad_token_id}
    rare = set.intersection(*(set(tokenizer(text).input_ids) for text in FAILING)) - used
    weights["shared.weight"][min(rare)] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    texts = [text for i in range(8) for text in (FAILING[i], *FINE[4 * i : 4 * i + 4])]
    captions = write_captions(tmp_path / "captions.parquet", texts)
    job = write_job(tmp_path, captions, broken, None)
    for _ in range(3):  # what failed before counts
        said = expect(5, "run", job, "--runtime.max_failed_samples", "4")
        assert "max_failed_samples" in said
    code, out, said = call("run", str(job))
    assert code == 6, said
    assert "non_finite 8" in out
    dataset = EmbeddingDataset(tmp_path / "out", verify="rows")
    assert len(dataset) == 32
    assert all(torch.isfinite(sample["text_t5"]).all() for sample in dataset)


@pytest.mark.parametrize("error", [MemoryError, RuntimeError])
@pytest.mark.parametrize("implementation", ["fused", "hf"])
def test_f14_an_encoder_that_raises(
    implementation: str, error: type[Exception], lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It blames no sample; there is no index over partial data, and the next run goes on."""
    job = lab.job(ROWS)
    edit(job.path, "encoders.clip", implementation=implementation)
    original, count = TextEncoder.submit, [0]

    def submit(self: Any, batch: Any) -> Any:
        count[0] += 1
        if count[0] > 20:
            raise error("the device is gone")
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "submit", submit)
        said = expect(1, "run", job.path)
    assert re.search("unit [0-9]+, encoder (t5|clip): a forward failed", said)
    assert "the device is gone" in said
    assert "Traceback" in said
    assert job.records()
    assert not (job.root / "manifest.json").exists()
    job.assert_nothing_left()
    expect(0, "run", job.path)
    if implementation == "fused":
        job.assert_undisturbed()
