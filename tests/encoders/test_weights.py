"""Casting is torch's; what decides the digest is in test_families, the cache in test_checkpoint."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embed_precompute.encoders.weights import CODES, cast

DTYPES = {
    **{code: getattr(torch, name) for name, code in CODES.items()},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}


@pytest.mark.parametrize("target", CODES.values())
@pytest.mark.parametrize("code", DTYPES)
def test_numbers_are_cast_as_torch_does(code: str, target: str) -> None:
    """All patterns of 16 bits, as upper halves of wider numbers too; ties, inf, NaN, subnormals."""
    halves = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    size = DTYPES[code].itemsize
    if size > 2:
        below = torch.from_numpy(np.random.default_rng(0).integers(-2, 3, (1 << 16, 3)) << 14)
        below = below.to(torch.int16)[:, : size // 2 - 1]
        halves = torch.cat([below, halves[:, None]], dim=1).flatten()
    stored = halves.view(DTYPES[code])
    expected = stored.to(DTYPES[target])
    block = stored.view(torch.uint8).numpy()
    found = torch.from_numpy(cast(block, code, target).copy()).view(DTYPES[target])
    nan = torch.isnan(expected.double())
    assert torch.equal(torch.isnan(found.double()), nan)
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.itemsize]
    assert torch.equal(found.view(integers)[~nan], expected.view(integers)[~nan])
