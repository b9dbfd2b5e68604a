"""The mathematics of the gate: exactness, intervals that invert the test, and false alarms in a simulation."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tuneship.bench.compare.paired import compare_nll, compare_scores
from tuneship.bench.compare.statistics import detectable, holm, pairs_needed, sign_flip
from tuneship.bench.compare.verdict import Evidence, judge

VALUES = st.lists(st.integers(-50, 50).map(lambda n: n / 8), min_size=1, max_size=8)


@given(VALUES)
def test_p_is_the_share_of_all_sign_flips(values: list[float]) -> None:
    flips = itertools.product((1, -1), repeat=len(values))
    sums = [sum(s * v for s, v in zip(signs, values, strict=True)) for signs in flips]
    assert sign_flip(values).p == sum(s >= sum(values) for s in sums) / len(sums)


@given(st.lists(st.floats(-1, 1), min_size=5, max_size=9, unique=True), st.sampled_from([0.05, 0.1, 0.25]))
@settings(max_examples=50)
def test_bounds_invert_the_test(values: list[float], alpha: float) -> None:
    found = sign_flip(values, alpha)
    for step, rejected in ((-1e-6, True), (1e-6, False)):
        assert (sign_flip([v - found.lower - step for v in values]).p <= alpha) is rejected
        assert (sign_flip([found.upper - step - v for v in values]).p <= alpha) is rejected


def test_too_few_pairs_have_no_interval() -> None:
    assert sign_flip([1.0] * 4).upper == math.inf
    assert sign_flip([1.0] * 5).p == 1 / 32


def test_many_pairs_are_flipped_at_random_and_repeatably() -> None:
    values = np.random.default_rng(1).normal(0.3, 1, 30).tolist()
    assert sign_flip(values) == sign_flip(values)
    exact = sign_flip(values[:16])
    sampled = sign_flip([*values[:16], 0.0])  # a pair without difference changes no p
    assert sampled.p == pytest.approx(exact.p, abs=0.01)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


def test_detectable_holds_its_power_and_pairs_needed_inverts_it() -> None:
    rng = np.random.default_rng(0)
    effect = detectable(1.0, 12)
    found = [sign_flip(rng.normal(effect, 1, 12).tolist()).p <= 0.05 for _ in range(400)]
    assert 0.73 < np.mean(found) < 0.88
    n = pairs_needed(0.1, 0.05)
    assert detectable(0.1, n) <= 0.05 < detectable(0.1, n - 1)


def test_false_alarms_of_four_metrics_with_heavy_tails() -> None:
    """400 A/A comparisons of four metrics that share some of their noise: without Holm about 12 % would alarm."""
    rng = np.random.default_rng(5)
    alarms = raw = 0
    for _ in range(400):
        noise = 0.03 * (rng.standard_t(2, (4, 12)) + 0.5 * rng.standard_t(2, 12))
        tests = [sign_flip(row.tolist()) for row in noise]
        rows = judge([Evidence("m", 1, 1, 0.01, worse_by=t.mean, upper=t.upper, lower=t.lower, p=t.p) for t in tests])
        alarms += any(row.verdict == "regressed" for row in rows)
        raw += any(t.p <= 0.05 for t in tests)
    assert 1 <= alarms <= 0.05 * 400 + 2 * math.sqrt(400 * 0.05 * 0.95)
    assert raw > 0.08 * 400  # so the bound above would catch a missing Holm


def _evidence(**changes: object) -> Evidence:
    return Evidence("m", 1.0, 1.1, 0.05, next_step="run more")._replace(pairs=12, **changes)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (_evidence(p=0.001, lower=0.06, upper=0.1), "regressed"),
        (_evidence(p=0.001, lower=0.01, upper=0.04), "no worse than the margin"),
        (_evidence(p=0.4, lower=-0.02, upper=0.04), "no worse than the margin"),
        (_evidence(p=0.4, lower=-0.02, upper=0.06), "cannot tell"),
        (_evidence(p=0.001, lower=0.06, upper=0.1, doubt="the candidate has errors"), "cannot tell"),
        (_evidence(), "cannot tell"),
    ],
)
def test_verdicts(found: Evidence, verdict: str) -> None:
    row = judge([found])[0]
    assert row.verdict == verdict
    assert (row.next_step == "run more") is (verdict == "cannot tell")


def test_binary_scores_by_mcnemar() -> None:
    a, b = [1.0] * 90 + [0.0] * 10, [1.0] * 82 + [0.0] * 18
    found = compare_scores(a, b)
    assert found.worse_by == pytest.approx(0.08)
    assert found.p == pytest.approx(0.5**8)
    assert 0.02 < found.lower < 0.08 < found.upper < 0.14
    same = compare_scores(a, a)
    assert (same.p, same.worse_by) == (1.0, 0.0)
    assert same.upper == pytest.approx(0.03, abs=0.001)
    assert 0.02 < same.detectable < 0.03, "no noise was seen, which is not none"


def test_graded_scores_and_nll() -> None:
    rng = np.random.default_rng(2)
    a = rng.uniform(0.5, 1, 200)
    assert compare_scores(a.tolist(), (a - 0.05 + rng.normal(0, 0.1, 200)).tolist()).p < 0.001
    assert compare_scores(a.tolist(), (a + rng.normal(0, 0.1, 200)).tolist()).p > 0.05
    tokens = rng.integers(5, 50, 100)
    nll = compare_nll((2.0 * tokens).tolist(), (2.1 * tokens).tolist(), tokens.tolist())
    assert nll.worse_by == pytest.approx(0.1)
    assert nll.lower == pytest.approx(nll.upper)
