"""What the sampling kernels share: order, weights and random numbers of model/sampling, to the bit.

A weight is an integer in units of 2^-35 of the largest, so sums over the vocabulary come out the
same in whatever order they are taken. Launch with `enable_fp_fusion=False`: a product and a sum
that become one instruction are rounded once, where torch rounds twice.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOWEST = tl.constexpr(-(1 << 31))  # below the key of any number


@triton.jit
def order_key(values):
    """Return int32 keys that order as float32 values do; -0 is 0, NaN the largest."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(values != values, 0x7FFFFFFF, keys)


@triton.jit
def value_of_key(keys):
    """Return the float32 values of int32 keys."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def weigh(exponents, min_exponent, INTERPRETED: tl.constexpr):
    """Return the weights (int64) of (logits - largest) * scale, as `distribution.weigh` does.

    They are 0 below min_p. libdevice's exp is the one that torch calls; Triton's own is an
    approximation.
    """
    if INTERPRETED:
        powers = tl.exp(exponents)
    else:
        powers = libdevice.exp(exponents)
    weights = (powers * 34359738368.0).to(tl.int64)
    return tl.where(exponents < min_exponent, 0, weights)


@triton.jit
def weight_to_reach(total, top_p):
    """Return `total * top_p` rounded to nearest even, at least 1: int64 of int64 and float64."""
    product = total.to(tl.float64) * top_p
    whole = product.to(tl.int64)
    rest = product - whole.to(tl.float64)
    is_up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
    return tl.maximum(whole + is_up.to(tl.int64), 1)


@triton.jit
def uniform(seed, position, choice):
    """Return `philox.uniforms` of one token: float64 of int64 words."""
    mask = 0xFFFFFFFF
    c0 = (position & mask).to(tl.uint64)
    c1 = ((position >> 32) & mask).to(tl.uint64)
    c2 = (choice & mask).to(tl.uint64)
    c3 = c2 - c2
    k0 = (seed & mask).to(tl.uint64)
    k1 = ((seed >> 32) & mask).to(tl.uint64)
    for _ in tl.static_range(10):
        first = c0 * 0xD2511F53
        second = c2 * 0xCD9E8D57
        c0 = (second >> 32) ^ c1 ^ k0
        c1 = second & mask
        c2 = (first >> 32) ^ c3 ^ k1
        c3 = first & mask
        k0 = (k0 + 0x9E3779B9) & mask
        k1 = (k1 + 0xBB67AE85) & mask
    bits = ((c0 >> 5) << 26) + (c1 >> 6)
    return bits.to(tl.int64).to(tl.float64) * 1.1102230246251565e-16
