"""What decode steps are made of: each kernel's share of a step, as torch's profiler sees them.

On a CPU there are no kernels; operations are listed instead, with what they call counted again.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

FIRST_STEP = 4  # of those in which everybody decodes
NUM_STEPS = 10
LAST_STEP = FIRST_STEP + NUM_STEPS
NUM_NAMES = 16
LONGEST_NAME = 100


class StepProfile:
    """Watches some steps of one batch; `watch` is told the number of each step."""

    def __init__(self, device: torch.device) -> None:
        self._kind = "CUDA" if device.type == "cuda" else "CPU"
        self._profile = profile(activities=[getattr(ProfilerActivity, self._kind)])
        self._num_watched = 0

    def watch(self, step: int) -> None:
        self._num_watched = step
        if step == FIRST_STEP:
            self._profile.start()
        elif step == LAST_STEP:
            self._profile.stop()

    def lines(self) -> Iterator[tuple[str, float, float]]:
        """Yield name, launches and microseconds a step: all kernels together, then the longest.

        Nothing where the batch had too few steps.
        """
        if self._num_watched < LAST_STEP:
            if self._num_watched >= FIRST_STEP:
                self._profile.stop()
            return
        launches: Counter[str] = Counter()
        microseconds: Counter[str] = Counter()
        for event in self._profile.events() or ():  # type: ignore[no-untyped-call]
            if event.device_type.name == self._kind:
                launches[event.name] += 1
                microseconds[event.name] += event.time_range.elapsed_us()
        yield "all", launches.total() / NUM_STEPS, microseconds.total() / NUM_STEPS
        for name, us in microseconds.most_common(NUM_NAMES):
            yield name[:LONGEST_NAME], launches[name] / NUM_STEPS, us / NUM_STEPS
