"""When a training has to end before its time: the loss is gone, or somebody asks for it."""

from __future__ import annotations

import math
import signal
import statistics
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_WINDOW = 16
_IN_A_ROW = 2


class Watch:
    """Whether losses are still those of a model that learns.

    Gone is a loss or a gradient that is no number, or `spike` nats over the median of the last steps, twice in a row:
    a single batch of foreign rows can be that high, and a model that came apart stays there.
    """

    def __init__(self, spike: float) -> None:
        self._spike = spike
        self._last: deque[float] = deque(maxlen=_WINDOW)
        self._high = 0

    @property
    def suspicious(self) -> bool:
        """Whether the last step was high: nothing to go back to."""
        return self._high > 0

    def judge(self, loss: float, grad_norm: float) -> str:
        """What is wrong after one more step; empty when nothing is."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"the gradient's norm is {grad_norm}"
        usual = statistics.median(self._last) if len(self._last) == _WINDOW else math.inf
        if not self._spike or loss <= usual + self._spike:
            self._last.append(loss)
            self._high = 0
            return ""
        self._high += 1
        return f"the loss is {loss:.2f}, after {usual:.2f}" if self._high == _IN_A_ROW else ""


class Request:
    """Whether SIGTERM came."""

    made = False

    def _make(self, _signal: int, _frame: FrameType | None) -> None:
        self.made = True


@contextmanager
def termination() -> Iterator[Request]:
    """SIGTERM becomes a request to stop between two steps; outside of the block it is what it was before."""
    request = Request()
    before = signal.signal(signal.SIGTERM, request._make)
    try:
        yield request
    finally:
        signal.signal(signal.SIGTERM, before)
