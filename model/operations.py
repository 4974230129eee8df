"""What the network computes between its matrix products: in torch, or in Triton on a CUDA card.

The only place that decides for Triton, and the only one that imports its kernels, once it does.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.backend import AttentionBackend
from model.attention.paged import PagedAttention
from model.config import ModelConfig
from model.kv_pool import KVPool
from model.layers.activation import swiglu
from model.layers.norm import add_rms_norm
from model.layers.rotary import RotaryEmbedding
from model.sampling.logprobs import Score
from model.sampling.table import SampleRows

logger = logging.getLogger(__name__)

TRITON_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16
TRITON_HEAD_DIM = 256  # the widest that the attention kernels have room for


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """One way to compute them. The torch functions say what each is."""

    name: str
    add_rms_norm: Callable[[Tensor | None, Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    attention: Callable[[ModelConfig, KVPool, RotaryEmbedding], AttentionBackend]


TORCH = Operations(name="torch", add_rms_norm=add_rms_norm, swiglu=swiglu, attention=PagedAttention)


def triton_operations() -> Operations:
    """Return the kernels. Raises ImportError without triton."""
    from model.attention.triton import TritonAttention
    from model.kernels.activation import silu_mul
    from model.kernels.norm import add_rms_norm

    return Operations(
        name="triton", add_rms_norm=add_rms_norm, swiglu=silu_mul, attention=TritonAttention
    )


def choose_operations(config: ModelConfig, device: torch.device) -> Operations:
    """Take Triton where it runs, else torch; say in the log why not."""
    if device.type != "cuda":
        return TORCH
    reason = _why_not_triton(device) or _why_too_wide(config)
    if reason:
        logger.warning("attention and norms run in torch, which is slower: %s", reason)
        return TORCH
    return triton_operations()


def runs_kernels(config: ModelConfig, device: torch.device) -> bool:
    """Say whether `choose_operations` takes Triton."""
    return device.type == "cuda" and not (_why_not_triton(device) or _why_too_wide(config))


LookUp = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor, Tensor]]
"""What a decode step looks up: `look_up` of model/decode.py says what."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerKernels:
    """What a card runs around the network; torch's way is in model/sampling and model/decode.py."""

    look_up: LookUp
    sample_rows: SampleRows
    score: Score


def triton_runner_kernels() -> RunnerKernels:
    """Return the kernels. Raises ImportError without triton."""
    from model.kernels.places import look_up
    from model.kernels.sample import sample_rows
    from model.kernels.score import score

    return RunnerKernels(look_up=look_up, sample_rows=sample_rows, score=score)


def choose_runner_kernels(device: torch.device) -> RunnerKernels | None:
    """Return the kernels; None where torch does it, which `choose_operations` explains."""
    if device.type != "cuda" or _why_not_triton(device):
        return None
    return triton_runner_kernels()


def _why_too_wide(config: ModelConfig) -> str | None:
    if config.head_dim > TRITON_HEAD_DIM:
        return f"heads of {config.head_dim} are wider than {TRITON_HEAD_DIM}"
    return None


def _why_not_triton(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device.index:
        return "Triton launches on the first card: choose with CUDA_VISIBLE_DEVICES, not --device"
    if torch.cuda.get_device_capability(device) < TRITON_CAPABILITY:
        return "the card is older than compute capability 8.0"
    from model.kernels.launch import why_not_working

    return why_not_working(device)
