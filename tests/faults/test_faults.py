"""The short form of the fault suite; the long form is `python -m tests.faults --long`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from faults.lab import Finding, Lab
from faults.table import CHECKS

KNOWN = {
    "F8 waste": "two jobs deal the same units in the same order, each from its own counter",
}
"""Targets that are missed, by the name of the finding, and why: remove a line once it holds."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"), seed=0, long=False)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_fault(check: Callable[[Lab], list[Finding]], lab: Lab) -> None:
    findings = check(lab)
    for finding in findings:
        print(f"{finding.fault} {finding.injection}: {finding.measured}")
    missed = [f for f in findings if f.holds is False]
    broken = [f"{f.fault} {f.injection}: {f.measured}" for f in missed if f.fault not in KNOWN]
    assert not broken, "\n".join(broken)
    if missed:
        pytest.xfail(f"{KNOWN[missed[0].fault]}: {missed[0].measured}")
    missing = [f.measured for f in findings if f.holds is None]
    if missing and len(missing) == len(findings):
        pytest.skip("; ".join(missing))
