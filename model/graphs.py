"""Which decode steps are replayed from a graph, and when each graph is captured.

A graph is a step's launches, recorded once and replayed in one call. Serving never waits for
graphs: a size that has none runs launch by launch, and graphs are captured between steps. The
first is the largest, since all share one pool of memory and the others then fit into what it has
taken; then what the batch needs now; then the rest. Capturing takes at most a fifth of the time.

Knows neither what a step computes nor, but for `CudaGraphRecorder`, any device.
"""

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

Replay = Callable[[], None]
CAPTURE_SHARE = 0.2  # of the time, at most


class GraphRecorder(Protocol):
    """Turns launches into something that repeats them."""

    def capture(self, run: Callable[[], None]) -> Replay:
        """Record what `run` launches; it may be run more than once. Raises RuntimeError."""
        ...


class CudaGraphRecorder:
    """CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, run: Callable[[], None]) -> Replay:
        """Run once on a stream of its own, so that libraries get their workspace, then record.

        By hand rather than with `torch.cuda.graph`, which collects garbage and empties the
        allocator's cache each time: between steps, both would be felt.
        """
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            run()
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay


def decode_sizes(max_num_seqs: int, row_tile: int) -> list[int]:
    """Return the sizes that batches are padded to, multiples of `row_tile` in rising order."""
    sizes = [1, 2, 4, *range(8, 257, 8), *range(288, max_num_seqs + 32, 32)]
    wanted = [*(size for size in sizes if size < max_num_seqs), max_num_seqs]
    return sorted({-(-size // row_tile) * row_tile for size in wanted})


class DecodeGraphs:
    """Graphs of steps of some sizes; `recorder` None means that there will be none.

    `run(size)` launches a step, `clear()` makes one that may be run at any time, for nothing.
    """

    def __init__(
        self,
        run: Callable[[int], None],
        clear: Callable[[], None],
        sizes: list[int],
        recorder: GraphRecorder | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._clear = clear
        self._sizes = sizes
        self._recorder = recorder
        self._clock = clock
        self._replays: dict[int, Replay] = {}
        self._not_before_s = 0.0
        self._spent_s = 0.0

    @property
    def num_captured(self) -> int:
        return len(self._replays)

    def padded(self, num_rows: int) -> int:
        """Return the smallest size for so many rows."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def run(self, size: int) -> None:
        """Launch a step, from its graph if there is one."""
        replay = self._replays.get(size)
        if replay is None:
            self._run(size)
        else:
            replay()

    def capture_next(self, num_rows: int) -> None:
        """Capture one more graph, unless all are there or the last one was just now."""
        if self._recorder is None or self._clock() < self._not_before_s:
            return
        size = self._next_size(num_rows)
        started_s = self._clock()
        self._clear()
        try:
            self._replays[size] = self._recorder.capture(lambda: self._run(size))
        except RuntimeError as error:
            logger.warning(
                "no graph of %d sequences, nor of sizes that have none yet: %s", size, error
            )
            self._recorder = None
            return
        ended_s = self._clock()
        self._spent_s += ended_s - started_s
        self._not_before_s = ended_s + (ended_s - started_s) * (1 / CAPTURE_SHARE - 1)
        if len(self._replays) == len(self._sizes):
            logger.info("%d graphs captured in %.1f s", len(self._replays), self._spent_s)
            self._recorder = None

    def capture_all(self) -> None:
        """Capture all that are missing at once, whoever waits."""
        while self._recorder is not None:
            self._not_before_s = -math.inf
            self.capture_next(1)

    def _next_size(self, num_rows: int) -> int:
        """Return the largest first, then the one that is wanted now, then the largest missing."""
        if not self._replays:
            return self._sizes[-1]
        wanted = self.padded(num_rows)
        if wanted not in self._replays:
            return wanted
        return max(size for size in self._sizes if size not in self._replays)
