"""What this machine is: GPUs through NVML (no torch, no CUDA context), processor, memory, library versions.

The GPUs are those that a CUDA program started here would see: `CUDA_VISIBLE_DEVICES` holds for us, too.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pynvml

SERVES_FROM = (8, 0)
"""Compute capability that SGLang's kernels start at; below it a card can train and not serve."""
TRACKED = ("tuneship", "torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "sglang")


class Gpu(NamedTuple):
    """One CUDA device."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]


class Hardware(NamedTuple):
    """One machine."""

    gpus: tuple[Gpu, ...]
    driver: str
    cpu: str
    cores: int
    memory_bytes: int

    @property
    def gpu(self) -> str:
        """The GPUs in one line, `none` without one."""
        names = sorted({gpu.name for gpu in self.gpus})
        return ", ".join(f"{sum(g.name == n for g in self.gpus)} x {n}" for n in names) or "none"

    def as_record(self) -> dict[str, str | int]:
        """For manifests and reports."""
        return {
            "gpu": self.gpu,
            "driver": self.driver,
            "cpu": self.cpu,
            "cores": self.cores,
            "memory_bytes": self.memory_bytes,
        }


def gib(count: float, digits: int = 1) -> str:
    """Bytes, for people: `1.5 GiB`."""
    return f"{count / 2**30:.{digits}f} GiB"


@cache
def detect() -> Hardware:
    """Look at this machine once."""
    gpus, driver = _gpus()
    return Hardware(gpus, driver, _cpu_name(), len(os.sched_getaffinity(0)), psutil.virtual_memory().total)


def thread_settings() -> dict[str, str]:
    """Environment for children that compute on the CPU; nothing where there is a GPU.

    OpenMP's threads spin at barriers by default, which starves whoever else needs the cores and then themselves: on two
    busy virtual cores a training step ran at 26 tokens a CPU second spinning, and at 110 sleeping.
    """
    return {} if detect().gpus else {"OMP_WAIT_POLICY": "PASSIVE"}


def versions(packages: tuple[str, ...] = TRACKED) -> dict[str, str]:
    """Installed versions of the libraries that decide a result, Python's with them."""
    found = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def visible_gpus() -> list[Any]:
    """NVML's handles of the GPUs that CUDA programs started here see, in their order; between nvmlInit and Shutdown."""
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    return [handles[index] for index in visible(wanted, [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles])]


def visible(wanted: str, uuids: Sequence[str]) -> list[int]:
    """Which of the GPUs with `uuids` the words of `CUDA_VISIBLE_DEVICES` mean; CUDA stops at the first that is none."""
    found = []
    for word in map(str.strip, wanted.split(",")):
        if word.isdecimal():
            named = [int(word)] if int(word) < len(uuids) else []
        else:
            named = [index for index, uuid in enumerate(uuids) if word.startswith("GPU-") and uuid.startswith(word)]
        if len(named) != 1:
            break
        found += named
    return found


def _gpus() -> tuple[tuple[Gpu, ...], str]:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return (), ""
    try:
        gpus = tuple(
            Gpu(
                name=pynvml.nvmlDeviceGetName(handle),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            )
            for handle in visible_gpus()
        )
        return gpus, str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
