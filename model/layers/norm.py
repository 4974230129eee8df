"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467), as Llama uses it."""

import torch
from torch import Tensor


class RMSNorm:
    """x / rms(x) * weight; the mean of squares is taken in float32, as in the reference."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of x [T, hidden]."""
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight
