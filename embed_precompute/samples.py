"""A sample: one caption of the input, and what became of it.

Every caption of the input is exactly one `Sample` with exactly one `Status`. Only a sample whose
status is `OK` has text to encode.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Status(enum.IntEnum):
    """What became of a sample: the number is in index/status.npy, the label everywhere else."""

    OK = 0
    NULL_TEXT = 1
    """The caption, or a column its recipe needs, is null."""
    INVALID_TEXT = 2
    """The caption is not UTF-8, or its recipe cannot be applied to this row, or an encoder has no
    position of it to store."""
    EMPTY_LIST = 3
    """The row's list of captions has no entry."""
    NON_FINITE = 4
    """The encoder gave inf or nan: our failure, counted and named."""

    @property
    def label(self) -> str:
        return self.name.lower()


INPUT_FACTS = (Status.NULL_TEXT, Status.INVALID_TEXT, Status.EMPTY_LIST)


def count_failed(status: Mapping[str, int]) -> int:
    """How many samples failed. `status`: status label -> number of samples."""
    return status[Status.NON_FINITE.label]


@dataclass(frozen=True)
class Sample:
    """One caption: `row` is its input row (0-based over all files in plan order)."""

    sample_id: str
    row: int
    text: str | None
    """The text that is encoded (normalised, recipe applied); None unless status is OK."""
    status: Status = Status.OK
    error: str | None = None
    """Why, when status is not OK."""
