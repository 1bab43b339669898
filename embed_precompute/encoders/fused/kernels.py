"""What a layer does besides products and attention, on buffers: embeddings, norms, gates.

Guarantees: every function works row by row, so that a row's bits depend on that row alone. Compiled
and uncompiled differ in rounding only; which one is used is part of an encoder's specification.
Costs: uncompiled a few passes over rows that stay in a cache; compiled one pass, and seconds of
torch.compile at the first call of each (its cache is shared by all ranks and runs of a node).
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional

ROWS = 256
"""Rows of one step: small enough to stay in a CPU's cache."""


class Kernels:
    """The kernels of one encoder."""

    def __init__(self, device: torch.device, *, compiled: bool) -> None:
        self._rows = ROWS if device.type == "cpu" else 1 << 62  # a GPU takes all rows at once
        self._compiled = compiled

    def embed(self, ids: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> None:
        """out [T, D] = the rows `ids` [T] of a table."""
        for part in _parts(len(ids), self._rows):
            out[part] = functional.embedding(ids[part], table)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """T5's norm of the rows of x [T, D]: no mean, no bias; the statistics in float32."""
        self._run(_rms_norm, (x, out), weight.float(), eps)

    def layer_norm(self, x: torch.Tensor, norm: Any, out: torch.Tensor) -> None:
        """CLIP's norm of the rows of x [T, D]; `norm` is the model's module."""
        self._run(_layer_norm, (x, out), norm.weight.float(), norm.bias.float(), norm.eps)

    def add_layer_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor,
        bias: torch.Tensor,
        norm: Any,
        out: torch.Tensor,
    ) -> None:
        """x += delta + bias, rounded once; then the norm of x."""
        # Two kernels: torch 2.5 cannot compile a sum that is kept and normed at once.
        self._run(_add, (x, delta), bias.float())
        self.layer_norm(x, norm, out)

    def activate(self, inner: torch.Tensor, activation: str, gate: torch.Tensor | None) -> None:
        """inner = activation(inner) * gate, in place; [T, F]."""
        if gate is None:
            self._run(_activate, (inner,), activation)
        else:
            self._run(_activate_gated, (inner, gate), activation)

    def activate_biased(self, inner: torch.Tensor, activation: str, bias: torch.Tensor) -> None:
        """inner = activation(inner + bias), in place; [T, F]."""
        self._run(_activate_biased, (inner,), bias.float(), activation)

    def _run(self, kernel: Callable[..., None], rows: tuple[torch.Tensor, ...], *rest: Any) -> None:
        if self._compiled:
            _compiled(kernel)(*rows, *rest)
            return
        for part in _parts(rows[0].shape[0], self._rows):
            kernel(*(tensor[part] for tensor in rows), *rest)


def _parts(num_rows: int, size: int) -> Iterator[slice]:
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


@contextlib.contextmanager
def one_compiles_first(compiled: bool) -> Iterator[None]:
    """One process of this user on this node at a time: the first fills torch's cache, in which the
    others then find everything, instead of all compiling the same at once."""
    if not compiled:
        yield
        return
    path = os.path.join(tempfile.gettempdir(), f"embed-precompute-{os.getuid()}.compile.lock")
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


@functools.cache
def _compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    # Never for varying shapes: which of its variants ran would then depend on a batch's captions.
    return torch.compile(kernel, fullgraph=True, dynamic=False)


def _rms_norm(x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
    out.copy_(functional.rms_norm(x.float(), weight.shape, weight, eps))


def _layer_norm(
    x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> None:
    out.copy_(functional.layer_norm(x.float(), weight.shape, weight, bias, eps))


def _add(x: torch.Tensor, delta: torch.Tensor, bias: torch.Tensor) -> None:
    x.copy_(x.float() + (delta.float() + bias))


def _activate(inner: torch.Tensor, activation: str) -> None:
    inner.copy_(ACTIVATIONS[activation](inner.float()))


def _activate_gated(inner: torch.Tensor, gate: torch.Tensor, activation: str) -> None:
    inner.copy_(ACTIVATIONS[activation](inner.float()) * gate)


def _activate_biased(inner: torch.Tensor, bias: torch.Tensor, activation: str) -> None:
    inner.copy_(ACTIVATIONS[activation](inner.float() + bias))


def _gelu_new(x: torch.Tensor) -> torch.Tensor:
    """0.5 x (1 + tanh(u / 2)) as x / (1 + exp(-u)): the same, and half the time of a tanh."""
    return x / (1 + torch.exp(x * (-GELU_LINEAR - GELU_CUBIC * x * x)))


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-1.702 * x))


GELU_LINEAR = 2 * (2 / math.pi) ** 0.5
GELU_CUBIC = 0.044715 * GELU_LINEAR

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_new": _gelu_new,
    "quick_gelu": _quick_gelu,
}
"""Of float32, by the names of config.json."""
