"""Random weights for a config, so that a model's speed and memory can be tried without its files.

Each tensor depends on a seed and its name alone. Scaled like a trained model's enough that logits
spread and nothing overflows in 16 bits. A million numbers are drawn and repeated, from a place of
each tensor's own on, where the model will be: to draw 8 billion would take a minute.
"""

import hashlib
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch

from model.config import ModelConfig
from model.weights.tensors import EMBEDDING, HEAD, PackedTensor, TensorInfo, required_tensors

_LOGIT_SPREAD = 3.0
_NUM_DRAWN = 1_048_573  # a prime: rows of a matrix begin at places that do not repeat soon


class DummyStore:
    """Tensors that no file holds."""

    def __init__(self, config: ModelConfig, seed: int, source: Path, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._infos = {
            name: TensorInfo(
                stored_name=name,
                file=source,
                dtype=config.dtype,
                shape=shape,
                num_bytes=math.prod(shape) * self._dtype.itemsize,
                is_readable=True,
            )
            for name, shape in required_tensors(config).items()
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        return self._infos

    @cached_property
    def _drawn(self) -> torch.Tensor:
        """Numbers from -1 to 1, the same on any device."""
        generator = torch.Generator().manual_seed(self._seed)
        return (torch.rand(_NUM_DRAWN, generator=generator) * 2 - 1).to(self._device)

    def read(self, name: str) -> torch.Tensor:
        shape = self._infos[name].shape
        tensor = torch.empty(shape, dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        start = int.from_bytes(digest[:8], "little") % _NUM_DRAWN
        gain = _LOGIT_SPREAD if name in (EMBEDDING, HEAD) else 1.0
        bound = gain * math.sqrt(3.0 / shape[-1])  # uniform, with a variance of gain² / columns
        numbers = (self._drawn.roll(-start) * bound).to(self._dtype)
        flat = tensor.view(-1)
        num_whole = len(flat) // _NUM_DRAWN
        whole, rest = flat[: num_whole * _NUM_DRAWN], flat[num_whole * _NUM_DRAWN :]
        whole.view(num_whole, _NUM_DRAWN).copy_(numbers)
        rest.copy_(numbers[: len(rest)])
        return tensor

    def packed(self, name: str) -> PackedTensor | None:  # noqa: ARG002
        return None

    def close(self) -> None:
        """Nothing is open."""
