"""The K/V of every layer, cut into slots. Knows the layout; not who holds which block.

::

    keys[layer], values[layer]: [K, slots, D]     slot = block * P + offset in the block
    slots: | block 0 | block 1 | ... | block B - 1 | zero | trash |

K heads lie outermost, so that gathering some slots gives each head a contiguous matrix. Two
slots behind the blocks belong to nobody: `zero_slot` stays zero and stands for positions that
a sequence does not have, `trash_slot` takes what padding writes.

In float8_e4m3fn a slot holds key / key scale and value / value scale, one static scale a layer,
rounded to nearest even and saturating: what lies beyond 448 scales is cut off.
"""

import math

import numpy as np
import torch
from torch import Tensor

from model.config import ModelConfig
from model.fp8 import FP8, FP8_MAX

INT8_SCALE_BYTES = 4  # of a token's key or value in one head


class KVPool:
    """Keys and values of all layers on one device."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        self.zero_slot = num_blocks * block_size
        self.trash_slot = self.zero_slot + 1
        shape = (config.num_kv_heads, self.trash_slot + 1, config.head_dim)
        layers = range(config.num_layers)
        self.keys = [_zeros(shape, dtype, device) for _ in layers]
        self.values = [_zeros(shape, dtype, device) for _ in layers]
        self.key_scales = [1.0 for _ in layers]
        self.value_scales = [1.0 for _ in layers]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [T, K, D] in slots [T]."""
        _write(self.keys[layer], slots, keys, self.key_scales[layer])
        _write(self.values[layer], slots, values, self.value_scales[layer])

    def read(self, layer: int, slots: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return keys and values [K, len(slots), D] of some slots, in `dtype`."""
        return (
            _read(self.keys[layer], slots, dtype, self.key_scales[layer]),
            _read(self.values[layer], slots, dtype, self.value_scales[layer]),
        )


def _write(pool: Tensor, slots: Tensor, heads: Tensor, scale: float) -> None:
    if pool.dtype is FP8:
        heads = (heads.to(torch.float32) / scale).clamp(-FP8_MAX, FP8_MAX).to(pool.dtype)
        # torch has no index_copy_ for fp8, but bytes are bytes.
        pool, heads = pool.view(torch.uint8), heads.view(torch.uint8)
    pool.index_copy_(1, slots, heads.transpose(0, 1))


def _read(pool: Tensor, slots: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    if pool.dtype is FP8:
        codes = pool.view(torch.uint8).index_select(1, slots).view(pool.dtype)
        return (codes.to(torch.float32) * scale).to(dtype)
    return pool.index_select(1, slots).to(dtype)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; in host memory as pages that the kernel gives only once they are written.

    torch would write gigabytes of zeros at start-up, most of them never used.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(shape)


def kv_bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one token takes over all layers; int8 has scales beside."""
    scale = INT8_SCALE_BYTES if dtype == torch.int8 else 0
    head = config.head_dim * dtype.itemsize + scale
    return 2 * config.num_layers * config.num_kv_heads * head
