"""x W^T whose rows do not depend on each other's company; the reference is `linear` of torch.

In fp8 as well, where both sides have a scale a row: `scaled_product` of model/layers/fp8.py.
Codes are multiplied as 16-bit floats there, which hold them exactly, so sums are float32 on any
card; the fp8 instructions of some sum in less.

cuBLAS picks its kernel, and with it the order of summation, by the number of rows. Here one tile
serves every number of rows: the same shape of products, over K in the same order, by one program
(no split of K). So a row's sums are the same alone and among others, wherever it lies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import Fp8Rows
from model.kernels.fp8 import fp8_operand, load_as
from model.kernels.launch import dot_type

BLOCK_M = 64  # the fewest rows that Hopper's products take
BLOCK_N = 128
BLOCK_K = 64


# Specialised by nothing that the batch decides: another number of rows is the same program.
@triton.jit(do_not_specialize=["num_rows"])
def matmul_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    x_scales_ptr,
    weight_scales_ptr,
    output_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Neighbouring programs share a tile of the weight, which is the larger operand.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    is_row, is_column = rows < num_rows, columns < N
    x_pointers = x_ptr + rows[:, None] * K + inner[None, :]
    weight_pointers = weight_ptr + columns[None, :] * K + inner[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        is_inner = inner < K - start
        x = load_as(x_pointers + start, is_row[:, None] & is_inner[None, :], DOT)
        mask = is_column[None, :] & is_inner[:, None]
        weight = load_as(weight_pointers + start, mask, DOT)
        total = tl.dot(x, weight, total, input_precision="ieee")
    if HAS_SCALES:
        x_scales = tl.load(x_scales_ptr + rows, mask=is_row, other=0.0)
        weight_scales = tl.load(weight_scales_ptr + columns, mask=is_column, other=0.0)
        total = total * x_scales[:, None] * weight_scales[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    tl.store(
        output_ptr + rows[:, None] * N + columns[None, :],
        total.to(output_ptr.dtype.element_ty),
        mask=is_row[:, None] & is_column[None, :],
    )


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Map x [T, in] to x W^T + b [T, out], W [out, in]; a row's bits do not depend on T.

    Sums are in float32 and rounded once, to the dtype of x.
    """
    output = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    _launch(x.contiguous(), weight, None, bias, output, dot_type(x.dtype))
    return output


def invariant_scaled_product(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """Do the same with both sides in fp8, x [T, in] and W [out, in]; the result is in `dtype`."""
    shape = (x.codes.shape[0], weight.codes.shape[0])
    output = torch.empty(shape, dtype=dtype, device=x.codes.device)
    scales = (x.scales, weight.scales)
    x_codes, weight_codes = fp8_operand(x.codes), fp8_operand(weight.codes)
    _launch(x_codes, weight_codes, scales, None, output, dot_type(torch.float16))
    return output


def _launch(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    output: Tensor,
    dot: str,
) -> None:
    assert x.is_contiguous()
    assert weight.is_contiguous()
    num_rows, (num_outputs, size) = x.shape[0], weight.shape
    grid = (triton.cdiv(num_rows, BLOCK_M), triton.cdiv(num_outputs, BLOCK_N))
    matmul_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        *(scales or (weight, weight)),
        output,
        num_rows,
        N=num_outputs,
        K=size,
        HAS_BIAS=bias is not None,
        HAS_SCALES=scales is not None,
        DOT=getattr(tl, dot),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        num_stages=2 if x.dtype is torch.float32 else 4,
    )
