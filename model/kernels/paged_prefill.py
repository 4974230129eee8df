"""Paged attention of any number of new tokens a sequence: prompts, chunks, mixed steps.

The reference is model/attention/paged.py. One launch serves all sequences: the grid has
T // positions + S tiles, enough for any way to cut T tokens among S sequences, and a tile finds
its sequence by bisection of `query_starts`. So the host decides nothing that depends on lengths.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attend import attend_keys, find_sequence
from model.kernels.fp8 import fp8_operand
from model.kernels.launch import dot_type, padded


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Sides of a program's tile, and how it runs."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedStep:
    """Where a step's queries and keys are, on the device; S sequences, T tokens."""

    block_tables: Tensor  # [S, blocks] int32 or int64, rows contiguous
    query_starts: Tensor  # [S + 1] int32, offsets into T
    seq_lens: Tensor  # [S] int32, keys once the step is written; 0 where there is no sequence
    block_size: int


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "num_short"])
def paged_prefill_kernel(
    queries_ptr,
    output_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    scale,
    value_scale,
    num_seqs,
    table_stride,
    num_short,
    token_stride,
    head_stride,
    slot_stride,
    GROUP: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
):
    positions: tl.constexpr = ROWS // GROUP
    kv_head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = find_sequence(query_starts_ptr, num_seqs, tile, positions, 1)
    start = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - start
    first = (tile - start // positions - sequence) * positions
    if first >= num_queries or num_queries <= num_short:
        return
    seq_len = tl.load(seq_lens_ptr + sequence)
    earlier = seq_len - num_queries  # keys before the step

    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    query = first + rows // GROUP
    is_query = (rows < positions * GROUP) & (query < num_queries)
    heads = kv_head * GROUP + rows % GROUP
    tokens = (start + query).to(tl.int64)
    mask = is_query[:, None] & (dims < HEAD_DIM)[None, :]
    places = tokens[:, None] * token_stride + (heads * HEAD_DIM)[:, None] + dims[None, :]
    queries = tl.load(queries_ptr + places, mask=mask, other=0.0).to(DOT)

    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    output = tl.zeros([ROWS, DIM], tl.float32)
    limits = tl.where(is_query, earlier + query + 1, 0)
    keys_ptr += kv_head.to(tl.int64) * head_stride
    values_ptr += kv_head.to(tl.int64) * head_stride
    table = tables_ptr + sequence.to(tl.int64) * table_stride
    open_end = (earlier + first + 1) // KEYS * KEYS
    end = tl.minimum(earlier + first + positions, seq_len)
    best, total, output = attend_keys(
        queries,
        best,
        total,
        output,
        limits,
        0,
        open_end,
        table,
        keys_ptr,
        values_ptr,
        slot_stride,
        scale,
        BLOCK_SIZE,
        HEAD_DIM,
        DIM,
        KEYS,
        DOT,
        True,
    )
    best, total, output = attend_keys(
        queries,
        best,
        total,
        output,
        limits,
        open_end,
        end,
        table,
        keys_ptr,
        values_ptr,
        slot_stride,
        scale,
        BLOCK_SIZE,
        HEAD_DIM,
        DIM,
        KEYS,
        DOT,
        False,
    )
    total = tl.where(is_query, total, 1.0)
    output = output * (value_scale / total)[:, None]
    num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    places = (tokens * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(output_ptr + places, output.to(output_ptr.dtype.element_ty), mask=mask)


def choose_tiling(head_dim: int, group: int, itemsize: int) -> Tiling:
    """Look up the tile for a head dimension and the bytes of a query's element.

    Shared memory stays below 99 KiB, the least that a card of capability 8.0 and up offers.
    Not tuned on a card yet.
    """
    dim = padded(head_dim)
    if itemsize == 4:
        num_warps, num_stages = (8, 1) if dim > 128 else (4, 2)
        tiling = Tiling(rows=32, keys=32, num_warps=num_warps, num_stages=num_stages)
    elif dim <= 64:
        tiling = Tiling(rows=128, keys=64, num_warps=4, num_stages=3)
    elif dim <= 128:
        tiling = Tiling(rows=128, keys=64, num_warps=8, num_stages=2)
    else:
        tiling = Tiling(rows=64, keys=32, num_warps=4, num_stages=2)
    return _with_room(tiling, group)


def invariant_tiling(head_dim: int, group: int, itemsize: int) -> Tiling:
    """Look up the tile for everything, single tokens too: narrower, so that they waste less."""
    dim = padded(head_dim)
    keys = 64 if dim * itemsize <= 256 else 32
    num_warps, num_stages = (8, 1) if dim * itemsize > 512 else (4, 2)
    tiling = Tiling(rows=32, keys=keys, num_warps=num_warps, num_stages=num_stages)
    return _with_room(tiling, group)


def _with_room(tiling: Tiling, group: int) -> Tiling:
    """Make sure that a position's query heads fit."""
    return Tiling(
        rows=max(tiling.rows, padded(group)),
        keys=tiling.keys,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )


def paged_prefill(
    queries: Tensor,
    output: Tensor,
    pool: tuple[Tensor, Tensor],
    step: PagedStep,
    *,
    tiling: Tiling,
    scale: float,
    value_scale: float = 1.0,
    num_short: int = 0,
) -> None:
    """Write the attention output [T, H, D] of the sequences with more than `num_short` new tokens.

    Queries [T, H, D] are float32, float16 or bfloat16 with contiguous heads; `pool` holds keys and
    values [K, slots, D] of one layer, in those or float8_e4m3fn. `scale` multiplies the scores
    (softmax's, log2(e) and the keys' scale in one), `value_scale` the result. D is 16 to 256,
    T below 65,536 tiles. What other tokens have in `output` stays.
    """
    keys, values = pool
    num_tokens, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    num_seqs = step.seq_lens.shape[0]
    assert queries.stride()[1:] == (head_dim, 1)
    assert output.is_contiguous()
    assert keys.stride() == values.stride()
    grid = (num_kv_heads, num_tokens // (tiling.rows // group) + num_seqs)
    paged_prefill_kernel[grid](
        queries,
        output,
        fp8_operand(keys),
        fp8_operand(values),
        step.block_tables,
        step.query_starts,
        step.seq_lens,
        scale,
        value_scale,
        num_seqs,
        step.block_tables.stride(0),
        num_short,
        queries.stride(0),
        keys.stride(0),
        keys.stride(1),
        GROUP=group,
        NUM_KV_HEADS=num_kv_heads,
        HEAD_DIM=head_dim,
        DIM=padded(head_dim),
        BLOCK_SIZE=step.block_size,
        ROWS=tiling.rows,
        KEYS=tiling.keys,
        DOT=getattr(tl, dot_type(queries.dtype)),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
