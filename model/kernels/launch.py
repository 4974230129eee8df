"""What a launch has to know of its device: interpreter or card, capability, multiprocessors."""

import functools

import torch
import triton
from triton.runtime import JITFunction

from model.layers.fp8 import CAPABILITY


@triton.jit
def _probe():
    pass


def is_interpreted() -> bool:
    """Whether TRITON_INTERPRET was set when triton was imported: kernels run as Python then."""
    return not isinstance(_probe, JITFunction)


@functools.cache
def converts_fp8(device: torch.device) -> bool:
    """Whether the hardware converts from and to float8_e4m3fn."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= CAPABILITY


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a card; a few when interpreted."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def padded(size: int) -> int:
    """Return the next power of two, at least 16: sides of tiles, which `tl.dot` wants that long."""
    return max(16, 1 << (size - 1).bit_length())


_DOT_TYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def dot_type(dtype: torch.dtype) -> str:
    """Name the type in which `tl.dot` gets operands of a dtype; sums are float32 in any case.

    The interpreter multiplies bfloat16 as the integers that it keeps them in, so it gets float32.
    """
    return "float32" if is_interpreted() else _DOT_TYPES[dtype]


def why_not_working(device: torch.device) -> str | None:
    """Build and run a kernel; return what is missing (a C compiler, a driver), if anything is."""
    try:
        with torch.cuda.device(device):
            _probe[(1,)]()
            torch.cuda.synchronize(device)
    except (RuntimeError, OSError, ImportError) as error:
        return f"Triton does not work here: {error}"
    return None
