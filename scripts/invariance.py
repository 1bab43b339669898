"""Show that an embedding depends on its caption and the specification alone.

The captions of a configuration are encoded again by other numbers of ranks, shuffled and in units
of another size; every stored embedding is compared with the first run's, by its row checksum. Exit
code 1 when one differs. Each number of ranks costs a whole run; the datasets go to a temporary
folder.

    python scripts/invariance.py CONFIG [--captions N] [--ranks 1 2 3] [--encoders.t5.dtype ...]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embed_precompute.config.files import load_config
from embed_precompute.job.prepare import Prepared, prepare

UNITS = (2048, 137, 512)
"""Samples of a unit, run by run, over and over."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Encode captions again in other ways and compare.")
    parser.add_argument("config")
    parser.add_argument("--captions", type=int, default=2000, help="the first N (default 2000)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 3], help="default 1 2 3")
    arguments, overrides = parser.parse_known_args()
    prepared = prepare(load_config(arguments.config, overrides), arguments.captions)
    overrides += fixed(prepared)
    expected: dict[str, dict[str, int]] = {}
    wrong = 0
    for number, ranks in enumerate(arguments.ranks):
        with tempfile.TemporaryDirectory() as folder:
            samples_per_shard = UNITS[number % len(UNITS)]
            captions = shuffled(prepared, Path(folder), number)
            settings = [*overrides, f"--captions.path={captions}", f"--output.path={folder}/out"]
            settings.append(f"--output.samples_per_shard={samples_per_shard}")
            launch(arguments.config, settings, ranks)
            found = checksums(Path(folder, "out"))
        expected = expected or found
        for name, sums in found.items():
            equal = sum(expected[name].get(sample) == value for sample, value in sums.items())
            wrong += len(expected[name]) - equal
            print(
                f"{ranks} ranks, units of {samples_per_shard}, "
                f"{'shuffled' if number else 'in order'}: text_{name} "
                f"{equal} of {len(expected[name])} embeddings equal the first run's",
                flush=True,
            )
    return 1 if wrong else 0


def fixed(prepared: Prepared) -> list[str]:
    """What makes the plain table of `shuffled` lead to the same embeddings."""
    settings = ["--captions.text_column=text", "--captions.id_column=id"]
    settings += ["--captions.recipe={kind: none}", "--captions.normalize=[]"]
    for encoder in prepared.encoders:
        if encoder.options.integer_column is not None:  # its numbers pad as this one does
            assert encoder.decision.padded_length is not None
            added_tokens = -encoder.decision.padded_length % encoder.options.seq_align
            settings.append(f"--encoders.{encoder.name}.added_tokens={added_tokens}")
    return settings


def shuffled(prepared: Prepared, folder: Path, seed: int) -> Path:
    """The first captions as one file, with ids of their own; in another order unless seed is 0."""
    plan = prepared.plan
    reader = prepared.table.reader(plan.num_rows, plan.last_row_samples)
    samples = reader.read(0, plan.num_rows)
    table = pa.table(
        {
            "id": [sample.sample_id for sample in samples],
            "text": [sample.text for sample in samples],
        }
    )
    order = np.random.default_rng(seed).permutation(len(table)) if seed else np.arange(len(table))
    pq.write_table(table.take(pa.array(order)), folder / "captions.parquet")
    return folder / "captions.parquet"


def launch(config: str, settings: list[str], ranks: int) -> None:
    """`run` under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={ranks}", "-m", "embed_precompute", "run", config]
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    done = subprocess.run(
        [*command, *settings],
        env={**os.environ, "OMP_NUM_THREADS": threads},
        stdout=subprocess.DEVNULL,
    )
    if done.returncode:
        sys.exit(f"invariance: run ended with exit code {done.returncode}.")


def checksums(root: Path) -> dict[str, dict[str, int]]:
    """Per encoder, the row checksum of every sample that has an embedding, by id."""
    from embed_precompute.store.index import DatasetIndex

    index = DatasetIndex(root)
    ids = [(sample, index.sample_id(sample)) for sample in index.ok.tolist()]
    return {
        name: {sample_id: int(sums[sample]) for sample, sample_id in ids}
        for name, sums in index.checksums.items()
    }


if __name__ == "__main__":
    sys.exit(main())
