"""TensorBoard, or Weights & Biases: the figures of a run as curves.

Guarantees: a tracker that fails stops no job; there is one warning. The step of a point is the
number of captions that are committed, which a crash does not take back: the curve of a job that was
resumed goes on where it stopped.

accelerate's trackers do the same, but ask for its process state, which under torchrun begins a
process group: a job of ours has none, and its ranks end when they like.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from embed_precompute.errors import InputError, one_line
from embed_precompute.steps import Work
from embed_precompute.store.plan import Plan

log = logging.getLogger(__name__)
Kind = Literal["none", "tensorboard", "wandb"]
Put = Callable[[Mapping[str, float], int], None]


def check_tracker(kind: Kind) -> None:
    """Raise InputError unless the package of a tracker is installed."""
    if kind != "none" and importlib.util.find_spec(kind) is None:
        raise InputError(
            f"runtime.tracker is {kind}, and the package {kind} is not installed. "
            f"`pip install {kind}`, or set runtime.tracker none."
        )


class Tracker:
    """Takes the figures of one run. `close` it at the end."""

    def __init__(self, kind: Kind, root: Path, plan: Plan) -> None:
        self._kind = kind
        self._put: Put | None = None
        self._close: Callable[[], None] = lambda: None
        with self._tolerant(), Work(f"starting {kind}"):
            if kind == "tensorboard":
                self._put, self._close = _tensorboard(root)
            elif kind == "wandb":
                self._put, self._close = _wandb(root, plan)

    def put(self, figures: Mapping[str, float], committed: int) -> None:
        """Adds a point to each curve, at so many committed captions."""
        with self._tolerant():
            if self._put is not None:
                self._put(figures, committed)

    def close(self) -> None:
        with self._tolerant(), Work(f"ending {self._kind}"):
            self._close()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of a network, of a full disk, of a library: of many kinds
            self._put, self._close = None, lambda: None
            log.warning(
                "runtime.tracker %s failed (%s: %s); the run goes on without it",
                *(self._kind, type(error).__name__, one_line(error)[:300]),
            )


def _tensorboard(root: Path) -> tuple[Put, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(root / "logs" / "tensorboard"))

    def put(figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return put, writer.close


def _wandb(root: Path, plan: Plan) -> tuple[Put, Callable[[], None]]:
    import wandb

    folder = str(root.absolute())
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "embed-precompute"),
        name=os.environ.get("WANDB_NAME", root.name),
        # A job that is resumed goes on in its own run.
        id=hashlib.sha256(f"{folder}\n{plan.plan_id}".encode()).hexdigest()[:16],
        resume="allow",
        dir=str(root / "logs"),
        config={"output": folder, "plan": plan.plan_id, "spec": plan.spec},
        settings=wandb.Settings(console="off"),
    )
    return lambda figures, step: run.log(dict(figures), step=step), run.finish
