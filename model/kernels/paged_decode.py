"""Paged attention of few new tokens a sequence, its keys split among programs ("flash decoding").

The reference is model/attention/paged.py. Three kernels: `count_splits` once a step, then in every
layer `paged_decode`, whose programs claim splits one after the other, and `merge_splits`.

The grid is as large as the card, whatever the lengths: splits are numbered through all sequences,
and a program takes every n-th. Lengths and block tables are read on the device, so the launches
can be replayed from a CUDA graph. How a sequence is split depends on its own length alone: 256
keys a split, doubled while that makes more than 32 splits. So do its results.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.attend import attend_keys, find_sequence
from model.kernels.fp8 import fp8_operand
from model.kernels.launch import dot_type, num_multiprocessors, padded
from model.kernels.paged_prefill import PagedStep, Tiling

MAX_SPLITS = 32
MIN_SPLIT_KEYS = 256
_PROGRAMS = 3  # on a multiprocessor at once: a fourth would start when these have done all
_NUM_REGISTERS = 65536 // (_PROGRAMS * 4 * 32) // 8 * 8  # of a thread, so that they fit


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeWork:
    """A step's splits, and room for what they find; one for all layers."""

    split_starts: Tensor  # [S + 1] int32: number of the first split of each sequence
    partial_sums: Tensor  # [S * num_short, H, MAX_SPLITS, D] float32
    partial_stats: Tensor  # [S * num_short, H, MAX_SPLITS, 2] float32: highest score, total
    num_short: int  # sequences with up to so many new tokens are served


@triton.jit
def split_keys(seq_len, MIN_KEYS: tl.constexpr, SPLITS: tl.constexpr):
    """Return the keys a split of sequences this long."""
    size = seq_len * 0 + MIN_KEYS
    for _ in tl.static_range(14):
        size = tl.where(size * SPLITS < seq_len, size * 2, size)
    return size


@triton.jit(do_not_specialize=["num_seqs", "num_short"])
def count_splits_kernel(
    query_starts_ptr,
    seq_lens_ptr,
    split_starts_ptr,
    num_seqs,
    num_short,
    SEQS: tl.constexpr,
    MIN_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    num_splits = 0
    for first in range(0, num_seqs, SEQS):
        sequences = first + tl.arange(0, SEQS)
        mask = sequences < num_seqs
        starts = tl.load(query_starts_ptr + sequences, mask=mask, other=0)
        ends = tl.load(query_starts_ptr + sequences + 1, mask=mask, other=0)
        seq_lens = tl.load(seq_lens_ptr + sequences, mask=mask, other=0)
        size = split_keys(seq_lens, MIN_KEYS, SPLITS)
        is_short = (ends > starts) & (ends - starts <= num_short)
        counts = tl.where(is_short, (seq_lens + size - 1) // size, 0)
        tl.store(split_starts_ptr + sequences + 1, num_splits + tl.cumsum(counts, 0), mask=mask)
        num_splits += tl.sum(counts, 0)
    tl.store(split_starts_ptr, 0)


@triton.jit(do_not_specialize=["num_seqs", "table_stride", "num_short"])
def paged_decode_kernel(
    queries_ptr,
    output_ptr,
    sums_ptr,
    stats_ptr,
    keys_ptr,
    values_ptr,
    tables_ptr,
    query_starts_ptr,
    seq_lens_ptr,
    split_starts_ptr,
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
    MIN_KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    num_heads: tl.constexpr = NUM_KV_HEADS * GROUP
    kv_head = tl.program_id(0)
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    query = rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    keys_ptr += kv_head.to(tl.int64) * head_stride
    values_ptr += kv_head.to(tl.int64) * head_stride
    num_items = tl.load(split_starts_ptr + num_seqs)
    for item in range(tl.program_id(1), num_items, tl.num_programs(1)):
        # Sequences without splits share their mark with the one behind them, which is found.
        sequence = find_sequence(split_starts_ptr, num_seqs, item, 1, 0)
        first_split = tl.load(split_starts_ptr + sequence)
        num_splits = tl.load(split_starts_ptr + sequence + 1) - first_split
        start = tl.load(query_starts_ptr + sequence)
        num_queries = tl.load(query_starts_ptr + sequence + 1) - start
        seq_len = tl.load(seq_lens_ptr + sequence)
        size = split_keys(seq_len, MIN_KEYS, SPLITS)
        split = item - first_split

        is_query = query < num_queries
        tokens = (start + query).to(tl.int64)
        mask = is_query[:, None] & (dims < HEAD_DIM)[None, :]
        places = tokens[:, None] * token_stride + (heads * HEAD_DIM)[:, None] + dims[None, :]
        queries = tl.load(queries_ptr + places, mask=mask, other=0.0).to(DOT)
        limits = tl.where(is_query, seq_len - num_queries + query + 1, 0)
        best, total, sums = attend_keys(
            queries,
            tl.full([ROWS], float("-inf"), tl.float32),
            tl.zeros([ROWS], tl.float32),
            tl.zeros([ROWS, DIM], tl.float32),
            limits,
            split * size,
            tl.minimum((split + 1) * size, seq_len),
            tables_ptr + sequence.to(tl.int64) * table_stride,
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
        if num_splits == 1:
            total = tl.where(is_query, total, 1.0)
            done = sums * (value_scale / total)[:, None]
            places = (tokens * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(output_ptr + places, done.to(output_ptr.dtype.element_ty), mask=mask)
        else:
            partial = (sequence * num_short + query).to(tl.int64) * num_heads + heads
            partial = partial * SPLITS + split
            tl.store(stats_ptr + partial * 2, best, mask=is_query)
            tl.store(stats_ptr + partial * 2 + 1, total, mask=is_query)
            tl.store(sums_ptr + partial[:, None] * HEAD_DIM + dims[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=["num_short"])
def merge_splits_kernel(
    output_ptr,
    sums_ptr,
    stats_ptr,
    query_starts_ptr,
    split_starts_ptr,
    value_scale,
    num_short,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program a short sequence's token and head."""
    head = tl.program_id(0)
    sequence = tl.program_id(1) // num_short
    query = tl.program_id(1) % num_short
    num_splits = tl.load(split_starts_ptr + sequence + 1) - tl.load(split_starts_ptr + sequence)
    start = tl.load(query_starts_ptr + sequence)
    num_queries = tl.load(query_starts_ptr + sequence + 1) - start
    if num_splits <= 1 or query >= num_queries:
        return
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, DIM)
    is_split = splits < num_splits
    mask = is_split[:, None] & (dims < HEAD_DIM)[None, :]
    partial = (tl.program_id(1).to(tl.int64) * NUM_HEADS + head) * SPLITS + splits
    best = tl.load(stats_ptr + partial * 2, mask=is_split, other=float("-inf"))
    total = tl.load(stats_ptr + partial * 2 + 1, mask=is_split, other=0.0)
    sums = tl.load(sums_ptr + partial[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
    weights = tl.exp2(best - tl.max(best, axis=0))
    merged = tl.sum(sums * weights[:, None], axis=0)
    merged = merged * (value_scale / tl.sum(total * weights, axis=0))
    token = (start + query).to(tl.int64)
    places = (token * NUM_HEADS + head) * HEAD_DIM + dims
    tl.store(output_ptr + places, merged.to(output_ptr.dtype.element_ty), mask=dims < HEAD_DIM)


def choose_tiling(head_dim: int, group: int, itemsize: int) -> Tiling:
    """Look up the tile for a head dimension and the bytes of a query's element.

    Rows beyond the group are filled with further positions (drafts); shared memory stays below
    99 KiB. Not tuned on a card yet.
    """
    rows = padded(group)
    if padded(head_dim) * itemsize <= 128:
        return Tiling(rows=rows, keys=128, num_warps=4, num_stages=3)
    if padded(head_dim) * itemsize <= 256:
        return Tiling(rows=rows, keys=64, num_warps=4, num_stages=3)
    return Tiling(rows=rows, keys=32, num_warps=4, num_stages=2)


def plan_decode(step: PagedStep, num_short: int, num_heads: int, head_dim: int) -> DecodeWork:
    """Number the splits of the sequences with at most `num_short` new tokens."""
    num_seqs = step.seq_lens.shape[0]
    device = step.seq_lens.device
    rows = (num_seqs * num_short, num_heads, MAX_SPLITS)
    work = DecodeWork(
        split_starts=torch.empty(num_seqs + 1, dtype=torch.int32, device=device),
        partial_sums=torch.empty((*rows, head_dim), dtype=torch.float32, device=device),
        partial_stats=torch.empty((*rows, 2), dtype=torch.float32, device=device),
        num_short=num_short,
    )
    count_splits_kernel[(1,)](
        step.query_starts,
        step.seq_lens,
        work.split_starts,
        num_seqs,
        num_short,
        SEQS=256,
        MIN_KEYS=MIN_SPLIT_KEYS,
        SPLITS=MAX_SPLITS,
        num_warps=4,
    )
    return work


def paged_decode(
    queries: Tensor,
    output: Tensor,
    pool: tuple[Tensor, Tensor],
    step: PagedStep,
    work: DecodeWork,
    *,
    tiling: Tiling,
    scale: float,
    value_scale: float = 1.0,
) -> None:
    """Write the attention output [T, H, D] of the sequences that `work` covers.

    Tensors, scales and limits are those of `paged_prefill`; `work.num_short` times the group is
    at most `tiling.rows`. What other tokens have in `output` stays.
    """
    keys, values = pool
    _, num_heads, head_dim = queries.shape
    num_kv_heads = keys.shape[0]
    group = num_heads // num_kv_heads
    num_seqs = step.seq_lens.shape[0]
    assert work.num_short * group <= tiling.rows
    assert queries.stride()[1:] == (head_dim, 1)
    assert output.is_contiguous()
    assert keys.stride() == values.stride()
    num_programs = num_multiprocessors(queries.device) * _PROGRAMS
    paged_decode_kernel[(num_kv_heads, triton.cdiv(num_programs, num_kv_heads))](
        queries,
        output,
        work.partial_sums,
        work.partial_stats,
        fp8_operand(keys),
        fp8_operand(values),
        step.block_tables,
        step.query_starts,
        step.seq_lens,
        work.split_starts,
        scale,
        value_scale,
        num_seqs,
        step.block_tables.stride(0),
        work.num_short,
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
        MIN_KEYS=MIN_SPLIT_KEYS,
        SPLITS=MAX_SPLITS,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        maxnreg=_NUM_REGISTERS,
    )
    merge_splits_kernel[(num_heads, num_seqs * work.num_short)](
        output,
        work.partial_sums,
        work.partial_stats,
        step.query_starts,
        work.split_starts,
        value_scale,
        work.num_short,
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        DIM=padded(head_dim),
        SPLITS=MAX_SPLITS,
        num_warps=4,
    )
