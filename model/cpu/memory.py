"""Memory for K/V whose pages are had before they are needed.

The first write to a page costs a fault, in which the kernel zeroes it; on a virtual machine the
host may have to find it as well, which was seen to take half as long as computing the tokens
that it is for. All of the plan is not touched at once either: most servers never use it.
"""

import contextlib
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
    """Zeroed bytes that are used from the first on; pages for the next are made ready meanwhile.

    `tensor` [num_bytes] uint8 is valid as long as this lives.
    """

    def __init__(self, num_bytes: int, ahead_bytes: int) -> None:
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._map = mmap.mmap(-1, max(num_bytes, 1), flags=private)
        # Huge pages take a fault for 2 MiB, not for 4 KiB; a kernel may have none.
        with contextlib.suppress(OSError):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.tensor: Tensor = torch.frombuffer(self._map, dtype=torch.uint8)[:num_bytes]
        self._ahead_bytes = ahead_bytes
        self._ready_bytes = 0
        self._thread: threading.Thread | None = None
        self.use(0)

    def use(self, num_bytes: int) -> None:
        """Note that so many of the first bytes are about to be written."""
        is_far_ahead = self._ready_bytes > num_bytes + self._ahead_bytes // 2
        if is_far_ahead or (self._thread is not None and self._thread.is_alive()):
            return
        wanted = min(num_bytes + self._ahead_bytes, self.tensor.numel())
        if wanted <= self._ready_bytes:
            return
        start, self._ready_bytes = self._ready_bytes, wanted
        # It holds the tensor, and with it the mapping, until it is done.
        self._thread = threading.Thread(
            target=_populate, args=(self.tensor, start, wanted), name="arriero-pages", daemon=True
        )
        self._thread.start()


def _populate(tensor: Tensor, start: int, end: int) -> None:
    """Have the kernel give the pages of a range, in time that nobody else wants."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LEAST_PRIORITY)
    # Unlike mmap's, this one lets go of the interpreter.
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    address = tensor.data_ptr()
    for at in range(start // _PIECE * _PIECE, end, _PIECE):
        length = ctypes.c_size_t(min(_PIECE, end - at))
        if madvise(ctypes.c_void_p(address + at), length, _MADV_POPULATE_WRITE):
            logger.debug("no pages ahead of use: %s", os.strerror(ctypes.get_errno()))
            return
