"""The report: report.html and the card, written from what is on disk.

Guarantees: the same dataset and logs give the same bytes. Nothing else of the dataset is changed,
and no file is overwritten that was not written here.
Costs: those of `facts.gather`.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from embed_precompute.audit.card import CARD, configured, write_card
from embed_precompute.audit.facts import gather
from embed_precompute.audit.info import read_status
from embed_precompute.audit.page import BEGIN, Dataset, page_of
from embed_precompute.audit.timeline import read_timeline
from embed_precompute.audit.verify import RESULT
from embed_precompute.errors import refuse_file, require
from embed_precompute.job.metrics import read_effort
from embed_precompute.steps import byte_size
from embed_precompute.store.commit import replace_bytes

PAGE = "report.html"


def report_page(root: Path) -> bytes:
    """The page about the dataset in `root`, finished or not. Raises InputError if there is none."""
    status, run = read_status(root), _read_json(root / "run.json")
    return page_of(
        Dataset(
            root.resolve().name,
            status,
            gather(root, status.plan),
            configured(root),
            read_effort(root),
            read_timeline(root, run),
            _read_json(root / RESULT),
            run,
        )
    )


def write_report(root: Path, output: Path | None = None) -> list[str]:
    """Writes the page and the card into `root`, or the page alone to `output`. Returns what was
    written, for a person. Raises StorageError where that cannot be written."""
    root = Path(root)
    path = output or root / PAGE
    require(not path.is_dir(), f"{path} is a folder. Give a file, such as {path / PAGE}.")
    if output is not None:
        refuse_file(path.parent, "--output")
    require(
        not os.path.lexists(path) or _is_page(path),
        f"{path} is there, and is no page of a report: it stays as it is. Move it away, or give "
        "another file with --output.",
    )
    page = report_page(root)
    replace_bytes(path, page)
    lines = [f"written: {path} ({byte_size(len(page))})"]
    if output is not None:
        return lines
    try:
        ours = write_card(root)
    except FileNotFoundError:
        return [*lines, f"not written: {root / CARD}, the card of a finished dataset"]
    if not ours:
        return [*lines, f"left as it is: {root / CARD}, which this program did not write"]
    return [*lines, f"written: {root / CARD}"]


def _is_page(path: Path) -> bool:
    """Whether a page was written here before; an empty file may become one."""
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(len(BEGIN)) in (b"", BEGIN.encode())
    return False


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file for people; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    return {}
