"""The native library, compiled once a session into a folder of its own."""

import shutil
from pathlib import Path

import pytest

from model.cpu.build import COMPILERS, find_library
from model.cpu.library import Library


@pytest.fixture(scope="session")
def library_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for this machine; skips where there is no C compiler."""
    if not any(shutil.which(name) for name in COMPILERS):
        pytest.skip("no C compiler")
    return find_library(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def library(library_path: Path) -> Library:
    """The library on two threads; never closed, as networks of other tests may live on."""
    return Library(library_path, 2)
