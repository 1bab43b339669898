"""How near two embeddings of one caption are: what other environments may differ by.

Guarantees: computed in float64; inf or nan in either is never near; two zero vectors are equal.
Costs: one copy of each embedding in float64.
"""

from __future__ import annotations

import math

import torch

MAX_RELATIVE_DIFFERENCE = 1e-5
"""Of float32 that was computed in float32."""
MIN_COSINE = 0.999
"""Of half precision, for every token."""


def distance(stored: torch.Tensor, reference: torch.Tensor) -> tuple[float, float]:
    """(max|a - b| / max|b|, the smallest cosine of any token); (inf, -1) where one is not finite.

    Both are [L, D] or [C], of equal shape.
    """
    a, b = stored.double(), reference.double()
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf, -1.0
    scale = float(b.abs().max()) if b.numel() else 0.0
    difference = float((a - b).abs().max()) / scale if scale else float((a != b).any())
    cosines = torch.nn.functional.cosine_similarity(a, b, dim=-1).reshape(-1)
    zero = ((a == 0).all(-1) & (b == 0).all(-1)).reshape(-1)
    cosines = cosines.masked_fill(zero, 1.0)
    return difference, float(cosines.min()) if cosines.numel() else 1.0
