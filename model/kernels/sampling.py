"""One token a row, from logits to id, with nothing asked of the host and no sort.

The reference is model/sampling: `first_max`, and `draw` with `uniforms`. A row is cut into
splits of `CHUNK` ids, one program each, so that a single row is spread over the card as well.

1. `maxima`: the largest logit of each split, with its lowest id.
2. `levels`, twice: how many ids, and what weight, lie above each of 16 levels of probability;
   the second time between the two levels around where top_k or top_p cuts.
3. `collect`: the logits between those two levels, or all above, go into a short list.
4. `threshold`: bisection over that list finds the logit at which the row is cut, and how many
   of the ids that have this very logit are kept. A list that would be too long is not used: then
   the bisection reads the row.
5. `sums`: what is kept of each split.
6. `pick`: the inverse of the CDF by rising id, at a Philox number.

Rows that do not ask for a kernel's work leave it at once. Grids and buffers depend on the shape of
the logits alone, so all of it can stand in a graph. Sums are taken over integers, so ids do not
depend on how a row is split; they can differ from the reference only where `exp` does (by a unit
in the last place, on a CPU), and then only for a number that falls between the two sums.
"""

import triton
import triton.language as tl

from model.kernels.weights import (
    LOWEST,
    order_key,
    uniform,
    value_of_key,
    weigh,
    weight_to_reach,
)

CHUNK = tl.constexpr(4096)
LEVELS = tl.constexpr(16)
# A product, which is rounded alike when it is computed by the compiler; division need not be.
_LEVEL_SHARE = tl.constexpr(1.0 / 15.0)
DEEPEST = tl.constexpr(-25.0)  # exp(-25) is less than one unit
LIST_LEN = tl.constexpr(8192)
_COUNT_SHIFT = tl.constexpr(48)  # 4096 weights of at most 2^35 stay below 2^48
_ONE_COUNT = tl.constexpr(1 << 48)
_WEIGHT_MASK = tl.constexpr((1 << 48) - 1)
_NAN_FREE = tl.constexpr(0x7F800000)  # the key of +inf
_WIDTH = tl.constexpr(2048)  # logits that a bisection reads at a time
_MOST = tl.constexpr(0x7FFFFFFF)
_MINUS_INF = tl.constexpr(-2139095041)  # the key of -inf

# Columns of the table (model/sampling/table.py), and of the state that kernels leave a row.
_COLUMNS = tl.constexpr(8)
_TARGET, _TOP_K, _LENGTH, _BASE_COUNT, _BASE_WEIGHT, _KEY, _TIES, _TIE_WEIGHT = (
    tl.constexpr(i) for i in range(8)
)
STATE_COLUMNS = tl.constexpr(8)


def splits_of(vocab_size: int) -> tuple[int, int]:
    """Return into how many splits a row of logits is cut, and the power of two to hold them."""
    num_splits = triton.cdiv(vocab_size, CHUNK.value)
    return num_splits, max(2, triton.next_power_of_2(num_splits))


@triton.jit
def read_line(table_ptr, row):
    """Return is_random, top_k, top_p, scale and min_exponent of a row."""
    line = table_ptr + row * _COLUMNS
    top_p = tl.load(line + 4).to(tl.float64, bitcast=True)
    scale = tl.load(line + 5).to(tl.float64, bitcast=True).to(tl.float32)
    min_exponent = tl.load(line + 6).to(tl.float64, bitcast=True).to(tl.float32)
    return tl.load(line) != 0, tl.load(line + 3), top_p, scale, min_exponent


@triton.jit
def load_split(logits_ptr, logits_stride, place, split, vocab_size: tl.constexpr):
    """Return the ids of a split of a place's logits, and the logits; -inf past the last."""
    ids = split * CHUNK + tl.arange(0, CHUNK)
    pointers = logits_ptr + place * logits_stride + ids
    return ids, tl.load(pointers, mask=ids < vocab_size, other=float("-inf"))


@triton.jit
def read_best(maxima_ptr, place, num_splits, SPLITS: tl.constexpr):
    """Return the largest logit of a place, its key and its lowest id."""
    splits = tl.arange(0, SPLITS)
    lowest: tl.constexpr = -(1 << 63)
    packed = tl.load(maxima_ptr + place * SPLITS + splits, mask=splits < num_splits, other=lowest)
    best = tl.max(packed, axis=0)
    key = (best >> 32).to(tl.int32)
    return value_of_key(key), key, 0x7FFFFFFF - (best & 0x7FFFFFFF)


@triton.jit
def is_finite_key(key):
    """Whether a largest logit is one to divide by."""
    return (key < _NAN_FREE) & (key > _MINUS_INF)


@triton.jit
def level(high, low, index):
    """Return the level(s) between two, both included, exact at either end."""
    step = (low - high) * _LEVEL_SHARE
    between = high + step * index.to(tl.float32)
    return tl.where(index == 0, high, tl.where(index == LEVELS - 1, low, between))


@triton.jit
def read_levels(sums_ptr, place, num_splits, SPLITS: tl.constexpr):
    """Return count and weight above each level, of a whole place."""
    splits = tl.arange(0, SPLITS)[:, None]
    index = tl.arange(0, LEVELS)[None, :]
    pointers = sums_ptr + (place * SPLITS + splits) * LEVELS + index
    packed = tl.load(pointers, mask=splits < num_splits, other=0)
    counts = tl.sum(packed >> _COUNT_SHIFT, axis=0)
    return counts, tl.sum(packed & _WEIGHT_MASK, axis=0)


@triton.jit
def pick_level(counts, weights, top_k, target):
    """Return the first level above which there is enough; LEVELS if there is none."""
    enough = tl.where(top_k > 0, counts >= top_k, weights >= target)
    return tl.sum(1 - enough.to(tl.int32), axis=0)


@triton.jit
def at_level(values, wanted):
    """Return a level's count or weight; 0 before the first."""
    index = tl.arange(0, LEVELS)
    return tl.sum(tl.where(index == wanted, values, 0), axis=0)


@triton.jit
def first_bracket(sums_ptr, place, num_splits, top_k, top_p, SPLITS: tl.constexpr):
    """Return the levels around the cut, the weight to reach, and top_k, 0 if all ids are fewer."""
    counts, weights = read_levels(sums_ptr, place, num_splits, SPLITS)
    top_k = tl.where(at_level(counts, LEVELS - 1) < top_k, 0, top_k)
    target = weight_to_reach(at_level(weights, LEVELS - 1), top_p)
    wanted = tl.minimum(pick_level(counts, weights, top_k, target), LEVELS - 1)
    top = DEEPEST * 0.0
    high = level(top, DEEPEST, tl.maximum(wanted - 1, 0))
    return high, level(top, DEEPEST, wanted), target, top_k


@triton.jit(do_not_specialize=["logits_stride"])
def maxima_kernel(
    logits_ptr, logits_stride, maxima_ptr, vocab_size: tl.constexpr, SPLITS: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    ids, values = load_split(logits_ptr, logits_stride, place, split, vocab_size)
    keys = order_key(values)
    packed = (keys.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)
    tl.store(maxima_ptr + place * SPLITS + split, tl.max(packed, axis=0))


@triton.jit(
    do_not_specialize=["logits_stride"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def levels_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    table_ptr,
    maxima_ptr,
    first_ptr,  # [N, SPLITS, LEVELS] of the first time
    sums_ptr,  # what is written
    vocab_size: tl.constexpr,
    num_splits: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_FIRST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.load(rows_ptr + place)
    is_random, top_k, top_p, scale, min_exponent = read_line(table_ptr, row)
    top_k = tl.where(top_k >= vocab_size, 0, top_k)
    largest, key, _id = read_best(maxima_ptr, place, num_splits, SPLITS)
    if is_random & ((top_k > 0) | (top_p < 1.0)) & is_finite_key(key):
        high = DEEPEST * 0.0
        low = high + DEEPEST
        if not IS_FIRST:
            high, low, _target, _top_k = first_bracket(
                first_ptr, place, num_splits, top_k, top_p, SPLITS
            )
        _ids, values = load_split(logits_ptr, logits_stride, place, split, vocab_size)
        exponents = (values - largest) * scale
        weights = weigh(exponents, min_exponent, INTERPRETED)
        packed = weights + _ONE_COUNT
        output = sums_ptr + (place * SPLITS + split) * LEVELS
        for step in range(LEVELS):
            index = step + split * 0
            is_above = exponents >= level(high, low, index)
            tl.store(output + index, tl.sum(tl.where(is_above, packed, 0), axis=0))


@triton.jit(
    do_not_specialize=["logits_stride"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def collect_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    table_ptr,
    maxima_ptr,
    first_ptr,
    second_ptr,
    list_ptr,  # [N, LIST_LEN] float32
    state_ptr,  # [N, STATE_COLUMNS] int64
    vocab_size: tl.constexpr,
    num_splits: tl.constexpr,
    SPLITS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.load(rows_ptr + place)
    is_random, top_k, top_p, scale, _min = read_line(table_ptr, row)
    top_k = tl.where(top_k >= vocab_size, 0, top_k)
    largest, key, _id = read_best(maxima_ptr, place, num_splits, SPLITS)
    if is_random & ((top_k > 0) | (top_p < 1.0)) & is_finite_key(key):
        high, low, target, top_k = first_bracket(first_ptr, place, num_splits, top_k, top_p, SPLITS)
        counts, weights = read_levels(second_ptr, place, num_splits, SPLITS)
        wanted = tl.minimum(pick_level(counts, weights, top_k, target), LEVELS - 1)
        count = at_level(counts, wanted)
        before = at_level(counts, wanted - 1)
        # The weight that top_p wants of the best k is not known yet: its cut may be above.
        from_top = (count <= LIST_LEN) | ((top_k > 0) & (top_p < 1.0))
        before = tl.where(from_top, 0, before)
        length = tl.where(count - before <= LIST_LEN, count - before, -1)
        if split == 0:
            state = state_ptr + place * STATE_COLUMNS
            tl.store(state + _TARGET, target)
            tl.store(state + _TOP_K, top_k)
            tl.store(state + _LENGTH, length)
            tl.store(state + _BASE_COUNT, tl.where(length < 0, 0, before))
            base = tl.where(from_top | (length < 0), 0, at_level(weights, wanted - 1))
            tl.store(state + _BASE_WEIGHT, base)
        if length >= 0:
            splits = tl.arange(0, SPLITS)
            own = second_ptr + (place * SPLITS + splits) * LEVELS
            is_earlier = splits < split
            listed = tl.load(own + wanted, mask=is_earlier, other=0) >> _COUNT_SHIFT
            above = tl.load(own + wanted - 1, mask=is_earlier & (wanted > 0), other=0)
            listed -= tl.where(from_top, 0, above >> _COUNT_SHIFT)
            _ids, values = load_split(logits_ptr, logits_stride, place, split, vocab_size)
            exponents = (values - largest) * scale
            is_listed = exponents >= level(high, low, wanted)
            is_above = exponents >= level(high, low, tl.maximum(wanted - 1, 0))
            is_listed = is_listed & (from_top | (wanted == 0) | (is_above == 0))
            where = tl.sum(listed, axis=0) + tl.cumsum(is_listed.to(tl.int32), axis=0) - 1
            tl.store(list_ptr + place * LIST_LEN + where, values, mask=is_listed)


@triton.jit
def measure(
    source,
    length,
    least,
    largest,
    scale,
    min_exponent,
    WITH_WEIGHTS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return how many of the source's logits have at least a key, and their weight."""
    lanes = tl.arange(0, _WIDTH)
    counts = lanes * 0
    sums = counts.to(tl.int64)
    for start in range(0, length, _WIDTH):
        values = tl.load(source + start + lanes, mask=start + lanes < length, other=float("-inf"))
        is_kept = (order_key(values) >= least) & (start + lanes < length)
        counts += is_kept.to(tl.int32)
        if WITH_WEIGHTS:
            weights = weigh((values - largest) * scale, min_exponent, INTERPRETED)
            sums += tl.where(is_kept, weights, 0)
    return tl.sum(counts, axis=0).to(tl.int64), tl.sum(sums, axis=0)


@triton.jit
def measure_cut(source, length, key, largest, scale, min_exponent, INTERPRETED: tl.constexpr):
    """Return how many logits are above a key, their weight, and the weight of one at it."""
    above, weight = measure(
        source, length, key + 1, largest, scale, min_exponent, True, INTERPRETED
    )
    count, total = measure(source, length, key, largest, scale, min_exponent, True, INTERPRETED)
    return above, weight, (total - weight) // tl.maximum(count - above, 1)


@triton.jit
def lowest_key(source, length):
    """Return the lowest key of the source's logits."""
    lanes = tl.arange(0, _WIDTH)
    lowest = lanes * 0 + _MOST
    for start in range(0, length, _WIDTH):
        values = tl.load(source + start + lanes, mask=start + lanes < length, other=float("inf"))
        lowest = tl.minimum(lowest, order_key(values))
    return tl.min(lowest, axis=0).to(tl.int64)


@triton.jit
def bisect(
    source,
    length,
    low,
    high,
    wanted,
    largest,
    scale,
    min_exponent,
    BY_WEIGHT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Return the highest key from which on there is at least what is wanted."""
    while low < high:
        middle = low + (high - low + 1) // 2
        count, weight = measure(
            source, length, middle, largest, scale, min_exponent, BY_WEIGHT, INTERPRETED
        )
        if BY_WEIGHT:
            count = weight
        is_enough = count >= wanted
        low = tl.where(is_enough, middle, low)
        high = tl.where(is_enough, high, middle - 1)
    return low


@triton.jit(
    do_not_specialize=["logits_stride"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def threshold_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    table_ptr,
    maxima_ptr,
    list_ptr,
    state_ptr,
    vocab_size: tl.constexpr,
    num_splits: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    is_random, top_k, top_p, scale, min_exponent = read_line(table_ptr, row)
    top_k = tl.where(top_k >= vocab_size, 0, top_k)
    largest, top_key, _id = read_best(maxima_ptr, place, num_splits, SPLITS)
    if is_random & ((top_k > 0) | (top_p < 1.0)) & is_finite_key(top_key):
        state = state_ptr + place * STATE_COLUMNS
        target = tl.load(state + _TARGET)
        top_k = tl.load(state + _TOP_K)
        length = tl.load(state + _LENGTH)
        base_count = tl.load(state + _BASE_COUNT)
        base_weight = tl.load(state + _BASE_WEIGHT)
        source = logits_ptr + place * logits_stride
        if length >= 0:
            source = list_ptr + place * LIST_LEN
        length = tl.where(length >= 0, length, vocab_size).to(tl.int32)
        high = top_key.to(tl.int64)
        low = lowest_key(source, length)
        kept_ties = high * 0 + vocab_size
        if top_k > 0:
            low = bisect(
                source,
                length,
                low,
                high,
                top_k - base_count,
                largest,
                scale,
                min_exponent,
                False,
                INTERPRETED,
            )
            count, weight, tie_weight = measure_cut(
                source, length, low, largest, scale, min_exponent, INTERPRETED
            )
            kept_ties = top_k - base_count - count
            target = weight_to_reach(weight + kept_ties * tie_weight, top_p)
        if (top_k <= 0) | (top_p < 1.0):
            low = bisect(
                source,
                length,
                low,
                high,
                target - base_weight,
                largest,
                scale,
                min_exponent,
                True,
                INTERPRETED,
            )
        count, weight, tie_weight = measure_cut(
            source, length, low, largest, scale, min_exponent, INTERPRETED
        )
        if (top_k <= 0) | (top_p < 1.0):
            missing = target - base_weight - weight
            one = tl.maximum(tie_weight, 1)
            kept_ties = (missing + one - 1) // one
        tl.store(state + _KEY, low)
        tl.store(state + _TIES, kept_ties)
        tl.store(state + _TIE_WEIGHT, tie_weight)


@triton.jit
def read_cut(state_ptr, place, top_k, top_p, vocab_size):
    """Return the key at which a row is cut, and how many ids of that key are kept."""
    state = state_ptr + place * STATE_COLUMNS
    is_cut = ((top_k > 0) & (top_k < vocab_size)) | (top_p < 1.0)
    key = tl.load(state + _KEY, mask=is_cut, other=LOWEST)
    ties = tl.load(state + _TIES, mask=is_cut, other=0)
    weight = tl.load(state + _TIE_WEIGHT, mask=is_cut, other=0)
    return key.to(tl.int32), ties, weight


@triton.jit(
    do_not_specialize=["logits_stride"],
    do_not_specialize_on_alignment=["rows_ptr"],
)
def sums_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    table_ptr,
    maxima_ptr,
    state_ptr,
    sums_ptr,  # [N, 2, SPLITS] int64: weight above the cut, ids at it
    vocab_size: tl.constexpr,
    num_splits: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row = tl.load(rows_ptr + place)
    is_random, top_k, top_p, scale, min_exponent = read_line(table_ptr, row)
    largest, best_key, _id = read_best(maxima_ptr, place, num_splits, SPLITS)
    if is_random & is_finite_key(best_key):
        key, _ties, _weight = read_cut(state_ptr, place, top_k, top_p, vocab_size)
        ids, values = load_split(logits_ptr, logits_stride, place, split, vocab_size)
        weights = weigh((values - largest) * scale, min_exponent, INTERPRETED)
        keys = order_key(values)
        output = sums_ptr + place * 2 * SPLITS + split
        tl.store(output, tl.sum(tl.where(keys > key, weights, 0), axis=0))
        is_tie = (keys == key) & (ids < vocab_size)
        tl.store(output + SPLITS, tl.sum(is_tie.to(tl.int32), axis=0).to(tl.int64))


@triton.jit(
    do_not_specialize=["logits_stride"],
    do_not_specialize_on_alignment=["rows_ptr", "positions_ptr"],
)
def pick_kernel(
    logits_ptr,
    logits_stride,
    rows_ptr,
    positions_ptr,
    table_ptr,
    maxima_ptr,
    state_ptr,
    sums_ptr,
    ids_ptr,  # [N] int64
    broken_ptr,  # [N] bool
    vocab_size: tl.constexpr,
    num_splits: tl.constexpr,
    SPLITS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    is_random, top_k, top_p, scale, min_exponent = read_line(table_ptr, row)
    largest, best_key, token_id = read_best(maxima_ptr, place, num_splits, SPLITS)
    is_good = is_finite_key(best_key)
    if is_random & is_good:
        key, kept_ties, tie_weight = read_cut(state_ptr, place, top_k, top_p, vocab_size)
        splits = tl.arange(0, SPLITS)
        is_split = splits < num_splits
        sums = sums_ptr + place * 2 * SPLITS + splits
        ties = tl.load(sums + SPLITS, mask=is_split, other=0)
        ties_before = tl.cumsum(ties, axis=0) - ties
        kept = tl.minimum(tl.maximum(kept_ties - ties_before, 0), ties)
        weights = tl.load(sums, mask=is_split, other=0) + kept * tie_weight
        reached = tl.cumsum(weights, axis=0)
        total = tl.sum(weights, axis=0)
        seed = tl.load(table_ptr + row * _COLUMNS + 1)
        choice = tl.load(table_ptr + row * _COLUMNS + 2)
        number = uniform(seed, tl.load(positions_ptr + place), choice)
        target = tl.minimum((number * total.to(tl.float64)).to(tl.int64), total - 1)
        split = tl.sum(((reached <= target) & is_split).to(tl.int32), axis=0)
        split = tl.minimum(split, num_splits - 1)
        target -= tl.sum(tl.where(splits < split, weights, 0), axis=0)
        num_before = tl.sum(tl.where(splits < split, ties, 0), axis=0)

        ids, values = load_split(logits_ptr, logits_stride, place, split, vocab_size)
        own = weigh((values - largest) * scale, min_exponent, INTERPRETED)
        keys = order_key(values)
        is_tie = (keys == key) & (ids < vocab_size)
        tie_rank = num_before + tl.cumsum(is_tie.to(tl.int32), axis=0)
        own = tl.where((keys > key) | (is_tie & (tie_rank <= kept_ties)), own, 0)
        is_passed = tl.cumsum(own, axis=0) <= target
        token_id = split * CHUNK + tl.sum(is_passed.to(tl.int32), axis=0)
        token_id = tl.minimum(token_id, vocab_size - 1).to(tl.int64)
    tl.store(ids_ptr + place, tl.where(is_good, token_id, 0))
    tl.store(broken_ptr + place, is_good == 0)
