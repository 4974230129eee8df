"""Limits of steps against figures worked out by hand for a card of round rates."""

import dataclasses

import pytest

from app.bench.gpu import MODELS
from app.bench.limits import CardRates, Limits
from model.kv_pool import kv_bytes_per_token
from model.weights.huggingface import config_from_hf

RATES = CardRates(bytes_per_s=4.3e12, flops_per_s=790e12, fp8_flops_per_s=1580e12)


def limits(name: str = "8B", layer_bytes: float = 2) -> Limits:
    import torch

    config = config_from_hf(MODELS[name], name)
    return Limits(
        config=config,
        rates=RATES,
        layer_bytes=layer_bytes,
        head_bytes=2,
        kv_bytes_per_token=kv_bytes_per_token(config, torch.bfloat16),
    )


@pytest.mark.parametrize(
    ("name", "layer_bytes", "batch", "step_ms"),
    [
        ("8B", 2, 1, 3.51),  # 15.0 GB of weights, 0.1 GB of K/V
        ("8B", 2, 256, 9.48),  # and 25.8 GB of K/V
        ("8B", 1, 1, 1.89),  # the head stays in 16 bits
        ("1B", 2, 64, 0.95),  # the tied embedding is read as the head
    ],
)
def test_decode_step_is_bytes_over_bandwidth(name, layer_bytes, batch, step_ms):
    assert 1000 * limits(name, layer_bytes).decode_s(batch, 768) == pytest.approx(step_ms, rel=0.01)


def test_decode_of_a_large_batch_with_short_contexts_is_operations_over_rate():
    step_s = limits().decode_s(4096, 1)
    assert step_s == pytest.approx(4096 * 2 * 7.5e9 / 790e12, rel=0.01)


@pytest.mark.parametrize(("num_tokens", "ms"), [(512, 9.1), (2048, 37.6), (8192, 167)])
def test_prompt_is_operations_over_rate(num_tokens, ms):
    assert 1000 * limits().prefill_s(num_tokens) == pytest.approx(ms, rel=0.02)


def test_prompt_in_fp8_takes_half_the_time_of_its_layers():
    ratio = limits(layer_bytes=1).prefill_s(512) / limits().prefill_s(512)
    assert ratio == pytest.approx(0.5, abs=0.01)


def test_without_a_rate_for_fp8_its_products_count_at_the_other():
    slow = dataclasses.replace(RATES, fp8_flops_per_s=None)
    one = dataclasses.replace(limits(layer_bytes=1), rates=slow)
    assert one.prefill_s(2048) == limits().prefill_s(2048)


def test_a_short_prompt_still_reads_all_weights():
    assert limits().prefill_s(1) == pytest.approx(3.5e-3, rel=0.01)


def test_whole_run_is_prompts_and_then_steps():
    whole_s = limits().whole_s(256, 512, 512)
    assert 256 * 512 / whole_s == pytest.approx(18.2e3, rel=0.01)
