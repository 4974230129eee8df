"""silu(gate) * up of a fused gate and up product; the reference is model/layers/activation.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import FP8, Fp8Rows
from model.kernels.fp8 import fp8_operand, row_warps, store_quantized
from model.kernels.launch import padded


@triton.jit
def gated(gate_up_ptr, row, columns, mask, SIZE: tl.constexpr):
    """Return silu(gate) * up of some columns, rounded where torch rounds."""
    dtype = gate_up_ptr.dtype.element_ty
    pointers = gate_up_ptr + row * (2 * SIZE) + columns
    gate = tl.load(pointers, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(pointers + SIZE, mask=mask, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype)
    return (activated.to(tl.float32) * up).to(dtype)


@triton.jit
def silu_mul_kernel(gate_up_ptr, output_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    y = gated(gate_up_ptr, row, columns, mask, SIZE)
    tl.store(output_ptr + row * SIZE + columns, y, mask=mask)


@triton.jit
def silu_mul_fp8_kernel(
    gate_up_ptr, codes_ptr, scales_ptr, SIZE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    y = gated(gate_up_ptr, row, columns, mask, SIZE).to(tl.float32)
    store_quantized(codes_ptr, scales_ptr, row, columns, y, mask, SIZE)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up [T, I] of gate and up side by side [T, 2 I], contiguous."""
    assert gate_up.is_contiguous()
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    block = min(1024, padded(size))
    grid = (num_rows, triton.cdiv(size, block))
    silu_mul_kernel[grid](gate_up, output, SIZE=size, BLOCK=block, num_warps=4)
    return output


def silu_mul_fp8(gate_up: Tensor) -> Fp8Rows:
    """Do the same and return what `quantize_fp8` would make of it: I up to 65,536."""
    assert gate_up.is_contiguous()
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    codes = torch.empty((num_rows, size), dtype=FP8, device=gate_up.device)
    scales = torch.empty((num_rows, 1), dtype=torch.float32, device=gate_up.device)
    block = padded(size)
    silu_mul_fp8_kernel[(num_rows,)](
        gate_up,
        fp8_operand(codes),
        scales,
        SIZE=size,
        BLOCK=block,
        num_warps=row_warps(block),
    )
    return Fp8Rows(codes, scales)
