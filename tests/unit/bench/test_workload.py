"""The schedule and the prompts: right on average, the same for the same seed."""

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.bench.load.workload import Request, make_prompt, plan, schedule


def _gaps(rate: float, duration_s: float, seed: int) -> list[float]:
    return [later - earlier for earlier, later in pairwise(schedule("poisson", rate, duration_s, seed))]


def _words(request: Request) -> list[str]:
    return request.messages[0]["content"].split()


@pytest.mark.parametrize("rate", [0.5, 8.0, 400.0])
def test_poisson_gaps_are_exponential_with_the_asked_rate(rate: float) -> None:
    gaps = _gaps(rate, 20_000 / rate, seed=1)
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1 / rate, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(mean, rel=0.05)  # an exponential's deviation is its mean
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.02)  # exp(-1)


@given(st.sampled_from(["constant", "poisson"]), st.floats(0.1, 50), st.floats(0.1, 20), st.integers(0, 99))
def test_schedules_start_at_zero_and_ascend_within_the_duration(
    arrivals: str, rate: float, duration_s: float, seed: int
) -> None:
    times = schedule(arrivals, rate, duration_s, seed)
    assert times[0] == 0
    assert all(earlier < later for earlier, later in pairwise(times))
    assert times[-1] < duration_s


def test_constant_arrivals_are_absolute() -> None:
    assert schedule("constant", 4, 2) == [0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75]


def test_the_seed_decides_everything_but_the_salted_words() -> None:
    def make(seed: int, salt: str = "") -> list:
        return plan(
            rate=5, duration_s=10, arrivals="poisson", input_tokens=12, output_tokens=4, models=("a", "b"), seed=seed,
            salt=salt,
        )  # fmt: skip

    assert make(3) == make(3)
    assert [r.at_s for r in make(3)] != [r.at_s for r in make(4)]
    one, other = make(3, "x"), make(3, "y")
    assert [(r.at_s, r.model, _words(r)[4:]) for r in one] == [(r.at_s, r.model, _words(r)[4:]) for r in other]
    # The server's prefix cache must not know a prompt from an earlier run, nor from this one.
    heads = {" ".join(_words(r)[:4]) for r in one + other}
    assert len(heads) == len(one) + len(other)
    assert {r.model for r in one} == {"a", "b"}


@given(st.integers(1, 300), st.sampled_from(["", "salt"]))
def test_prompts_have_the_asked_length(words: int, salt: str) -> None:
    assert len(make_prompt(words, "7", salt).split()) == words
