"""The short form of the fault suite; the long form is `python -m tests.faults --long`."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from faults.kills import f13_slow
from faults.lab import Finding, Lab
from faults.table import CHECKS

ALONE = {f13_slow}
PARAMS = [pytest.param(c, marks=[pytest.mark.alone] * (c in ALONE), id=c.__name__) for c in CHECKS]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("faults"), seed=0, long=False)


@pytest.mark.parametrize("check", PARAMS)
def test_fault(check: Callable[[Lab], list[Finding]], lab: Lab) -> None:
    lab.sow(0, check.__name__)
    findings = check(lab)
    for finding in findings:
        print(f"{finding.fault} {finding.injection}: {finding.measured}")
    missed = [f"{f.fault} {f.injection}: {f.measured}" for f in findings if f.holds is False]
    assert not missed, "\n".join(missed)
    missing = [f.measured for f in findings if f.holds is None]
    if missing and len(missing) == len(findings):
        pytest.skip("; ".join(missing))
