"""A family's transformers model, loaded from a checkpoint onto a device.

Guarantees: every weight comes from the checkpoint, in the dtype asked for; only safetensors is
read. Loading takes the memory of the weights and a few blocks more, whatever dtype the files have.
A weight that has the dtype already and lies at a multiple of 64 bytes stays mapped from its file,
so that processes of a node share its pages. A GPU gets each weight from the file, and the host
never holds the model; of a decoder it holds what has to be cast.

transformers casts tensor by tensor too, but keeps the whole file mapped meanwhile: measured, a
float32 checkpoint asked for in bfloat16 takes 3 times its weights while it is loaded.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open

from embed_precompute.encoders.checkpoint import Checkpoint, quiet_transformers
from embed_precompute.encoders.families.base import EncoderConfig, Family
from embed_precompute.encoders.weights import (
    CODES,
    StoredWeight,
    extra_weights,
    num_threads,
    stored_weights,
)
from embed_precompute.errors import EmbedPrecomputeError, InputError, one_line
from embed_precompute.steps import BYTES, Work

log = logging.getLogger(__name__)
GB = 1e9
ALIGNMENT = 64
"""A weight begins at a multiple of this in memory. Where it lies decides how a product is summed,
and so the last bits: copies of a checkpoint have their weights at different places in their files,
and have to give equal embeddings."""
PIECE_BYTES = 1 << 16
TORCH_DTYPES = {code: getattr(torch, name) for name, code in CODES.items()}
CGROUPS = Path("/sys/fs/cgroup")

State = dict[str, torch.Tensor]
"""Name in the checkpoint -> weight."""


@dataclass(frozen=True)
class Source:
    """What a model is loaded from."""

    checkpoint: Checkpoint
    family: Family[Any]
    options: EncoderConfig

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.family.model_class(self.options, self.checkpoint))

    def weights(self, dtype: torch.dtype) -> list[StoredWeight]:
        """The weights that a model of `dtype` loads; reads headers only."""
        return stored_weights(self.checkpoint, self.family, self.options, name_of(dtype))

    def extra_weights(self, dtype: torch.dtype) -> State:
        """The weights that are not the checkpoint's, by their canonical names."""
        extra = extra_weights(self.checkpoint, self.family, self.options, name_of(dtype))
        return {weight.canonical: read_weights([weight])[weight.name] for weight in extra}


def name_of(dtype: torch.dtype) -> str:
    """float32 of torch.float32."""
    return str(dtype).removeprefix("torch.")


def num_parameters(source: Source) -> int:
    """How many numbers the text encoder's weights hold; reads headers only."""
    return sum(math.prod(weight.shape) for weight in source.weights(torch.float32))


def loaded_bytes(source: Source, dtype: torch.dtype) -> int:
    """How many bytes the text encoder's weights take in `dtype`; reads headers only."""
    return sum(weight.target_bytes for weight in source.weights(dtype))


def num_bytes(model: Any) -> int:
    """Number of bytes of a model's weights and buffers on its device, not in host memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type != "meta")


def read_weights(
    weights: Sequence[StoredWeight], more: Callable[[int], None] = lambda _: None
) -> State:
    """Weights as a model holds them, each at a multiple of 64 bytes.

    A weight that lies so in its file, in its dtype, is mapped. Others are copied and cast, block by
    block, and `more` is told how many bytes. Raises InputError, and what safetensors raises, for a
    damaged file.
    """
    state: State = {}
    to_copy = []
    for path in dict.fromkeys(weight.path for weight in weights):
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for weight in (each for each in weights if each.path == path):
                target = TORCH_DTYPES.get(weight.target)
                if weight.code == weight.target and weight.name in names:
                    found = state[weight.name] = file.get_tensor(weight.name)
                    if found.data_ptr() % ALIGNMENT == 0:
                        more(weight.target_bytes)
                        continue
                    target = found.dtype
                state[weight.name] = torch.empty(weight.shape, dtype=target)
                to_copy.append(weight)
    fill(((state[weight.name], weight) for weight in to_copy), more)
    return state


def mapped(weight: StoredWeight) -> torch.Tensor | None:
    """A weight where it lies in its file; None unless it has its dtype there, at a multiple of 64
    bytes. The pages are the page cache's; they are unmapped with the tensor."""
    if weight.code != weight.target or weight.offset is None or weight.offset % ALIGNMENT:
        return None
    # Copy on write, for torch warns of what it may not write; nobody does.
    found = np.memmap(weight.path, np.uint8, "c", weight.offset, weight.num_bytes)
    return torch.from_numpy(found).view(TORCH_DTYPES[weight.target]).view(weight.shape)


def fill(
    pairs: Iterable[tuple[torch.Tensor | None, StoredWeight]],
    more: Callable[[int], None] = lambda _: None,
) -> None:
    """Read weights into contiguous tensors in host memory, cast, several at a time. None: they are
    read into the page cache. `more` is told how many bytes were filled."""
    with ThreadPoolExecutor(num_threads()) as pool:
        list(pool.map(lambda pair: _fill(pair[0], pair[1], more), pairs))


def _fill(tensor: torch.Tensor | None, weight: StoredWeight, more: Callable[[int], None]) -> None:
    if tensor is None:
        _into_page_cache(weight)
        return
    held, start = tensor.reshape(-1).view(torch.uint8).numpy(), 0
    for block in weight.blocks():
        held[start : start + len(block)] = block
        start += len(block)
        more(len(block))


def _into_page_cache(weight: StoredWeight) -> None:
    """Read a weight's bytes and keep none. In small pieces: large ones, freed by many threads, stay
    with the process, for the C library's heaps do not give them back."""
    assert weight.offset is not None, "it is mapped"
    piece, left = memoryview(bytearray(PIECE_BYTES)), weight.num_bytes
    with open(weight.path, "rb", buffering=0) as file:
        file.seek(weight.offset)
        while left > 0 and (count := file.readinto(piece[: min(left, PIECE_BYTES)])):
            left -= count


def load_model(
    source: Source,
    dtype: torch.dtype | str,
    *,
    read: Callable[[Sequence[StoredWeight]], State] = read_weights,
    **hf_kwargs: Any,
) -> Any:
    """The model in eval mode; `hf_kwargs` go to transformers' from_pretrained.

    Raises InputError naming weights that are missing, of another shape, or of layers that
    config.json does not have.
    """
    where, folder = source.checkpoint.where, str(source.checkpoint.folder)
    model_class = source.model_class
    ours: dict[str, Any] = {
        "pretrained_model_name_or_path": folder,
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported to us instead of raised; refused below
        **source.family.model_arguments,
        "torch_dtype" if transformers.__version__.startswith("4.") else "dtype": dtype,
    }
    changes = source.family.config_changes(source.options, source.checkpoint)
    extra: dict[str, torch.Tensor] = {}
    with quiet_transformers():
        try:
            state = None
            plain = hf_kwargs.keys() <= {"attn_implementation"}
            plain = plain or source.family.loads_canonical_names
            if plain and isinstance(dtype, torch.dtype) and name_of(dtype) in CODES:
                stored = source.weights(dtype)
                state = read(stored)
                if source.family.loads_canonical_names:
                    state = {weight.canonical: state[weight.name] for weight in stored}
                extra = source.extra_weights(dtype)
            if state is not None or changes:
                config = copy.deepcopy(source.checkpoint.text_config)
                for name, value in changes.items():
                    setattr(config, name, value)
                ours["config"] = config
            if state is not None:
                ours |= {"pretrained_model_name_or_path": None, "state_dict": state}
            model, loading = model_class.from_pretrained(**{**hf_kwargs, **ours})
        except (EmbedPrecomputeError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # safetensors and transformers raise many kinds for damage
            reason = one_line(error)[:600]
            raise InputError(
                f"{where}: {folder} cannot be loaded as {model_class.__name__} "
                f"({type(error).__name__}: {reason}). Check that config.json belongs to these "
                "weights and that the files are complete."
            ) from error
    _check_loading(source, loading)
    source.family.adapt(model, source.options, source.checkpoint, extra)
    return model.eval().requires_grad_(False)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be taken on a device; None where the system does not say.

    On a CPU what lies in the page cache counts as free, and a limit of this process's cgroup counts
    whole.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        group = Path("/proc/self/cgroup").read_text().rpartition("0::/")[2].strip()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    folder = CGROUPS / group.lstrip("/")
    for each in (folder, *folder.parents):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            free.append(int((each / "memory.max").read_text()))
    return min(free, default=None)


def load_on(
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    *,
    forward_bytes: int,
    may_split: bool,
) -> Any:
    """The model on `device`.

    If the model and a forward of `forward_bytes` do not fit on a GPU and `may_split` is true,
    accelerate holds some layers in host memory and copies them for each forward. Raises InputError
    as `load_model` does, and if the model does not fit.
    """
    with out_of_memory(
        f"{source.checkpoint.where}: the weights do not fit on {device}. Use a device with more "
        "memory, a smaller dtype, runtime.weights stream with the implementation fused, or the "
        "implementation hf, which keeps what does not fit on a GPU in host memory."
    ):
        what, size = f"{source.checkpoint.where}: loading weights", loaded_bytes(source, dtype)
        if device.type != "cuda":
            with Work(what, size, BYTES) as work:
                read = functools.partial(read_weights, more=work.add)
                return load_model(source, dtype, read=read).to(device)
        free, before = torch.cuda.mem_get_info(device)[0], torch.cuda.memory_allocated(device)
        if size <= (free - forward_bytes if may_split else free):
            # transformers moves weight after weight from the file to the GPU.
            with Work(what, size, BYTES, lambda: torch.cuda.memory_allocated(device) - before):
                return load_model(source, dtype, device_map={"": str(device)})
        if not may_split:
            raise torch.OutOfMemoryError
        left = max(0, free - forward_bytes)
        log.warning(
            "%s: %.1f GB of weights, and %.1f GB are left on %s after a forward: the rest stays "
            "in host memory, and every forward copies it over the bus. A smaller dtype or another "
            "device avoids that.",
            *(source.checkpoint.where, size / GB, left / GB, device),
        )
        memory = {torch.device(device).index or 0: left, "cpu": size}
        with Work(what):
            return load_model(source, dtype, device_map="auto", max_memory=memory)


def _check_loading(source: Source, loading: dict[str, Any]) -> None:
    where = f"{source.checkpoint.where}: {source.checkpoint.folder}"
    # transformers 4 gives names, 5 gives (name, shape, shape).
    mismatched = [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]]
    if mismatched:
        raise InputError(
            f"{where} has weights of other shapes than its config.json says: {_some(mismatched)}. "
            "Use the config.json of these weights."
        )
    # A decoder, a vision tower or a head may be left over; parts of the encoder may not.
    family, options, checkpoint = source.family, source.options, source.checkpoint
    if missing := loading["missing_keys"]:
        in_files = {weight.canonical for weight in source.weights(torch.float32)}
        if unread := [key for key in missing if family.canonical_name(key) in in_files]:
            raise InputError(
                f"{where} has weights that transformers {transformers.__version__} does not read: "
                f"{_some(unread)}. The files are whole, but the model would have random numbers "
                "there. Install another release of transformers: 5.0 is known for this."
            )
        raise InputError(
            f"{where} lacks weights that its config.json asks for: {_some(missing)}. Download or "
            "convert the checkpoint again."
        )
    leftovers = [
        key
        for key in loading["unexpected_keys"]
        if (name := family.canonical_name(key)) is not None
        and name not in family.second_names.values()
        and not family.is_other_part(options, checkpoint, key)
    ]
    if leftovers:
        raise InputError(
            f"{where} has encoder weights that its config.json does not know: {_some(leftovers)}. "
            "Use the config.json of these weights."
        )


def _some(keys: Any) -> str:
    names = sorted(keys)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


@contextlib.contextmanager
def out_of_memory(message: str) -> Iterator[None]:
    """Say `message` when memory runs out, on a GPU or in the CPU's allocator."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(message) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(message) from error
