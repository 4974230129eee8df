"""Rotation of queries and keys and the write of keys and values into the pool, in one pass.

The reference is `rotate` of model/layers/rotary.py and `KVPool.write`. Here the products are
taken in float32 and rounded once, where the reference rounds each to the network's dtype; in
float32 both are the same.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8 import fp8_operand, store_as
from model.kernels.launch import padded


@triton.jit
def rotate_half(low, high, cos, sin):
    return low * cos - high * sin, high * cos + low * sin


@triton.jit
def rope_write_kernel(
    qkv_ptr,
    positions_ptr,
    slots_ptr,
    cos_ptr,
    sin_ptr,
    keys_ptr,
    values_ptr,
    head_stride,
    slot_stride,
    key_scale,
    value_scale,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    """One program a token and K/V head: its query heads, its key, its value."""
    token = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    half: tl.constexpr = HEAD_DIM // 2
    row = qkv_ptr + token * ((NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM)
    dims = tl.arange(0, HALF_BLOCK)
    is_dim = dims < half
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_ptr + position * half + dims, mask=is_dim, other=0.0)
    sin = tl.load(sin_ptr + position * half + dims, mask=is_dim, other=0.0)

    heads = tl.arange(0, GROUP_BLOCK)
    queries = row + (kv_head * group + heads[:, None]) * HEAD_DIM + dims[None, :]
    is_query = (heads[:, None] < group) & is_dim[None, :]
    low = tl.load(queries, mask=is_query, other=0.0).to(tl.float32)
    high = tl.load(queries + half, mask=is_query, other=0.0).to(tl.float32)
    low, high = rotate_half(low, high, cos[None, :], sin[None, :])
    tl.store(queries, low.to(qkv_ptr.dtype.element_ty), mask=is_query)
    tl.store(queries + half, high.to(qkv_ptr.dtype.element_ty), mask=is_query)

    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot >= 0:
        place = kv_head.to(tl.int64) * head_stride + slot * slot_stride + dims
        key = row + (NUM_HEADS + kv_head) * HEAD_DIM + dims
        key_low = tl.load(key, mask=is_dim, other=0.0).to(tl.float32)
        key_high = tl.load(key + half, mask=is_dim, other=0.0).to(tl.float32)
        key_low, key_high = rotate_half(key_low, key_high, cos, sin)
        dtype = qkv_ptr.dtype.element_ty
        key_low = tl.div_rn(key_low.to(dtype).to(tl.float32), key_scale)
        key_high = tl.div_rn(key_high.to(dtype).to(tl.float32), key_scale)
        store_as(keys_ptr + place, key_low, is_dim)
        store_as(keys_ptr + place + half, key_high, is_dim)
        value = row + (NUM_HEADS + NUM_KV_HEADS + kv_head) * HEAD_DIM + dims
        value_low = tl.load(value, mask=is_dim, other=0.0).to(tl.float32)
        value_high = tl.load(value + half, mask=is_dim, other=0.0).to(tl.float32)
        store_as(values_ptr + place, tl.div_rn(value_low, value_scale), is_dim)
        store_as(values_ptr + place + half, tl.div_rn(value_high, value_scale), is_dim)


def rope_write(
    qkv: Tensor,
    positions: Tensor,
    slots: Tensor,
    tables: tuple[Tensor, Tensor],
    pool: tuple[Tensor, Tensor],
    scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Rotate in place the queries of qkv [T, H + 2 K, D], put its keys and values in their slots.

    `tables` are cosines and sines [positions, D / 2] in float32, `pool` keys and values
    [K, slots, D] of one layer, of any float dtype or float8_e4m3fn. A key is divided by the
    first scale, a value by the second, before it is rounded. A token with slot -1 is padding
    and writes nothing. Returns the queries [T, H, D], a view of qkv.
    """
    keys, values = pool
    assert qkv.is_contiguous()
    assert keys.stride() == values.stride()
    assert keys.stride(2) == 1
    num_kv_heads, _, head_dim = keys.shape
    num_heads = qkv.shape[1] - 2 * num_kv_heads
    group = num_heads // num_kv_heads
    rope_write_kernel[(qkv.shape[0], num_kv_heads)](
        qkv,
        positions,
        slots,
        *tables,
        fp8_operand(keys),
        fp8_operand(values),
        keys.stride(0),
        keys.stride(1),
        *scales,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        GROUP_BLOCK=1 << (group - 1).bit_length(),
        HALF_BLOCK=padded(head_dim // 2),
        num_warps=1 if group * head_dim <= 1024 else 4,
    )
    return qkv[:, :num_heads]
