"""F23: streamed weights. A run that is killed, stopped or fails in the middle of a window leaves no
part of the unit; the next run ends with the bytes of resident weights."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from typing import Any

import pytest
from faults.lab import Job, Lab
from faults.processes import wait_for
from jobs import expect

from embed_precompute.encoders.fused.layers import T5Layers
from embed_precompute.job.stages import Stages
from embed_precompute.job.writer import UnitWriter
from embed_precompute.store.records import committed_units

BEFORE, OF_UNIT = 4, 6
"""Calls of a T5 layer: two for the one shape and two for the null embedding; then for each unit
three token batches in two layers, which are one window."""
MIDDLE = BEFORE + OF_UNIT + 4
"""In the second layer of the second unit."""


@pytest.fixture
def job(lab: Lab) -> Job:
    """Of three units."""
    return lab.job(30, per_shard=10, weights="stream")


@pytest.fixture
def calls(job: Job, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with each call of a T5 layer in this process."""
    real, numbers = T5Layers.layer, list[int]()

    def layer(self: T5Layers, number: int, state: Any) -> None:
        numbers.append(number)
        real(self, number, state)

    monkeypatch.setattr(T5Layers, "layer", layer)
    return numbers


def test_f23_killed_in_the_middle_of_a_window(lab: Lab, job: Job, calls: list[int]) -> None:
    job.assert_resumes()
    assert calls == [0, 1] * 2 + [0, 0, 0, 1, 1, 1] * 3
    for n in lab.sample(range(BEFORE + 1, len(calls) + 1), 2):
        killed = lab.job(30, per_shard=10, weights="stream")
        code, said = killed.execute(("die_in_layer", {"n": n}))
        assert code == -signal.SIGKILL, said
        assert len(committed_units(killed.root)) <= (n - BEFORE - 1) // OF_UNIT
        killed.assert_resumes()


def test_f23_asked_to_stop_in_the_middle_of_a_window(
    job: Job, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """The window is left at its next batch, if the unit does not fit the grace."""
    real = Stages._goes_on

    def goes_on(self: Stages, *given: Any) -> bool:
        if len(calls) == MIDDLE:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(self._stop.is_set)
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(Stages, "_goes_on", goes_on)
        patch.setattr(Stages, "_fits_grace", lambda self, began: False)
        assert "signal SIGTERM" in expect(75, "run", job.path)
    assert len(calls) == MIDDLE, "no other batch was begun"
    assert len(committed_units(job.root)) == 1
    job.assert_nothing_left()
    job.assert_resumes()


def test_f23_the_writer_fails_in_the_middle_of_a_window(
    job: Job, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """The encoder does not go on for minutes with what nobody will write."""
    reached, commit, real = threading.Event(), UnitWriter.commit, Stages._goes_on

    def failing(self: UnitWriter) -> Any:
        if self._unit.is_null:
            return commit(self)
        assert reached.wait(60)
        raise OSError(5, "Input/output error")

    def goes_on(self: Stages, *given: Any) -> bool:
        if len(calls) == MIDDLE:
            reached.set()
            assert self._halted.wait(60)
        return real(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(UnitWriter, "commit", failing)
        patch.setattr(Stages, "_goes_on", goes_on)
        expect(74, "run", job.path)
    assert len(calls) == MIDDLE
    job.assert_resumes()


def test_f23_a_peer_commits_the_unit_in_the_middle_of_a_window(
    job: Job, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """In the sweep two ranks may compute one unit: the slower one leaves it and goes on."""
    left = itertools.count()
    monkeypatch.setattr(Stages, "_is_done", lambda self, unit: unit.number == 1 and next(left) == 2)
    expect(5, "run", job.path)
    assert committed_units(job.root) == {0, 2}
    monkeypatch.undo()
    job.assert_resumes()
