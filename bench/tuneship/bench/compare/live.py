"""Two endpoints measured in turn: pairs of blocks in ABBA order, so that a machine that drifts is slow for both.

Both blocks of a pair have the same arrivals and prompts (one seed); the seed changes from pair to pair.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tuneship.bench.compare.again import Again
from tuneship.bench.compare.calibration import Calibration, load_key
from tuneship.bench.compare.metrics import LOAD_METRICS, Metric
from tuneship.bench.compare.statistics import detectable, pairs_needed, sign_flip
from tuneship.bench.compare.verdict import Evidence
from tuneship.bench.target import Target
from tuneship.core.progress import progress
from tuneship.core.report import LoadResult

Measure = Callable[[Target, int], LoadResult]
"""Measures one block of a target with the arrivals and prompts of a seed."""
FEWEST_PAIRS, USUAL_PAIRS, MOST_PAIRS = 8, 12, 100


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


class Expected(NamedTuple):
    """What to expect of one metric under one load on a calibrated testbed; noise as a share, None where not known."""

    load: str
    metric: str
    pair_noise: float | None
    pairs: int | None
    """Pairs that decide about the margin."""
    run_noise: float | None


def expected_noise(calibration: Calibration, margin: float, alpha: float) -> list[Expected]:
    """Every load and metric that the testbed is calibrated for."""
    found = []
    for load in calibration.loads():
        for metric in LOAD_METRICS:
            pair, run = calibration.pair_noise(load, metric.field), calibration.run_noise(load, metric.field)
            needed = pairs_needed(pair.sd, math.log1p(margin), alpha / len(LOAD_METRICS)) if pair else None
            found.append(Expected(load, metric.name, pair.sd if pair else None, needed, run.sd if run else None))
    return found


def plan_pairs(calibration: Calibration, level: LoadResult, margin: float, alpha: float) -> int:
    """As many pairs as decide about `margin` in the noisiest metric, by the testbed's calibration; 12 without one.

    Between 8, below which Holm over four metrics can reject nothing, and 100.
    """
    expected = [e.pairs for e in expected_noise(calibration, margin, alpha) if e.load == load_key(level) and e.pairs]
    return min(MOST_PAIRS, max(FEWEST_PAIRS, *expected)) if expected else USUAL_PAIRS


def weigh_pairs(
    pairs: Sequence[Pair], margin: float, alpha: float = 0.05, again: Again | None = None
) -> list[Evidence]:
    """What the pairs say of median TTFT, TPOT, E2E and throughput.

    A pair during which the client lagged says nothing about the servers and is set aside whole; when that is more than
    half of them, or a request failed, nothing can be told.

    Args:
        pairs: in the order in which they were measured.
        margin: the share by which each metric may be worse.
        alpha: of each one-sided test and bound.
        again: what would measure the same with more pairs.

    """
    kept = [pair for pair in pairs if pair.a.client.valid and pair.b.client.valid]
    doubt = next((found for pair in pairs if (found := _failed(pair))), "")
    if not doubt and len(kept) * 2 < len(pairs):
        doubt = f"the client was the bottleneck in {len(pairs) - len(kept)} of {len(pairs)} pairs"
    return [_weigh(metric, kept, margin, alpha, doubt, again) for metric in LOAD_METRICS]


def log_ratios(metric: Metric, pairs: Sequence[Pair]) -> list[float]:
    """One a pair, positive where B is worse; empty when a block has no such figure."""
    found = [metric.log_ratio(pair.a, pair.b) for pair in pairs]
    known = [ratio for ratio in found if ratio is not None]
    return known if len(known) == len(found) else []


def _weigh(
    metric: Metric, pairs: Sequence[Pair], margin: float, alpha: float, doubt: str, again: Again | None
) -> Evidence:
    ratios = log_ratios(metric, pairs)
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
        next_step=again.of_pairs(needed) if again else "",
    )


def _failed(pair: Pair) -> str:
    sides = ((pair.a, "baseline"), (pair.b, "candidate"))
    return next((f"the {name} has errors" for side, name in sides if side.errors), "")
