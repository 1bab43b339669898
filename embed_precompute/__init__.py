"""Precompute the T5 and CLIP text embeddings of a caption table: once, offline, on any GPUs.

Guarantees: importing this package imports neither torch nor transformers; each public name brings
what it needs when it is first used.
Costs: nothing until then.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embed_precompute.audit.similarity import nearest_captions, prompt_similarity
    from embed_precompute.config.files import load_config
    from embed_precompute.config.schema import Config
    from embed_precompute.encoders.embedder import HFEmbedder
    from embed_precompute.encoders.shardformer import shardformer_t5
    from embed_precompute.job.run import run
    from embed_precompute.train.dataset import EmbeddingDataset, collate_embeddings
    from embed_precompute.train.inputs import (
        ConditionDropout,
        dropout_condition,
        prepare,
        prepare_ids,
    )
    from embed_precompute.train.joined import JoinedDataset
    from embed_precompute.train.loader import EmbeddingLoader

__version__ = "0.1.0"

_HOME = {
    "HFEmbedder": "encoders.embedder",
    "shardformer_t5": "encoders.shardformer",
    "Config": "config.schema",
    "load_config": "config.files",
    "run": "job.run",
    "prepare": "train.inputs",
    "prepare_ids": "train.inputs",
    "ConditionDropout": "train.inputs",
    "dropout_condition": "train.inputs",
    "nearest_captions": "audit.similarity",
    "prompt_similarity": "audit.similarity",
    "EmbeddingDataset": "train.dataset",
    "EmbeddingLoader": "train.loader",
    "JoinedDataset": "train.joined",
    "collate_embeddings": "train.dataset",
}

__all__ = [
    "ConditionDropout",
    "Config",
    "EmbeddingDataset",
    "EmbeddingLoader",
    "HFEmbedder",
    "JoinedDataset",
    "collate_embeddings",
    "dropout_condition",
    "load_config",
    "nearest_captions",
    "prepare",
    "prepare_ids",
    "prompt_similarity",
    "run",
    "shardformer_t5",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
