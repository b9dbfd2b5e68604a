"""The cross-check's own parts: what both are sent is the same, and what follows from the runs."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

STUDY = Path(__file__).parents[3] / "bench" / "studies" / "cross_check.py"
RUN = {"completed": 2, "output_tokens": 8, "engine_output_tokens": 8, "engine_prompt_tokens": 50}


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("cross_check_study", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def level(study):
    return study.Level(requests=2, input_words=20, output_tokens=4, seed=3, rate=7.0)


def test_runs_ask_the_same_words_in_another_order(study, level) -> None:
    one, other = study._prompts(level, "one"), study._prompts(level, "other")
    assert study._prompts(level, "one") == one
    for mine, theirs in zip(one, other, strict=True):
        assert sorted(mine.split()) == sorted(theirs.split())
        assert mine.split()[0] == theirs.split()[0]
        assert mine.split()[1:4] != theirs.split()[1:4]
    assert one[0] != one[1]


def test_arrivals_are_those_that_sglang_draws(study, level) -> None:
    many = level._replace(requests=30)
    np.random.seed(many.seed)  # noqa: NPY002 - as they do
    gaps = [np.random.exponential(1.0 / many.rate) for _ in range(30)]  # noqa: NPY002
    assert study._at_s(many) == pytest.approx([sum(gaps[:index]) for index in range(30)])
    assert study._at_s(level._replace(concurrency=2)) == [0.0, 0.0]


def test_sglang_still_draws_them_so() -> None:
    """Asked from its source: importing it takes 15 s."""
    (sglang,) = importlib.util.find_spec("sglang").submodule_search_locations
    source = (Path(sglang) / "benchmark" / "serving.py").read_text()
    assert "np.random.seed(args.seed)" in source
    assert "np.random.exponential(1.0 / request_rate)" in source


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, ""),
        ({"completed": 1}, "a request failed"),
        ({"engine_prompt_tokens": 51}, "prompt tokens differ: [50, 51]"),
        ({"output_tokens": 7}, "output tokens are not 8: [7, 8]"),
    ],
)
def test_another_load_is_noticed(study, level, changed, said) -> None:
    runs = {"tuneship": [{**RUN, "input_tokens": 50}], "sglang": [{**RUN, **changed}]}
    assert "; ".join(study._problems(level, runs)) == said


@pytest.mark.parametrize(
    ("ours", "ratio", "verdict"),
    [
        ([101, 102, 101, 102], 1.015, "yes"),
        ([120, 121, 120, 121], 1.205, "no"),
        ([80, 79, 80, 79], 0.795, "no"),
        ([70, 135, 90, 125], 1.015, "cannot tell"),
        ([104, 107, 104, 107], 1.055, "cannot tell"),
    ],
)
def test_agreement_is_told_from_noise(study, ours, ratio, verdict) -> None:
    figure = study._figure(ours, [100.0] * 4)
    assert figure["ratio"] == pytest.approx(ratio, abs=0.002 if verdict != "cannot tell" else 0.05)
    assert figure["agrees"] == verdict
    assert figure["spread"][1] == 0


def test_one_round_tells_nothing(study) -> None:
    assert study._figure([100.0], [100.0]) == {
        "tuneship": 100.0,
        "sglang": 100.0,
        "ratio": 1.0,
        "ci95": None,
        "spread": [0.0, 0.0],
        "agrees": "cannot tell",
    }
