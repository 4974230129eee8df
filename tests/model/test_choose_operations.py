"""Who computes what lies between the products, and that triton is nobody's import before that."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig, RopeConfig
from model.errors import ConfigError
from model.operations import TORCH, choose_operations

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ModelConfig(
    vocab_size=16,
    hidden_size=64,
    intermediate_size=64,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope=RopeConfig(),
    tie_word_embeddings=True,
)


def test_a_cpu_computes_in_torch():
    assert choose_operations(CONFIG, torch.device("cpu")) is TORCH


def test_model_is_imported_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import model.loader; "
        "sys.exit(any(name.startswith('model.kernels') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_without_triton_a_card_computes_in_torch_and_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_operations(CONFIG, torch.device("cuda")) is TORCH
    assert "triton is not installed" in caplog.text


def test_batch_invariance_on_a_card_needs_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="--batch-invariant needs Triton's kernels: triton is"):
        choose_operations(CONFIG, torch.device("cuda"), is_invariant=True)


def test_on_a_cpu_torch_is_invariant_anyway():
    assert choose_operations(CONFIG, torch.device("cpu"), is_invariant=True) is TORCH


def test_an_old_card_computes_in_torch(monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_operations(CONFIG, torch.device("cuda")) is TORCH
    assert "older than compute capability 8.0" in caplog.text
