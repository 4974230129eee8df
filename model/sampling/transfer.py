"""Host values on their way to the device, without waiting for it.

`torch.tensor(values, device=...)` waits until the device has run everything queued before.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor [N] of the values, queued behind the device's work."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def upload_ids(ids: Sequence[int], device: torch.device) -> Tensor:
    """Return an int64 tensor [N] of the ids or indices, queued behind the device's work."""
    return upload(ids, torch.int64, device)
