"""`arriero generate`, from its command line to what it prints."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli import main
from app.factory import create_app
from app.settings import ServerSettings
from tests.api.serve import real_server
from tests.fake_engine import FakeEngine, make_context, says
from tests.toy import write_toy_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def run_main(*line: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(line))
    return left.value.code


@pytest.fixture(scope="module")
def engine():
    return FakeEngine(says("abc\x1b[2J"))


@pytest.fixture(scope="module")
def url(engine):
    with real_server(create_app(make_context(engine), ServerSettings())) as url:
        yield url


def test_text_is_continued_on_standard_output(url, engine, capsys):
    flags = ["--max-tokens", "3", "--temperature", "0.5", "--stop", "x", "--stop", "y"]
    assert run_main("generate", "--base-url", url, "--prompt", "once", *flags) == 0
    assert capsys.readouterr().out == "abc\n"
    assert engine.requests[-1].sampling[0].temperature == 0.5


def test_prompt_comes_through_standard_input(url, engine, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    assert run_main("generate", "--base-url", url) == 0
    prompt = bytes(i for i in engine.requests[-1].prompt_token_ids if i < 256)
    assert prompt == b"from a pipe"


def test_json_is_the_servers_answer(url, capsys):
    assert run_main("generate", "--base-url", url, "--prompt", "once", "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["object"] == "text_completion"


def test_text_where_a_model_belongs_is_a_usage_error(url, capsys):
    assert run_main("generate", "--base-url", url, "Once upon a time") == 2
    said = capsys.readouterr().err
    assert "'Once upon a time' is no model: a text goes behind --prompt" in said


def test_nothing_to_continue_is_a_usage_error(url, capsys):
    assert run_main("generate", "--base-url", url, "--prompt", "") == 2
    assert "the prompt is empty" in capsys.readouterr().err


def test_refusal_is_a_line_and_code_1(url, capsys):
    assert run_main("generate", "--base-url", url, "--prompt", "x", "--temperature", "9") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("arriero: 'temperature'")


def test_terminal_gets_no_control_characters(url):
    pty = pytest.importorskip("pty")
    code = "from app.cli import main; main()"
    arguments = ["generate", "--base-url", url, "--prompt", "x"]
    own, its = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, stdout=its):
        os.close(its)
        text = b""
        with contextlib.suppress(OSError):  # the end, as Linux tells it
            while part := os.read(own, 1000):
                text += part
    os.close(own)
    assert text.startswith(b"abc\\x1b[2J")


def test_reader_that_leaves_is_no_error(url):
    code = "from app.cli import main; main()"
    arguments = ["generate", "--base-url", url, "--prompt", "x"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    os.close(writing)
    assert (done.stderr, done.returncode) == (b"", 1)


def test_model_is_loaded_here_when_no_server_is_named(tmp_path, capsys):
    folder = write_toy_checkpoint(tmp_path / "toy")
    line = ["generate", str(folder), "--prompt", "the mule", "--max-tokens", "5", "--seed", "3"]
    assert run_main(*line, "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert run_main(*line) == 0
    assert capsys.readouterr().out == first["choices"][0]["text"] + "\n"
    assert first["usage"]["completion_tokens"] == 5
