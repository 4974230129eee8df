"""What is measured of kernels runs: each case, at tiny sizes, on a card or in the interpreter."""

import pytest
import torch

from model.bench.__main__ import limit_of
from model.bench.card import Card
from model.bench.cases import Draw, Sizes, triton_cases
from model.config import ModelConfig, RopeConfig

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=128,
    rope=RopeConfig(),
    tie_word_embeddings=True,
)
SIZES = Sizes(tokens=(3,), batches=(2,), contexts=(20,), prompts=(18,))
NAMES = ["quantize_fp8", "rope_write", "paged decode", "paged prefill"]
CARD = Card(
    name="round", bytes_per_s=1e9, flops_per_s=1e12, fp8_flops_per_s=2e12, dtype="bfloat16",
    memory_bytes=0, software="",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_case_runs(name, device):
    draw = Draw(CONFIG, torch.float32, device)
    cases = [case for case in triton_cases(draw, SIZES) if case.name == name]
    assert cases
    for case in cases:
        case.make()()
        assert case.num_bytes > 0


def test_limit_is_the_longer_of_bytes_and_operations(device):
    draw = Draw(CONFIG, torch.float32, device)
    by_name = {case.name: case for case in triton_cases(draw, SIZES)}
    quantize = by_name["quantize_fp8"]
    assert quantize.num_bytes == 3 * (48 * 5 + 4)
    assert limit_of(quantize, CARD) == quantize.num_bytes / 1e9
    decode = by_name["paged decode"]
    # Keys and values of two heads, 20 tokens, 16 wide; queries in and outputs out.
    assert decode.num_bytes == 2 * 2 * 2 * 20 * 16 * 4 + 2 * 2 * 4 * 16 * 4
