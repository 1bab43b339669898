"""The presets that ship with the package: what each stores of a caption, and where that is written.

Guarantees: figures come from the preset alone, no checkpoint is looked for. The width of a vector
is what the preset states; `plan` and `run` refuse a checkpoint with another.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from embed_precompute.config.files import load_config, preset_path, preset_paths
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.families.base import DTYPE_BYTES, DType, EncoderConfig

HEAD = ("PRESET", "TENSOR", "STORED", "BYTES", "A TOKEN", "ENCODER", "AS IN")
ALIGNED = "<<<>><<"
NOTE = (
    "BYTES: of a caption at its full length. Where only real tokens are stored, a shorter caption "
    "has fewer.\n`embed-precompute presets NAME` shows a preset and its whole source; `run NAME` "
    "runs it."
)
KEPT = {"all": "all", "real": "real, up to", "real+1": "real and 1 pad, up to"}
"""Positions that are stored, in words."""


def table_lines() -> list[str]:
    """All presets, a row for each stored tensor."""
    rows: list[Sequence[str]] = [HEAD]
    for path in preset_paths():
        name, config = path.stem, load_config(path)
        for encoder, options in config.encoders.items():
            repository, commit, place = re.split("[@ ]", str(options.reference))
            source = f"{repository}@{commit[:8]} .../{place.rpartition('/')[2]}"
            for facts in _tensors(encoder, options, config.output.dtype):
                rows.append((name, *facts, options.pretrained, source))
                name = ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    shapes = [f"{side}{width}" for side, width in zip(ALIGNED, widths, strict=True)]
    lines = ["  ".join(map(format, row, shapes)).rstrip() for row in rows]
    return [*lines, "", NOTE]


def preset_lines(name: str) -> list[str]:
    """One preset: its facts as comments, then its file. Raises InputError: there is none such."""
    path = preset_path(name)
    config = load_config(path)
    lines = []
    for encoder, options in config.encoders.items():
        lines.append(f"# encoders.{encoder}, as in {options.reference}")
        for tensor, stored, full, token in _tensors(encoder, options, config.output.dtype):
            each = f", {token} a token" if token else ""
            lines.append(f"#   {tensor}: {stored}; bytes of a caption: {full}{each}")
    return [*lines, "", *path.read_text(encoding="utf-8").splitlines()]


def _tensors(
    name: str, options: EncoderConfig, dtype: DType
) -> Iterator[tuple[str, str, str, str]]:
    """(tensor, what is stored, bytes at full length, bytes of a token) of each stored tensor."""
    for output in FAMILIES[options.kind].outputs(options, None):
        size = output.width * DTYPE_BYTES[dtype]
        tensor = f"text_{name}{output.suffix}"
        if output.per == "caption":
            yield tensor, f"a vector of {output.width}", f"{size:,}", ""
        else:
            stored = f"{KEPT[output.positions or 'all']} {options.positions} x {output.width}"
            yield tensor, stored, f"{size * options.positions:,}", f"{size:,}"
