"""python -m tests.faults [--long] [--seed N] [--only F1 F5 ...]: run checks and print the table.

The table has for each fault the target, what was measured and the command that shows it again.
Exit code 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
IMPORTS = [str(REPO), str(REPO / "scripts"), str(REPO / "tests")]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--long", action="store_true", help="the sizes of the issue, over an hour")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same faults")
    parser.add_argument("--only", nargs="*", metavar="F", help="such as F1 F5 or f13_slow cost")
    parser.add_argument("--jobs", type=int, default=1, help="periods of F20 at the same time")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the findings here too")
    arguments = parser.parse_args()
    known = {name for check in CHECKS for name in _names(check.__name__)}
    if unknown := set(arguments.only or ()) - known:
        parser.error(
            f"no such check: {' '.join(sorted(unknown))}; there are {' '.join(sorted(known))}"
        )
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="faults-"))
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    findings = _run(arguments, folder)
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(f) for f in findings], indent=1))
    failed = [f for f in findings if f.holds is False]
    print(f"\n{len(findings)} findings, {len(failed)} targets missed")
    if arguments.folder is None and not failed:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


def _names(check: str) -> tuple[str, str]:
    """What `--only` takes for a check: its fault and its own name."""
    return f"F{int(check[1:3])}" if check[1:3].isdigit() else check, check


def _run(arguments: argparse.Namespace, folder: Path) -> list[Finding]:
    size = " --long" if arguments.long else ""
    size += f" --jobs {arguments.jobs}" if arguments.jobs > 1 else ""
    findings: list[Finding] = []
    print("| fault | injection | target | measured | holds | s | command |\n|" + "---|" * 7)
    for check in CHECKS:
        fault, name = _names(check.__name__)
        if arguments.only and not {fault, name} & set(arguments.only):
            continue
        seed = check_seed(arguments.seed, name)
        lab = Lab(folder / name, seed, long=arguments.long, jobs=arguments.jobs)
        began = time.monotonic()
        try:
            found = check(lab)
        except Exception as error:
            traceback.print_exc()
            found = [Finding(fault, name, "", f"the check itself failed: {error!r}", False)]
        spent = time.monotonic() - began
        for finding in found:
            holds = {True: "yes", False: "NO", None: "not run"}[finding.holds]
            command = f"python -m tests.faults{size} --seed {arguments.seed} --only {name}"
            cells = (finding.fault, finding.injection, finding.target, finding.measured, holds)
            print("|", " | ".join(cells), f"| {spent:.0f} | `{command}` |", flush=True)
            findings.append(dataclasses.replace(finding, seconds=spent))
        if all(f.holds is not False for f in found):
            shutil.rmtree(folder / name, ignore_errors=True)
    return findings


if __name__ == "__main__":
    sys.path[:0] = IMPORTS
    os.environ["PYTHONPATH"] = os.pathsep.join([*IMPORTS, os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from faults.lab import Finding, Lab, check_seed
    from faults.table import CHECKS

    sys.exit(main())
