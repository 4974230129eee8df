"""The workflow calls scripts that are there, and the issue forms are forms."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
yaml = pytest.importorskip("yaml")


def load(name: str):
    return yaml.safe_load((ROOT / ".github" / name).read_text("utf-8"))


def test_workflow_does_nothing_but_call_what_a_user_can_call():
    jobs = load("workflows/ci.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert "scripts/check" in commands
    assert "scripts/test" in commands
    for command in commands:
        program, _, rest = command.partition(" ")
        assert program == "docker" or (ROOT / program).is_file()
        assert all((ROOT / path).is_file() for path in rest.split() if path.endswith(".py"))
    assert all(job["timeout-minutes"] <= 40 for job in jobs.values())
    actions = [step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", action) for action in actions)


def test_workflow_starts_with_the_oldest_python_that_installs():
    jobs = load("workflows/ci.yml")["jobs"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    versions = jobs["test"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("name", ["bug.yml", "feature.yml"])
def test_issue_form_asks_something_that_must_be_answered(name):
    form = load(f"ISSUE_TEMPLATE/{name}")
    assert form["name"]
    fields = [field for field in form["body"] if field["type"] in ("textarea", "input")]
    assert any(field.get("validations", {}).get("required") for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
