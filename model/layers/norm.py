"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467), as Llama uses it."""

import torch
from torch import Tensor


def add_rms_norm(delta: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add delta to residual [T, hidden] in place; return the sum x as x / rms(x) * weight.

    The mean of squares is taken in float32, as in the reference.
    """
    if delta is not None:
        residual.add_(delta)
    wide = residual.to(torch.float32)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(residual.dtype) * weight
