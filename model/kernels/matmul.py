"""x W^T whose rows do not depend on each other's company; the reference is `linear` of torch.

cuBLAS picks its kernel, and with it the order of summation, by the number of rows. Here one tile
serves every number of rows: the same shape of products, over K in the same order, by one program
(no split of K). So a row's sums are the same alone and among others, wherever it lies.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.kernels.fp8 import load_as
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
    output_ptr,
    num_rows,
    N: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    x = x.contiguous()
    assert weight.is_contiguous()
    num_rows, (num_outputs, size) = x.shape[0], weight.shape
    output = torch.empty((num_rows, num_outputs), dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(num_rows, BLOCK_M), triton.cdiv(num_outputs, BLOCK_N))
    matmul_kernel[grid](
        x,
        weight,
        weight if bias is None else bias,
        output,
        num_rows,
        N=num_outputs,
        K=size,
        HAS_BIAS=bias is not None,
        DOT=getattr(tl, dot_type(x.dtype)),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        BLOCK_K=BLOCK_K,
        num_warps=4,
        num_stages=2 if x.dtype is torch.float32 else 4,
    )
    return output
