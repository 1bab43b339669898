"""The house in figures: how large it is, who imports whom, and what runs for a job of 3 captions.

    python scripts/house.py          lines, modules, rooms, floors, arrows, widest imports, tests
    python scripts/house.py --run    also: the modules that a job of 3 captions runs, and the pairs

A room is what lies directly in the package: a folder or a module. An arrow is a pair of rooms of
which one imports from the other; a floor is one more than the highest floor below. Imports are
counted wherever they stand, those inside functions and for type checkers too. A module runs when
one of its functions does; a pair is two modules of which one calls the other.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import sys
import tempfile
import threading
from collections import defaultdict
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import grimp

PACKAGE = "embed_precompute"
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--run", action="store_true", help="run 3 captions and trace the calls")
    arguments = parser.parse_args()
    show_sizes()
    show_imports()
    if arguments.run:
        show_run()


def lines_of(folder: Path) -> int:
    return sum(len(path.read_text().splitlines()) for path in folder.rglob("*.py"))


def show_sizes() -> None:
    modules = list((ROOT / PACKAGE).rglob("*.py"))
    longest = max((ROOT / "docs").rglob("*.md"), key=count_lines, default=None)
    print(f"package: {lines_of(ROOT / PACKAGE):,} lines, {len(modules)} modules")
    print(f"tests: {lines_of(ROOT / 'tests'):,} lines; scripts: {lines_of(ROOT / 'scripts'):,}")
    print(f"README.md: {count_lines(ROOT / 'README.md')} lines")
    if longest is not None:
        print(f"longest page of docs: {longest.name}, {count_lines(longest)} lines")


def count_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def show_imports() -> None:
    sys.path.insert(0, str(ROOT))
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    imported = {
        module: graph.find_modules_directly_imported_by(module) - {PACKAGE}
        for module in graph.modules - {PACKAGE, f"{PACKAGE}.__main__"}
    }
    below: dict[str, set[str]] = defaultdict(set)
    for module, others in imported.items():
        below[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}

    @functools.cache
    def floor(room: str) -> int:
        return 1 + max((floor(other) for other in below[room]), default=0)

    arrows = sum(len(others) for others in below.values())
    floors = defaultdict(list)
    for room in sorted(below):
        floors[floor(room)].append(room)
    print(f"rooms: {len(below)} on {len(floors)} floors, {arrows} arrows")
    for number in sorted(floors, reverse=True):
        print(f"  floor {number}: {', '.join(floors[number])}")
    widest = sorted(imported, key=lambda module: (-len(imported[module]), module))[:5]
    print("most imports from the package:")
    for module in widest:
        print(f"  {module.removeprefix(PACKAGE + '.')}: {len(imported[module])}")


def room_of(module: str) -> str:
    return module.split(".")[1]


def show_run() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    with tempfile.TemporaryDirectory() as folder:
        job = write_job(Path(folder))
        calls = Calls()
        sys.setprofile(calls.note)
        threading.setprofile(calls.note)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                from embed_precompute.cli.main import main as run_command

                code = run_command(["run", str(job)])
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    print(
        f"a job of 3 captions (exit {code}): {len(calls.modules)} modules run, in "
        f"{len(calls.pairs)} pairs"
    )
    print(f"  {', '.join(sorted(calls.modules))}")


def write_job(folder: Path) -> Path:
    """T5 and CLIP with random weights, 3 captions, everything else as it is by default."""
    import pyarrow.parquet as pq
    import yaml

    from make_demo import demo_captions, write_clip, write_t5

    texts = demo_captions(200).column("text").to_pylist()
    t5, clip = write_t5(folder / "t5", texts), write_clip(folder / "clip", texts)
    pq.write_table(demo_captions(3), folder / "captions.parquet")
    config = {
        "captions": {"path": str(folder / "captions.parquet")},
        "encoders": {
            "t5": {"kind": "t5", "pretrained": str(t5), "max_length": 24, "dtype": "float32"},
            "clip": {"kind": "clip", "pretrained": str(clip), "dtype": "float32"},
        },
        "output": {"path": str(folder / "out"), "dtype": "float32"},
        "runtime": {"device": "cpu"},
    }
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Calls:
    """Which modules of the package run, and which calls which."""

    def __init__(self) -> None:
        self.modules: set[str] = set()
        self.pairs: set[tuple[str, str]] = set()

    def note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or (called := module_of(frame.f_code)) is None:
            return
        self.modules.add(called)
        caller = module_of(frame.f_back.f_code) if frame.f_back else None
        if caller is not None and caller != called:
            self.pairs.add((caller, called))


@functools.cache
def module_of(code: CodeType) -> str | None:
    """The package's module that a function is of; None for others, and for a module's own body."""
    if not code.co_flags & inspect.CO_OPTIMIZED:  # the body of a module or class
        return None
    path = Path(code.co_filename)
    folder = ROOT / PACKAGE
    return str(path.relative_to(folder).with_suffix("")) if folder in path.parents else None


if __name__ == "__main__":
    main()
