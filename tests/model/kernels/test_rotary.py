"""Rotation and K/V write against `rotate` and `KVPool.write`."""

import random

import pytest
import torch

from model.config import ModelConfig, RopeConfig
from model.kernels.rotary import rope_write
from model.kv_pool import KVPool
from model.layers.rotary import RotaryEmbedding, rotate

TOLERANCES = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
MAX_MODEL_LEN = 200


def small_config(num_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=32,
        hidden_size=num_heads * head_dim,
        intermediate_size=64,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=MAX_MODEL_LEN,
        rms_norm_eps=1e-5,
        rope=RopeConfig(),
        tie_word_embeddings=False,
    )


def compare(rng, device, dtype, kv_dtype, num_tokens=7):
    num_kv_heads, group = rng.choice([1, 2, 3]), rng.choice([1, 3, 4, 7])
    head_dim, block_size = rng.choice([16, 32, 64, 80, 96]), rng.choice([16, 32])
    config = small_config(num_kv_heads * group, num_kv_heads, head_dim)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    pools = [
        KVPool(config, num_blocks=4, block_size=block_size, dtype=kv_dtype, device=device)
        for _ in range(2)
    ]
    for pool in pools:
        if kv_dtype is torch.float8_e4m3fn:
            pool.key_scales, pool.value_scales = [0.03], [0.5]
    rotary = RotaryEmbedding(config, MAX_MODEL_LEN, device)
    splits = [config.num_heads, num_kv_heads, num_kv_heads]
    qkv = torch.randn(num_tokens, sum(splits), head_dim, generator=generator)
    qkv = qkv.to(dtype).to(device)
    positions = torch.randint(0, MAX_MODEL_LEN, (num_tokens,), generator=generator).to(device)
    slots = torch.randperm(4 * block_size, generator=generator)[:num_tokens].to(device)
    slots[rng.randrange(num_tokens)] = -1

    queries, keys, values = torch.split(qkv.clone(), splits, dim=1)
    rotation = [each.to(dtype) for each in rotary.gather(positions)]
    trash = torch.where(slots < 0, pools[0].trash_slot, slots)
    pools[0].write(0, trash, rotate(keys, *rotation), values)
    got = rope_write(
        qkv,
        positions,
        slots,
        rotary.half_tables(),
        (pools[1].keys[0], pools[1].values[0]),
        (pools[1].key_scales[0], pools[1].value_scales[0]),
    )
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(got, rotate(queries, *rotation), rtol=tolerance, atol=tolerance)
    everywhere = torch.arange(4 * block_size, device=device)
    assert not pools[1].values[0][:, pools[1].zero_slot :].to(torch.float32).any()
    expected = pools[0].read(0, everywhere, torch.float32)
    return expected, pools[1].read(0, everywhere, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_rope_write_equals_rotate_and_write(dtype, device):
    rng = random.Random(1)
    for _ in range(8):
        expected, got = compare(rng, device, dtype, dtype)
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
        assert torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_keys_and_values_are_written_in_fp8_with_their_scales(dtype, device):
    rng = random.Random(2)
    for _ in range(4):
        expected, got = compare(rng, device, dtype, torch.float8_e4m3fn)
        # A key that lies between two codes may go to either: one part in eight of its value.
        # Where two products nearly cancel, float16 loses all of a value in the reference.
        torch.testing.assert_close(got[0], expected[0], rtol=0.13, atol=TOLERANCES[dtype])
        assert (got[0] != expected[0]).float().mean() < 0.02
        assert torch.equal(got[1], expected[1])


def test_values_beyond_the_scale_are_cut_off(device):
    config = small_config(1, 1, 16)
    pool = KVPool(config, num_blocks=1, block_size=16, dtype=torch.float8_e4m3fn, device=device)
    pool.value_scales = [2.0]
    qkv = torch.full((1, 3, 16), 1000.0, device=device)
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    tables = RotaryEmbedding(config, MAX_MODEL_LEN, device).half_tables()
    rope_write(qkv, zero, zero, tables, (pool.keys[0], pool.values[0]), (1.0, 2.0))
    keys, values = pool.read(0, zero, torch.float32)
    assert keys.unique().tolist() == [448.0]
    assert values.unique().tolist() == [896.0]
