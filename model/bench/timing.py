"""How long something takes on a device, without what the host takes to ask for it."""

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from model.graphs import CudaGraphRecorder

Call = Callable[[], object]
TARGET_S = 0.05  # of one measurement
NUM_ROUNDS = 5
MIN_CALLS = 4


def cache_bytes(device: torch.device) -> int:
    """Return the size of the cache that inputs must not stay in."""
    if device.type != "cuda":
        return 1 << 20  # on a CPU only the smoke test measures
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return int(size) or 50 << 20


def num_copies(num_bytes: float, device: torch.device) -> int:
    """Return how many inputs of a size take turns so that none is found in the cache."""
    return max(1, min(64, -(-2 * cache_bytes(device) // max(1, int(num_bytes)))))


def seconds_of(calls: Sequence[Call], device: torch.device, *, is_captured: bool = True) -> float:
    """Return the median time of a call; the calls, over inputs of their own, take turns.

    On a card they are replayed from a graph, as a served step is, so that no launch is waited for.
    """
    for call in calls[:2]:
        call()
    if device.type != "cuda":
        return _host_seconds(calls)
    torch.cuda.synchronize(device)
    count = _count_for(_card_seconds(lambda: _run(calls, MIN_CALLS)) / MIN_CALLS, len(calls))
    run = partial(_run, calls, count)
    once = CudaGraphRecorder(device).capture(run) if is_captured else run
    once()
    return statistics.median(_card_seconds(once) for _ in range(NUM_ROUNDS)) / count


def _run(calls: Sequence[Call], count: int) -> None:
    for index in range(count):
        calls[index % len(calls)]()


def _count_for(seconds: float, num_calls: int) -> int:
    """Return how many calls make a measurement: enough, and every input as often as the others."""
    wanted = max(MIN_CALLS, min(200, int(TARGET_S / max(seconds, 1e-7))))
    return -(-wanted // num_calls) * num_calls if wanted > num_calls else num_calls


def _card_seconds(run: Call) -> float:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def _host_seconds(calls: Sequence[Call]) -> float:
    times = []
    for _ in range(NUM_ROUNDS):
        started_s = time.perf_counter()
        _run(calls, MIN_CALLS)
        times.append((time.perf_counter() - started_s) / MIN_CALLS)
    return statistics.median(times)
