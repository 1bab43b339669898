"""Outputs on their way from a device: with a device that finishes a copy as late as it may."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from jobs import call, dataset_bytes, edit, write_captions, write_job

from embed_precompute.encoders import encoder as encoder_module
from embed_precompute.encoders.encoder import FusedEncoder, download
from embed_precompute.job.stages import IN_FLIGHT, overlapped

SLOTS = 1
"""Encoded batches that may wait for the writer if `runtime.write_queue_mb` is 0."""


class LateEngine:
    """Copies when it is waited for and not before; its host memory is counted, and overwritten when
    the last view of it is gone."""

    def __init__(self) -> None:
        self.live = self.most_live = 0
        self.flying: list[LateCopy] = []
        self.most_flying = 0
        self.num_waits = 0
        self.fails_at: int | None = None

    def host_buffer(self, like: torch.Tensor) -> torch.Tensor:
        buffer = np.empty(like.numel() * like.element_size(), np.uint8)
        self.live += 1
        self.most_live = max(self.most_live, self.live)
        lent = buffer[:]
        weakref.finalize(lent, self._returned, buffer)
        return torch.from_numpy(lent).view(like.dtype).view(like.shape)

    def _returned(self, buffer: np.ndarray) -> None:
        buffer[:] = 0xFF  # NaN in every dtype: nobody may look at it any more
        self.live -= 1

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> LateCopy:
        copy = LateCopy(self, source, target)
        self.flying.append(copy)
        self.most_flying = max(self.most_flying, len(self.flying))
        return copy


class LateCopy:
    def __init__(self, engine: Any, source: torch.Tensor, target: torch.Tensor) -> None:
        self._engine, self._source, self._target = engine, source, target

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        self._engine.num_waits += 1
        if self._engine.num_waits == self._engine.fails_at:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        assert self._engine.flying[0] is self, "waited for out of order"
        self._engine.flying.pop(0)
        with torch.inference_mode():
            self._target.copy_(self._source)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    late = LateEngine()
    monkeypatch.setattr(encoder_module, "copy_engine", lambda device: late)
    return late


def test_on_a_cpu_nothing_is_copied_and_nothing_waits() -> None:
    output = torch.ones(4, 2)
    pending, again = (
        download({"": output}, torch.float32, None, lambda suffix, values: values, reused=reused)
        for reused in (False, True)
    )
    assert pending.ready()
    assert pending.wait()[""] is output
    assert again.wait()[""] is not output


@pytest.mark.parametrize(
    ("ready", "begun_at_each"),
    [
        (lambda number: True, [1, 2, 3, 4, 5]),  # a CPU: each is handed on at once
        (lambda number: False, [2, 3, 4, 5, 5]),
        (lambda number: number == 1, [2, 2, 4, 5, 5]),
    ],
)
def test_the_next_is_begun_before_one_is_waited_for(
    ready: Callable[[int], bool], begun_at_each: list[int]
) -> None:
    begun: list[int] = []

    def forwards() -> Iterator[tuple[int, Any]]:
        for number in range(5):
            begun.append(number)
            yield number, SimpleNamespace(ready=partial(ready, number))

    seen = [(number, len(begun)) for number, _ in overlapped(forwards())]
    assert seen == list(enumerate(begun_at_each))


def test_all_are_handed_on_while_the_next_is_waited_for() -> None:
    never = SimpleNamespace(ready=lambda: False)
    forwards: list[Any] = [(0, never), None, (1, never), (2, never), None]
    begun: list[Any] = []
    seen = [(n, len(begun)) for n, _ in overlapped(begun.append(f) or f for f in forwards)]
    assert seen == [(0, 2), (1, 4), (2, 5)]


@pytest.fixture
def job(tmp_path: Path, tiny_t5: Path, tiny_clip: Path, corpus: list[str]) -> Path:
    captions = write_captions(tmp_path / "captions.parquet", ["", *corpus[:60]])
    return write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=40)


@pytest.mark.parametrize(
    ("implementation", "weights"), [("fused", "resident"), ("fused", "stream"), ("hf", "resident")]
)
def test_a_job_with_late_copies_gives_the_same_bytes(
    job: Path, tmp_path: Path, engine: Any, implementation: str, weights: str
) -> None:
    streams = {"stream_tokens": 96} if implementation == "fused" else {}
    edit(job, "encoders.t5", implementation=implementation, attention_mask="padding", **streams)
    edit(job, "encoders.clip", implementation=implementation, **streams)
    edit(job, "runtime", write_queue_mb=0.0, weights=weights)
    code, _, said = call("run", str(job))
    assert code == 0, said
    late = dataset_bytes(tmp_path / "out")
    # The fused layers had written their outputs again when these were copied at last.
    # Of each forward the embeddings, and whether they are finite.
    assert engine.most_flying == 2 * IN_FLIGHT
    assert engine.live == 0
    # On their way, in the queue, with the writer, and one each on either side of the queue.
    assert engine.most_live <= 2 * (IN_FLIGHT + SLOTS + 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder_module, "copy_engine", lambda device: None)
        assert call("run", str(job), "--output.path", str(tmp_path / "again"))[0] == 0
    assert dataset_bytes(tmp_path / "again") == late


def test_what_fails_on_the_way_is_no_samples_fault(job: Path, engine: Any) -> None:
    engine.fails_at = 4  # the encoders' first forwards are two
    code, _, said = call("run", str(job))
    assert code == 1
    assert "illegal memory access" in said


def test_the_device_finds_what_is_not_finite(
    job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of each encoder's first batch is nan: the job ends as if the host had looked."""
    real = FusedEncoder.forward

    def forward(self: Any, batch: Any) -> Any:
        outputs = real(self, batch)
        if len(batch.rows) > 2:
            per_token = self.resolved.outputs[0].per == "token"
            row = int(batch.starts[2]) if per_token else 2
            outputs[""].reshape(-1, outputs[""].shape[-1])[row] = torch.nan
        return outputs

    monkeypatch.setattr(FusedEncoder, "forward", forward)
    edit(job, "encoders.t5", attention_mask="padding", stream_tokens=96)
    said = []
    for name, engine in (("host", None), ("device", LateEngine())):
        monkeypatch.setattr(encoder_module, "copy_engine", lambda device, engine=engine: engine)
        code, _, _ = call("run", str(job), "--output.path", str(tmp_path / name))
        assert code == 6
        said.append(dataset_bytes(tmp_path / name))
    assert said[0] == said[1]
