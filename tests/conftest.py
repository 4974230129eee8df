"""Options and fixtures for all tests: the full counts, the real toy model, capped threads."""

import os
from pathlib import Path

import pytest

# Before torch is imported anywhere: the suite shares two cores with whatever else runs.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STORIES = Path(__file__).resolve().parents[2] / "shared" / "models" / "stories260K"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the full counts (up to an hour)")


@pytest.fixture(scope="session")
def full(request: pytest.FixtureRequest) -> bool:
    """True with --full: tests use the counts that the project promises."""
    return bool(request.config.getoption("--full"))


@pytest.fixture(scope="session")
def stories260k() -> Path:
    """The folder of a real 260K-parameter Llama, or skip."""
    if not STORIES.is_dir():
        pytest.skip("stories260K is not on this machine")
    return STORIES
