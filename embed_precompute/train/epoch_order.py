"""The order of an epoch: a permutation that is computed where it is needed and never stored.

Guarantees: `EpochOrder(n, seed, epoch)` is one-to-one on [0, n) and a function of these three
numbers alone. No library's random numbers take part, so a position that was saved today means the
same sample under any later numpy or torch; ORDER_VERSION stands in every saved state. Each of the
n! orders is about equally likely for n up to 7, where that can be counted; for large n neighbours
in the order are strangers in the dataset.
Costs: no memory, whatever n is, and no start: asking for position 90,000,000 is as cheap as asking
for the first. In blocks of some thousand positions a sample takes about 0.15 us of one CPU core, so
an epoch of 100 million samples takes 15 s, divided over the ranks. A stored permutation of them is
made in 3 s, and is then 0.8 GB on every rank.

A Feistel network over rows x columns >= n (Black and Rogaway 2002, "Ciphers with arbitrary finite
domains"): each round moves one coordinate by a hash of the other; a result outside [0, n) goes
through the network again until it is inside. Rows are even, since a move along an odd coordinate
alone gives even permutations only.
"""

from __future__ import annotations

from math import isqrt
from typing import Any

import numpy as np
import xxhash

ORDER_VERSION = 1
ROUNDS = 16
"""With 12, the orders of 6 and 7 samples are not yet equally likely; it shows no more at 16."""

Array = np.ndarray[Any, np.dtype[Any]]


class EpochOrder:
    """The samples of one epoch: `order.at(positions)` are their indexes in the dataset."""

    def __init__(self, num_samples: int, seed: int, epoch: int) -> None:
        self._num_samples = np.uint64(num_samples)
        rows = isqrt(max(num_samples - 1, 0)) + 1
        rows += rows % 2
        self._sizes = (np.uint64(rows), np.uint64(-(-num_samples // rows)))
        names = [f"order {ORDER_VERSION}/{seed}/{epoch}/{k}" for k in range(ROUNDS)]
        self._keys = [np.uint64(xxhash.xxh3_64_intdigest(name.encode())) for name in names]

    def at(self, positions: Array) -> Array:
        """The dataset's index, int64, for each position of [0, n)."""
        found = self._network(positions.astype(np.uint64))
        (outside,) = np.nonzero(found >= self._num_samples)
        while outside.size:
            found[outside] = self._network(found[outside])
            outside = outside[found[outside] >= self._num_samples]
        return found.astype(np.int64)

    def _network(self, values: Array) -> Array:
        """A permutation of [0, rows x columns)."""
        columns = self._sizes[1]
        place = [values // columns, values % columns]
        for k, key in enumerate(self._keys):
            moved, other = k % 2, 1 - k % 2
            size = self._sizes[moved]
            # The hash's upper half scaled to [0, size): both factors are below 2**32.
            by = ((_mixed(place[other] + key) >> np.uint64(32)) * size) >> np.uint64(32)
            moved_to = place[moved] + by
            place[moved] = np.where(moved_to >= size, moved_to - size, moved_to)
        permuted: Array = place[0] * columns + place[1]
        return permuted


def _mixed(values: Array) -> Array:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
