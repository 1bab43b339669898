"""Weights of a checkpoint in another dtype than its files have, cast block by block.

Guarantees: loading takes the memory of the cast weights and one block more, whatever the files
hold: no tensor is in memory in two dtypes, and what was read of a file is let go at once. A tensor
that has the dtype already stays mapped from its file, so that processes of a node share its pages.
Costs: a file is opened anew for each block (its header is parsed again: tens of microseconds).

transformers casts tensor by tensor too, but keeps the whole file mapped meanwhile: measured, a
float32 checkpoint asked for in bfloat16 takes 3 times its weights while it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

BLOCK_BYTES = 1 << 24
"""Of a file that are mapped at a time."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Those that are cast, by their names in a safetensors header."""
OTHER_PARTS = {
    "t5": ("decoder.", "lm_head."),
    "clip": ("vision_model.", "visual_projection.", "text_projection.", "logit_scale"),
}
"""Encoder kind -> how the names of weights begin that a text encoder does not have."""


def kept_in_float32(name: str, dtype: torch.dtype) -> bool:
    """T5's wo overflows in float16, so transformers keeps it in float32 there."""
    return dtype == torch.float16 and ".wo." in name


def read_cast(files: list[Path], kind: str, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
    """The text encoder's tensors of safetensors files, in `dtype`; None when all have it already.

    Raises what safetensors raises for a damaged file.
    """
    found = list(_tensors(files, kind))
    if all(_target(name, stored, dtype) == stored for _, name, stored, _ in found):
        return None
    state = {}
    for path, name, stored, _ in found:
        target = _target(name, stored, dtype)
        if target is None or target == stored:
            with safe_open(path, "pt") as file:
                state[name] = file.get_tensor(name)
        else:
            state[name] = _cast(path, name, target)
    return state


def loaded_bytes(files: list[Path], kind: str, dtype: torch.dtype) -> int:
    """Bytes that the text encoder's weights take in `dtype`; reads headers only."""
    return sum(
        math.prod(shape) * (_target(name, stored, dtype) or torch.int64).itemsize
        for _, name, stored, shape in _tensors(files, kind)
    )


def _tensors(
    files: list[Path], kind: str
) -> Iterator[tuple[Path, str, torch.dtype | None, list[int]]]:
    """(file, name, dtype if it is one that is cast, shape) of the text encoder's tensors."""
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (it has no iterator)
                if not name.startswith(OTHER_PARTS[kind]):
                    tensor = file.get_slice(name)
                    yield path, name, DTYPES.get(tensor.get_dtype()), tensor.get_shape()


def _target(name: str, stored: torch.dtype | None, dtype: torch.dtype) -> torch.dtype | None:
    """None: no floating point numbers, left as they are."""
    if stored is None:
        return None
    return torch.float32 if kept_in_float32(name, dtype) else dtype


def _cast(path: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        shape: list[int] = file.get_slice(name).get_shape()
        if not shape:
            scalar: torch.Tensor = file.get_tensor(name)
            return scalar.to(dtype)
    target = torch.empty(shape, dtype=dtype)
    row_bytes = max(1, 4 * target[:1].numel())
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        with safe_open(path, "pt") as file:  # anew, and with it the last block's pages go
            part: Any = file.get_slice(name)
            target[start : start + step] = part[start : start + step]
    return target
