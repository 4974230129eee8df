"""Runs the battery and prints a table; arguments go to pytest. Exit code 1 if anything fails."""

import sys
from pathlib import Path

import pytest

from tests.battery.report import CaseReport


def main() -> int:
    report = CaseReport()
    pytest.main([str(Path(__file__).parent), *sys.argv[1:]], plugins=[report])
    rows = report.rows()
    width = max(len(title) for _, title, _, _ in rows)
    for case, title, result, reason in rows:
        sys.stdout.write(f"{case} | {title:{width}} | {result} | {reason}\n")
    num_failed = sum(result != "passed" for _, _, result, _ in rows)
    sys.stdout.write(f"{len(rows) - num_failed} of {len(rows)} cases passed\n")
    for stray in report.strays:
        sys.stdout.write(f"of no case, FAILED: {stray}\n")
    return 1 if num_failed or report.strays else 0


if __name__ == "__main__":
    sys.exit(main())
