"""Residual add and RMSNorm in one pass over the stream; the reference is model/layers/norm.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import FP8, Fp8Rows
from model.kernels.fp8 import fp8_operand, row_warps, store_quantized
from model.kernels.launch import padded


@triton.jit
def add_rms_norm_kernel(
    delta_ptr,
    residual_ptr,
    weight_ptr,
    output_ptr,
    scales_ptr,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_DELTA: tl.constexpr,
    QUANTIZES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < SIZE
    dtype = residual_ptr.dtype.element_ty
    x = tl.load(residual_ptr + row * SIZE + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + row * SIZE + columns, mask=mask, other=0.0)
        rounded = (x + delta.to(tl.float32)).to(dtype)
        tl.store(residual_ptr + row * SIZE + columns, rounded, mask=mask)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / SIZE + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    y = ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype)
    if QUANTIZES:
        store_quantized(output_ptr, scales_ptr, row, columns, y.to(tl.float32), mask, SIZE)
    else:
        tl.store(output_ptr + row * SIZE + columns, y, mask=mask)


def add_rms_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add delta to residual [T, hidden] in place; return the sum normalised.

    One program holds a whole row, hidden <= 65,536; both tensors are contiguous.
    """
    output = torch.empty_like(residual)
    _launch(delta, residual, weight, eps, output, None)
    return output


def add_rms_norm_fp8(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """Do the same and return what `quantize_fp8` would make of the result, without the detour."""
    codes = torch.empty(residual.shape, dtype=FP8, device=residual.device)
    scales = torch.empty((residual.shape[0], 1), dtype=torch.float32, device=residual.device)
    _launch(delta, residual, weight, eps, codes, scales)
    return Fp8Rows(codes, scales)


def _launch(
    delta: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    output: Tensor,
    scales: Tensor | None,
) -> None:
    assert residual.is_contiguous()
    assert delta is None or delta.is_contiguous()
    size = residual.shape[1]
    block = padded(size)
    add_rms_norm_kernel[(residual.shape[0],)](
        residual if delta is None else delta,
        residual,
        weight,
        fp8_operand(output),
        weight if scales is None else scales,
        eps,
        SIZE=size,
        BLOCK=block,
        HAS_DELTA=delta is not None,
        QUANTIZES=scales is not None,
        num_warps=row_warps(block),
    )
