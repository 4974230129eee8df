"""Collects the outcome of each case from its tests: pytest's plugin behind scripts/battery."""

import re
from dataclasses import dataclass, field

import pytest

from tests.battery.cases import CASES

_TEST = re.compile(r"test_([a-e][0-9]{2})_")
MAX_REASON = 100


def case_of(test_name: str) -> str | None:
    """Return the id of the case that a test belongs to."""
    match = _TEST.match(test_name)
    return match[1].upper() if match else None


@dataclass
class CaseReport:
    """What has become of each case; one without a passed test has failed."""

    faults: dict[str, list[str]] = field(default_factory=dict)
    num_passed: dict[str, int] = field(default_factory=dict)
    strays: list[str] = field(default_factory=list)  # failures of tests that are of no case

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test = report.nodeid.rpartition("::")[2]
        case = case_of(test)
        if case is None:
            if report.failed:
                self.strays.append(f"{test}: {_reason(report)}")
            return
        is_xfail = hasattr(report, "wasxfail")
        if report.passed and not is_xfail:
            if report.when == "call":
                self.num_passed[case] = self.num_passed.get(case, 0) + 1
            return
        reason = f"{test}: {_reason(report)}"
        self.faults.setdefault(case, []).append(reason)

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Return id, case, result and reason of every case."""
        rows = []
        for case, title in CASES.items():
            faults = self.faults.get(case, [])
            if not faults and not self.num_passed.get(case):
                faults = ["has no test that ran"]
            count = f"{self.num_passed.get(case, 0)} passed"
            rows.append((case, title, "FAILED" if faults else "passed", "; ".join(faults) or count))
        return rows


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return f"known fault: {report.wasxfail.removeprefix('reason: ')}"
    if report.skipped:
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash is not None else str(report.longrepr)
    return f"{report.when}: {' '.join(text.split())}"[:MAX_REASON]
