"""The client against a server that notes when it sent each chunk: it says what the server did, or that it cannot."""

import importlib.util
import sys
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[3] / "bench" / "studies" / "truth.py"


@pytest.fixture(scope="module")
def truth():
    sys.path.append(str(STUDY.parent))  # as when it is run: studies import their neighbours
    spec = importlib.util.spec_from_file_location("truth_study", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timing
@pytest.mark.parametrize("streams", [1, 64, 256])
def test_figures_are_right_or_called_invalid(truth, streams: int) -> None:
    with truth.running_server() as url:
        verdict = truth.measure(url, streams)
    assert verdict.errors == verdict.expected_errors  # counted by kind, whatever the client's lag
    assert set(verdict.errors) == {"missing_usage", "http_429", "stream_error"}
    assert verdict.completed == (5 if streams == 1 else streams * 5 // 8)
    assert verdict.honest, verdict


def test_a_wrong_figure_is_seen(truth) -> None:
    assert truth.Figure("itl_ms_p99", 20.0, 21.9).right
    assert not truth.Figure("itl_ms_p99", 20.0, 22.1).right
    assert truth.Figure("e2e_ms_p99", 1000.0, 1049.0).right
    assert not truth.Figure("e2e_ms_p99", 1000.0, 949.0).right
    wrong = [truth.Figure("ttft_ms_p50", 300.0, 330.0)]
    verdict = truth.Verdict(1, 1, {}, {}, 5, 50.0, 1.0, valid=True, figures=wrong)
    assert not verdict.honest
    assert verdict._replace(valid=False).honest
    assert not verdict._replace(valid=False, errors={"timeout": 1}).honest
