"""float8_e4m3fn: the format's codec inside kernels, and quantisation of activations by row.

A tensor in fp8 comes to a kernel in one of two forms. As `float8_e4m3fn` the hardware converts
(capability 8.9 and up). Viewed as `uint8`, integer arithmetic does: for Ampere, which has no such
type, and for Triton's interpreter, whose conversion does not round to nearest. Both round to
nearest even and saturate at 448; written, they give the same bits. Read as uint8, the NaN code
is 480.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import FP8, Fp8Rows
from model.kernels.launch import converts_fp8, padded


@triton.jit
def encode_e4m3(x):
    """Return the codes (uint8) of float32 values."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Exponent bias 127 becomes 7; the 20 bits that fall off round half to even.
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1) - (120 << 23)) >> 20
    # Below 2^-6 codes are multiples of 2^-9, the unit in the last place of floats from 2^14 on.
    shifted = tl.abs(x) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < (121 << 23), subnormal, normal)
    code = tl.where(magnitude > 0x43E00000, 0x7E, code)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)
    return (sign | code).to(tl.uint8)


@triton.jit
def decode_e4m3(codes):
    """Return the values (float16, exact) of codes (uint8)."""
    wide = codes.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    # The exponent still has bias 7 where float16 has 15.
    return bits.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def load_as(pointers, mask, dtype: tl.constexpr):
    """Load masked values of any float format, or codes of e4m3, in `dtype`; 0 elsewhere."""
    values = tl.load(pointers, mask=mask, other=0.0)
    if values.dtype == tl.uint8:
        values = decode_e4m3(values)
    return values.to(dtype)


@triton.jit
def store_as(pointers, values, mask):
    """Store float32 values in the format that is pointed to."""
    if pointers.dtype.element_ty == tl.uint8:
        tl.store(pointers, encode_e4m3(values), mask=mask)
    elif pointers.dtype.element_ty == tl.float8e4nv:
        limit: tl.constexpr = 448.0
        clamped = tl.clamp(values, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
        tl.store(pointers, clamped.to(tl.float8e4nv), mask=mask)
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def store_quantized(codes_ptr, scales_ptr, row, columns, values, mask, size):
    """Store a row of float32 values as codes and their scale; values are 0 beyond the mask."""
    highest = tl.max(tl.abs(values), axis=0)
    highest = tl.where(highest > 0.0, highest, 448.0)
    tl.store(scales_ptr + row, tl.div_rn(highest, 448.0))
    store_as(codes_ptr + row * size + columns, values * tl.div_rn(448.0, highest), mask)


@triton.jit(do_not_specialize=["x_stride"])
def quantize_kernel(
    x_ptr, x_stride, codes_ptr, scales_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    store_quantized(codes_ptr, scales_ptr, row, columns, x, mask, SIZE)


def quantize_fp8(x: Tensor) -> Fp8Rows:
    """Do what `quantize_rows` of model/fp8.py does to x [T, I], to the bit.

    One program holds a whole row: I up to 65,536.
    """
    codes = torch.empty(x.shape, dtype=FP8, device=x.device)
    scales = torch.empty((x.shape[0], 1), dtype=torch.float32, device=x.device)
    size = x.shape[1]
    block = padded(size)
    quantize_kernel[(x.shape[0],)](
        x,
        x.stride(0),
        fp8_operand(codes),
        scales,
        SIZE=size,
        BLOCK=block,
        num_warps=row_warps(block),
    )
    return Fp8Rows(codes, scales)


def fp8_operand(x: Tensor) -> Tensor:
    """Return x in the form in which this device's kernels take it, if x is fp8."""
    if x.dtype is FP8 and not converts_fp8(x.device):
        return x.view(torch.uint8)
    return x


def row_warps(block: int) -> int:
    """Warps of a program that holds a row of `block` values."""
    return max(1, min(16, block // 512))
