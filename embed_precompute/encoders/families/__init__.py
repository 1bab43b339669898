"""The registry of encoder families: what `kind` may be."""

from __future__ import annotations

from typing import Any

from embed_precompute.encoders.families.base import Family
from embed_precompute.encoders.families.clip import Clip
from embed_precompute.encoders.families.decoder import Decoder
from embed_precompute.encoders.families.t5 import T5

FAMILIES: dict[str, Family[Any]] = {
    "t5": T5(),
    "clip": Clip(),
    "decoder": Decoder(),
}
