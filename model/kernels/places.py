"""What a decode step looks up for each place of its batch, in one launch.

The reference is `look_up` of model/decode.py: a dozen small operations, each of which would be a
launch of its own in every step.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def look_up_kernel(
    rows_ptr,
    positions_ptr,
    log_ptr,
    tables_ptr,
    token_ids_ptr,
    at_ptr,
    slots_ptr,
    seq_lens_ptr,
    log_stride,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
):
    """One program a place."""
    place = tl.program_id(0)
    row = tl.load(rows_ptr + place)
    position = tl.load(positions_ptr + place)
    at = tl.maximum(position, 0)
    token_id = tl.load(log_ptr + row * log_stride + at)
    block = tl.load(tables_ptr + row * table_stride + at // BLOCK_SIZE).to(tl.int64)
    slot = tl.where(position >= 0, block * BLOCK_SIZE + at % BLOCK_SIZE, -1)
    tl.store(token_ids_ptr + place, token_id.to(tl.int64))
    tl.store(at_ptr + place, at)
    tl.store(slots_ptr + place, slot)
    tl.store(seq_lens_ptr + place, (position + 1).to(tl.int32))
    tl.store(positions_ptr + place, tl.where(position >= 0, position + 1, position))


def look_up(
    rows: Tensor, positions: Tensor, token_log: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Do as the reference does, for contiguous rows and positions [S] int64."""
    num_places = len(rows)
    token_ids, at, slots = (torch.empty_like(rows) for _ in range(3))
    seq_lens = torch.empty(num_places, dtype=torch.int32, device=rows.device)
    look_up_kernel[(num_places,)](
        rows,
        positions,
        token_log,
        block_tables,
        token_ids,
        at,
        slots,
        seq_lens,
        token_log.stride(0),
        block_tables.stride(0),
        BLOCK_SIZE=block_size,
        num_warps=1,
    )
    return token_ids, at, slots, seq_lens
