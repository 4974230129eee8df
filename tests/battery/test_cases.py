"""No case without a test, no test without a case."""

import ast
import re
from pathlib import Path

import pytest

from tests.battery.cases import CASES
from tests.battery.client import ROOT
from tests.battery.report import CaseReport, case_of

FILES = sorted(Path(__file__).parent.glob("test_*.py"))
# The whole document's, and that of what is checked after each.
NO_CASES = {Path(__file__).name, "test_schemathesis.py", "test_base_line.py"}


def test_every_case_has_a_test_and_every_test_a_case():
    functions = [
        node.name
        for path in FILES
        if path.name not in NO_CASES
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert {case_of(name) for name in functions} == set(CASES)


def reported(name: str, outcome: str) -> pytest.TestReport:
    return pytest.TestReport(
        f"tests/x.py::{name}", ("tests/x.py", 1, name), {}, outcome, "it broke", "call"
    )


def test_table_counts_a_case_as_passed_only_if_all_of_its_tests_passed():
    report = CaseReport()
    for name, outcome in (
        ("test_a01_one", "passed"),
        ("test_a02_one", "passed"),
        ("test_a02_other", "failed"),
        ("test_a03_one", "skipped"),
    ):
        report.pytest_runtest_logreport(reported(name, outcome))
    results = {case: (result, reason) for case, _, result, reason in report.rows()}
    assert results["A01"] == ("passed", "1 passed")
    assert results["A02"] == ("FAILED", "test_a02_other: call: it broke")
    assert results["A03"] == ("FAILED", "test_a03_one: call: it broke")
    assert results["A04"] == ("FAILED", "has no test that ran")
    assert report.strays == []


def test_failure_of_a_test_without_a_case_is_reported_as_well():
    report = CaseReport()
    report.pytest_runtest_logreport(reported("test_of_no_case", "passed"))
    report.pytest_runtest_logreport(reported("test_of_no_case_either", "failed"))
    assert report.strays == ["test_of_no_case_either: call: it broke"]


def test_ids_are_those_of_the_five_groups_without_a_gap():
    groups = {}
    for name in CASES:
        assert re.fullmatch("[A-E][0-9]{2}", name)
        groups.setdefault(name[0], []).append(int(name[1:]))
    assert {group: len(numbers) for group, numbers in groups.items()} == {
        "A": 24, "B": 8, "C": 12, "D": 22, "E": 8,
    }  # fmt: skip
    assert all(numbers == list(range(1, len(numbers) + 1)) for numbers in groups.values())


def test_security_maps_every_case_that_has_a_class_of_advisory():
    named = set()
    for line in (ROOT / "SECURITY.md").read_text("utf-8").splitlines():
        cases = line.rpartition(" | ")[2] if line.startswith("| ") else ""
        for first, last in re.findall(r"\b([A-E][0-9]{2})(?:–([A-E][0-9]{2}))?", cases):
            ids = list(CASES)
            named |= set(ids[ids.index(first) : ids.index(last or first) + 1])
    # Behaviour that has no class of advisory: unknown fields, length against schema, clock, soak.
    assert set(CASES) - named == {"A22", "B08", "D19", "D22"}


def test_security_names_files_that_exist_and_hold_tests():
    named = set(re.findall(r"`(tests/[^`]+\.py)`", (ROOT / "SECURITY.md").read_text("utf-8")))
    assert len(named) >= 10
    for name in named - {"tests/fake_runner.py"}:  # what other tests run on
        assert re.search(r"^(async )?def test_", (ROOT / name).read_text("utf-8"), re.MULTILINE), (
            name
        )
    assert (ROOT / "tests/fake_runner.py").is_file()
