"""A trainer callback that times whole optimizer steps, device included, and profiles one where asked."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback


class StepTimer(TrainerCallback):  # type: ignore[misc]  # transformers is not typed everywhere
    """Seconds, loss and gradient norm of each step; the kernels of step `profiled` (from 1; 0: none)."""

    def __init__(self, *, profiled: int = 0) -> None:
        self.step_s: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.table: list[dict[str, Any]] = []
        self._profiled = profiled
        self._profiler: Any = None
        self._since = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Start the clock once the device has nothing left to do."""
        _wait()
        if state.global_step == self._profiled - 1:
            # Kernels alone: what launches them makes a hundred thousand events, which take longer than the step.
            kind = torch.profiler.ProfilerActivity
            self._profiler = torch.profiler.profile(activities=[kind.CUDA if torch.cuda.is_available() else kind.CPU])
            self._profiler.__enter__()
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop it when the device is done."""
        _wait()
        self.step_s.append(time.perf_counter() - self._since)
        if self._profiler:
            self._profiler.__exit__(None, None, None)
            self.table = _table(self._profiler)
            self._profiler = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        """Keep what the trainer logs of a step."""
        if logs and "loss" in logs:
            self.losses.append(round(float(logs["loss"]), 5))
            self.grad_norms.append(round(float(logs.get("grad_norm", 0)), 5))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _table(profiler: Any) -> list[dict[str, Any]]:
    """The sum of all, then the 25 that took longest."""
    cuda = torch.cuda.is_available()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, key))
    if cuda:
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    rows = [(event.key[:110], getattr(event, key), event.count) for event in events]
    rows = [("all", sum(row[1] for row in rows), sum(row[2] for row in rows)), *rows[:25]]
    return [{"kernel": name, "ms": round(us / 1e3, 2), "calls": calls} for name, us, calls in rows]
