"""What a card does at its best: bytes copied, matrices multiplied; and how it is called."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.bench.timing import Call, num_copies, seconds_of
from model.fp8 import FP8, Fp8Rows
from model.layers.fp8 import CAPABILITY, scaled_product


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A device and its measured rates, in bytes and operations a second."""

    name: str
    bytes_per_s: float
    flops_per_s: float
    fp8_flops_per_s: float | None
    dtype: str  # of the products of `flops_per_s`
    memory_bytes: int
    software: str


def measure_card(device: torch.device, *, copy_bytes: int = 2 << 30, side: int = 8192) -> Card:
    """Copy memory, multiply square matrices. A copy counts what it reads and what it writes."""
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    copy_s = seconds_of([_copy(copy_bytes // 2, device)], device)
    flops = 2.0 * side**3
    product_s = seconds_of(_products(side, dtype, device), device)
    fp8 = None
    if has_fp8(device):
        fp8 = flops / seconds_of([fp8_product(side, side, side, device)], device)
    return Card(
        name=torch.cuda.get_device_name(device) if is_cuda else "cpu",
        bytes_per_s=copy_bytes / copy_s,
        flops_per_s=flops / product_s,
        fp8_flops_per_s=fp8,
        dtype=str(dtype).removeprefix("torch."),
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if is_cuda else 0,
        software=_software(),
    )


def has_fp8(device: torch.device) -> bool:
    """Whether the card multiplies matrices in fp8."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


def fp8_product(num_rows: int, num_outputs: int, size: int, device: torch.device) -> Call:
    """Return the call that multiplies random rows with a random weight, both in fp8."""
    x, weight = _draw_fp8((num_rows, size), device), _draw_fp8((num_outputs, size), device)
    return lambda: scaled_product(x, weight, torch.bfloat16)


def _draw_fp8(shape: tuple[int, int], device: torch.device) -> Fp8Rows:
    """Return random codes and scales of one."""
    codes = torch.randn(shape, device=device, dtype=torch.bfloat16).to(FP8)
    return Fp8Rows(codes, torch.ones(shape[0], 1, device=device))


def peak_bytes(device: str) -> dict[str, int]:
    """Return the most that torch has held on a card so far: allocated, and reserved for it."""
    if not device.startswith("cuda"):
        return {}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def _copy(num_bytes: int, device: torch.device) -> Callable[[], Tensor]:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _products(side: int, dtype: torch.dtype, device: torch.device) -> list[Callable[[], Tensor]]:
    def product() -> Callable[[], Tensor]:
        x, y = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        return lambda: torch.mm(x, y)

    return [product() for _ in range(min(4, num_copies(2 * side * side * dtype.itemsize, device)))]


def _software() -> str:
    try:
        import triton

        with_triton = f", triton {triton.__version__}"
    except ImportError:
        with_triton = ""
    return f"torch {torch.__version__}{with_triton}"
