"""Products of fp8 activations with fp8 weights: W8A8, a scale for each token and each output.

On a card through `torch._scaled_mm`, whose row-wise scaling wants bfloat16 out and sides that are
multiples of `SIDE`. Elsewhere, for tests and for measuring quality, the same sums are taken in
float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from model.fp8 import Activations, Fp8Rows, quantize_rows
from model.layers.activation import swiglu
from model.layers.norm import add_rms_norm

SIDE = 16
CAPABILITY = (8, 9)  # Ada: the first whose tensor cores multiply fp8

Quantize = Callable[[Tensor], Fp8Rows]
ScaledProduct = Callable[[Fp8Rows, Fp8Rows, torch.dtype], Tensor]


class Fp8Linear:
    """y = x W^T + b with W [out, in] in fp8; x is quantised on its way in, unless it is already."""

    def __init__(
        self,
        weight: Fp8Rows,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        quantize: Quantize,
        product: ScaledProduct,
    ) -> None:
        self.weight = weight
        self.bias = bias
        self._dtype = dtype
        self._quantize = quantize
        self._product = product

    def __call__(self, x: Activations) -> Tensor:
        """Map x [T, in] to [T, out] in the dtype of the network."""
        rows = self._quantize(x) if isinstance(x, Tensor) else x
        y = self._product(rows, self.weight, self._dtype)
        return y if self.bias is None else y.add_(self.bias)


def scaled_product(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """Return x [T, in] times weight [out, in], transposed: [T, out].

    Sums on a card are fast ones: kept in fewer bits than float32's, as other servers keep them.
    """
    if x.codes.device.type != "cuda":
        return scaled_product_reference(x, weight, dtype)
    y = torch._scaled_mm(
        x.codes,
        weight.codes.t(),
        scale_a=x.scales,
        scale_b=weight.scales.t(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y.to(dtype)


def scaled_product_reference(x: Fp8Rows, weight: Fp8Rows, dtype: torch.dtype) -> Tensor:
    """Say what `scaled_product` computes, in float32."""
    y = linear(x.codes.to(torch.float32), weight.codes.to(torch.float32))
    return (y * x.scales * weight.scales.t()).to(dtype)


def why_no_scaled_product(device: torch.device) -> str | None:
    """Try the smallest product on a card; return what is amiss with it, if anything is."""
    sizes = torch.arange(1.0, SIDE + 1, device=device)
    rows = quantize_rows(sizes[:, None].repeat(1, SIDE))
    try:
        y = scaled_product(rows, rows, torch.float32)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).partition("\n")[0]
    is_right = torch.allclose(y, SIDE * torch.outer(sizes, sizes), rtol=1e-2)
    return None if is_right else "its product is wrong"


def add_rms_norm_fp8(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Fp8Rows:
    """Return `add_rms_norm` in fp8."""
    return quantize_rows(add_rms_norm(delta, residual, weight, eps))


def swiglu_fp8(gate_up: Tensor) -> Fp8Rows:
    """Return `swiglu` in fp8."""
    return quantize_rows(swiglu(gate_up))
