"""GPU memory, power and energy while a level runs, sampled through NVML; nothing where there is no GPU.

    with watch() as gpus:
        ...
    gpus  # one GpuUse a GPU

NVML sees this machine: of a server elsewhere it shows nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pynvml

from tuneship.core.hardware import visible_gpus
from tuneship.core.report import GpuUse

_INTERVAL_S = 0.1


class _Seen:
    """What one GPU showed so far; energy is the power integrated by the trapezoid rule."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._name = str(pynvml.nvmlDeviceGetName(handle))
        self._memory_peak_bytes = 0
        self._samples: list[tuple[float, float]] = []

    def sample(self) -> None:
        self._memory_peak_bytes = max(self._memory_peak_bytes, int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used))
        self._samples.append((time.perf_counter(), pynvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3))

    def summary(self) -> GpuUse:
        pairs = list(zip(self._samples, self._samples[1:], strict=False))
        energy_j = sum((w0 + w1) / 2 * (t1 - t0) for (t0, w0), (t1, w1) in pairs)
        watts = [watt for _, watt in self._samples]
        return GpuUse(
            name=self._name,
            memory_peak_bytes=self._memory_peak_bytes,
            power_mean_w=sum(watts) / len(watts),
            energy_j=energy_j,
        )


@contextmanager
def watch() -> Iterator[list[GpuUse]]:
    """A list that is filled when the block ends; it stays empty without NVML."""
    found: list[GpuUse] = []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield found
        return
    done = threading.Event()
    seen: list[_Seen] = []
    thread = threading.Thread(target=_sample, args=(seen, done), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
        found += [gpu.summary() for gpu in seen]
        pynvml.nvmlShutdown()


def _sample(seen: list[_Seen], done: threading.Event) -> None:
    """10 times a second, and at both ends; a GPU that cannot tell is left out."""
    for handle in visible_gpus():
        try:
            gpu = _Seen(handle)
            gpu.sample()
        except pynvml.NVMLError:
            continue
        seen.append(gpu)
    while True:
        ended = done.wait(_INTERVAL_S)
        for gpu in list(seen):
            try:
                gpu.sample()
            except pynvml.NVMLError:
                seen.remove(gpu)
        if ended:
            return
