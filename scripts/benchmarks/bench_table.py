"""Bench encoders of real shapes with random weights, and print one table of all.

The shapes are those of the published checkpoints: T5 v1.1 base, the first layers of T5
v1.1 XXL, and CLIP ViT-L/14's text model. Every job is a process of its own. A checkpoint that is
in the folder already is used again.
The XXL slice of two layers has 1 GiB in bfloat16.

    python scripts/benchmarks/bench_table.py FOLDER [--captions FILE] [--jobs ...]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))  # scripts/

from demo_tokenizers import clip_tokenizer, t5_tokenizer
from make_demo import Weights, demo_captions, write_clip, write_t5

PEERS = Path(__file__).with_name("peers.py")
CAPTION_ROWS = 3000
JOBS: dict[str, dict[str, Any]] = {
    "base-padded": {"kind": "t5", "attention_mask": "none"},
    "xxl-padded": {"kind": "t5", "attention_mask": "none"},
    "base-masked": {"kind": "t5", "attention_mask": "padding"},
    "xxl-masked": {"kind": "t5", "attention_mask": "padding"},
    "clip-pooled": {"kind": "clip"},
}
T5_VOCABULARY, CLIP_VOCABULARY = 32128, 49408
DEMO_VOCABULARY = 1000
BASE = "fused"


class QuickWeights(Weights):
    """Made in the dtype itself, tensor by tensor; other bits on other machines."""

    def __init__(self, dtype: str) -> None:
        super().__init__(seed=0)
        self._dtype: torch.dtype = getattr(torch, dtype)

    def add(self, name: str, *shape: int, std: float, mean: float = 0.0) -> None:
        tensor = torch.empty(shape, dtype=self._dtype)
        self.tensors[name] = tensor.normal_(mean, std, generator=self._generator)


def main() -> None:
    arguments = _parser().parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    captions = arguments.captions or _demo_captions(arguments.folder)
    rows = []
    for dtype in arguments.dtypes:
        for job in arguments.jobs:
            config = write_job(arguments, job, dtype, captions)
            rows.append((job, dtype, run(arguments, config)))
    print(f"\n{rows[0][2]['environment']}")
    print("| mode | dtype | shape | fused: captions/s | of GEMM | relative diff, hf's | fused is |")
    print("|---|---|---|---|---|---|---|")
    for job, dtype, report in rows:
        print(row(job, dtype, report["encoders"][0], arguments.layers))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One table of benches of real shapes.")
    parser.add_argument("folder", type=Path, help="checkpoints, configurations and JSON go there")
    parser.add_argument("--captions", type=Path, help="parquet with a column text (default: demo)")
    parser.add_argument("--t5-tokenizer", type=Path, help="folder (default: the demo's own)")
    parser.add_argument("--clip-tokenizer", type=Path, help="folder (default: the demo's own)")
    parser.add_argument("--jobs", nargs="+", choices=tuple(JOBS), default=list(JOBS))
    parser.add_argument(
        "--dtypes", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16"]
    )
    parser.add_argument("--layers", type=int, default=2, help="of the XXL slice (default 2)")
    parser.add_argument("--batch", type=int, default=16, help="captions of a padded forward (16)")
    parser.add_argument("--device", default="auto", help="as runtime.device")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--num-captions", type=int, help="peers.py's --captions")
    parser.add_argument("--variants", nargs="+", help="peers.py's --variants")
    return parser


def _demo_captions(folder: Path) -> Path:
    path = folder / "captions.parquet"
    pq.write_table(demo_captions(CAPTION_ROWS), path)
    return path


def checkpoint(folder: Path, shape: str, dtype: str, layers: int) -> Path:
    """A random checkpoint of a real shape, with the demo's tokenizer."""
    name = f"{shape}{layers}" if shape == "xxl" else shape
    target = folder / f"{name}-{dtype}"
    if (target / "config.json").exists():  # written last
        return target
    corpus: list[str] = demo_captions(200).column("text").to_pylist()
    if shape == "clip":
        return write_clip(
            target,
            corpus,
            width=768,
            layers=12,
            heads=12,
            vocab_size=CLIP_VOCABULARY,
            eos_rule="argmax",  # the end token is the highest id of the demo's and of CLIP's own
            dtype=dtype,
            weights=QuickWeights(dtype),
            tokenizer=clip_tokenizer(corpus, DEMO_VOCABULARY),
        )
    large = shape == "xxl"
    return write_t5(
        target,
        corpus,
        width=4096 if large else 768,
        layers=layers if large else 12,
        heads=64 if large else 12,
        feed_forward=10240 if large else 2048,
        vocab_size=T5_VOCABULARY,
        dtype=dtype,
        weights=QuickWeights(dtype),
        tokenizer=t5_tokenizer(corpus, DEMO_VOCABULARY),
    )


def write_job(arguments: argparse.Namespace, job: str, dtype: str, captions: Path) -> Path:
    """A configuration of one encoder; its embeddings are stored as they are computed."""
    shape = job.split("-")[0]
    pretrained = checkpoint(arguments.folder, shape, dtype, arguments.layers)
    encoder = {"pretrained": str(pretrained), "dtype": dtype, **JOBS[job]}
    tokenizer = getattr(arguments, f"{encoder['kind']}_tokenizer")
    if tokenizer is not None:
        encoder["tokenizer"] = str(tokenizer)
    if encoder.get("attention_mask") == "none":
        encoder["batch_tokens"] = 512 * arguments.batch
    config = {
        "captions": {"path": str(captions), "id_column": None},
        "encoders": {shape: encoder},
        "output": {"path": str(arguments.folder / "none"), "dtype": dtype},
        "runtime": {"device": arguments.device},
    }
    path: Path = arguments.folder / f"{job}-{dtype}.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def run(arguments: argparse.Namespace, config: Path) -> Any:
    """The report of a bench, which prints its own table meanwhile."""
    target = config.with_suffix(".json")
    command = [sys.executable, str(PEERS), str(config)]
    command += ["--rounds", str(arguments.rounds), "--json", str(target)]
    if arguments.num_captions is not None:
        command += ["--captions", str(arguments.num_captions)]
    if arguments.variants is not None:
        command += ["--variants", *arguments.variants]
    print(f"\n{config.stem}", flush=True)
    done = subprocess.run(command)
    if done.returncode:
        sys.exit(f"bench_table: {config} ended with exit code {done.returncode}.")
    return json.loads(target.read_text())


def row(job: str, dtype: str, encoder: dict[str, Any], layers: int) -> str:
    """One line of the table."""
    shape, mode = job.split("-")
    found = {measured["variant"]: measured for measured in encoder["measured"]}
    cells = [mode, dtype, f"{layers} layers of xxl" if shape == "xxl" else shape]
    fused, hf = found.get(BASE), found.get("hf")
    figures = {} if fused is None else fused["figures"]
    cells.append(f"{figures['captions_per_s']:,.1f}" if figures else "-")
    cells.append(f"{figures['of_gemm']:.2f}" if figures else "-")
    cells.append(", ".join(_relative(measured) for measured in (fused, hf)))
    ratios = [
        f"{measured['figures']['fused_is']:.2f}x {name}"
        for name, measured in found.items()
        if name != BASE and measured["figures"]["fused_is"] is not None
    ]
    cells.append(", ".join(ratios) or "-")
    return f"| {' | '.join(cells)} |"


def _relative(measured: dict[str, Any] | None) -> str:
    if measured is None or measured["relative"] is None:
        return "-"
    return f"{measured['relative']:.1e}"


if __name__ == "__main__":
    main()
