"""What is known of a testbed's noise, and what comparisons make of it."""

import math

import pytest

from tuneship.bench.compare.calibration import (
    Calibration,
    add_measurements,
    calibration_file,
    load_key,
    measurement,
    read_calibration,
)
from tuneship.bench.compare.commands import BlockLoad, calibrate
from tuneship.bench.compare.live import expected_noise, plan_pairs
from tuneship.bench.target import resolve
from tuneship.bench.testbed import describe
from tuneship.core import report
from tuneship.core.errors import EndpointError, TuneshipError
from tuneship.core.report import ClientHealth, write_report


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))


def _blocks(make_level, factors):
    return [measurement(make_level(slower=factor), "now", order) for order, factor in enumerate(factors)]


def test_noise_of_pairs_and_of_runs(make_report, make_level) -> None:
    testbed = make_report().testbed
    ratios = [0.02, -0.02, 0.01, -0.01, 0.0]
    factors = [factor for i, r in enumerate(ratios) for factor in (math.exp(0.1 * i), math.exp(0.1 * i + r))]
    known = Calibration(testbed=testbed, measurements=_blocks(make_level, factors))
    key = load_key(make_level())
    assert known.pair_noise(key, "ttft_ms") == (pytest.approx(0.0158113883), 4)
    run = known.run_noise(key, "ttft_ms")
    assert run.df == 9
    assert 0.19 < run.sd < 0.22  # the drift of 0.1 a pair is in it
    assert known.pair_noise("another load", "ttft_ms") is known.run_noise("another load", "ttft_ms") is None
    few = Calibration(testbed=testbed, measurements=_blocks(make_level, factors[:3]))
    assert few.pair_noise(key, "ttft_ms") is few.run_noise(key, "ttft_ms") is None


@pytest.mark.parametrize(("sd", "pairs"), [(0.002, 8), (0.05, 14), (0.5, 100)])
def test_as_many_pairs_as_the_noise_asks_for(make_report, make_level, sd: float, pairs: int) -> None:
    factors = [factor for sign in (1, -1) * 6 for factor in (1.0, math.exp(sign * sd))]
    known = Calibration(testbed=make_report().testbed, measurements=_blocks(make_level, factors))
    assert plan_pairs(known, make_level(), 0.05, 0.05) == pytest.approx(pairs, abs=2)
    assert plan_pairs(known, make_level(rate=5), 0.05, 0.05) == 12


def test_what_says_nothing_is_no_measurement(make_level) -> None:
    assert measurement(make_level(errors={"timeout": 1}), "now") is None
    assert measurement(make_level(client=ClientHealth(lag_p99_ms=9, valid=False)), "now") is None


@pytest.mark.timing
def test_a_server_against_itself(separate_server) -> None:
    block = BlockLoad(concurrency=4, duration_s=0.3, output_tokens=4)
    calibrate(separate_server, model="truth", pairs=5, block=block)
    known = read_calibration(describe(resolve(separate_server, "truth")))
    assert len(known.measurements) == 10
    rows = expected_noise(known, 0.05, 0.05)
    assert [row.metric for row in rows] == ["TTFT p50 ms", "TPOT p50 ms", "E2E p50 ms", "output tokens/s"]
    assert all(0 < row.pair_noise < 0.5 and row.pairs >= 7 for row in rows)
    calibrate(separate_server, model="truth", pairs=4, block=block)
    assert len(read_calibration(known.testbed).measurements) == 18


def test_reports_of_the_same_thing_count_once(make_report, make_level, tmp_path, capsys) -> None:
    files = []
    for run, slower in enumerate((1.0, 1.01, 0.99, 1.02)):
        files.append(str(tmp_path / f"{run}.json"))
        one = make_report(load=[make_level(4, slower=slower)], created_at=f"2026-01-0{run + 1} 00:00:00 UTC")
        write_report(one, tmp_path / f"{run}.json")
    calibrate(*files)
    calibrate(*files)
    known = read_calibration(make_report().testbed)
    assert len(known.measurements) == 4
    assert known.run_noise(load_key(make_level(4)), "ttft_ms").sd == pytest.approx(math.sqrt(2) * 0.0129, rel=0.01)
    assert "1.8%" in capsys.readouterr().out


def test_bad_input(make_report, tmp_path) -> None:
    with pytest.raises(TuneshipError, match="nothing to calibrate from"):
        calibrate()
    other = report.Testbed.build(gpu="1 x NVIDIA L4", cpu="", driver="", versions={}, flags=[])
    write_report(make_report(), tmp_path / "a.json")
    write_report(make_report(testbed=other), tmp_path / "b.json")
    with pytest.raises(EndpointError, match="different testbeds: gpu: none / 1 x NVIDIA L4"):
        calibrate(str(tmp_path / "a.json"), str(tmp_path / "b.json"))
    file = calibration_file(other)
    add_measurements(other, [])
    file.write_text("{}")
    with pytest.raises(EndpointError, match=r"cannot be read: testbed"):
        read_calibration(other)
