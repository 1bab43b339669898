"""The device an encoder runs on, and the environment: what else its bytes may depend on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

from embed_precompute import __version__
from embed_precompute.distributed import DistContext
from embed_precompute.encoders.spec import ResolvedEncoder
from embed_precompute.errors import InputError


def environment(device: str, encoders: Sequence[ResolvedEncoder] = ()) -> dict[str, str]:
    """What bytes may depend on besides the spec: versions, ours too, device, CPU capability."""
    import torch

    versions = {
        name: importlib.metadata.version(name)
        for name in ("torch", "transformers", "tokenizers", "pyarrow", "numpy")
    }
    if any(encoder.implementation == "shardformer" for encoder in encoders):
        versions["colossalai"] = importlib.metadata.version("colossalai")
    versions["embed_precompute"] = __version__  # its own layers round as its release does
    versions["torch"] = torch.__version__  # with the build, such as +cpu or +cu124
    on_gpu = device.startswith("cuda")
    return {
        **versions,
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def resolve_device(device: str, dist: DistContext) -> str:
    """`auto` is this rank's GPU among the visible ones, or the CPU; `cuda` insists on a GPU."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return "cpu"
    if device in ("auto", "cuda") and count:
        return f"cuda:{dist.local_rank % count}"
    if int(device.partition(":")[2] or 0) < count:
        return device
    raise InputError(
        f"runtime.device is {device} but torch {torch.__version__} sees {count} GPUs: install a "
        "CUDA build of torch, check CUDA_VISIBLE_DEVICES, or use runtime.device auto."
    )


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
