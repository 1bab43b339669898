"""Print what `fetch` takes for a large pickle, and whether the copy is right.

A random T5 with its decoder, float32, in a sharded pickle as transformers 4 saved it: by default 4
GB. `fetch` makes its encoder in bfloat16, in a process of its own. Private memory is what no file
has; pages of the pickle that are mapped are the page cache's. Captions are encoded by plain
transformers, one at a time, from the pickle and from the copy: not a bit may differ. A second
`fetch` is killed when half of its copy is on disk, and run again: the files have to be equal.

    python scripts/benchmarks/fetch.py [--layers 24] [--width 1024] [--folder FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))  # scripts/

from demo_tokenizers import t5_tokenizer
from embed_precompute.encoders.checkpoint import fetched_folder, origin_of, quiet_transformers
from embed_precompute.encoders.families.t5 import T5, T5Options
from make_demo import demo_captions

NUM_FILES = 5
NUM_CAPTIONS = 8
SAMPLE_S = 0.01
GB, MIB = 1e9, 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description="`fetch` of a large pickle.")
    parser.add_argument("--layers", type=int, default=24, help="of encoder and decoder, default 24")
    parser.add_argument("--width", type=int, default=1024, help="default 1024")
    parser.add_argument("--folder", type=Path, help="for the checkpoint, which stays; default none")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(fetch_measured(arguments.worker)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        source = checkpoint(folder / f"t5-{arguments.layers}-{arguments.width}", arguments)
        measure(source, Path(temporary))


# --- the checkpoint -------------------------------------------------------------------------------


def checkpoint(folder: Path, arguments: argparse.Namespace) -> Path:
    """A random checkpoint, made file by file."""
    if (folder / "config.json").exists():  # written last
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    width = arguments.width
    sizes: dict[str, Any] = {"d_model": width, "d_ff": 4 * width, "num_heads": width // 64}
    sizes |= {"num_layers": arguments.layers, "vocab_size": 32128, "tie_word_embeddings": False}
    config = transformers.T5Config(**sizes, d_kv=64, feed_forward_proj="gated-gelu")
    with torch.device("meta"):
        model = transformers.T5ForConditionalGeneration(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    second = [f"{part}.embed_tokens.weight" for part in ("encoder", "decoder")]
    names = [name for name in shapes if name not in second]
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number in range(NUM_FILES):
        file = f"pytorch_model-{number + 1:05}-of-{NUM_FILES:05}.bin"
        part = {name: random(shapes[name], generator) for name in names[number::NUM_FILES]}
        if "shared.weight" in part:  # one storage under three names
            part |= dict.fromkeys(second, part["shared.weight"])
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    corpus: list[str] = demo_captions(200).column("text").to_pylist()
    t5_tokenizer(corpus, 1000).save(str(folder / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    tokenizer |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config.save_pretrained(str(folder))
    return folder


def random(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    scale = 0.5 * shape[-1] ** -0.5 if len(shape) > 1 else 0.1
    values = torch.empty(shape).normal_(0.0, scale, generator=generator)
    return values if len(shape) > 1 else values + 1


# --- what is measured -----------------------------------------------------------------------------


def measure(source: Path, temporary: Path) -> None:
    size = sum(path.stat().st_size for path in source.glob("*.bin"))
    first, second = temporary / "first", temporary / "second"
    done = run(source, first, temporary)
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    copy = copy_of(source, first)
    held = (copy / "model.safetensors").stat().st_size
    print(f"{size / GB:.2f} GB of float32 pickles, an encoder of {held / GB:.2f} GB in bfloat16")
    print(
        f"fetch: {report['seconds']:.1f} s, private memory {report['peak'] / MIB:,.0f} MiB, of "
        f"which {report['imported'] / MIB:,.0f} MiB are Python with torch and transformers"
    )
    texts: list[str] = demo_captions(50).column("text").to_pylist()
    expected, found = (encoded(folder, texts[:NUM_CAPTIONS]) for folder in (source, copy))
    worst = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    print(f"{len(found)} captions: largest difference to the pickle's embeddings {worst}")
    share = kill_at_half(source, second, temporary, held)
    run(source, second, temporary)
    digests = [sha256s(copy_of(source, home)) for home in (first, second)]
    equal = "equal" if digests[0] == digests[1] else "DIFFERENT"
    left = len(list((second / "checkpoints").iterdir())) - 1
    print(
        f"killed with {share:.0%} of the copy on disk, run again: {equal} files, {left} left over"
    )


def command(source: Path, home: Path, temporary: Path) -> subprocess.Popen[str]:
    """`fetch` in a process that reports its memory."""
    job = temporary / "job.yaml"
    encoder = {"kind": "t5", "pretrained": str(source), "dtype": "bfloat16"}
    settings = {"captions": {"path": "none.parquet"}, "encoders": {"t5": encoder}}
    job.write_text(json.dumps({**settings, "output": {"path": "none"}}))  # JSON is YAML
    environment = {**os.environ, "EMBED_PRECOMPUTE_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, __file__, "--worker", str(job)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)


def run(source: Path, home: Path, temporary: Path) -> subprocess.CompletedProcess[str]:
    process = command(source, home, temporary)
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"fetch: ended with exit code {process.returncode}.\n{out}")
    return subprocess.CompletedProcess(process.args, 0, out)


def fetch_measured(job: Path) -> dict[str, float]:
    from embed_precompute.cli.main import main

    imported, peak = private(), [0]

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], private())
            time.sleep(SAMPLE_S)

    threading.Thread(target=watch, daemon=True).start()
    began = time.perf_counter()
    if code := main(["fetch", str(job)]):
        sys.exit(code)
    return {"seconds": time.perf_counter() - began, "peak": peak[0], "imported": imported}


def private() -> int:
    """Bytes of this process that no file has."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found is not None, "this needs Linux"
    return int(found[1]) * 1024


def kill_at_half(source: Path, home: Path, temporary: Path, size: int) -> float:
    """How much of the copy was on disk when the process was killed."""
    process = command(source, home, temporary)
    while process.poll() is None:
        share = sum(written(path) for path in home.glob("checkpoints/.*/*.safetensors")) / size
        if share >= 0.5:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return share
        time.sleep(SAMPLE_S / 10)
    return 1.0  # too small a copy to meet it


def written(path: Path) -> int:
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def copy_of(source: Path, home: Path) -> Path:
    os.environ["EMBED_PRECOMPUTE_HOME"] = str(home)
    return fetched_folder(origin_of(str(source), None, "t5", "bfloat16", None, None))


def encoded(folder: Path, texts: list[str]) -> list[torch.Tensor]:
    options = T5Options(pretrained=str(folder), max_length=64, attention_mask="padding")
    with quiet_transformers():
        reference = T5().reference(folder, folder, options, "cpu")
    return [reference(text, None)[""].float() for text in texts]


def sha256s(folder: Path) -> dict[str, str]:
    paths = sorted(folder.iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


if __name__ == "__main__":
    main()
