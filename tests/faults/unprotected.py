"""`python -m faults.unprotected run CONFIG`: the program without what protects its bytes.

No sha256 of anything, no row checksums, no fsync; the records stay, for finalize reads them, and
say nothing. Only to measure what the protection costs.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from embed_precompute.store import shards


class _NoDigest:
    def update(self, payload: Any) -> None:
        return

    def hexdigest(self) -> str:
        return "0" * 64

    def digest(self) -> bytes:
        return bytes(32)


@contextmanager
def unprotected() -> Iterator[None]:
    """No sha256, no row checksums, no fsync in this process."""
    real = hashlib.sha256, shards.xxhash, os.fsync
    hashlib.sha256 = lambda *_, **__: _NoDigest()  # type: ignore[assignment]
    shards.xxhash = SimpleNamespace(xxh3_64_intdigest=lambda *_: 0)  # type: ignore[assignment]
    os.fsync = lambda fd: None
    try:
        yield
    finally:
        hashlib.sha256, shards.xxhash, os.fsync = real  # type: ignore[misc]


if __name__ == "__main__":
    from embed_precompute.cli.main import main

    with unprotected():
        sys.exit(main(sys.argv[1:]))
