"""Precompute the T5 and CLIP text embeddings of a caption table: once, offline, on any GPUs.

Guarantees: importing this package imports neither torch nor transformers; each public name brings
what it needs when it is first used.
Costs: nothing until then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embed_precompute.config import Config
    from embed_precompute.config_file import load_config
    from embed_precompute.datasets import EmbeddingDataset, collate_embeddings
    from embed_precompute.pipeline import run

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "load_config": "config_file",
    "run": "pipeline",
    "EmbeddingDataset": "datasets",
    "collate_embeddings": "datasets",
}

__all__ = ["Config", "EmbeddingDataset", "collate_embeddings", "load_config", "run"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
