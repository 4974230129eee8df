"""Launches the kernels of model/kernels/sampling.py, one after the other, over logits."""

import torch
from torch import Tensor

from model.kernels.launch import is_interpreted
from model.kernels.sampling import (
    LEVELS,
    LIST_LEN,
    STATE_COLUMNS,
    collect_kernel,
    levels_kernel,
    maxima_kernel,
    pick_kernel,
    splits_of,
    sums_kernel,
    threshold_kernel,
)
from model.sampling.table import Draw


def sample_rows(
    logits: Tensor, rows: Tensor, positions: Tensor, table: Tensor, most: Draw
) -> tuple[Tensor, Tensor]:
    """Choose an id for each of logits [N, V] float32, whose rows are contiguous.

    `rows` [N] int64 are lines of the table [R, COLUMNS] (model/sampling/table.py), `positions` [N]
    int64 those of the tokens to be sampled. Return ids [N] int64 and whether a row is broken [N]
    bool: NaN or +inf in the logits, or nothing but -inf; its id is 0. No row may ask for more than
    `most`. Waits for nothing, and can be captured into a graph.
    """
    assert logits.dtype is torch.float32
    assert logits.stride(1) == 1
    num_rows, vocab_size = logits.shape
    num_splits, splits = splits_of(vocab_size)
    shape = {"vocab_size": vocab_size, "num_splits": num_splits, "SPLITS": splits}
    options = {"num_warps": 8, "enable_fp_fusion": False}
    numeric = {"INTERPRETED": is_interpreted(), **options}
    grid = (num_rows, num_splits)

    def buffer(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty((num_rows, *size), dtype=dtype, device=logits.device)

    maxima, state, sums = buffer(splits), buffer(STATE_COLUMNS.value), buffer(2, splits)
    token_ids, is_broken = buffer(), buffer(dtype=torch.bool)
    source = (logits, logits.stride(0))
    common = (*source, rows, table, maxima)
    maxima_kernel[grid](*source, maxima, vocab_size=vocab_size, SPLITS=splits, **options)
    if most == Draw.FILTERED:
        first, second = buffer(splits, LEVELS.value), buffer(splits, LEVELS.value)
        shortlist = buffer(LIST_LEN.value, dtype=torch.float32)
        levels_kernel[grid](*common, first, first, **shape, IS_FIRST=True, **numeric)
        levels_kernel[grid](*common, first, second, **shape, IS_FIRST=False, **numeric)
        collect_kernel[grid](*common, first, second, shortlist, state, **shape, **options)
        threshold_kernel[(num_rows,)](*common, shortlist, state, **shape, **numeric)
    if most != Draw.GREEDY:
        sums_kernel[grid](*common, state, sums, **shape, **numeric)
    pick_kernel[(num_rows,)](
        *source,
        rows,
        positions,
        table,
        maxima,
        state,
        sums,
        token_ids,
        is_broken,
        **shape,
        **numeric,
    )
    return token_ids, is_broken
