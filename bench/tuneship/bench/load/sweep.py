"""The knee: the highest rate that a server sustains, found by doubling, then by bisection.

    levels, knee = sweep(measure_one_rate)

A rate is sustained when goodput stays at 0.95 (where there are objectives), else when answers come at 0.9 of the rate
at which questions do. A level that the client could not keep up with is no verdict on the server: there
the search ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from tuneship.core.report import Knee, LoadResult

_FIRST_RATE = 1.0
_LAST_RATE = 2.0**16
_CLOSE_ENOUGH = 1.15
_GOODPUT = 0.95
_THROUGHPUT = 0.9


class Sweep(NamedTuple):
    """Levels in ascending rate, and what they show."""

    levels: list[LoadResult]
    knee: Knee


def sweep(measure: Callable[[float], LoadResult]) -> Sweep:
    """Measure rate after rate until the knee is known within 15 %.

    Where even 1/s is not sustained, the knee is at a rate of 0.
    """
    levels: dict[float, LoadResult] = {}

    def why_not(rate: float) -> str:
        levels[rate] = measure(rate)
        quietest = levels[min(levels)]
        return gave_way(levels[rate], quietest)

    knee = find_knee(why_not)
    if knee.beyond is not None and not levels[knee.beyond].client.valid:
        knee = knee.model_copy(update={"beyond": None})
    return Sweep([levels[rate] for rate in sorted(levels)], knee)


def find_knee(why_not: Callable[[float], str]) -> Knee:
    """Search with `why_not(rate)`, which is empty where the rate is sustained; no rate is tried twice."""
    low, high, reason = 0.0, _FIRST_RATE, ""
    while not (reason := why_not(high)):
        low = high
        if high >= _LAST_RATE:
            return Knee(rate=high, beyond=None, reason="the sweep goes no further")
        high *= 2
    while low and high / low > _CLOSE_ENOUGH:
        middle = (low * high) ** 0.5
        if failed := why_not(middle):
            high, reason = middle, failed
        else:
            low = middle
    return Knee(rate=low, beyond=high, reason=reason)


def gave_way(level: LoadResult, quietest: LoadResult) -> str:
    """Why `level` was not sustained; empty if it was. `quietest` tells how long an answer takes without a queue."""
    if not level.client.valid:
        return f"the client lags {level.client.lag_p99_ms:.0f} ms"
    if level.goodput is not None:
        return f"goodput {level.goodput:.2f} < {_GOODPUT}" if level.goodput < _GOODPUT else ""
    offered, reached = _throughputs(level, quietest)
    return f"throughput {reached:.3g}/s of {offered:.3g}/s offered" if reached < _THROUGHPUT * offered else ""


def _throughputs(level: LoadResult, quietest: LoadResult) -> tuple[float, float]:
    """Offered and completed requests per second.

    A level lasts from its first send to its last end; the last answer's own time, as it is without a queue, is no sign
    of one, so it is taken off.
    """
    start_s, end_s = level.window_s or (0.0, level.duration_s)
    window_s = max(end_s - start_s, 1e-9)
    answer_s = quietest.e2e_ms.p50 / 1e3 if quietest.e2e_ms else 0.0
    return level.requests / window_s, level.completed / max(window_s, level.duration_s - answer_s)
