"""GGUF's block formats turned back into float32, in torch.

Each format's layout is drawn above its function. The arithmetic is done in the order of
ggml's reference (ggml-quants.c, and gguf-py, with which results agree bit for bit), a slice of
rows at a time, so that the temporaries stay in the cache.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from model.weights.gguf import BLOCK_TYPES

_SLICE_LEN = 2**18  # elements


def dequantize(raw: npt.NDArray[np.uint8], kind: str, num_columns: int) -> torch.Tensor:
    """Return rows of blocks `[rows, bytes per row]` as float32 `[rows, num_columns]`."""
    block_bytes = _BLOCK_BYTES[kind]
    unpack = _UNPACK[kind]
    out = torch.empty(len(raw), num_columns)
    step = max(1, _SLICE_LEN // num_columns)
    for begin in range(0, len(raw), step):
        rows = torch.from_numpy(np.array(raw[begin : begin + step]))
        values = unpack(rows.view(-1, block_bytes))
        out[begin : begin + step] = values.view(-1, num_columns)
    return out


def _float16(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """Return the float16 at one place of every block, as float32 `[blocks, 1]`."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Return the low halves of n bytes, then their high halves: `[blocks, 2 n]`."""
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _bits(packed: torch.Tensor) -> torch.Tensor:
    """Return the bits of n bytes, lowest first: `[blocks, 8 n]`."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((packed[:, :, None] >> shifts) & 1).flatten(1)


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    # | d: float16 | 32 int8 |
    return blocks[:, 2:].view(torch.int8).float().mul_(_float16(blocks, 0))


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    # | d: float16 | 16 bytes of nibbles: codes 0…15 low, codes 16…31 high |
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_float16(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    # | d: float16 | min: float16 | 16 bytes of nibbles |
    return _nibbles(blocks[:, 4:]).float().mul_(_float16(blocks, 0)).add_(_float16(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    # | d: float16 | fifth bits: 4 bytes | 16 bytes of nibbles |
    codes = _nibbles(blocks[:, 6:]) | _bits(blocks[:, 2:6]) << 4
    return codes.float().sub_(16).mul_(_float16(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> torch.Tensor:
    # | d: float16 | min: float16 | fifth bits: 4 bytes | 16 bytes of nibbles |
    codes = _nibbles(blocks[:, 8:]) | _bits(blocks[:, 4:8]) << 4
    return codes.float().mul_(_float16(blocks, 0)).add_(_float16(blocks, 2))


def _k_scales(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 6-bit scales and minima of the 8 parts of a Q4_K or Q5_K block, `[blocks, 8]`.

    ::

        bytes 0…3   low 6 bits: scales 0…3    top 2 bits: those of scales 4…7
        bytes 4…7   low 6 bits: minima 0…3    top 2 bits: those of minima 4…7
        bytes 8…11  low 4 bits: of scales 4…7   high 4 bits: of minima 4…7
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | (first >> 6) << 4), dim=1)
    minima = torch.cat((second & 63, (third >> 4) | (second >> 6) << 4), dim=1)
    return scales, minima


def _k_codes(packed: torch.Tensor) -> torch.Tensor:
    """Return 4-bit codes as `[blocks, 8, 32]`: 32 bytes hold a part low and the next part high."""
    quarters = packed.view(-1, 4, 1, 32)
    return torch.cat((quarters & 15, quarters >> 4), dim=2).view(-1, 8, 32)


def _scaled_k(blocks: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    scales, minima = _k_scales(blocks[:, 4:16])
    steps = _float16(blocks, 0) * scales.float()
    offsets = _float16(blocks, 2) * minima.float()
    return codes.float().mul_(steps[:, :, None]).sub_(offsets[:, :, None]).flatten(1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    # | d: float16 | dmin: float16 | scales and minima: 12 bytes | codes: 128 bytes |
    return _scaled_k(blocks, _k_codes(blocks[:, 16:].contiguous()))


def _q5_k(blocks: torch.Tensor) -> torch.Tensor:
    # | d: float16 | dmin: float16 | scales and minima: 12 bytes | fifth bits: 32 | codes: 128 |
    # Bit p of the fifth bits' byte i belongs to code i of part p.
    parts = torch.arange(8, dtype=torch.uint8)[:, None]
    fifth = (blocks[:, None, 16:48] >> parts) & 1
    return _scaled_k(blocks, _k_codes(blocks[:, 48:].contiguous()) | fifth << 4)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    # | low 4 bits: 128 bytes | high 2 bits: 64 bytes | scales: 16 int8 | d: float16 |
    # Two halves of 128 codes: 64 bytes hold 64 codes low and 64 high; 32 bytes hold four twos.
    low = blocks[:, :128].reshape(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), dim=2).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = (low | high << 4).view(-1, 16, 16).float().sub_(32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return codes.mul_((_float16(blocks, 208) * scales)[:, :, None]).flatten(1)


_BLOCK_BYTES = {kind: num_bytes for kind, _, num_bytes in BLOCK_TYPES.values()}
_UNPACK: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
