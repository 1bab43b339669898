"""The workplace of a fault, and the bytes of undisturbed runs, made once a session."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.lab import Lab, Undisturbed

RAM_BYTES = 1 << 29


@pytest.fixture(scope="session")
def ram(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK) or shutil.disk_usage(shm).free < RAM_BYTES:
        yield tmp_path_factory.mktemp("faults")
        return
    with tempfile.TemporaryDirectory(prefix="faults-", dir=shm) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def undisturbed_runs(ram: Path, tiny_t5: Path, tiny_clip: Path) -> Undisturbed:
    return Undisturbed(ram, tiny_t5, tiny_clip)


@pytest.fixture
def lab(undisturbed_runs: Undisturbed, request: pytest.FixtureRequest) -> Iterator[Lab]:
    seed = f"{request.config.getoption('seed')}:{request.node.name}"
    folder = Path(tempfile.mkdtemp(dir=undisturbed_runs.folder))
    yield Lab(folder, undisturbed_runs, random.Random(seed), request.config.getoption("long"))
    shutil.rmtree(folder, ignore_errors=True)
