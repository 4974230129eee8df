"""Values on their way between host and device, without waiting for the device.

A copy from or to ordinary host memory waits until the device has run everything queued before
it, and a step could then not be launched while another runs. From and to pinned memory it does
not. On a CPU nothing has to be sent.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ids = npt.NDArray[np.int64]
"""Ids, indices or positions on the host."""


def send(values: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor's values on the device, queued behind the device's work."""
    if device.type == "cpu":
        return values
    return values.pin_memory().to(device, non_blocking=True)


def send_all(arrays: Sequence[Ids], device: torch.device) -> tuple[Tensor, ...]:
    """Return int64 tensors [N] of several arrays, which travel in one copy."""
    if device.type == "cpu":
        return tuple(torch.from_numpy(array) for array in arrays)
    sent = send(torch.from_numpy(np.concatenate(arrays)), device)
    return torch.split(sent, [len(array) for array in arrays])


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor [N] of the values, queued behind the device's work."""
    return send(torch.tensor(values, dtype=dtype), device)


def upload_ids(ids: Sequence[int], device: torch.device) -> Tensor:
    """Return an int64 tensor [N] of the ids or indices, queued behind the device's work."""
    return upload(ids, torch.int64, device)


def download(values: Tensor) -> Tensor:
    """Return a copy in host memory; it is there once the device has come this far."""
    if values.device.type == "cpu":
        return values.clone()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)
