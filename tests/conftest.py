"""Shared by the tests: tiny checkpoints, made once a session, and captions run through them."""

from __future__ import annotations

import fcntl
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub client is imported
# Tiny models gain nothing from threads, and spinning threads slow every other process down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from make_demo import demo_captions, write_clip, write_t5

if TYPE_CHECKING:
    import torch

    from embed_precompute.encoders.encoder import TextEncoder

CORPUS_ROWS = 200


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of test files stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Beside other processes of pytest-xdist, a test marked `alone` waits until they all wait."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    folder = tmp_path_factory.getbasetemp().parent
    mode = fcntl.LOCK_EX if request.node.get_closest_marker("alone") else fcntl.LOCK_SH
    with open(folder / "gate", "a") as gate, open(folder / "room", "a") as room:
        fcntl.flock(gate, fcntl.LOCK_EX)  # who waits for the room alone lets nobody in before it
        fcntl.flock(room, mode)
        fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(room, fcntl.LOCK_UN)  # closing is not enough: a child may have it open, too


@pytest.fixture(scope="session")
def corpus() -> list[str]:
    """Captions the tiny tokenizers are trained on."""
    texts: list[str] = demo_captions(CORPUS_ROWS).column("text").to_pylist()
    return texts


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    return write_t5(tmp_path_factory.mktemp("checkpoints") / "t5", corpus)


@pytest.fixture(scope="session")
def tiny_umt5(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    return write_t5(tmp_path_factory.mktemp("checkpoints") / "umt5", corpus, model_type="umt5")


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory, corpus: list[str]) -> Path:
    return write_clip(tmp_path_factory.mktemp("checkpoints") / "clip", corpus)


Encode = Callable[["TextEncoder", Sequence[str]], "list[torch.Tensor]"]


@pytest.fixture(scope="session")
def encode() -> Encode:
    """Captions -> what is stored of each, by an encoder with one output: [length, D] or [D]."""

    def run(encoder: TextEncoder, texts: Sequence[str]) -> list[torch.Tensor]:
        resolved = encoder.resolved
        captions = resolved.opened.tokenizer.encode(texts)
        stored: dict[int, torch.Tensor] = {}
        for batch in resolved.batches(captions):
            (values,) = encoder.encode(batch).values()
            stored.update((row, values[i]) for i, row in enumerate(batch.rows.tolist()))
        return [stored[row] for row in range(len(texts))]

    return run
