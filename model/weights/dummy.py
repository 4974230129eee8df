"""Random weights for a config, so that a model's speed and memory can be tried without its files.

Each tensor is drawn when it is read, from a seed and its name alone. Scaled like a trained model's
enough that logits spread and nothing overflows in 16 bits.
"""

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import torch

from model.config import ModelConfig
from model.weights.tensors import EMBEDDING, HEAD, PackedTensor, TensorInfo, required_tensors

_LOGIT_SPREAD = 3.0


class DummyStore:
    """Tensors that no file holds."""

    def __init__(self, config: ModelConfig, seed: int, source: Path) -> None:
        self._seed = seed
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

    def read(self, name: str) -> torch.Tensor:
        shape = self._infos[name].shape
        tensor = torch.empty(shape, dtype=self._dtype)
        if name.endswith("norm.weight"):
            return tensor.fill_(1.0)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        gain = _LOGIT_SPREAD if name in (EMBEDDING, HEAD) else 1.0
        bound = gain * math.sqrt(3.0 / shape[-1])  # uniform, with a variance of gain² / columns
        return tensor.uniform_(-bound, bound, generator=generator)

    def packed(self, name: str) -> PackedTensor | None:  # noqa: ARG002
        return None

    def close(self) -> None:
        """Nothing is open."""
