"""Files that leave a dataset: damaged ones, derived ones that are stale, and those of dead writers.

Guarantees: what is removed is a derived file or has a temporary name; anything else is moved to
`_quarantine/`, never deleted. The temporary file of a process that may still live on another
machine stays.
Costs: `remove_dead` lists the folders once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

from embed_precompute.store.commit import (
    TEMP_PREFIX,
    make_folder,
    staged_files,
    storage_error,
    sync_folder,
    this_host,
)

QUARANTINE = "_quarantine"
_TEMP_NAME = re.compile(
    re.escape(TEMP_PREFIX) + r".+-(?P<host>[A-Za-z0-9._]+)-(?P<pid>[0-9]+)-[0-9a-f]{12}"
)


def move_aside(root: Path, path: Path) -> bool:
    """Takes a file out of the dataset, into `_quarantine/` of `root`; False when it is gone."""
    folder = root / QUARANTINE
    make_folder(folder)
    try:
        os.replace(path, folder / f"{path.name}-{secrets.token_hex(6)}")
        sync_folder(folder)
        sync_folder(path.parent)
    except FileNotFoundError:
        return False  # a peer did it
    except OSError as error:
        raise storage_error(path, "moving it to quarantine", error) from error
    return True


def remove_file(path: Path) -> None:
    """Removes a derived file durably; it may be gone already."""
    try:
        path.unlink(missing_ok=True)
        sync_folder(path.parent)
    except FileNotFoundError:
        return  # nor is there its folder
    except OSError as error:
        raise storage_error(path, "removing it", error) from error


def remove_leftovers(*folders: Path) -> None:
    """Removes the temporary files of processes that died, from a dataset that is complete.

    A process that lives may lose one too, of a file that another has published: it finds that
    file when it comes to publish its own.
    """
    for path in _temporaries(*folders):
        with contextlib.suppress(OSError):
            path.unlink()


def remove_dead(root: Path) -> int:
    """Removes temporary files whose writer was on this machine and is dead; gives their number.

    Those of other machines stay until the dataset is complete: nobody here can tell.
    """
    removed = 0
    own = staged_files()
    for path in _temporaries(*_folders(root)):
        match = _TEMP_NAME.fullmatch(path.name)
        if match is None or match["host"] != this_host() or path in own:
            continue
        pid = int(match["pid"])
        # In a container that was started again, our own pid may be that of the dead writer.
        if pid != os.getpid() and _lives(pid):
            continue
        with contextlib.suppress(OSError):
            path.unlink()
            removed += 1
    return removed


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError as error:
        return error.errno != errno.ESRCH
    except OverflowError:
        return False
    return True


def _folders(root: Path) -> Iterator[Path]:
    """Every folder of a dataset that files are published in."""
    yield root
    yield root / "index"
    with contextlib.suppress(OSError), os.scandir(root / "shards") as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield Path(entry.path)


def _temporaries(*folders: Path) -> Iterator[Path]:
    for folder in folders:
        with contextlib.suppress(OSError):
            for name in os.listdir(folder):
                if name.startswith(TEMP_PREFIX):
                    yield folder / name
