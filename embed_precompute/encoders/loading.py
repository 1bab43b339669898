"""A family's transformers model, loaded from a checkpoint onto a device.

Guarantees: every weight comes from the checkpoint, in the dtype asked for; only safetensors is
read. Loading takes the memory of the weights and one block of 16 MiB more, whatever dtype the files
have. A tensor that has the dtype already stays mapped from its file, so that processes of a node
share its pages. A GPU gets each weight from the file, and the host never holds the model.

transformers casts tensor by tensor too, but keeps the whole file mapped meanwhile: measured, a
float32 checkpoint asked for in bfloat16 takes 3 times its weights while it is loaded.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from embed_precompute.encoders.checkpoint import Checkpoint, quiet_transformers
from embed_precompute.encoders.families.base import EncoderConfig, Family
from embed_precompute.errors import EmbedPrecomputeError, InputError, one_line

log = logging.getLogger(__name__)
GB = 1e9
BLOCK_BYTES = 1 << 24
"""Number of bytes of a file that are mapped at a time while they are cast."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""The dtypes that are cast, by their names in a safetensors header."""
HARMLESS_LEFTOVERS = ("position_ids", "embed_tokens.weight")
"""Buffers that older versions saved, and the second name of T5's shared embedding."""


@dataclass(frozen=True)
class Source:
    """What a model is loaded from."""

    checkpoint: Checkpoint
    family: Family[Any]
    options: EncoderConfig

    @property
    def model_class(self) -> Any:
        return getattr(transformers, self.family.model_class(self.options, self.checkpoint))

    def tensors(self) -> Iterator[tuple[Path, str, torch.dtype | None, list[int]]]:
        """Yields (file, name, dtype, shape) of the text encoder's tensors; dtype None: not cast."""
        for path in self.checkpoint.files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  (it has no iterator)
                    if not self.family.is_other_part(self.options, self.checkpoint, name):
                        tensor = file.get_slice(name)
                        yield path, name, DTYPES.get(tensor.get_dtype()), tensor.get_shape()

    def target(
        self, name: str, stored: torch.dtype | None, dtype: torch.dtype
    ) -> torch.dtype | None:
        """The dtype a tensor gets; None: it holds no floating point numbers and is left alone."""
        if stored is None:
            return None
        return torch.float32 if self.family.keeps_float32(name, dtype) else dtype


def num_parameters(source: Source) -> int:
    """How many numbers the text encoder's weights hold; reads headers only."""
    return sum(math.prod(shape) for _, _, _, shape in source.tensors())


def loaded_bytes(source: Source, dtype: torch.dtype) -> int:
    """How many bytes the text encoder's weights take in `dtype`; reads headers only."""
    return sum(
        math.prod(shape) * (source.target(name, stored, dtype) or torch.int64).itemsize
        for _, name, stored, shape in source.tensors()
    )


def num_bytes(model: Any) -> int:
    """Number of bytes of a model's weights and buffers on its device, not in host memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type != "meta")


def load_model(source: Source, dtype: torch.dtype | str, **hf_kwargs: Any) -> Any:
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
    with quiet_transformers():
        try:
            cast = None
            if hf_kwargs.keys() <= {"attn_implementation"} and isinstance(dtype, torch.dtype):
                cast = read_cast(source, dtype)
            if cast is not None or changes:
                config = model_class.config_class.from_pretrained(folder, local_files_only=True)
                for name, value in changes.items():
                    setattr(config, name, value)
                ours["config"] = config
            if cast is not None:
                ours |= {"pretrained_model_name_or_path": None, "state_dict": cast}
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
    source.family.adapt(model, source.options)
    return model.eval().requires_grad_(False)


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
        "memory, a smaller dtype, or the implementation hf, which keeps what does not fit on a GPU "
        "in host memory."
    ):
        if device.type != "cuda":
            return load_model(source, dtype).to(device)
        size, free = loaded_bytes(source, dtype), torch.cuda.mem_get_info(device)[0]
        if size <= (free - forward_bytes if may_split else free):
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
        return load_model(source, dtype, device_map="auto", max_memory=memory)


def read_cast(source: Source, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """The text encoder's tensors in `dtype`, cast block by block; None when all have that dtype.

    Raises what safetensors raises for a damaged file.
    """
    found = list(source.tensors())
    if all(source.target(name, stored, dtype) == stored for _, name, stored, _ in found):
        return None
    state = {}
    for path, name, stored, shape in found:
        target = source.target(name, stored, dtype)
        if target is None or target == stored or not shape:
            with safe_open(path, "pt") as file:
                whole: torch.Tensor = file.get_tensor(name)
            state[name] = whole if target is None else whole.to(target)
            continue
        state[name] = torch.empty(shape, dtype=target)
        step = max(1, BLOCK_BYTES // max(1, 4 * math.prod(shape[1:])))
        for start in range(0, shape[0], step):
            with safe_open(path, "pt") as file:  # opened again, to release the last block's pages
                block: Any = file.get_slice(name)
                state[name][start : start + step] = block[start : start + step]
    return state


def _check_loading(source: Source, loading: dict[str, Any]) -> None:
    where = f"{source.checkpoint.where}: {source.checkpoint.folder}"
    # transformers 4 gives names, 5 gives (name, shape, shape).
    mismatched = [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]]
    if mismatched:
        raise InputError(
            f"{where} has weights of other shapes than its config.json says: {_some(mismatched)}. "
            "Use the config.json of these weights."
        )
    if loading["missing_keys"]:
        raise InputError(
            f"{where} lacks weights that its config.json asks for: "
            f"{_some(loading['missing_keys'])}. Download or convert the checkpoint again."
        )
    # A decoder, a vision tower or a head may be left over; parts of the encoder may not.
    family, options, checkpoint = source.family, source.options, source.checkpoint
    leftovers = [
        key
        for key in loading["unexpected_keys"]
        if key.startswith(family.encoder_prefixes)
        and not key.endswith(HARMLESS_LEFTOVERS)
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
