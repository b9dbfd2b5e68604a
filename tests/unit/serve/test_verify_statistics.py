"""The statistics of a verdict: distances, how much of an effect is there, bounds."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship.serve.verify.statistics import (
    Spread,
    carried_over,
    distances,
    effect,
    explained,
    lower_bound,
    spread,
    upper_bound,
)


def test_the_arithmetic():
    one, other = [[0.0, -1.0], [-2.0]], [[0.0, -1.5], [-2.25]]
    apart = distances(one, other)
    assert apart == [[0.0, 0.5], [0.25]]
    assert spread(apart) == Spread(0.25, 0.5)
    assert lower_bound(apart).mean < 0.25 < upper_bound(apart).mean
    assert lower_bound(apart).high <= 0.5 == upper_bound(apart).high
    sure, unsure = math.log(0.98), math.log(0.02)
    assert carried_over([[0.4, 0.4]], [[unsure, sure]], [[sure, unsure]])[0] == pytest.approx([0.016, 10.0])
    assert explained(one, one) == 1
    assert explained(one, other) == pytest.approx(1 - 0.3125 / 2)
    half = effect([[-3.0, -3.0]], [[-2.0, -1.0]], [[-3.0, -3.0]], [[-2.5, -2.0]])
    assert half == pytest.approx((0.5, 0.995), abs=1e-3)
    broken = effect([[-1.0] * 10], [[-0.1] * 10], [[-1.0] * 10], [[-0.01] * 9 + [-8.0]])
    assert broken.alignment == pytest.approx(0.87, abs=0.01), "one token that a doubled adapter broke decides nothing"
    assert effect([[0.0]], [[0.0]], [[1.0]], [[1.0]]) == (0.0, 0.0)
    assert not Spread(math.nan, 0.0).within(Spread(1.0, 1.0))


@given(st.integers(0, 10**6), st.integers(5, 16))
@settings(max_examples=60, deadline=None)
def test_the_upper_bound_is_one(seed, rows):
    """In nearly all draws of rows it is above the spread of the population that they are drawn from."""
    draw = random.Random(seed)

    def sample(count: int) -> list[list[float]]:
        return [[abs(draw.gauss(0, 1)) for _ in range(20)] for _ in range(count)]

    bound = [upper_bound(sample(rows)) for _ in range(40)]
    true_mean, true_high = math.sqrt(2 / math.pi), 1.96
    assert sum(b.mean >= true_mean for b in bound) >= 32
    assert sum(b.high >= true_high for b in bound) >= 32
