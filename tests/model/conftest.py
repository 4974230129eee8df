"""Torch on as many threads as the suite may use."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _capped_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)
