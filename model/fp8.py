"""The format float8_e4m3fn: a sign, four bits of exponent, three of mantissa, and a scale beside.

Rows of codes with a scale each are what fp8 products take on both sides: a row of activations is
a token, a row of weights an output. What is said here in torch, `model/kernels/fp8.py` does on a
card, to the bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0


class Fp8Rows(NamedTuple):
    """A matrix in fp8: row i is about codes[i] * scales[i]."""

    codes: Tensor  # [rows, columns] float8_e4m3fn, contiguous
    scales: Tensor  # [rows, 1] float32


Activations = Tensor | Fp8Rows
"""What a product takes: rows in the dtype of the network, or in fp8 already."""


def quantize_rows(x: Tensor) -> Fp8Rows:
    """Return x [rows, columns] in fp8: a row's largest magnitude becomes 448.

    A row of zeros has scale 1.
    """
    wide = x.to(torch.float32)
    highest = wide.abs().amax(-1, keepdim=True)
    highest = torch.where(highest > 0, highest, FP8_MAX)
    # A number over a tensor would be the number times the reciprocal, rounded twice.
    inverse = torch.full_like(highest, FP8_MAX) / highest
    codes = (wide * inverse).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return Fp8Rows(codes, highest / FP8_MAX)
