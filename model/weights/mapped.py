"""A file mapped into memory, and tensors that look straight into it.

The mapping is private: whoever writes into such a tensor changes a copy of the page, never the
file. It lives as long as the last tensor that looks into it.
"""

import mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from model.errors import WeightsError


class MappedFile:
    """One weight file. Offsets and sizes must have been checked against it before."""

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as stream:
                self._map: mmap.mmap | None = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise WeightsError(f"{path}: cannot be mapped: {error.strerror}") from error
        except ValueError as error:  # mmap's word for an empty file
            raise WeightsError(f"{path}: is empty") from error
        self._path = path

    def buffer(self) -> mmap.mmap:
        if self._map is None:
            raise WeightsError(f"{self._path}: was read from after it was closed")
        return self._map

    def tensor(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """Return a tensor that looks into the file."""
        count = 1
        for size in shape:
            count *= size
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        if offset % dtype.itemsize:  # old safetensors files pad their header to nothing
            raw = torch.frombuffer(
                self.buffer(), dtype=torch.uint8, count=count * dtype.itemsize, offset=offset
            )
            return raw.clone().view(dtype).view(shape)
        flat = torch.frombuffer(self.buffer(), dtype=dtype, count=count, offset=offset)
        return flat.view(shape)

    def rows(self, offset: int, num_rows: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        """Return bytes of the file as a read-only matrix."""
        flat = np.frombuffer(
            self.buffer(), dtype=np.uint8, count=num_rows * row_bytes, offset=offset
        )
        flat.flags.writeable = False
        return flat.reshape(num_rows, row_bytes)

    def close(self) -> None:
        """Let go of the mapping; tensors that look into it keep it alive."""
        self._map = None
