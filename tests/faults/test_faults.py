"""The short form of the fault suite; the long form is `python -m tests.faults --long`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from faults.lab import Finding, Lab
from faults.table import CHECKS

KNOWN = {
    "f08_two_jobs": "jobs deal the same order and encode side by side",
    "f09_input": "a plan knows size, rows and footer of an input, so captions can be swapped",
    "f15_hostile": "caption tables of huge values, ids.npy with foreign numbers",
}
"""Targets that are missed, and why: remove a line once it holds."""
MARKED = [
    pytest.param(check, marks=pytest.mark.xfail(reason=KNOWN[check.__name__]))
    if check.__name__ in KNOWN
    else check
    for check in CHECKS
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"), seed=0, long=False)


@pytest.mark.parametrize("check", MARKED, ids=[check.__name__ for check in CHECKS])
def test_fault(check: Callable[[Lab], list[Finding]], lab: Lab) -> None:
    findings = check(lab)
    for finding in findings:
        print(f"{finding.fault} {finding.injection}: {finding.measured}")
    broken = [f"{f.fault} {f.injection}: {f.measured}" for f in findings if f.holds is False]
    assert not broken, "\n".join(broken)
    missing = [f.measured for f in findings if f.holds is None]
    if missing and len(missing) == len(findings):
        pytest.skip("; ".join(missing))
