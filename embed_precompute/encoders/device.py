"""The machine that an encoder runs on: device, environment, and a check of its numbers.

A GPU, driver or kernel that nobody has tried may compute wrong numbers without an error. So every
rank on a GPU compares a few captions with transformers' own model before its first unit, in about a
second after the model is loaded.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Sequence
from typing import Literal

import torch

from embed_precompute import __version__
from embed_precompute.encoders import text_steps
from embed_precompute.encoders.encoder import (
    HfEncoder,
    TextEncoder,
    WeightsMode,
    build,
    is_streamed,
)
from embed_precompute.encoders.loading import Source, num_parameters
from embed_precompute.encoders.resolve import ResolvedEncoder
from embed_precompute.encoders.tokenizer import Tokenized, make_batch
from embed_precompute.errors import InputError
from embed_precompute.steps import Work, steps

log = logging.getLogger(__name__)
LARGE = 10**9
"""An encoder with more parameters than this runs on a CPU only if runtime.device is cpu."""
MAX_RELATIVE_DIFFERENCE = 1e-5
"""Largest max|a - b| / max|b| between float32 numbers that were computed in float32."""
MIN_COSINE = 0.999
"""Smallest allowed cosine between the two vectors of a token, in any precision."""
CAPTIONS = (
    "",
    "a red fox",
    "A slow tracking shot follows an old fisherman along the harbour at dawn, cinematic lighting.",
    "caf\u00e9 \ube68\uac04 \uc6b0\uc0b0 1234567890",
    "two cats " * 200,
)


def environment(device: str, encoders: Sequence[ResolvedEncoder] = ()) -> dict[str, str]:
    """What bytes may depend on besides the spec: versions (ours too), device, CPU capability."""
    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "tokenizers", "pyarrow", "numpy")
    }
    if any(encoder.decision.implementation == "shardformer" for encoder in encoders):
        versions["colossalai"] = importlib.metadata.version("colossalai")
    for encoder in encoders:
        versions |= text_steps.versions(encoder.options.text_steps)
    versions["embed_precompute"] = __version__  # another release may round differently
    versions["torch"] = torch.__version__  # with the build, such as +cpu or +cu124
    return {
        **versions,
        "device": device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def device_name(device: str) -> str:
    """The GPU's or the CPU's product name."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
        for line in cpuinfo:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def resolve_device(setting: str, local_rank: int = 0) -> str:
    """`auto` is this rank's GPU among the visible GPUs, or the CPU; `cuda` insists on a GPU.

    Raises InputError: there is no such GPU.
    """
    with Work("looking for GPUs"):  # a driver that is broken takes its time
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and count == 0):
        return "cpu"
    index = local_rank % max(1, count)
    if setting.startswith("cuda:"):
        index = int(setting.partition(":")[2])
    if index >= count:
        raise InputError(
            f"runtime.device is {setting} but torch {torch.__version__} sees {count} GPUs: install "
            "a CUDA build of torch, check the driver and CUDA_VISIBLE_DEVICES, or use "
            "runtime.device auto."
        )
    return f"cuda:{index}"


def check_machine(
    setting: str,
    device: str,
    encoders: Sequence[ResolvedEncoder],
    weights: WeightsMode = "resident",
) -> None:
    """Raise InputError unless the encoders can and should run on this machine; loads nothing.

    `setting`: runtime.device; `device`: what this setting means on this machine; `weights`:
    runtime.weights.
    """
    for encoder in encoders:
        if weights == "stream":
            is_streamed(encoder, device, weights)
        opened, decision = encoder.opened, encoder.decision
        if decision.implementation == "shardformer":
            from embed_precompute.encoders.shardformer import check_usable

            check_usable(
                f"{opened.where}.implementation is shardformer", opened.checkpoint.model_type
            )
        if decision.compiled and compiler() is None:
            raise InputError(
                f"{opened.where}.compile is true, and torch.compile needs a C++ compiler: neither "
                "g++ nor clang++ is in PATH (CXX names another). Install one, or set compile false "
                "and give a new output.path."
            )
        if decision.compiled and device.startswith("cuda") and not has_flex_attention():
            raise InputError(
                f"{opened.where}.compile is true, and on a GPU that needs torch 2.5 or newer: this "
                f"is {torch.__version__}. Set compile false and give a new output.path."
            )
        if setting == "auto" and device == "cpu":
            count = num_parameters(Source(opened.checkpoint, encoder.family, encoder.options))
            if count > LARGE:
                raise InputError(
                    f"{opened.where} has {count / 1e9:.1f} billion parameters, and torch "
                    f"{torch.__version__} sees no usable GPU. Check the driver and "
                    "CUDA_VISIBLE_DEVICES; to run it on the CPU nevertheless, set runtime.device "
                    "cpu."
                )


def warn_of_cpu(setting: str, device: str) -> None:
    """Log a warning if a CPU takes the place of a GPU."""
    if setting == "auto" and device == "cpu" and torch.version.cuda is not None:
        log.warning("device: cpu, for torch %s sees no usable GPU", torch.__version__)


def compiler() -> str | None:
    """The C++ compiler that torch.compile calls, on a GPU too; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "g++") or shutil.which("clang++")


def has_flex_attention() -> bool:
    """Whether torch has the attention that compiled layers need on a GPU."""
    return importlib.util.find_spec("torch.nn.attention.flex_attention") is not None


def start(
    resolved: ResolvedEncoder,
    device: str,
    output_dtype: str,
    self_check: Literal["auto", "always", "never"],
    weights: WeightsMode = "resident",
) -> TextEncoder:
    """Load an encoder, run one forward of each shape, and check its numbers.

    So a shape that does not fit in memory fails now and not after an hour. `self_check` auto means
    always on a GPU, and never on a CPU. `weights`: runtime.weights. Raises InputError.
    """
    encoder = build(resolved, device, output_dtype, weights)
    where, shapes = resolved.opened.where, list(resolved.every_shape())
    what = f"{where}: {'compiling, ' if resolved.decision.compiled else ''}first forwards"
    for output in steps(encoder.submit_all(shapes), len(shapes), what, " shapes"):
        output.wait()
    if self_check == "always" or (self_check == "auto" and encoder.device.type == "cuda"):
        began = time.monotonic()
        with Work(f"{where}: comparing with transformers"):
            check_numbers(encoder)
        log.info(
            "%s: self-check on %s passed in %.1f s",
            *(where, device, time.monotonic() - began),
        )
    return encoder


def check_numbers(encoder: TextEncoder) -> None:
    """Compare the embeddings of a few captions with those of transformers' model.

    `encoder` runs the captions in batches of the decided shapes, transformers' model one at a time.
    Raises InputError if the embeddings differ too much.
    """
    resolved = encoder.resolved
    captions = resolved.opened.tokenizer.encode_prepared(CAPTIONS)
    exact = resolved.options.dtype == "float32" and not resolved.options.tf32
    reference: TextEncoder = HfEncoder(resolved, str(encoder.device), "float32", encoder.model)
    if resolved.decision.implementation == "shardformer":  # it has changed its model in place
        plain = dataclasses.replace(resolved.decision, implementation="hf")
        reference = build(
            dataclasses.replace(resolved, decision=plain), str(encoder.device), "float32"
        )
    for batch in resolved.batches(captions):
        with encoder.computing(batch):
            found = {
                suffix: [each.clone() for each in encoder.cut(batch, suffix, values)]
                for suffix, values in encoder.forward(batch).items()
            }
        for line, row in enumerate(batch.rows.tolist()):
            for suffix, expected in _alone(reference, captions, row).items():
                problem = difference(found[suffix][line], expected, exact=exact)
                if problem is None:
                    continue
                implementation = resolved.decision.implementation
                remedy = "Set implementation hf with a new output.path"
                if implementation == "hf":
                    remedy = "Use other versions or another device"
                raise InputError(
                    f"{resolved.opened.where}: self-check failed on {encoder.device} "
                    f"({device_name(str(encoder.device))}, torch {torch.__version__}, transformers "
                    f"{importlib.metadata.version('transformers')}): for the caption "
                    f"{CAPTIONS[row][:40]!r} {implementation} has {problem} to transformers' own "
                    f"model, one caption at a time. {remedy}; runtime.self_check never trusts the "
                    "device as it is."
                )


def _alone(reference: TextEncoder, captions: Tokenized, row: int) -> dict[str, torch.Tensor]:
    """Suffix -> what transformers' model makes of one caption, in a batch of its own."""
    decision, tokenizer = reference.resolved.decision, reference.resolved.opened.tokenizer
    shape = (1, decision.padded_length or captions.extents[row])
    batch = make_batch(
        captions,
        [row],
        shape,
        tokenizer.pad_id or 0,
        tokenizer.empty,
        pads_left=tokenizer.pads_left,
    )
    with reference.computing(batch):
        outputs = reference.forward(batch)
        return {suffix: reference.cut(batch, suffix, v)[0] for suffix, v in outputs.items()}


def difference(found: torch.Tensor, expected: torch.Tensor, *, exact: bool) -> str | None:
    """How `found` [L, D] or [D] differs from `expected`; None if they are close enough.

    `exact`: both were computed in float32, so their relative difference must be small too.
    """
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}, not {list(expected.shape)},"
    relative, cosine = distance(found, expected)
    if exact and not relative <= MAX_RELATIVE_DIFFERENCE:
        return f"a relative difference of {relative:.2e} (at most {MAX_RELATIVE_DIFFERENCE})"
    if not cosine >= MIN_COSINE:
        return f"a cosine of {cosine:.6f} in one token (at least {MIN_COSINE})"
    return None


def distance(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """(max|a - b| / max|b|, the smallest cosine of any token); (inf, -1) if a number is not finite.

    Computed in float64. Two zero vectors count as equal.
    """
    a, b = found.double(), expected.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf, -1.0
    scale = float(b.abs().max()) if b.numel() else 0.0
    relative = float((a - b).abs().max()) / scale if scale else float((a != b).any())
    cosines = torch.nn.functional.cosine_similarity(a, b, dim=-1).reshape(-1)
    zero = ((a == 0).all(-1) & (b == 0).all(-1)).reshape(-1)
    cosines = cosines.masked_fill(zero, 1.0)
    return relative, float(cosines.min()) if cosines.numel() else 1.0
