"""Matrix products whose rows do not depend on each other's company.

On a CPU, a BLAS picks its kernel, and with it the order of summation, by the number of rows:
the same row gives other bits alone than among others. So the number of rows is never the
batch's: products run in tiles of exactly `ROW_TILE` rows. Larger tiles read the weight less
often; one is used only where a trial with the weight at load, on this machine and with this
number of threads, gave the very bits of the small tiles.

A float32 tile is computed as W x^T, in about half the time of x W^T for few rows; 16-bit
products are several times slower that way and take the other.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import linear

from model.fp8 import Activations

ROW_TILE = 16
_LARGER_TILES = (128, 32)  # each a multiple of the next and of ROW_TILE

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x W^T + b of x [T, in], W [out, in] and b."""


class Linear:
    """y = x W^T + b, W of shape [out, in]; through `product` if one is given, else torch's."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, product: Product | None = None
    ) -> None:
        self.weight = weight
        self.bias = bias
        self.product = product
        self.tile_sizes: tuple[int, ...] = (ROW_TILE,)

    def __call__(self, x: Activations) -> Tensor:
        """Map x [T, in], not in fp8, to [T, out]; on a CPU, T is a multiple of ROW_TILE."""
        assert isinstance(x, Tensor)
        if self.product is not None:
            return self.product(x, self.weight, self.bias)
        if x.device.type != "cpu":
            return linear(x, self.weight, self.bias)
        y = torch.empty(x.shape[0], self.weight.shape[0], dtype=x.dtype)
        start = 0
        for size in self.tile_sizes:
            for end in range(start + size, x.shape[0] + 1, size):
                y[start:end] = _tile_product(x[start:end], self.weight)
                start = end
        assert start == x.shape[0]
        return y if self.bias is None else y.add_(self.bias)


def _tile_product(x: Tensor, weight: Tensor) -> Tensor:
    if x.dtype is torch.float32:
        return torch.mm(weight, x.t()).t()
    return linear(x, weight)


def choose_tile_sizes(linears: Iterable[Linear]) -> None:
    """Let products on a CPU use every larger tile that is bitwise safe for their shape.

    The number of threads may not change afterwards.
    """
    chosen: dict[torch.Size, tuple[int, ...]] = {}
    for layer in linears:
        if layer.weight.device.type == "cpu" and layer.product is None:
            shape = layer.weight.shape
            if shape not in chosen:
                chosen[shape] = _safe_tile_sizes(layer.weight)
            layer.tile_sizes = chosen[shape]


def _safe_tile_sizes(weight: Tensor) -> tuple[int, ...]:
    """Try each larger tile on random rows: another order of summation would show in most sums."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(_LARGER_TILES), weight.shape[1], generator=generator).to(weight.dtype)
    expected = torch.cat([_tile_product(tile, weight) for tile in torch.split(x, ROW_TILE)])
    sizes = [
        size
        for size in _LARGER_TILES
        if torch.equal(_tile_product(x[:size], weight), expected[:size])
    ]
    return (*sizes, ROW_TILE)
