"""The memory plan: what is asked for fits, or is refused in one line that says what to change."""

from dataclasses import replace

import pytest
import torch

from model.config import LoadOptions, ModelConfig, RopeConfig
from model.errors import ConfigError, ResourceError
from model.memory import available_host_bytes, plan_memory
from model.precision import Precision

CPU = torch.device("cpu")
CONFIG = ModelConfig(
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    rms_norm_eps=1e-5,
    max_position_embeddings=1024,
    rope=RopeConfig(),
    tie_word_embeddings=True,
)
EMBEDDING_AND_NORM = [(1000, 64), (64,)]
ATTENTION = [(64, 64), (32, 64), (32, 64), (64, 64), (64,)]
LAYER = [*ATTENTION, (128, 64), (128, 64), (64, 128), (64,)]
BYTES_PER_TOKEN = 2 * 2 * 2 * 16 * 4


PRECISION = Precision(
    quantization="none",
    dtype="float32",
    kv_cache_dtype="float32",
    weights_bytes=4 * CONFIG.num_parameters,
)


def plan(precision=PRECISION, **options):
    return plan_memory(LoadOptions(model="m", **options), CONFIG, precision, CPU)


def test_pool_never_holds_more_than_all_sequences_can_use():
    small = plan(max_num_seqs=2, max_num_batched_tokens=16)
    assert small.num_blocks == 2 * 1024 // 16
    assert small.kv_cache_bytes == small.num_blocks * 16 * BYTES_PER_TOKEN


def test_weights_are_counted_to_the_byte():
    expected = sum(torch.Size(shape).numel() for shape in EMBEDDING_AND_NORM + 2 * LAYER)
    assert plan().weights_bytes == 4 * expected


def test_small_models_take_more_tokens_in_a_native_step():
    native = replace(PRECISION, library="native.so")
    assert plan(native).max_num_batched_tokens == 512
    assert plan().max_num_batched_tokens == 256
    large = replace(CONFIG, num_layers=12_000)
    assert large.num_parameters > 400_000_000
    options = LoadOptions(model="m", kv_cache_memory_bytes=1 << 30)
    larger = replace(large, num_layers=15_000)
    for config, expected in ((large, 512), (larger, 256)):
        found = plan_memory(options, config, native, CPU)
        assert found.max_num_batched_tokens == expected


def test_context_shrinks_to_the_pool_when_nobody_asked_for_a_length():
    assert plan(kv_cache_memory_bytes=512 * BYTES_PER_TOKEN).max_model_len == 512


def test_context_that_was_asked_for_and_does_not_fit_is_refused():
    with pytest.raises(ResourceError, match="--max-model-len"):
        plan(kv_cache_memory_bytes=512 * BYTES_PER_TOKEN, max_model_len=1024)


def test_pool_without_a_single_block_is_refused():
    with pytest.raises(ResourceError, match="room for 0 tokens"):
        plan(kv_cache_memory_bytes=1)


def test_context_beyond_the_models_positions_is_refused():
    with pytest.raises(ConfigError, match="1024 positions"):
        plan(max_model_len=2048)


def test_fewer_tokens_a_step_than_sequences_is_refused():
    with pytest.raises(ConfigError, match="--max-num-batched-tokens"):
        plan(max_num_seqs=64, max_num_batched_tokens=32)


def test_available_memory_is_read_from_the_machine():
    assert 1 << 20 < available_host_bytes() < 1 << 50


def test_keys_and_values_in_16_bits_take_half_the_room():
    half = plan(replace(PRECISION, kv_cache_dtype="float16"))
    assert half.kv_bytes_per_token * 2 == plan().kv_bytes_per_token == BYTES_PER_TOKEN


CUDA = torch.device("cuda")
CARD_BYTES = 8 << 30


def plan_on_card(monkeypatch, *, free=CARD_BYTES - (1 << 30), **options):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _device: (free, CARD_BYTES))
    load = LoadOptions(model="m", **options)
    return plan_memory(load, CONFIG, PRECISION, CUDA, runs_kernels=True)


def test_plan_of_a_card_keeps_to_the_share_of_it_that_is_free(monkeypatch):
    options = {"gpu_memory_utilization": 0.3, "max_num_seqs": 2048, "enforce_eager": True}
    small = plan_on_card(monkeypatch, **options)
    free = int(CARD_BYTES * 0.3) - (1 << 30)
    assert free - small.planned_bytes in range(16 * BYTES_PER_TOKEN + 1)


def test_graphs_take_part_in_the_plan_unless_there_are_none(monkeypatch):
    with_graphs = plan_on_card(monkeypatch)
    without = plan_on_card(monkeypatch, enforce_eager=True)
    assert with_graphs.graphs_bytes > 0
    assert without.graphs_bytes == 0
    assert with_graphs.planned_bytes - without.planned_bytes == with_graphs.graphs_bytes


def test_a_card_without_room_for_keys_and_values_is_refused(monkeypatch):
    with pytest.raises(ResourceError, match="no room for K/V on cuda"):
        plan_on_card(monkeypatch, free=1 << 30)
