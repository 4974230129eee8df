"""Habits that are checked: docstrings, no dangerous calls, frozen flags, README."""

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from app.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("app/**/*.py"), *ROOT.glob("model/**/*.py")])
FORBIDDEN_MODULES = {"pickle", "dill", "marshal", "shelve"}
OPTIONS = frozenset(
    {
        "--allowed-origins",
        "--api-key",
        "--api-key-file",
        "--base-url",
        "--batch-invariant",
        "--batch-size",
        "--block-size",
        "--body-timeout",
        "--burstiness",
        "--card",
        "--chat-template",
        "--device",
        "--download-dir",
        "--dtype",
        "--enable-prefix-caching",
        "--endpoint",
        "--extra-body",
        "--generation-config",
        "--goodput",
        "--enforce-eager",
        "--gpu-memory-utilization",
        "--header-timeout",
        "--help",
        "--host",
        "--ignore-eos",
        "--input-len",
        "--json",
        "--kv-cache-dtype",
        "--kv-cache-memory-bytes",
        "--load-format",
        "--log-format",
        "--log-level",
        "--max-concurrency",
        "--max-connections",
        "--max-connections-per-client",
        "--max-model-len",
        "--max-num-batched-tokens",
        "--max-num-seqs",
        "--max-tokens",
        "--metric-percentiles",
        "--min-p",
        "--model",
        "--no-enable-prefix-caching",
        "--no-ignore-eos",
        "--num-prompts",
        "--num-warmups",
        "--otlp-traces-endpoint",
        "--output-json",
        "--output-len",
        "--plot",
        "--port",
        "--prefill-len",
        "--profile",
        "--prompt",
        "--quantization",
        "--random-input-len",
        "--random-output-len",
        "--random-prefix-len",
        "--random-range-ratio",
        "--request-rate",
        "--resume-window",
        "--revision",
        "--root-path",
        "--seconds",
        "--seed",
        "--served-model-name",
        "--shutdown-timeout",
        "--speculative-config",
        "--ssl-certfile",
        "--ssl-keyfile",
        "--stop",
        "--system",
        "--temperature",
        "--tokenizer",
        "--tool-call-parser",
        "--top-k",
        "--top-p",
        "--vocab-size",
    }
)


def dangers_of(source: str) -> list[str]:
    """Calls and imports that have no place in a server."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in FORBIDDEN_MODULES]
        if isinstance(node, ast.ImportFrom) and node.module in FORBIDDEN_MODULES:
            # To name the exception of torch's own unpickler is not to unpickle.
            found += [alias.name for alias in node.names if alias.name != "UnpicklingError"]
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "request.url":
            found.append("request.url")
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if name in ("eval", "exec", "compile", "yaml.load", "os.system"):
                found.append(name)
            if name == "torch.load" and keywords.get("weights_only") != "True":
                found.append("torch.load without weights_only")
            if keywords.get("shell") == "True":
                found.append("shell=True")
            if keywords.get("trust_remote_code") == "True":
                found.append("trust_remote_code")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_is_safe_and_says_what_it_is(path):
    source = path.read_text("utf-8")
    assert dangers_of(source) == []
    assert ast.get_docstring(ast.parse(source)), "a module says what it owns"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", source)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "eval('1')",
        "torch.load(path)",
        "subprocess.run('x', shell=True)",
        "path = request.url.path",
        "AutoTokenizer.from_pretrained(p, trust_remote_code=True)",
    ],
)
def test_check_notices_a_danger(source):
    assert dangers_of(source)


def all_options(parser: argparse.ArgumentParser) -> set[str]:
    options = set()
    for action in parser._actions:
        options.update(name for name in action.option_strings if name.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                options |= all_options(command)
    return options


def test_options_are_the_frozen_ones():
    assert all_options(build_parser()) == OPTIONS


def test_every_flag_of_the_docs_exists_and_every_flag_is_in_them():
    text = "".join((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/flags.md"))
    named = set(re.findall(r"`(--[a-z-]+)", text))
    assert named <= OPTIONS | {"--full"}
    assert OPTIONS - {"--help", "--no-enable-prefix-caching", "--no-ignore-eos"} <= named


def test_help_costs_no_torch():
    code = (
        "import sys, app.cli; app.cli.build_parser().format_help(); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
