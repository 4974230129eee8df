"""How many threads this process may use: its affinity, and its cgroup's share of processor time."""

import math
import os
from pathlib import Path

CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


def available_threads(cpu_max: Path = CPU_MAX) -> int:
    """Return the number of processors that this process can keep busy, at least one."""
    count = len(os.sched_getaffinity(0))
    if cpu_max.is_file():
        quota, _, period = cpu_max.read_text("ascii").partition(" ")
        if quota.strip() != "max":
            count = min(count, math.ceil(int(quota) / int(period)))
    return max(count, 1)
