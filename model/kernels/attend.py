"""The inner loop that both attention kernels share: a tile of queries over a range of keys.

Softmax is taken online (Milakov and Gimelshein, arXiv 1805.02867), in powers of two, with
float32 sums. A tile packs the query heads of one K/V head, of one or more neighbouring
positions, into its rows (row = position * group + head), so that a key is read once for all of
them. Keys come in tiles of `KEYS` from the start of the range on: what is summed for a row, and
in which order, depends on nothing but its own sequence. Keys past a row's position weigh exactly 0.
"""

import triton
import triton.language as tl

from model.kernels.fp8 import load_as


@triton.jit
def attend_keys(
    queries,  # [ROWS, DIM] in DOT
    best,  # [ROWS] highest score so far, in units of log2
    total,  # [ROWS] sum of weights
    output,  # [ROWS, DIM] sum of weighted values
    limits,  # [ROWS] keys before it are seen
    first,
    end,
    table,  # the sequence's row of the block tables
    keys_ptr,  # of this K/V head
    values_ptr,
    slot_stride,
    scale,  # of scores, log2(e) included
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    DOT: tl.constexpr,
    IS_OPEN: tl.constexpr,  # every row sees every key of the range, which is whole tiles
):
    dims = tl.arange(0, DIM)
    is_dim = dims < HEAD_DIM
    for start in range(first, end, KEYS):
        places = start + tl.arange(0, KEYS)
        is_key = places < end
        blocks = tl.load(table + places // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
        slots = blocks * BLOCK_SIZE + places % BLOCK_SIZE
        offsets = slots[:, None] * slot_stride + dims[None, :]
        if IS_OPEN:
            mask = is_dim[None, :]
        else:
            mask = is_key[:, None] & is_dim[None, :]
        keys = load_as(keys_ptr + offsets, mask, DOT)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
        if not IS_OPEN:
            scores = tl.where(places[None, :] < limits[:, None], scores, float("-inf"))
        new_best = tl.maximum(best, tl.max(scores, axis=1))
        # A row that has seen nothing yet: -inf - -inf would be no number.
        origin = tl.where(new_best == float("-inf"), 0.0, new_best)
        weights = tl.exp2(scores - origin[:, None])
        keep = tl.exp2(best - origin)
        total = total * keep + tl.sum(weights, axis=1)
        values = load_as(values_ptr + offsets, mask, DOT)
        output = output * keep[:, None]
        output = tl.dot(weights.to(DOT), values, output, input_precision="ieee")
        best = new_best
    return best, total, output


@triton.jit
def find_sequence(marks_ptr, num_seqs, item, DIVISOR: tl.constexpr, STEP: tl.constexpr):
    """Return the last sequence s with marks[s] // DIVISOR + s * STEP <= item; marks rise."""
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        mark = tl.load(marks_ptr + middle) // DIVISOR + middle * STEP
        low = tl.where(mark <= item, middle, low)
        high = tl.where(mark <= item, high, middle)
    return low
