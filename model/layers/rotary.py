"""Rotary position embedding (Su et al., arXiv 2104.09864) and the ways to stretch its reach.

A head's dimensions i and i + D/2 are one pair, turned by position times an inverse frequency;
the kinds differ only in the frequencies, and in yarn's factor on the result. All of them follow
the reference in transformers' `modeling_rope_utils`, except that "dynamic" is computed once for
`max_model_len`: the reference recomputes it for the longest sequence of a batch, so that an
answer would depend on its neighbours. Both agree up to the original length when `max_model_len`
does not exceed it.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, RopeConfig


class RotaryEmbedding:
    """Tables of cosines and sines for every position, made once."""

    def __init__(self, config: ModelConfig, max_model_len: int, device: torch.device) -> None:
        frequencies, factor = inverse_frequencies(config, max_model_len)
        positions = torch.arange(max_model_len, dtype=torch.float32)
        angles = torch.outer(positions, frequencies)
        self._cos = (torch.cat([angles, angles], -1).cos() * factor).to(device)
        self._sin = (torch.cat([angles, angles], -1).sin() * factor).to(device)

    def gather(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [T, 1, D], float32, of positions [T]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def half_tables(self) -> tuple[Tensor, Tensor]:
        """Return cosines and sines [max_model_len, D / 2], float32: the other half is the same."""
        half = self._cos.shape[1] // 2
        return self._cos[:, :half].contiguous(), self._sin[:, :half].contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs of x [T, H, D] by the angles of its tokens."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-high, low], dim=-1) * sin


def inverse_frequencies(config: ModelConfig, max_model_len: int) -> tuple[Tensor, float]:
    """Return the inverse frequencies [D / 2], float32, and the factor on cosines and sines."""
    rope = config.rope
    frequencies = _base_frequencies(rope.theta, config.head_dim)
    factor = 1.0
    match rope.kind:
        case "linear":
            frequencies = frequencies / rope.factor
        case "dynamic":
            frequencies = _dynamic(rope, config, max_model_len)
        case "llama3":
            frequencies = _llama3(rope, config, frequencies)
        case "yarn":
            frequencies, factor = _yarn(rope, config, frequencies)
        case "default":
            pass
    if rope.freq_factors is not None:
        frequencies = frequencies / torch.tensor(rope.freq_factors, dtype=torch.float32)
    return frequencies, factor


def _base_frequencies(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    return 1.0 / (theta**exponents)


def _original_length(rope: RopeConfig, config: ModelConfig) -> int:
    return rope.original_max_position_embeddings or config.max_position_embeddings


def _dynamic(rope: RopeConfig, config: ModelConfig, max_model_len: int) -> Tensor:
    """NTK-aware scaling for one fixed length: a larger base instead of smaller positions."""
    original = config.max_position_embeddings
    length = max(max_model_len, original)
    stretch = rope.factor * length / original - (rope.factor - 1)
    theta = rope.theta * stretch ** (config.head_dim / (config.head_dim - 2))
    return _base_frequencies(theta, config.head_dim)


def _llama3(rope: RopeConfig, config: ModelConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended."""
    original = _original_length(rope, config)
    wavelengths = 2 * math.pi / frequencies
    low_wavelength = original / rope.low_freq_factor
    high_wavelength = original / rope.high_freq_factor
    span = rope.high_freq_factor - rope.low_freq_factor
    blend = (original / wavelengths - rope.low_freq_factor) / span
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    slowed = torch.where(wavelengths > low_wavelength, frequencies / rope.factor, frequencies)
    is_between = (wavelengths >= high_wavelength) & (wavelengths <= low_wavelength)
    return torch.where(is_between, blended, slowed)


def _yarn(rope: RopeConfig, config: ModelConfig, frequencies: Tensor) -> tuple[Tensor, float]:
    """YaRN (Peng et al., arXiv 2309.00071): a ramp from kept to slowed over the dimensions."""
    original = _original_length(rope, config)
    dim = config.head_dim

    def dimension_of(rotations: float) -> float:
        """The dimension whose wave turns this often within the original length."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # the ramp may not divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    scaled = frequencies / rope.factor * (1 - kept) + frequencies * kept
    return scaled, _yarn_attention_factor(rope)


def _yarn_attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
