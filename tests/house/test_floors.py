"""The floors of docs/architecture.md: who may import whom, read from the source itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEAM = {"model.errors", "model.config", "model.step"}
FLOORS = {
    "app.errors": 1,
    "app.settings": 1,
    "app.engine": 2,
    "app.text": 2,
    "app.protocol": 2,
    "app.serving": 3,
    "app.api": 4,
    "app.factory": 5,
    "app.logs": 5,
    "app.main": 5,
    "app.cli": 5,
    "app.bench": 5,
}
KNOWS_UVICORN = ("app.main", "app.api.connections")
ONLY_THE_SEAM = ("app.engine", "app.protocol", "app.api")


def folder_of(module: str) -> str:
    """The unit that floors are counted in: a folder of app, a seam file, or the rest of model."""
    if module.split(".")[0] == "model":
        return module if module in SEAM else "model"
    return ".".join(module.split(".")[:2])


def floor_of(module: str) -> int:
    folder = folder_of(module)
    if folder in SEAM:
        return 0
    return 1 if folder == "model" else FLOORS[folder]


def imports_of(source: str) -> set[str]:
    """Every module that a source imports, wherever in the file it does so."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            is_package = node.module in ("app", "model")
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            modules.update(names if is_package else [node.module or ""])
    return modules


def faults_of(module: str, source: str) -> list[str]:
    """What a module's source breaks of the rules."""
    faults = []
    for imported in imports_of(source):
        top = imported.split(".")[0]
        if top in ("app", "model") and imported not in ("app", "model"):
            is_own = folder_of(imported) == folder_of(module)
            is_seam_twin = {folder_of(imported), folder_of(module)} <= SEAM
            is_wiring = floor_of(module) == 5 and floor_of(imported) == 5
            if not (is_own or is_seam_twin or is_wiring) and floor_of(imported) >= floor_of(module):
                faults.append(f"{module} imports {imported}, which is no lower floor")
            if (
                folder_of(module) in ONLY_THE_SEAM
                and top == "model"
                and imported not in ("model.step", "model.errors")
            ):
                faults.append(f"{module} may see model.step and model.errors alone")
        if top == "torch" and (not module.startswith("model") or module in SEAM):
            faults.append(f"{module} imports torch")
        if top in ("fastapi", "starlette", "uvicorn"):
            allowed = module.startswith("app.api") or module == "app.factory" or top == "uvicorn"
            if not allowed or (top == "uvicorn" and module not in KNOWS_UVICORN):
                faults.append(f"{module} imports {top}")
    reads_environment = any(
        isinstance(node, ast.Attribute | ast.alias)
        and (node.attr if isinstance(node, ast.Attribute) else node.name) in ("environ", "getenv")
        for node in ast.walk(ast.parse(source))
    )
    if reads_environment and module != "app.settings":
        faults.append(f"{module} reads the environment")
    return faults


def modules() -> list[tuple[str, Path]]:
    found = []
    for path in sorted([*ROOT.glob("app/**/*.py"), *ROOT.glob("model/**/*.py")]):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("app", "model"):
            found.append((name, path))
    return found


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value)[-40:])
def test_module_keeps_to_its_floor(module, path):
    assert faults_of(module, path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("app.engine.loop", "import torch"),
        ("app.engine.loop", "from app.text.output import OutputText"),
        ("app.engine.loop", "from model.tokenizer import Tokenizer"),
        (
            "app.text.stop",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import app.engine.loop",
        ),
        ("app.protocol.chat", "def f():\n  from app.serving import chat"),
        ("app.serving.chat", "from fastapi import Request"),
        ("app.api.sse", "from app.factory import create_app"),
        ("app.api.sse", "import os\nos.environ['A']"),
        ("app.engine.loop", "from model import runner"),
        ("app.engine.loop", "from os import environ"),
        ("app.main", "import fastapi"),
        ("app.api.body", "import uvicorn"),
        ("model.step", "import torch"),
        ("model.runner", "from app.errors import ServiceError"),
        ("model.config", "from model.runner import ModelRunner"),
    ],
)
def test_check_notices_a_breach(module, source):
    assert faults_of(module, source)
