"""The search for the knee: right for every capacity, and on a real server with one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.bench.load.measure import LoadPlan, measure
from tuneship.bench.load.sweep import find_knee, gave_way
from tuneship.bench.target import resolve
from tuneship.core.report import ClientHealth


@given(st.floats(1, 5000))
def test_the_knee_is_within_15_percent_of_the_capacity(capacity: float) -> None:
    tried: list[float] = []

    def why_not(rate: float) -> str:
        tried.append(rate)
        return "too much" if rate > capacity else ""

    knee = find_knee(why_not)
    assert knee.rate <= capacity < knee.beyond
    assert knee.beyond / knee.rate <= 1.15
    assert knee.reason == "too much"
    assert len(tried) == len(set(tried)) < 20


def test_the_ends_of_a_sweep() -> None:
    assert find_knee(lambda _: "dead").rate == 0
    endless = find_knee(lambda _: "")
    assert (endless.rate, endless.beyond) == (2**16, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"duration_s": 42.0}, "throughput"),
        ({"completed": 30}, "throughput"),
        ({"goodput": 0.96, "completed": 1}, ""),
        ({"goodput": 0.7}, "goodput 0.70"),
        ({"client": ClientHealth(lag_p99_ms=30, valid=False)}, "the client lags 30 ms"),
    ],
)
def test_what_gives_way(make_level, changes, reason: str) -> None:
    level = make_level(1.333, **({"window_s": (0.0, 30.0), "duration_s": 31.0} | changes))
    assert gave_way(level, make_level(1)).startswith(reason)
    assert bool(reason) == bool(gave_way(level, make_level(1)))


@pytest.mark.timing
def test_a_real_server_with_a_limit(separate_server) -> None:
    """Six at once, 0.3 s each: 20/s. Sustained means 0.9 of what is offered, so 22.2/s; 3 s a level blur it by 5 %."""
    plan = LoadPlan("sweep", 3, "constant", 4, 1)
    levels, knee = measure(resolve(separate_server, "limited"), plan)
    assert [level.rate for level in levels] == sorted(level.rate for level in levels)
    assert knee.rate <= 20 / 0.9 * 1.05
    assert knee.beyond >= 18
    assert knee.beyond / knee.rate <= 1.15
    assert knee.reason.startswith("throughput")
