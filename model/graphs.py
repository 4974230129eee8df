"""Which parts of decode steps are replayed from graphs, and when each graph is captured.

A graph is launches recorded once and replayed in one call. A step has two parts, the forward pass
and the draw of ids, so that the long one is captured once a size and not once for each way to
draw. Serving never waits for graphs: a part that has none runs launch by launch, and graphs are
captured between steps. The first is the largest forward pass, since all share one pool of memory
and the others then fit into what it has taken; then what the batch needs now; then the rest of
what was ever needed. Capturing takes at most a fifth of the time.

Knows neither what a part computes nor, but for `CudaGraphRecorder`, any device.
"""

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

Part = Hashable
"""The name of a part of a step."""

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
    """Graphs of the parts of steps of some sizes; `recorder` None means that there will be none.

    `launch(part, size)` launches a part; after `clear()` any may be launched at any time, for
    nothing.
    """

    def __init__(
        self,
        launch: Callable[[Part, int], None],
        clear: Callable[[], None],
        sizes: list[int],
        recorder: GraphRecorder | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._launch = launch
        self._clear = clear
        self._sizes = sizes
        self._recorder = recorder
        self._clock = clock
        self._replays: dict[tuple[Part, int], Replay] = {}
        self._seen: list[Part] = []  # parts that were ever needed, in that order
        self._not_before_s = 0.0
        self._spent_s = 0.0

    @property
    def num_captured(self) -> int:
        return len(self._replays)

    def padded(self, num_rows: int) -> int:
        """Return the smallest size for so many rows."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def run(self, part: Part, size: int) -> None:
        """Launch a part, from its graph if there is one."""
        replay = self._replays.get((part, size))
        if replay is None:
            self._launch(part, size)
        else:
            replay()

    def capture_next(self, num_rows: int, parts: Sequence[Part]) -> None:
        """Capture one more graph, unless all are there or the last one was just now.

        `num_rows` and `parts` are what steps are made of now, the longest part first.
        """
        if self._recorder is None or self._clock() < self._not_before_s:
            return
        self._seen += [part for part in parts if part not in self._seen]
        if len(self._replays) == len(self._seen) * len(self._sizes):
            return  # all are there: this is asked after every step
        part, size = key = self._next(self.padded(num_rows), parts)
        started_s = self._clock()
        self._clear()
        try:
            self._replays[key] = self._recorder.capture(lambda: self._launch(part, size))
        except RuntimeError as error:
            logger.warning("no graph of %d sequences, nor of what has none yet: %s", size, error)
            self._recorder = None
            return
        ended_s = self._clock()
        self._spent_s += ended_s - started_s
        self._not_before_s = ended_s + (ended_s - started_s) * (1 / CAPTURE_SHARE - 1)
        if len(self._replays) == len(self._seen) * len(self._sizes):
            logger.info("%d graphs captured in %.1f s", len(self._replays), self._spent_s)

    def capture_all(self) -> None:
        """Capture all that are missing of the parts seen, at once, whoever waits."""
        num_captured = -1
        while num_captured < self.num_captured:
            num_captured = self.num_captured
            self._not_before_s = -math.inf
            self.capture_next(self._sizes[-1], ())

    def _next(self, wanted: int, parts: Sequence[Part]) -> tuple[Part, int]:
        """Return what to capture next; something is missing."""
        if not self._replays and parts:
            return parts[0], self._sizes[-1]
        needed = [(part, wanted) for part in parts]
        rest = [(part, size) for part in self._seen for size in reversed(self._sizes)]
        return next(key for key in (*needed, *rest) if key not in self._replays)
