"""What the network computes with: torch, or on a CUDA card Triton between the matrix products.

The only place that decides for Triton, and the only one that imports its kernels, once it does.
"""

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from model.attention.backend import AttentionBackend
from model.attention.paged import PagedAttention
from model.config import ModelConfig
from model.errors import ConfigError
from model.fp8 import Fp8Rows, quantize_rows
from model.kv_pool import KVPool
from model.layers.activation import swiglu
from model.layers.fp8 import (
    Quantize,
    ScaledProduct,
    add_rms_norm_fp8,
    scaled_product,
    swiglu_fp8,
)
from model.layers.linear import Product
from model.layers.norm import add_rms_norm
from model.layers.rotary import RotaryEmbedding
from model.sampling.logprobs import Score
from model.sampling.table import SampleRows

logger = logging.getLogger(__name__)

TRITON_CAPABILITY = (8, 0)  # Ampere: the first with bfloat16
TRITON_HEAD_DIM = 256  # the widest that the attention kernels have room for


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Operations:
    """What feeds a product in fp8, and the product."""

    quantize: Quantize
    add_rms_norm: Callable[[Tensor | None, Tensor, Tensor, float], Fp8Rows]
    swiglu: Callable[[Tensor], Fp8Rows]
    product: ScaledProduct


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """One way to compute them. The torch functions say what each is."""

    name: str
    add_rms_norm: Callable[[Tensor | None, Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    attention: Callable[[ModelConfig, KVPool, RotaryEmbedding], AttentionBackend]
    fp8: Fp8Operations
    product: Product | None = None  # in place of torch's own


TORCH = Operations(
    name="torch",
    add_rms_norm=add_rms_norm,
    swiglu=swiglu,
    attention=PagedAttention,
    fp8=Fp8Operations(
        quantize=quantize_rows,
        add_rms_norm=add_rms_norm_fp8,
        swiglu=swiglu_fp8,
        product=scaled_product,
    ),
)


def triton_operations() -> Operations:
    """Return the kernels. Raises ImportError without triton."""
    from model.attention.triton import TritonAttention
    from model.kernels import activation, fp8, norm

    return Operations(
        name="triton",
        add_rms_norm=norm.add_rms_norm,
        swiglu=activation.silu_mul,
        attention=TritonAttention,
        fp8=Fp8Operations(
            quantize=fp8.quantize_fp8,
            add_rms_norm=norm.add_rms_norm_fp8,
            swiglu=activation.silu_mul_fp8,
            product=scaled_product,
        ),
    )


def invariant_operations() -> Operations:
    """Return the kernels in which a token's bits never depend on its company.

    Everything but products and attention is of that kind anyway. Raises ImportError without triton.
    """
    from model.attention.triton import TritonAttention
    from model.kernels import matmul

    fast = triton_operations()
    return replace(
        fast,
        name="triton, batch-invariant",
        attention=partial(TritonAttention, is_invariant=True),
        fp8=replace(fast.fp8, product=matmul.invariant_scaled_product),
        product=matmul.invariant_linear,
    )


def choose_operations(
    config: ModelConfig, device: torch.device, is_invariant: bool = False
) -> Operations:
    """Take Triton where it runs, else torch; say in the log why not.

    On a CPU both are invariant. Raises ConfigError for a card that only torch runs on, where
    nothing is.
    """
    if device.type != "cuda":
        return TORCH
    reason = _why_not_triton(device) or _why_too_wide(config)
    if reason and is_invariant:
        raise ConfigError(f"--batch-invariant needs Triton's kernels: {reason}")
    if reason:
        logger.warning("attention and norms run in torch, which is slower: %s", reason)
        return TORCH
    return invariant_operations() if is_invariant else triton_operations()


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
