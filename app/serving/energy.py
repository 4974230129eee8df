"""What the GPUs say of themselves through NVML: energy, power, memory, load.

Needs NVIDIA's `nvidia-ml-py`, the extra `gpu`; without it or without a driver there is no meter.
"""

import logging
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

try:
    import pynvml
except ImportError:
    pynvml = None

logger = logging.getLogger(__name__)

_Family = TypeVar("_Family", CounterMetricFamily, GaugeMetricFamily)


class GpuMeter:
    """Reads all GPUs that this process may see; a container sees its own."""

    def __init__(self, nvml: ModuleType) -> None:
        """Open NVML. Raises its NVMLError if there is no driver."""
        self._nvml = nvml
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
        self._handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(count)]

    def collect(self) -> Iterator[Metric]:
        """Yield what can be read; an old GPU cannot tell its energy."""
        nvml = self._nvml
        yield self._read(
            CounterMetricFamily("arriero:gpu_energy_joules", "Energy used.", labels=["gpu"]),
            lambda handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000,
        )
        yield self._read(
            GaugeMetricFamily("arriero:gpu_power_watts", "Power drawn.", labels=["gpu"]),
            lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        )
        yield self._read(
            GaugeMetricFamily("arriero:gpu_memory_used_bytes", "Memory used.", labels=["gpu"]),
            lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).used,
        )
        yield self._read(
            GaugeMetricFamily("arriero:gpu_busy", "Share of time with a kernel.", labels=["gpu"]),
            lambda handle: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100,
        )

    def _read(self, family: _Family, read: Callable[[object], float]) -> _Family:
        for index, handle in enumerate(self._handles):
            try:
                family.add_metric([str(index)], read(handle))
            except self._nvml.NVMLError:
                continue
        return family


def open_gpu_meter() -> GpuMeter | None:
    """Return a meter if there is anything that it could read."""
    if pynvml is None:
        logger.info("no energy in /metrics: nvidia-ml-py is not installed")
        return None
    try:
        return GpuMeter(pynvml)
    except pynvml.NVMLError as error:
        logger.warning("no energy in /metrics: %s", error)
        return None
