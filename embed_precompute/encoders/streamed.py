"""A model of which one layer at a time is in memory; the others stay in the checkpoint's files.

Guarantees: a weight has the values that loading the whole model gives, at a multiple of 64 bytes. A
layer that was not brought has no weights at all, so nothing is computed with another layer's.
Costs: memory of two layers, of the embeddings and of all norms and biases. On a GPU also two layers
in page-locked host memory. On a CPU a weight that has its dtype in the file, at a multiple of 64
bytes, is mapped, and takes pages of the page cache alone. A thread reads the next layer through the
page cache while the caller computes with the layer before, and casts it.

What stays on the meta device until `bring` are the matrices of the layers' linears, which is
nearly all that a layer has.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from embed_precompute.encoders.loading import (
    TORCH_DTYPES,
    Source,
    State,
    fill,
    load_model,
    mapped,
    out_of_memory,
    read_weights,
)
from embed_precompute.encoders.weights import StoredWeight
from embed_precompute.errors import InputError

PLACE = 512
"""A weight begins at a multiple of this in a layer's buffer, as it does where torch allocates it on
a GPU."""


class LayerBuffer:
    """The matrices of one layer. On a GPU they come by page-locked memory."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self.held = torch.empty_like(self.host, device=device) if on_gpu else self.host
        self.arrived: torch.cuda.Event | None = None
        """On a GPU: when `held` is what `host` is."""
        self.values: dict[nn.Linear, torch.Tensor] = {}
        """The layer's matrices: parts of `held`, or mapped."""


class StreamedWeights:
    """A transformers model on a device, and the weights of one layer of it at a time."""

    def __init__(self, source: Source, dtype: torch.dtype, device: torch.device) -> None:
        """Loads everything but the matrices of linears; `stream` has to follow.

        Raises InputError as `load_model` does, and if what is loaded does not fit on the device.
        """
        self._where, self._device = source.checkpoint.where, device
        weights = source.weights(dtype)
        self._files = {weight.path: _identity(weight.path) for weight in weights}
        self.model = load_model(source, dtype, read=_stand_ins)
        self._stored: dict[nn.Linear, StoredWeight] = {}
        by_name = {weight.canonical: weight for weight in weights}
        resident: dict[str, list[tuple[nn.Module, str]]] = {}
        for path, module in self.model.named_modules():
            for name, _ in list(module.named_parameters(recurse=False)):
                canonical = source.family.canonical_name(f"{path}.{name}".lstrip("."))
                assert canonical is not None, f"{path}.{name} is a weight of the model"
                if isinstance(module, nn.Linear) and name == "weight":
                    self._stored[module] = by_name[canonical]
                    _take_away(module)
                else:
                    resident.setdefault(canonical, []).append((module, name))
        state = read_weights([by_name[canonical] for canonical in resident])
        for canonical, places in resident.items():
            parameter = nn.Parameter(state[by_name[canonical].name], requires_grad=False)
            for module, name in places:
                setattr(module, name, parameter)
        with out_of_memory(f"{self._where}: not even the embeddings fit on {device}."):
            self.model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))
        self._layers: list[dict[nn.Linear, StoredWeight]] = []
        self._buffers: list[LayerBuffer] = []
        self._present: tuple[int, LayerBuffer] | None = None
        self._coming: tuple[int, Future[LayerBuffer]] | None = None
        self._reader = ThreadPoolExecutor(1, "weights")
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def stream(self, blocks: Sequence[nn.Module]) -> None:
        """From now on `bring(n)` brings the matrices of `blocks[n]`. Those of other linears are
        loaded to stay. Calling a block as a module brings it, too."""
        for number, block in enumerate(blocks):
            linears = [each for each in block.modules() if isinstance(each, nn.Linear)]
            self._layers.append({linear: self._stored.pop(linear) for linear in linears})
            block.register_forward_pre_hook(functools.partial(self._before, number))
        state = read_weights(list(self._stored.values()))
        for linear, weight in self._stored.items():
            _give(linear, state[weight.name].to(self._device))
        with out_of_memory(
            f"{self._where}: two layers, of {self.layer_bytes / 1e9:.1f} GB each, do not fit on "
            f"{self._device} beside the embeddings. Use a device with more memory."
        ):
            self._buffers = [LayerBuffer(self.layer_bytes, self._device) for _ in range(2)]

    @property
    def layer_bytes(self) -> int:
        """Bytes of the largest layer's buffer."""
        return max((sum(map(_space, layer.values())) for layer in self._layers), default=0)

    def bring(self, number: int) -> None:
        """Let layer `number` have its weights. The layer that had them loses them, and the next
        one is read meanwhile. Raises InputError: a file has changed or cannot be read."""
        if self._present is not None and self._present[0] == number:
            return
        if self._coming is None or self._coming[0] != number:
            if self._coming is not None:
                self._coming[1].result()  # it is still being written
            self._coming = number, self._begin(number)
        buffer = self._coming[1].result()
        if buffer.arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(buffer.arrived)
        if self._present is not None:
            for linear in self._layers[self._present[0]]:
                _take_away(linear)
        for linear, values in buffer.values.items():
            _give(linear, values)
        self._present = number, buffer
        _give_back()
        following = (number + 1) % len(self._layers)
        self._coming = following, self._begin(following)

    def _before(self, number: int, block: nn.Module, arguments: Any) -> None:
        self.bring(number)

    def _begin(self, number: int) -> Future[LayerBuffer]:
        """Begin to read a layer into the buffer that no layer has."""
        free = self._buffers[0]
        if self._present is not None and self._present[1] is free:
            free = self._buffers[1]
        computed = None
        if self._copies is not None:  # the GPU may still compute with what is in this buffer
            computed = torch.cuda.current_stream(self._device).record_event()
        return self._reader.submit(self._read, self._layers[number], free, computed)

    def _read(
        self,
        layer: Mapping[nn.Linear, StoredWeight],
        buffer: LayerBuffer,
        computed: torch.cuda.Event | None,
    ) -> LayerBuffer:
        if buffer.arrived is not None:
            buffer.arrived.synchronize()  # `host` may still be on its way
        buffer.values = _views(layer, buffer.held)
        try:
            targets: dict[nn.Linear, torch.Tensor | None] = {**_views(layer, buffer.host)}
            if self._copies is None:
                for linear, weight in layer.items():
                    if (found := mapped(weight)) is not None:
                        buffer.values[linear], targets[linear] = found, None
            fill((target, layer[linear]) for linear, target in targets.items())
            changed = [path for path, found in self._files.items() if _identity(path) != found]
        except OSError as error:
            raise InputError(
                f"{self._where}: {error.filename} cannot be read any more ({error.strerror}), and "
                "streamed weights are read as long as a run lasts. Restore it and run again."
            ) from error
        if changed:
            raise InputError(
                f"{self._where}: {changed[0]} was changed, and streamed weights are read as long "
                "as a run lasts. Restore it and run again."
            )
        if self._copies is not None:
            assert computed is not None
            with torch.cuda.stream(self._copies):
                self._copies.wait_event(computed)
                buffer.held.copy_(buffer.host, non_blocking=True)
                buffer.arrived = self._copies.record_event()
        return buffer


def _give_back() -> None:
    """Return free memory to the system, where the C library can (glibc): the temporary tensors of a
    forward leave gaps that it would keep, more with every layer."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _identity(path: Path) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _stand_ins(weights: Sequence[StoredWeight]) -> State:
    """A tensor for each weight, of its shape and dtype, that takes no memory as long as nobody
    looks into it: transformers checks them and puts them into its modules."""
    floats = [weight for weight in weights if weight.target in TORCH_DTYPES]
    size = max(map(_space, floats), default=0)
    nothing = torch.empty(size, dtype=torch.uint8)  # no page of it is touched
    state = {
        weight.name: nothing[: weight.target_bytes]
        .view(TORCH_DTYPES[weight.target])
        .view(weight.shape)
        for weight in floats
    }
    return state | read_weights([weight for weight in weights if weight.name not in state])


def _space(weight: StoredWeight) -> int:
    return -(-weight.target_bytes // PLACE) * PLACE


def _views(
    layer: Mapping[nn.Linear, StoredWeight], memory: torch.Tensor
) -> dict[nn.Linear, torch.Tensor]:
    """The matrices of a layer in `memory` [n] uint8, one after the other."""
    views, start = {}, 0
    for linear, weight in layer.items():
        part = memory[start : start + weight.target_bytes]
        views[linear] = part.view(TORCH_DTYPES[weight.target]).view(weight.shape)
        start += _space(weight)
    return views


def _give(linear: nn.Linear, values: torch.Tensor) -> None:
    linear.weight = nn.Parameter(values, requires_grad=False)


def _take_away(linear: nn.Linear) -> None:
    _give(linear, torch.empty_like(linear.weight, device="meta"))
