"""Every preset against the text encoding of the pipeline that it follows, on tiny random models.

Where the shapes are the pipeline's own, each bit is equal. The positions that are stored and the
null embedding are the pipeline's, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

import presets_table
from embed_precompute.config.files import preset_paths

FEW = 7
"""The first captions tell most; with --long all are compared."""
MOST_FUSED = 3e-6
MOST_SHIFTED = 1e-5
"""Where the pipeline pads on the left: the same caption at higher positions, whose float32 angles
have fewer digits."""


def test_every_preset_is_compared() -> None:
    assert {path.stem for path in preset_paths()} == set(presets_table.PRESETS)


@pytest.mark.parametrize("name", presets_table.PRESETS)
def test_a_preset_is_its_pipeline(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    long = request.config.getoption("--long")
    captions = presets_table.CAPTIONS[: None if long else FEW]
    try:
        rows = presets_table.rows_of(name, tmp_path, captions)
    except presets_table.NotHereError as error:
        pytest.skip(str(error))
    for row in rows:
        assert row.hf == 0.0, row
        most = MOST_SHIFTED if presets_table.PRESETS[name].pads_left else MOST_FUSED
        assert row.fused is None or row.fused <= most, row
