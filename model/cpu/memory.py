"""Memory for K/V whose pages are had before they are needed.

A page that was never written costs a fault at its first write, in which the kernel zeroes it; on a
virtual machine the host has to find it as well, which took 40 ms of a prompt whose products took
100. The whole plan is not touched at once either, as most servers never use it.
"""

import ctypes
import logging
import mmap
import os
import threading

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_MADV_POPULATE_WRITE = 23  # Linux 5.14
_PIECE = 2 << 20  # of a call: the size of a huge page
_LEAST_PRIORITY = 19


class GrowingMemory:
    """Zeroed memory that is used from its beginning on; what comes next is made ready meanwhile."""

    def __init__(self, num_bytes: int, ahead_bytes: int) -> None:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, max(num_bytes, 1), flags=private)
        if hasattr(mmap, "MADV_HUGEPAGE"):  # a fault for 2 MiB instead of 4 KiB
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]
        self._ahead_bytes = ahead_bytes
        self._ready_bytes = 0
        self._thread: threading.Thread | None = None
        self.use(0)

    def use(self, num_bytes: int) -> None:
        """Note that the first bytes are about to be written."""
        if num_bytes + self._ahead_bytes // 2 < self._ready_bytes:
            return
        if self._thread is not None and self._thread.is_alive():
            return
        wanted = min(num_bytes + self._ahead_bytes, self.tensor.numel())
        if wanted <= self._ready_bytes:
            return
        start, self._ready_bytes = self._ready_bytes, wanted
        arguments = (self._map, self.tensor.data_ptr(), start, wanted)
        self._thread = threading.Thread(
            target=_populate, args=arguments, name="arriero-pages", daemon=True
        )
        self._thread.start()


def _populate(memory: mmap.mmap, address: int, start: int, end: int) -> None:
    """Have the kernel give all pages of a range, on whatever time nobody else wants."""
    del memory  # held by the caller's arguments until this ends
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
    madvise = ctypes.CDLL(None, use_errno=True).madvise  # lets go of the interpreter; mmap's does not
    for at in range(start // _PIECE * _PIECE, end, _PIECE):
        length = min(_PIECE, end - at)
        if madvise(ctypes.c_void_p(address + at), ctypes.c_size_t(length), _MADV_POPULATE_WRITE):
            logger.debug("pages are not made ready ahead: %s", os.strerror(ctypes.get_errno()))
            return
