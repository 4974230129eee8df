"""Where kernels run in tests: on a card if there is one, else in Triton's interpreter.

Whether kernels are interpreted is decided for a whole process, when triton is imported. So
without a card the tests in this folder are collected in a process of their own alone, which
`test_interpreter.py` starts; by hand: TRITON_INTERPRET=1 pytest tests/model/kernels
"""

import os
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob: list[str] = []
if IS_INTERPRETED:
    collect_ignore_glob = ["test_interpreter.py", "test_compile.py"]
elif not torch.cuda.is_available():
    collect_ignore_glob = ["test_[!ic]*.py"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device whose kernels are tested."""
    return torch.device("cpu" if IS_INTERPRETED else "cuda")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _floats_like_a_card() -> Iterator[None]:
    """Overflow and NaN are values on a card; in the interpreter, numpy would warn of them.

    NaN is what rows of padding may hold: attention writes nothing to them.
    """
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        yield
