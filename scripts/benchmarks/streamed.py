"""Print the speed and the private memory of streamed weights next to resident ones.

Both encode the same captions in the same token batches, one window of them, each in a process of
its own, in alternation. The weights are random, of a real shape, in as many files as there are
layers; all layers hold the same numbers. What is timed is a window, after a first pass of one
batch, with the files in the page cache. The embeddings have to be equal.

Private memory is what the process has beyond Python and its libraries and what is not mapped from a
file: layers in memory of their own, the residuals of the window, the buffers of a forward. A file
whose weights begin at a multiple of 64 bytes (`--place 0`, as in a copy that `fetch` made) is
mapped; others are copied.

    python scripts/benchmarks/streamed.py t5-2048 t5-xxl [--window 65536] [--rounds 3] [--place 8]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash

sys.path.insert(0, str(Path(__file__).parent.parent))  # scripts/

from demo_tokenizers import t5_tokenizer
from embed_precompute.bench.measure import gemm_flops_of
from embed_precompute.encoders import encoder as encoder_module
from embed_precompute.encoders.encoder import build
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.loading import Source, loaded_bytes
from embed_precompute.encoders.resolve import ResolvedEncoder, open_encoder, resolve
from embed_precompute.encoders.tokenizer import Tokenized
from make_demo import demo_captions

T5 = {"feed_forward_proj": "gated-gelu", "vocab_size": 32128, "d_kv": 64, "num_layers": 24}
LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 24}
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5-xxl": ("t5", "T5Encoder", {**T5, "d_model": 4096, "d_ff": 10240, "num_heads": 64}),
    "t5-2048": ("t5", "T5Encoder", {**T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32}),
    "decoder-2048": ("decoder", "Llama", {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192}),
    "tiny": ("t5", "T5Encoder", {**T5, "d_model": 256, "d_ff": 512, "num_heads": 4}),
}
"""Name -> kind, transformers' class without Model, its config."""
MODES = ("resident", "stream")
SAMPLE_S = 0.02


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.worker is not None:
        print(json.dumps(work(arguments)), flush=True)
        return
    print("| shape | weights | GB | tokens/s | of GEMM | private MiB | of the weights |")
    print("|---|---|---|---|---|---|---|")
    for shape in arguments.shapes:
        with contextlib.ExitStack() as stack:
            folder = arguments.folder
            if folder is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            measure(arguments, shape, checkpoint(folder, shape, arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Streamed weights next to resident ones.")
    parser.add_argument("shapes", nargs="+", choices=tuple(SHAPES))
    parser.add_argument("--folder", type=Path, help="for checkpoints, which stay (default: none)")
    parser.add_argument("--layers", type=int, default=24, help="default 24")
    parser.add_argument("--window", type=int, default=65536, help="tokens; default 65536")
    parser.add_argument("--stream-tokens", type=int, default=4096, help="of a batch; default 4096")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--place", type=int, default=0, help="where weights begin, modulo 64")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--worker", choices=MODES, help=argparse.SUPPRESS)
    return parser


# --- the checkpoint -------------------------------------------------------------------------------


def checkpoint(folder: Path, shape: str, arguments: argparse.Namespace) -> Path:
    """A random checkpoint, made layer by layer."""
    target = folder / f"{shape}-{arguments.layers}-{arguments.dtype}-{arguments.place}"
    if (target / "config.json").exists():  # written last
        return target
    target.mkdir(parents=True, exist_ok=True)
    kind, name, fields = SHAPES[shape]
    layers = "num_layers" if kind == "t5" else "num_hidden_layers"
    config = getattr(transformers, name.removesuffix("Encoder") + "Config")(
        **{**fields, layers: arguments.layers}
    )
    with torch.device("meta"):
        model = getattr(transformers, f"{name}Model")(config)
    files: dict[str, dict[str, torch.Tensor]] = {}
    for weight, tensor in model.named_parameters():
        numbers = [part for part in weight.split(".") if part.isdecimal()]
        files.setdefault(numbers[0] if numbers else "rest", {})[weight] = tensor
    made: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    for part, weights in files.items():
        file = f"model-{part}.safetensors"
        values = {name: _random(made, name, part, weights[name], arguments) for name in weights}
        write_file(target / file, values, arguments.place)
        weight_map |= dict.fromkeys(weights, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    corpus: list[str] = demo_captions(200).column("text").to_pylist()
    t5_tokenizer(corpus, 1000).save(str(target / "tokenizer.json"))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    tokenizer |= {"pad_token": "<pad>", "unk_token": "<unk>"}
    (target / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    config.architectures = [f"{name}Model"]
    config.save_pretrained(str(target))
    return target


def _random(
    made: dict[str, torch.Tensor],
    name: str,
    part: str,
    like: torch.Tensor,
    arguments: argparse.Namespace,
) -> torch.Tensor:
    """The same numbers for all layers: 9 GB of new ones would take minutes."""
    key = name.replace(f".{part}.", ".N.", 1)
    if key not in made:
        values = torch.empty(like.shape, dtype=getattr(torch, arguments.dtype))
        made[key] = values.normal_(1.0, 0.1) if like.dim() == 1 else _matrix(values)
    return made[key]


def _matrix(values: torch.Tensor) -> torch.Tensor:
    return values.normal_(0.0, 0.5 * float(values.shape[1]) ** -0.5)


def write_file(path: Path, tensors: dict[str, torch.Tensor], place: int) -> None:
    """A safetensors file whose weights begin `place` bytes behind a multiple of 64."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        code = {torch.bfloat16: "BF16", torch.float32: "F32"}[tensor.dtype]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entry = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * ((place - 8 - len(text)) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


# --- the rounds -----------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, shape: str, folder: Path) -> None:
    """Rounds in alternating order, and the medians."""
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(arguments.rounds):
        for mode in MODES if number % 2 == 0 else reversed(MODES):
            found[mode].append(launch(arguments, shape, folder, mode))
    for mode, rounds in found.items():
        median = {
            key: statistics.median(each[key] for each in rounds)
            for key in ("tokens_per_s", "of_gemm", "private_bytes")
        }
        size = rounds[0]["weight_bytes"]
        print(
            f"| {shape} | {mode} | {size / 1e9:.2f} | "
            f"{median['tokens_per_s']:,.0f} | {median['of_gemm']:.2f} | "
            f"{median['private_bytes'] / 2**20:,.0f} | {median['private_bytes'] / size:.3f} |"
        )
    pairs = zip(found["stream"], found["resident"], strict=True)
    ratio = statistics.median(ours["tokens_per_s"] / all_["tokens_per_s"] for ours, all_ in pairs)
    digests = {each["digest"] for rounds in found.values() for each in rounds}
    equal = "equal" if len(digests) == 1 else "DIFFERENT"
    tokens, batches = (found["stream"][0][key] for key in ("tokens", "batches"))
    print(
        f"{shape}: streamed is {ratio:.2f} of resident; {tokens:,} tokens in {batches} batches, "
        f"one window; {equal} embeddings",
        flush=True,
    )


def launch(arguments: argparse.Namespace, shape: str, folder: Path, mode: str) -> dict[str, Any]:
    """What a process of its own reports."""
    command = [sys.executable, __file__, shape, "--worker", mode, "--folder", str(folder)]
    for option in ("window", "stream_tokens", "dtype", "device"):
        command += [f"--{option.replace('_', '-')}", str(getattr(arguments, option))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"streamed: {mode} ended with exit code {done.returncode}.")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def work(arguments: argparse.Namespace) -> dict[str, Any]:
    """One window; `--folder` is the checkpoint."""
    kind = SHAPES[arguments.shapes[0]][0]
    fields: dict[str, Any] = {"implementation": "fused", "stream_tokens": arguments.stream_tokens}
    if kind == "t5":
        fields["attention_mask"] = "padding"
    make: Any = FAMILIES[kind].options
    options = make(
        kind=kind, pretrained=str(arguments.folder), dtype=arguments.dtype, max_length=256, **fields
    )
    encoder = resolve(open_encoder("enc", options))
    source = Source(encoder.opened.checkpoint, encoder.family, options)
    encoder_module.WINDOW_TOKENS = arguments.window
    captions = captions_of(encoder, arguments.window)
    batches = list(encoder.batches(captions))
    assert source.model_class is not None  # imported when first named: no memory of the encoder
    before = _private()
    with peak_of_private_memory() as peak:
        built = build(encoder, arguments.device, arguments.dtype, arguments.worker)
        for pending in built.submit_all(encoder.every_shape()):
            pending.wait()
        digest = xxhash.xxh3_128()
        began = time.perf_counter()
        for pending in built.submit_all(batches):
            for values in pending.wait().values():
                for each in values:
                    digest.update(each.contiguous().view(torch.uint8).numpy().data)
        seconds = time.perf_counter() - began
    rate = encoder.flops(captions) / seconds
    return {
        "tokens_per_s": sum(captions.num_ids) / seconds,
        "of_gemm": rate / gemm_flops_of(encoder, arguments.device),
        "private_bytes": peak[0] - before,
        "weight_bytes": loaded_bytes(source, getattr(torch, arguments.dtype)),
        "tokens": sum(captions.num_ids),
        "batches": len(batches),
        "digest": digest.hexdigest(),
    }


def captions_of(encoder: ResolvedEncoder, num_tokens: int) -> Tokenized:
    """So many of the demo's captions that their packed streams are one window."""
    texts: list[str] = demo_captions(max(50, num_tokens // 8)).column("text").to_pylist()
    captions = encoder.opened.tokenizer.encode(texts)
    rows, left = [], num_tokens - num_tokens // 64  # the streams are not quite full
    for row, count in enumerate(captions.num_ids):
        if count > left:
            break
        rows.append(row)
        left -= count
    return captions.select(rows)


def _private() -> int:
    """Bytes of this process that no file has."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no RssAnon: this needs Linux.")


@contextlib.contextmanager
def peak_of_private_memory() -> Iterator[list[int]]:
    """The most that it was, looked at every 20 ms."""
    peak, ended = [_private()], threading.Event()

    def watch() -> None:
        while not ended.wait(SAMPLE_S):
            peak[0] = max(peak[0], _private())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    main()
