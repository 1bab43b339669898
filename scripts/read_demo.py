"""Read one batch of a finished dataset through a DataLoader with two workers, and print it.

Guarantees: uses only what a training job uses: torch, `EmbeddingDataset`, `collate_embeddings`.
Costs: a few seconds, most of them the start of the workers.

    python scripts/read_demo.py OUT [--batch-size 4]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch.utils.data import DataLoader

from embed_precompute import EmbeddingDataset, collate_embeddings


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Read one batch of a dataset of embeddings.")
    parser.add_argument("out", help="folder of the dataset")
    parser.add_argument("--batch-size", type=int, default=4, help="samples (default 4)")
    arguments = parser.parse_args()
    dataset = EmbeddingDataset(arguments.out)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=arguments.batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        num_workers=2,
        collate_fn=collate_embeddings,
    )
    batch = next(iter(loader))
    print(f"{len(dataset)} samples; one shuffled batch of {arguments.batch_size}:")
    for name, value in batch.items():
        print(f"  {name:<20} {_describe(value)}")
    for name, value in dataset.null.items():
        print(f"  null {name:<15} {_describe(value)}")


if __name__ == "__main__":
    main()
