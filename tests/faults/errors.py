"""F14: samples that fail, too many of them, and an encoder that raises."""

from __future__ import annotations

import json

from jobs import call

from faults.lab import Finding, Job, Lab, first_lines
from faults.processes import execute

ROWS = 30


def f14_poison(lab: Lab) -> list[Finding]:
    """Not finite at some rows: recorded, bounded, and made again on demand."""
    problems: list[str] = []
    job = lab.job("f14-one", ROWS)
    code, said = _run(job, {"unit": 2, "rows": [1]})
    problems += [f"one bad row: exit {code} {said[-300:]}"] * (code != 6)
    counts = json.loads((job.root / "manifest.json").read_text())["counts"]
    if counts["status"]["non_finite"] != 1 or sum(counts["status"].values()) != ROWS:
        problems.append(f"one bad row: counts {counts['status']}")
    problems += [f"one bad row: verify {call('verify', str(job.root))[0]}"] * (
        call("verify", str(job.root))[0] != 0
    )
    code, said = execute("run", str(job.path), log=job.path.with_name("log"))
    problems += [f"a rerun does not help: exit {code}"] * (code != 6)
    codes = [call("repair", str(job.root), "--failed")[0], call("run", str(job.path))[0]]
    problems += [f"repair --failed, run: exit {codes}"] * (codes[1] != 0)
    problems += job.wrong(lab.undisturbed(ROWS), quarantine=True)
    job = lab.job("f14-many", ROWS, runtime={"max_failed_samples": 1})
    code, said = _run(job, {"unit": 2, "rows": [0, 1]})
    named = "s6" in said and "runtime.max_failed_samples" in said
    problems += [f"too many: exit {code} {said[-300:]}"] * (code != 5 or not named)
    code, _ = execute("run", str(job.path), log=job.path.with_name("log"))
    problems += [f"too many, mended: exit {code}"] * (code != 0)
    problems += job.wrong(lab.undisturbed(ROWS))
    return [
        Finding(
            "F14", "rows that are not finite: one, and more than max_failed_samples",
            "exit 6 and counted; exit 5 naming row and limit; repair --failed, run: same bytes",
            f"{len(problems)} wrong {first_lines(problems)}", not problems,
        )
    ]  # fmt: skip


def f14_raises(lab: Lab) -> list[Finding]:
    """The encoder raises in the middle: nothing is lost, the next run goes on."""
    problems: list[str] = []
    said_of = []
    for kind in ("memory", "runtime"):
        job = lab.job("f14-raises", ROWS)
        code, _ = _run(job, {"unit": 4, "rows": [], "kind": kind})
        said_of.append(f"{kind} error: exit {code}")
        problems += [f"{kind}: exit {code}"] * (code == 0)
        problems += [f"{kind}: root manifest over partial data"] * (
            (job.root / "manifest.json").exists()
        )
        problems += [f"{kind}: {path} left" for path in job.root.rglob(".tmp-*")]
        code, _ = execute("run", str(job.path), log=job.path.with_name("log"))
        problems += [f"{kind}: rerun exit {code}"] * (code != 0)
        problems += job.wrong(lab.undisturbed(ROWS))
    return [
        Finding(
            "F14", "MemoryError and RuntimeError while a unit is encoded",
            "the run fails, no index over partial data, the next run ends with the same bytes",
            f"{', '.join(said_of)}; {len(problems)} wrong {first_lines(problems)}", not problems,
        )
    ]  # fmt: skip


def _run(job: Job, poison: dict[str, object]) -> tuple[int, str]:
    log = job.path.with_name("log")
    return execute("run", str(job.path), log=log, hooks=[("poison", poison)])
