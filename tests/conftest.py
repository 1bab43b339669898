"""Shared by the tests: captions and tiny checkpoints, made once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub client is imported
# Tiny models gain nothing from threads, and spinning threads slow every other process down.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from make_demo import demo_captions, write_clip, write_t5

CORPUS_ROWS = 200


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="faults in their full number: hours")
    parser.addoption("--seed", type=int, default=0, help="the same seed draws the same faults")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Digests of test files stay out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _no_handlers_left() -> Iterator[None]:
    """A command sets the package's logger up; the next test finds it as it was."""
    yield
    for name in ("embed_precompute", "embed_precompute.steps"):
        logger = logging.getLogger(name)
        for handler in logger.handlers:
            handler.close()
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.NOTSET)


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
