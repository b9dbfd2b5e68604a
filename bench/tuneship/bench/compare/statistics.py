"""Sign-flip tests of paired log-ratios, their intervals, Holm's correction, and what a number of pairs can find.

Under "B is no worse than A" a pair's log-ratio is as likely negative as positive, so the observed mean is put among the
means of all sign flips. A flip of a subset makes the mean at least as large exactly when the subset's own mean is at
most 0, so the share of subset means at or below theta is the p-value of "the effect is at most theta", and the bounds
of the interval are order statistics of the subset means (Hartigan, JASA 64, 1969: typical values).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped]

EXACT_UP_TO = 16
RANDOM_FLIPS = 100_000
POWER = 0.8
MOST_PAIRS = 1000


class SignFlip(NamedTuple):
    """The test of one metric; positive is worse. With too few pairs for `alpha` the bounds are infinite."""

    mean: float
    p: float
    """One-sided, of "the mean is at most 0"."""
    lower: float
    upper: float
    """One-sided bounds at 1 - alpha each: together a two-sided interval at 1 - 2 alpha."""


def sign_flip(values: Sequence[float], alpha: float = 0.05, seed: int = 0) -> SignFlip:
    """Test the mean of `values` (shape [n], n >= 1): exact for n <= 16, else with 100,000 flips from `seed`."""
    x = np.asarray(values, dtype=float)
    means = np.sort(_subset_means(x, seed))
    total = len(means) + 1  # the flip of nothing, which is what was observed
    slack = 1e-12 * float(np.max(np.abs(x)))  # equal values: binary fractions must not decide a tie
    p = (1 + int(np.searchsorted(means, slack, side="right"))) / total
    rank = math.floor(alpha * total + 1e-9)
    lower, upper = (float(means[rank - 1]), float(means[-rank])) if rank else (-math.inf, math.inf)
    return SignFlip(float(x.mean()), p, lower, upper)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down p-values, in the order given: at most alpha exactly where the hypothesis falls.

    Scandinavian Journal of Statistics 6, 1979.
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def detectable_at(error: float, alpha: float = 0.05) -> float:
    """As `detectable`, of an estimate whose standard error is `error`, by the normal distribution."""
    return float(stats.norm.ppf([1 - alpha, POWER]).sum()) * error


def detectable(sd: float, pairs: int, alpha: float = 0.05) -> float:
    """The smallest mean that a one-sided test of `pairs` values with deviation `sd` finds with a power of 0.8."""
    if pairs < 2:
        return math.inf
    quantiles = stats.t.ppf([1 - alpha, POWER], pairs - 1)
    return float(quantiles.sum()) * sd / math.sqrt(pairs)


def pairs_needed(sd: float, margin: float, alpha: float = 0.05) -> int:
    """The fewest pairs that decide about a distance of `margin` with a power of 0.8; at most 1000."""
    least = math.floor(math.log2(1 / alpha)) + 1  # below it no sign-flip test can reject
    return next((n for n in range(least, MOST_PAIRS) if detectable(sd, n, alpha) <= margin), MOST_PAIRS)


def _subset_means(x: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    """Means of all subsets but the empty one, or of random ones."""
    n = len(x)
    if n <= EXACT_UP_TO:
        chosen = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1
    else:
        chosen = np.random.default_rng(seed).integers(0, 2, (RANDOM_FLIPS, n), dtype=np.int8)
        chosen = chosen[chosen.any(axis=1)]
    return np.asarray((chosen @ x) / chosen.sum(axis=1), dtype=np.float64)
