"""What is counted by size: step times, tokens a step. Knows nothing of who reads it, or how.

Plain lists rather than a metrics library's objects: one is written for every token, so that a lock
and a walk through all buckets would be a good part of what a token costs the host.
"""

from bisect import bisect_left
from dataclasses import dataclass, field

STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
STEP_SEQS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class Histogram:
    """How many values fell below each bound and above the one before. One thread may write."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last: above all bounds
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value; one that equals a bound belongs below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


@dataclass(frozen=True, slots=True)
class EngineMeasures:
    """Histograms over the steps so far.

    A step's time runs from its launch, or from the end of the step before if that is later, until
    its result is there.
    """

    step_seconds: Histogram = field(default_factory=lambda: Histogram(STEP_SECONDS))
    step_tokens: Histogram = field(default_factory=lambda: Histogram(STEP_TOKENS))
    step_seqs: Histogram = field(default_factory=lambda: Histogram(STEP_SEQS))
