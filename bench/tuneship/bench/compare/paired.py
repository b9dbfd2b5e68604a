"""Quality on the same items: exact McNemar where scores are 0 or 1, a seeded bootstrap where they are graded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats  # type: ignore[import-untyped]

from tuneship.bench.compare.statistics import detectable, detectable_at

RESAMPLES = 10_000


class Paired(NamedTuple):
    """How much worse the candidate is, in points of score (or nats), with one-sided bounds at 1 - alpha each."""

    worse_by: float
    lower: float
    upper: float
    p: float
    pairs: int
    detectable: float


def compare_scores(a: Sequence[float], b: Sequence[float], alpha: float = 0.05, seed: int = 0) -> Paired:
    """Compare scores in 0..1 of the same items, in the same order (shape [n] each, n >= 2); higher is better."""
    loss = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    found = _bootstrap(loss, np.ones(len(loss)), alpha, seed)
    if not loss.any():  # the bootstrap sees no noise at all: the rule of three bounds what n items can have missed
        found = found._replace(upper=-math.log(alpha) / len(loss), detectable=detectable_at(1 / len(loss), alpha))
    if set(a) | set(b) <= {0.0, 1.0}:
        return found._replace(p=_mcnemar(int((loss > 0).sum()), int((loss < 0).sum())))
    return found


def compare_nll(
    a: Sequence[float], b: Sequence[float], tokens: Sequence[int], alpha: float = 0.05, seed: int = 0
) -> Paired:
    """Compare rows' summed NLL in nats; the effect is in nats per token, rows are the clusters that are resampled."""
    loss = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    return _bootstrap(loss, np.asarray(tokens, dtype=float), alpha, seed)


def _mcnemar(lost: int, won: int) -> float:
    """One-sided exact p of "no more items were lost than won" among the items that changed."""
    return float(stats.binomtest(lost, lost + won, alternative="greater").pvalue) if lost + won else 1.0


def _bootstrap(
    loss: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    alpha: float,
    seed: int,
) -> Paired:
    n = len(loss)
    mean = float(loss.sum() / weight.sum())
    rng = np.random.default_rng(seed)
    drawn = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        rows = rng.integers(0, n, n)
        drawn[index] = loss[rows].sum() / weight[rows].sum()
    lower, upper = (float(bound) for bound in np.quantile(drawn, [alpha, 1 - alpha]))
    residual = (loss - mean * weight) / weight.mean()
    sd = float(residual.std(ddof=1)) if n > 1 else math.inf
    p = (1 + int((drawn <= 0).sum())) / (RESAMPLES + 1)
    return Paired(mean, lower, upper, p, n, detectable(sd, n, alpha))
