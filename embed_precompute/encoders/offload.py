"""Weights that do not fit on the device: layers that wait in host memory for their turn.

Guarantees: every layer runs on the device, by the kernels and on the numbers that it would have if
it stayed there, so no bit changes. Nothing is left in host memory while everything fits.
Costs: each forward copies the matrices left in host memory over the bus, one after another, by
accelerate's hooks; the host holds them once, mapped from the checkpoint where that has the dtype.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from embed_precompute.errors import InputError

if TYPE_CHECKING:
    from embed_precompute.encoders.spec import ResolvedEncoder

log = logging.getLogger(__name__)
GB = 1e9
BUS_BYTES_PER_S = 10e9
"""Of copies out of memory that is not page-locked, over 16 lanes of PCIe 4: about half the bus."""
DEVICE_RESERVE = 1 << 29
"""For libraries' workspaces and what the allocator cannot use."""


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a GPU; None for a CPU, which swaps or fails by itself."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def forward_bytes(resolved: ResolvedEncoder, config: Any) -> int:
    """An upper estimate of what the largest forward takes beside the weights.

    `config`: transformers' of the text encoder.
    """
    lines, length = max(
        [*resolved.shapes, resolved.null_shape], key=lambda shape: shape[0] * shape[1]
    )
    if resolved.pooled:
        width = inner = config.hidden_size
        hidden, heads = config.intermediate_size, config.num_attention_heads
    else:
        width, hidden, heads = config.d_model, config.d_ff, config.num_heads
        inner = heads * config.d_kv
    dtype: torch.dtype = getattr(torch, resolved.config.dtype)
    # Norms, and in float16 the residual, are in float32.
    rows = 16 * width + dtype.itemsize * (4 * inner + 2 * hidden)
    # Only plain attention has a tensor of all scores, and another for their softmax in float32.
    scores = 0 if resolved.implementation == "fused" else heads * length * (4 + dtype.itemsize)
    return int(lines * length * (rows + scores)) + DEVICE_RESERVE


def layers_of(model: Any, *, pooled: bool) -> torch.nn.ModuleList:
    """The layers of a transformers T5 encoder or CLIP text model."""
    # transformers 4 wraps CLIP's text model once more than 5.
    layers = getattr(model, "text_model", model).encoder.layers if pooled else model.encoder.block
    assert isinstance(layers, torch.nn.ModuleList)
    return layers


def place(
    what: str, model: Any, layers: torch.nn.ModuleList, device: torch.device, room: int
) -> None:
    """Move a model from the CPU to `device`, with at most `room` bytes of its weights: the last of
    its layers stay in host memory as far as they must. `what` begins messages.

    Raises InputError when what is no layer does not fit beside one of them.
    """
    import accelerate

    total, of_layers = num_bytes(model), [num_bytes(layer) for layer in layers]
    left = room - (total - sum(of_layers)) - max(of_layers)  # one is there while it runs
    if left < 0:
        raise InputError(
            f"{what}: not even its embeddings and one layer of its weights fit on {device} beside "
            f"a forward ({room / GB:.1f} GB are left for them). Use a device with more memory, "
            "smaller batches or a smaller dtype."
        )
    num_resident = 0
    while num_resident < len(of_layers) and sum(of_layers[: num_resident + 1]) <= left:
        num_resident += 1
    waiting = layers[num_resident:]
    linears = [each for each in waiting.modules() if isinstance(each, torch.nn.Linear)]
    for module in set(model.modules()) - set(linears):
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            tensor.data = tensor.data.to(device)
    for linear in linears:
        accelerate.cpu_offload(linear, execution_device=device)
    copied = sum(of_layers[num_resident:])
    log.warning(
        "%s: %d of %d layers (%.1f of %.1f GB of weights) do not fit on %s and stay in host "
        "memory: each forward copies them over the bus, about %.1f s. Larger batches make that "
        "count less; a smaller dtype or another device avoids it.",
        *(what, len(waiting), len(of_layers), copied / GB, total / GB, device),
        copied / BUS_BYTES_PER_S,
    )


def each_on_device(layers: Any) -> Iterator[Any]:
    """The layers in turn, each with its weights on its device until the next is taken; for those
    that are not called as modules. Take no weight of a linear at another time."""
    for layer in layers:
        waiting = [module for module in layer.modules() if hasattr(module, "_hf_hook")]
        for module in waiting:
            module._hf_hook.pre_forward(module)
        try:
            yield layer
        finally:
            for module in waiting:
                module._hf_hook.post_forward(module, None)


def num_bytes(model: Any) -> int:
    """Bytes of a model's weights and buffers that are not waiting in host memory."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type != "meta")
