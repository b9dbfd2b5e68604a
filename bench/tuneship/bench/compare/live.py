"""Two endpoints measured in turn: pairs of blocks in ABBA order, so that a machine that drifts is slow for both.

Both blocks of a pair have the same arrivals and prompts (one seed); the seed changes from pair to pair.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tuneship.bench.compare.statistics import detectable, pairs_needed, sign_flip
from tuneship.bench.compare.verdict import Evidence, judge
from tuneship.bench.target import Target
from tuneship.core.progress import progress
from tuneship.core.report import Comparison, LoadResult

Measure = Callable[[Target, int], LoadResult]
"""Measures one block of a target with the arrivals and prompts of a seed."""


class _Metric(NamedTuple):
    name: str
    value: Callable[[LoadResult], float | None]
    sign: int = 1
    """-1 where higher is better."""


_METRICS = (
    _Metric("TTFT p50 ms", lambda level: level.ttft_ms.p50 if level.ttft_ms else None),
    _Metric("TPOT p50 ms", lambda level: level.tpot_ms.p50 if level.tpot_ms else None),
    _Metric("E2E p50 ms", lambda level: level.e2e_ms.p50 if level.e2e_ms else None),
    _Metric("output tokens/s", lambda level: level.output_tokens_per_s, -1),
)


class Pair(NamedTuple):
    """Two blocks with the same load."""

    a: LoadResult
    b: LoadResult


def measure_pairs(a: Target, b: Target, measure: Measure, pairs: int) -> list[Pair]:
    """Drive `pairs` pairs of blocks in the order AB, BA, AB, ..."""
    found = []
    for index in range(pairs):
        if index % 2:
            second, first = measure(b, index), measure(a, index)
            found.append(Pair(first, second))
        else:
            found.append(Pair(measure(a, index), measure(b, index)))
        progress("pairs", index + 1, pairs)
    return found


def compare_pairs(pairs: Sequence[Pair], margin: float, alpha: float = 0.05) -> list[Comparison]:
    """Judge median TTFT, TPOT, E2E and throughput; `margin` is the share by which each may be worse.

    A pair during which the client lagged says nothing about the servers and is set aside whole; when that is more than
    half of them, or a request failed, nothing can be told.
    """
    kept = [pair for pair in pairs if pair.a.client.valid and pair.b.client.valid]
    doubt = next((found for pair in pairs if (found := _failed(pair))), "")
    if not doubt and len(kept) * 2 < len(pairs):
        doubt = f"the client was the bottleneck in {len(pairs) - len(kept)} of {len(pairs)} pairs"
    return judge([_evidence(metric, kept, margin, alpha, doubt) for metric in _METRICS], alpha)


def log_ratios(metric: str, pairs: Sequence[Pair]) -> list[float]:
    """One a pair, positive where B is worse; empty when a block has no such figure."""
    return _log_ratios(next(m for m in _METRICS if m.name == metric), pairs)


def _evidence(metric: _Metric, pairs: Sequence[Pair], margin: float, alpha: float, doubt: str) -> Evidence:
    ratios = _log_ratios(metric, pairs)
    if doubt or not ratios:
        return Evidence(metric.name, None, None, margin, doubt=doubt or "one side has no figure")
    test = sign_flip(ratios, alpha)
    sd = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    distance = max(math.log1p(margin) - test.mean, test.mean)
    needed = max(pairs_needed(sd, distance, alpha), len(pairs) + 1)
    return Evidence(
        metric.name,
        statistics.median(metric.value(pair.a) or 0.0 for pair in pairs),
        statistics.median(metric.value(pair.b) or 0.0 for pair in pairs),
        margin,
        worse_by=math.expm1(test.mean),
        lower=math.expm1(test.lower),
        upper=math.expm1(test.upper),
        p=test.p,
        pairs=len(pairs),
        detectable=math.expm1(min(detectable(sd, len(pairs), alpha), 700)),
        next_step=f"--pairs {needed}",
    )


def _log_ratios(metric: _Metric, pairs: Sequence[Pair]) -> list[float]:
    values = [(metric.value(pair.a), metric.value(pair.b)) for pair in pairs]
    if not all(a and b for a, b in values):
        return []
    return [metric.sign * math.log((b or 1) / (a or 1)) for a, b in values]


def _failed(pair: Pair) -> str:
    sides = ((pair.a, "baseline"), (pair.b, "candidate"))
    return next((f"the {name} has errors" for side, name in sides if side.errors), "")
