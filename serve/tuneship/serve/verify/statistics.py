"""The arithmetic of a verdict: log-probabilities of the same answer tokens, stored and served. Pure, no library.

Everything takes figures as rows of tokens, since rows are what was drawn: the tokens of one row lean on each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

HIGH = 0.95
"""The quantile beside the mean. A fault in few tokens shows there; one freak token does not."""
_CERTAINTY = 2.0
"""Standard errors by which something may have been measured too low or too high."""
_LEAST_DOUBT = 0.02
"""Rounding that does not vanish however sure a model is."""

Rows = Sequence[Sequence[float]]


class Spread(NamedTuple):
    """How far two sets of log-probabilities lie apart, over |difference| of each token, in nats per token."""

    mean: float
    high: float
    """Its 0.95 quantile."""

    def within(self, limit: Spread) -> bool:
        """Whether neither figure is beyond its limit; NaN never is within."""
        return self.mean <= limit.mean and self.high <= limit.high

    def times(self, factor: float) -> Spread:
        """Both figures, multiplied."""
        return Spread(self.mean * factor, self.high * factor)

    def at_least(self, other: Spread) -> Spread:
        """Of each figure the larger."""
        return Spread(max(self.mean, other.mean), max(self.high, other.high))


class Interval(NamedTuple):
    """A mean over tokens, and how low and high it may really be."""

    low: float
    mean: float
    high: float


class Effect(NamedTuple):
    """What serving an adapter does to its base, beside what training it did, over all tokens."""

    slope: float
    """Least squares through the origin of the served effect on the trained one: 1 is all of it, 0 none."""
    alignment: float
    """The cosine between both: 1 says that it is the same effect, at whatever strength."""


def distances(one: Rows, other: Rows) -> Rows:
    """|difference| of each token."""
    return [[abs(a - b) for a, b in zip(*pair, strict=True)] for pair in zip(one, other, strict=True)]


def carried_over(noise: Rows, base: Rows, trained: Rows) -> Rows:
    """What disturbs the base by `noise` would do so much to the trained model, token by token.

    A disturbed logit moves log p of a token in proportion to 1 - p: what a model is sure of stays, and a trained model
    is surer than its base.
    """
    return [
        [n * (_doubt(t) + _LEAST_DOUBT) / (_doubt(b) + _LEAST_DOUBT) for n, b, t in zip(*row, strict=True)]
        for row in zip(noise, base, trained, strict=True)
    ]


def spread(measured: Rows) -> Spread:
    """The two figures of some distances."""
    return _spread(measured, HIGH)


def upper_bound(measured: Rows) -> Spread:
    """How large they may really be, given that few tokens were looked at.

    The mean's standard error has rows as clusters; the quantile is taken at the upper end of its binomial interval.
    """
    return _bound(measured, _CERTAINTY)


def lower_bound(measured: Rows) -> Spread:
    """How large they surely are: the other end of `upper_bound`."""
    return _bound(measured, -_CERTAINTY)


def interval(measured: Rows) -> Interval:
    """Of signed figures, with the doubt of `upper_bound`."""
    mean = math.fsum(_flat(measured)) / len(_flat(measured))
    doubt = _CERTAINTY * _error(measured, mean)
    return Interval(mean - doubt, mean, mean + doubt)


def effect(base: Rows, trained: Rows, served_base: Rows, served: Rows) -> Effect:
    """Compare served - served base with trained - base: how much in nats, whether it points there in probabilities.

    A doubled adapter breaks a few tokens, by so many nats that in them it would point elsewhere.
    """
    wanted, found = _change(base, trained), _change(served_base, served)
    likelier, found_likelier = _change(_likely(base), _likely(trained)), _change(_likely(served_base), _likely(served))
    of_both = math.sqrt(_dot(likelier, likelier) * _dot(found_likelier, found_likelier))
    return Effect(
        slope=_dot(wanted, found) / _dot(wanted, wanted) if any(wanted) else 0.0,
        alignment=_dot(likelier, found_likelier) / of_both if of_both else 0.0,
    )


def explained(stored: Rows, served: Rows) -> float:
    """Share of the stored figures' variance that the served ones repeat: 1 the same model, 0 or less another one."""
    known, found = _flat(stored), _flat(served)
    middle = math.fsum(known) / len(known)
    around = math.fsum((k - middle) ** 2 for k in known)
    missed = math.fsum((k - f) ** 2 for k, f in zip(known, found, strict=True))
    return 1 - missed / around if around else float(not missed)


def finite(rows: Rows) -> bool:
    """Whether every figure is a number."""
    return all(map(math.isfinite, _flat(rows)))


def _change(before: Rows, after: Rows) -> list[float]:
    return [b - a for a, b in zip(_flat(before), _flat(after), strict=True)]


def _likely(log_p: Rows) -> Rows:
    return [[math.exp(min(value, 0.0)) for value in row] for row in log_p]


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def _flat(rows: Rows) -> list[float]:
    return list(chain.from_iterable(rows))


def _doubt(log_p: float) -> float:
    """1 - p, within what rounding leaves of it."""
    return min(max(-math.expm1(log_p), 0.0), 1.0)


def _spread(measured: Rows, level: float) -> Spread:
    flat = sorted(_flat(measured))
    return Spread(math.fsum(flat) / len(flat), flat[max(0, math.ceil(level * len(flat)) - 1)])


def _bound(measured: Rows, certainty: float) -> Spread:
    level = HIGH + certainty * math.sqrt(HIGH * (1 - HIGH) / sum(map(len, measured)))
    found = _spread(measured, min(max(level, 0.0), 1.0))
    return Spread(max(found.mean + certainty * _error(measured, found.mean), 0.0), found.high)


def _error(measured: Rows, mean: float) -> float:
    """Few rows may be alike by chance: their tokens are asked too."""
    rows = [math.fsum(row) - mean * len(row) for row in measured]
    tokens = [figure - mean for figure in _flat(measured)]
    return max(_standard_error(clusters, len(tokens)) for clusters in (rows, tokens))


def _standard_error(clusters: Sequence[float], tokens: int) -> float:
    """Of a mean over `tokens`, by the ratio estimator: each cluster's sum, less what the mean makes of it."""
    count = len(clusters)
    return math.sqrt(count / max(count - 1, 1) * math.fsum(each * each for each in clusters)) / tokens
