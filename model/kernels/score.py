"""Weights and ranks behind log-probabilities; the reference is `logprobs.score_in_torch`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.launch import is_interpreted
from model.kernels.sampling import load_split, maxima_kernel, read_best, splits_of
from model.kernels.weights import weigh


@triton.jit(
    do_not_specialize=["logits_stride"],
    do_not_specialize_on_alignment=["token_ids_ptr"],
)
def score_kernel(
    logits_ptr,
    logits_stride,
    token_ids_ptr,
    maxima_ptr,
    largest_ptr,  # [N] float32
    sums_ptr,  # [N, 2, SPLITS] int64: weight, ids before the chosen one
    vocab_size: tl.constexpr,
    num_splits: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    largest, _key, _id = read_best(maxima_ptr, place, num_splits, SPLITS)
    if split == 0:
        tl.store(largest_ptr + place, largest)
    token_id = tl.load(token_ids_ptr + place)
    chosen = tl.load(logits_ptr + place * logits_stride + token_id)
    ids, values = load_split(logits_ptr, logits_stride, place, split, vocab_size)
    is_id = ids < vocab_size
    weights = weigh(values - largest, float("-inf"), INTERPRETED)
    is_before = is_id & ((values > chosen) | ((values == chosen) & (ids < token_id)))
    output = sums_ptr + place * 2 * SPLITS + split
    tl.store(output, tl.sum(tl.where(is_id, weights, 0), axis=0))
    tl.store(output + SPLITS, tl.sum(is_before.to(tl.int32), axis=0).to(tl.int64))


def score(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of logits [N, V] float32 the largest [N, 1], the weight of all ids [N, 1] int64, and
    how many ids come before the chosen ones [N].
    """
    assert logits.dtype is torch.float32
    assert logits.stride(1) == 1
    num_rows, vocab_size = logits.shape
    num_splits, splits = splits_of(vocab_size)
    maxima, sums = (
        torch.zeros(size, dtype=torch.int64, device=logits.device)
        for size in ((num_rows, splits), (num_rows, 2, splits))
    )
    largest = torch.empty((num_rows, 1), dtype=torch.float32, device=logits.device)
    options = {"num_warps": 8, "enable_fp_fusion": False}
    shape = {"vocab_size": vocab_size, "SPLITS": splits}
    grid = (num_rows, num_splits)
    source = (logits, logits.stride(0))
    maxima_kernel[grid](*source, maxima, **shape, **options)
    score_kernel[grid](
        *source,
        token_ids,
        maxima,
        largest,
        sums,
        **shape,
        num_splits=num_splits,
        INTERPRETED=is_interpreted(),
        **options,
    )
    totals, before = sums.sum(-1).split(1, dim=1)
    return largest, totals, before[:, 0]
