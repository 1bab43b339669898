"""Every failure a user can cause or meet, and the exit code it ends the program with.

An `EmbedPrecomputeError` has one message that says what was found, what was expected and what to
do; the CLI prints it without a traceback. Any other exception that escapes is a bug (exit 1).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

EXIT_COMPLETE = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_CONFLICT = 3
EXIT_VERIFICATION = 4
EXIT_INCOMPLETE = 5
EXIT_FAILED_SAMPLES = 6
EXIT_IO = 74
EXIT_INTERRUPTED = 75


class EmbedPrecomputeError(Exception):
    """Base of every error with a message meant for a person."""

    exit_code = EXIT_BUG
    found_by_every_rank = False
    """Each rank of a node finds it: it is about the configuration, or files that all see."""


@contextlib.contextmanager
def found_by_every_rank() -> Iterator[None]:
    """A user's mistake that is raised inside is found by each rank of a node alike."""
    try:
        yield
    except (InputError, ConflictError) as error:
        error.found_by_every_rank = True
        raise


class InputError(EmbedPrecomputeError):
    """Bad usage, configuration, captions or checkpoint: the user can mend it (exit 2)."""

    exit_code = EXIT_USAGE


def require(condition: bool, message: str) -> None:
    """Raise InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def refuse_file(folder: Path, key: str) -> None:
    """Raises InputError if a file is where a folder, or one above it, is to be; `key` named it."""
    found = next(each for each in (folder, *folder.absolute().parents) if os.path.lexists(each))
    # Without permission os.path.isdir returns False; Path.is_dir() may raise.
    require(
        os.path.isdir(found),
        f"{key} {folder}: {found} is not a folder. Choose another, or move it away.",
    )


class ConflictError(EmbedPrecomputeError):
    """The output belongs to another fingerprint, plan or input (exit 3)."""

    exit_code = EXIT_CONFLICT


class VerificationError(EmbedPrecomputeError):
    """Stored bytes are not what the records say (exit 4)."""

    exit_code = EXIT_VERIFICATION


class IncompleteError(EmbedPrecomputeError):
    """The dataset is not finished: running the same command again goes on (exit 5)."""

    exit_code = EXIT_INCOMPLETE


class StorageError(EmbedPrecomputeError):
    """A write, fsync or publish failed: no space, quota, I/O error (exit 74)."""

    exit_code = EXIT_IO


class InterruptedRunError(EmbedPrecomputeError):
    """A signal asked the run to stop; what was committed stays (exit 75)."""

    exit_code = EXIT_INTERRUPTED


class InternalError(EmbedPrecomputeError):
    """A promise of this program was broken, such as two different results for one unit (exit 1)."""

    exit_code = EXIT_BUG


def one_line(error: BaseException) -> str:
    """The error's text on one line, as every message of this program is."""
    return " ".join(str(error).split()).rstrip(".")
