"""Verdicts by plain thresholds, and what the verb's exit code says of them."""

import pytest

from tuneship.bench.compare.commands import compare as compare_verb
from tuneship.bench.compare.stored import Margins, compare
from tuneship.core import report
from tuneship.core.errors import EndpointError, ExitCode, RegressionFound
from tuneship.core.report import ClientHealth, write_report

MARGINS = Margins(latency=0.05, quality=0.02)
OK, REGRESSED, UNKNOWN = "no worse than the margin", "regressed", "cannot tell"


def _verdicts(a, b) -> dict[str, str]:
    return {row.metric: row.verdict for row in compare(a, b, MARGINS)}


def test_equal_reports_are_no_worse(make_report) -> None:
    rows = compare(make_report(), make_report(), MARGINS)
    assert len(rows) == 2 * 4 + 2  # two levels of four metrics, one task in two roles
    assert {row.verdict for row in rows} == {OK}
    assert {row.ratio for row in rows} == {1.0}


@pytest.mark.parametrize(("slower", "verdict"), [(0.5, OK), (1.04, OK), (1.06, REGRESSED), (3, REGRESSED)])
def test_latency_and_throughput(make_report, make_level, slower: float, verdict: str) -> None:
    a, b = make_report(load=[make_level(4)]), make_report(load=[make_level(4, slower=slower)])
    found = _verdicts(a, b)
    for metric in ("TTFT p50 ms", "TPOT p50 ms", "E2E p50 ms", "output tokens/s"):
        assert found[f"poisson 4/s {metric}"] == verdict


@pytest.mark.parametrize(("score", "verdict"), [(0.95, OK), (0.88, OK), (0.87, REGRESSED), (0, REGRESSED)])
def test_quality(make_report, make_eval, score: float, verdict: str) -> None:
    a, b = make_report(load=[], eval=[make_eval(score=0.9)]), make_report(load=[], eval=[make_eval(score=score)])
    assert _verdicts(a, b) == {"json-fields invoice.heldout.jsonl (tuned)": verdict}


def test_a_baseline_of_zero_has_no_ratio(make_report, make_eval) -> None:
    row = compare(make_report(load=[], eval=[make_eval(score=0)]), make_report(load=[], eval=[make_eval()]), MARGINS)[0]
    assert (row.ratio, row.verdict) == (None, OK)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"errors": {"http_500": 1}}, "has errors"),
        ({"client": ClientHealth(lag_p99_ms=50, valid=False)}, "client was the bottleneck"),
        ({"completed": 19}, "has 19 requests"),
        ({"ttft_ms": None, "tpot_ms": None, "e2e_ms": None, "output_tokens_per_s": 0}, "no figure"),
        ({"rate": 5}, "was not measured so"),
        ({"workload": "fixed 1 in, 1 out"}, "was not measured so"),
        ({"arrivals": "constant"}, "was not measured so"),
    ],
)
def test_what_is_thin_cannot_tell(make_report, make_level, changes: dict, reason: str) -> None:
    good = make_report(load=[make_level(4)], eval=[])
    bad = make_report(load=[make_level(4, slower=9).model_copy(update=changes)], eval=[])
    for a, b in ((good, bad), (bad, good)):
        rows = compare(a, b, MARGINS)
        assert {row.verdict for row in rows} == {UNKNOWN}
        assert all(reason in row.reason for row in rows)


@pytest.mark.parametrize("changes", [{"errors": 1}, {"items": 19}, {"role": "other"}, {"data": "/else.jsonl"}])
def test_thin_evals_cannot_tell(make_report, make_eval, changes: dict) -> None:
    a, b = make_report(load=[], eval=[make_eval()]), make_report(load=[], eval=[make_eval(**changes)])
    assert set(_verdicts(a, b).values()) == {UNKNOWN}


def test_levels_of_several_models_are_paired_by_name(make_report, make_level) -> None:
    a = make_report(load=[make_level(4, model="x"), make_level(4, model="y", slower=2)], eval=[])
    b = make_report(load=[make_level(4, model="y", slower=2), make_level(4, model="x")], eval=[])
    assert {row.ratio for row in compare(a, b, MARGINS)} == {1.0}


def _other_testbed() -> report.Testbed:
    return report.Testbed.build(
        gpu="1 x NVIDIA L4", cpu="Test CPU, 2 cores", driver="", versions={"sglang": "0.5.23"}, flags=["--y 2"]
    )


def test_different_testbeds_are_refused_by_name(make_report) -> None:
    a, b = make_report(), make_report(testbed=_other_testbed())
    with pytest.raises(EndpointError) as caught:
        compare(a, b, MARGINS)
    for difference in ("gpu: none / 1 x NVIDIA L4", "sglang: 0.5.17 / 0.5.23", "--x 1", "--y 2"):
        assert difference in caught.value.message
    assert "--allow-different-testbeds" in caught.value.hint
    assert compare(a, b, MARGINS, allow_different_testbeds=True)


def test_nothing_to_compare_is_no_pass(make_report) -> None:
    with pytest.raises(EndpointError, match="no load level and no task"):
        compare(make_report(load=[], eval=[]), make_report(), MARGINS)


def test_exit_codes(make_report, make_level, tmp_path, capsys) -> None:
    def verb(b, **options) -> None:
        write_report(make_report(), tmp_path / "report.json")
        write_report(b, tmp_path / "b.json")
        compare_verb(str(tmp_path), str(tmp_path / "b.json"), **options)

    thin = make_level(1, completed=3)
    assert verb(make_report()) is None
    with pytest.raises(RegressionFound, match="poisson 4/s TTFT") as regressed:
        verb(make_report(load=[thin, make_level(4, slower=1.2)]))
    assert regressed.value.exit_code == ExitCode.FAILED
    verb(make_report(load=[make_level(1), make_level(4, slower=1.2)]), latency_margin=0.3)
    with pytest.raises(SystemExit) as unknown:
        verb(make_report(load=[thin, make_level(4)]))
    assert unknown.value.code == ExitCode.CANNOT_TELL == 3
    out = capsys.readouterr()
    assert "cannot tell: the candidate has 3 requests, 20 are needed" in " ".join(out.out.split())
    assert "cannot tell" in out.err
    with pytest.raises(EndpointError, match="no report at"):
        compare_verb(str(tmp_path), str(tmp_path / "missing.json"))


def test_closed_loops_are_told_apart_by_what_is_in_flight(make_report, make_level) -> None:
    levels = [make_level(0, arrivals="closed", concurrency=count, slower=count) for count in (1, 4)]
    report = make_report(load=levels, eval=[])
    rows = compare(report, report, Margins())
    assert {row.ratio for row in rows} == {1}
    assert [row.metric for row in rows if "TTFT" in row.metric] == [
        *("closed 1 in flight TTFT p50 ms", "closed 4 in flight TTFT p50 ms"),
    ]
