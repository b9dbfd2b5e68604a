"""The schedule and the prompts: right on average, the same for the same seed."""

import json
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.bench.load.arrivals import Arrival, read_trace, schedule
from tuneship.bench.load.prompts import source
from tuneship.bench.load.workload import Request, plan, weigh
from tuneship.core.errors import DataError, EndpointError


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


def _make(seed: int = 3, salt: str = "", **more) -> list[Request]:
    prompts = source("fixed", input_tokens=12, output_tokens=4, seed=seed, salt=salt)
    arrivals = [Arrival(at_s) for at_s in schedule("poisson", 5, 10, seed)]
    parts = {"level": "5", "models": ("a", "b"), "input_tokens": 12, "output_tokens": 4, "seed": seed}
    return plan(arrivals, prompts, **(parts | more))


def test_the_seed_decides_everything_but_the_salted_words() -> None:
    assert _make(3) == _make(3)
    assert [r.at_s for r in _make(3)] != [r.at_s for r in _make(4)]
    one, other = _make(3, "x"), _make(3, "y")
    assert [(r.at_s, r.model, _words(r)[4:]) for r in one] == [(r.at_s, r.model, _words(r)[4:]) for r in other]
    # The server's prefix cache must not know a prompt from an earlier run, nor from this one.
    heads = {" ".join(_words(r)[:4]) for r in one + other}
    assert len(heads) == len(one) + len(other)
    assert {r.model for r in one} == {"a", "b"}


@pytest.mark.parametrize(("mix", "share"), [("uniform", 1 / 3), ("zipf", 6 / 11), ({"a": 8, "b": 1, "c": 1}, 0.8)])
def test_models_are_asked_as_often_as_their_weights_say(mix, share: float) -> None:
    arrivals = [Arrival(float(index)) for index in range(5000)]
    prompts = source("fixed", input_tokens=1, output_tokens=1)
    requests = plan(arrivals, prompts, level="1", models=("a", "b", "c"), input_tokens=1, output_tokens=1, mix=mix)
    assert sum(r.model == "a" for r in requests) / 5000 == pytest.approx(share, abs=0.03)


def test_weights_of_other_models_are_refused() -> None:
    with pytest.raises(EndpointError, match="c"):
        weigh(("a", "b"), {"a": 1, "c": 1})


def test_a_trace_keeps_its_times_lengths_and_messages(tmp_path) -> None:
    rows = [
        {"timestamp": 31500, "input_length": 7, "output_length": 3, "hash_ids": [1]},
        {"timestamp": 30000, "input_length": 5, "output_length": 2},
        {"timestamp": 30250.5, "messages": [{"role": "user", "content": "hi"}]},
    ]
    file = tmp_path / "trace.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    prompts = source("fixed", input_tokens=9, output_tokens=9)
    requests = plan(read_trace(file), prompts, level="t", models=("m",), input_tokens=9, output_tokens=9)
    assert [r.at_s for r in requests] == pytest.approx([0, 0.2505, 1.5])
    assert [len(_words(r)) for r in requests] == [5, 1, 7]
    assert [(r.output_tokens, r.ignore_eos) for r in requests] == [(2, True), (9, False), (3, True)]


@pytest.mark.parametrize(
    "line", ['{"input_length": 3}', '{"timestamp": -1}', '{"timestamp": 1, "output_length": "x"}', "[]", "{"]
)
def test_a_bad_line_of_a_trace_is_named(tmp_path, line: str) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"timestamp": 0}\n' + line + "\n")
    with pytest.raises(DataError, match=r"trace\.jsonl:2"):
        read_trace(file)
