"""Every command that the documents show is run, or says why it is not.

A block of `sh` or `python` runs as it stands, against a server of the demo model; a document's
blocks of Python run one after the other in one process. `<!-- not run: … -->` before a block
keeps it out and says why. What starts `arriero` itself runs with --full.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from app.cli import parse
from app.factory import create_app
from app.main import make_context
from app.settings import ServerSettings, read_environment
from model.errors import WeightsError
from model.loader import load_model
from model.weights.demo import fetch_demo_model
from tests.api.serve import real_server

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [
    ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")
] + sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\n\n?)?^```(?P<language>[a-z]*)\n(?P<body>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
ADDRESS = "http://127.0.0.1:8000"
CURLRC = "fail-with-body\nsilent\nshow-error\nmax-time = 120\n"


class Block(NamedTuple):
    """Some commands of a document."""

    name: str
    language: str
    body: str
    reason: str | None  # why it is not run


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text("utf-8")
    return [
        Block(
            name=f"{document.name}:{text.count(chr(10), 0, found.start('language')) + 1}",
            language=found["language"],
            body=found["body"],
            reason=found["reason"],
        )
        for found in BLOCK.finditer(text)
        if found["language"] in ("sh", "python")
    ]


SHELL = [
    block
    for document in DOCUMENTS
    for block in blocks_of(document)
    if block.language == "sh" and not block.reason
]
PYTHON = {
    document.name: bodies
    for document in DOCUMENTS
    if (bodies := [b.body for b in blocks_of(document) if b.language == "python" and not b.reason])
}


@pytest.fixture(scope="module")
def url():
    try:
        path = fetch_demo_model(read_environment().cache_dir, lambda _: None)
    except WeightsError as error:
        pytest.skip(str(error))
    command = parse(
        ["serve", str(path), "--device", "cpu", "--served-model-name", "smollm2-135m-instruct"],
        read_environment(),
    )
    context = make_context(command, load_model(command.load))
    with real_server(create_app(context, ServerSettings())) as url:
        yield url


@pytest.fixture
def environment(url, tmp_path):
    (tmp_path / ".curlrc").write_text(CURLRC)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "URL": url, "CURL_HOME": str(tmp_path), "PATH": path}


@pytest.mark.demo
@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_command_of_a_document_works(block, url, environment, tmp_path, full):
    if block.body.startswith("arriero ") and not full:
        pytest.skip("starts a process a line; runs with --full")
    run = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block.body.replace(ADDRESS, url)],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert run.stdout.strip()


@pytest.mark.demo
@pytest.mark.parametrize("document", PYTHON)
def test_python_of_a_document_works(document, url, environment, tmp_path):
    program = "\n".join(PYTHON[document]).replace(ADDRESS, url)
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert run.stdout.strip()


def test_few_commands_are_left_out_and_each_says_why():
    blocks = [block for document in DOCUMENTS for block in blocks_of(document)]
    reasons = [block.reason for block in blocks if block.reason]
    assert all(len(reason.split()) > 2 for reason in reasons)
    assert len(reasons) < len(blocks) / 2


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_stands_in_a_block_that_is_looked_at(document):
    text = document.read_text("utf-8")
    fences = re.findall(r"^ *(?:```|~~~)(.*)$", text, re.MULTILINE)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= {"sh", "python", "toml", ""}, "tests run sh and python"
    assert text.count("<!-- not run:") == sum(bool(b.reason) for b in blocks_of(document))
    for block in BLOCK.finditer(text):
        is_command = re.search(r"^\$? ?(curl|arriero|scripts/|docker|pip)", block["body"], re.M)
        assert block["language"] == "sh" or not is_command
