"""Open-Sora's classes, transcribed."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import embed_precompute.opensora.dataset as ours
import embed_precompute.opensora.export as export

TRANSCRIPTION = Path(__file__).parent / "transcription"


def forget_opensora() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "opensora"]:
        del sys.modules[name]
    vars(ours).pop(ours.CLASS_NAME, None)


@pytest.fixture(scope="module")
def open_sora() -> Iterator[Any]:
    """Open-Sora's registry, with our class in it, as its trainer's configuration imports it."""
    forget_opensora()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRANSCRIPTION))
        registry = importlib.import_module("opensora.registry").DATASETS
        importlib.reload(ours)
        importlib.reload(export)  # it holds classes of the module before
        yield registry
    forget_opensora()
