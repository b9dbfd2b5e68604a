"""Two stored reports: what their testbed's noise allows to be told, and what the verb's exit code says of it."""

import json
from pathlib import Path

import pytest

from tuneship.bench.compare.calibration import Calibration, Measurement, add_measurements, load_key
from tuneship.bench.compare.commands import compare as compare_verb
from tuneship.bench.compare.metrics import LOAD_METRICS
from tuneship.bench.compare.stored import Margins, Stored, weigh
from tuneship.bench.compare.verdict import judge
from tuneship.core import report
from tuneship.core.errors import EndpointError, ExitCode, RegressionFound
from tuneship.core.report import ClientHealth, NllResult, write_report

MARGINS = Margins()
OK, REGRESSED, UNKNOWN = "no worse than the margin", "regressed", "cannot tell"


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TUNESHIP_CACHE", str(tmp_path / "cache"))


def calibration(one, noise: float = 0.005, runs: int = 12) -> Calibration:
    """A testbed on which every level of `one` moves by `noise` from run to run."""
    return Calibration(testbed=one.testbed, measurements=_measurements(one, noise, runs))


def _measurements(one, noise: float, runs: int) -> tuple[Measurement, ...]:
    return tuple(
        Measurement(
            load=load_key(level),
            at=f"run {run}",
            values={m.field: m.value(level) * (1 + noise * (-1) ** run) for m in LOAD_METRICS if m.value(level)},
        )
        for level in one.load
        for run in range(runs)
    )


def compare(a, b, folders=(Path(), Path()), known=None, **options):
    sides = (Stored(side, folder / "report.json") for side, folder in zip((a, b), folders, strict=True))
    return judge(weigh(*sides, MARGINS, known or calibration(a), **options))


@pytest.fixture
def items(tmp_path, make_eval):
    """An eval of `right` items of 200, the first ones, with its items file in a folder of its own."""

    def make(name: str, right: int, question: str = "q"):
        folder = tmp_path / name
        folder.mkdir()
        rows = (
            {"index": i, "prompt": [{"role": "user", "content": f"{question}{i}"}], "reference": "r", "answer": "a"}
            | {"score": float(i < right), "error": ""}
            for i in range(200)
        )
        (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return make_eval(score=right / 200), folder

    return make


def test_equal_loads_are_no_worse_on_a_calibrated_testbed(make_report) -> None:
    rows = compare(make_report(eval=[]), make_report(eval=[]))
    assert len(rows) == 2 * 4
    assert {row.verdict for row in rows} == {OK}
    assert {row.ratio for row in rows} == {1.0}
    assert all(row.ci[0] < 0 < row.ci[1] < 0.05 for row in rows)


@pytest.mark.parametrize(("slower", "verdict"), [(0.5, OK), (1.02, OK), (1.03, UNKNOWN), (1.1, REGRESSED)])
def test_latency_and_throughput(make_report, make_level, slower: float, verdict: str) -> None:
    a, b = (make_report(load=[make_level(4, slower=s)], eval=[]) for s in (1, slower))
    rows = compare(a, b, known=calibration(a, noise=0.01))
    assert [row.metric for row in rows] == [f"poisson 4/s {metric.name}" for metric in LOAD_METRICS]
    assert {row.verdict for row in rows} == {verdict}
    assert all(row.worse_by == pytest.approx(slower - 1) for row in rows)


@pytest.mark.parametrize(("slower", "verdict"), [(0.5, OK), (1.0, UNKNOWN), (1.1, UNKNOWN), (3, REGRESSED)])
def test_only_what_is_plain_is_told_of_an_uncalibrated_testbed(make_report, make_level, slower, verdict) -> None:
    a, b = (make_report(load=[make_level(4, slower=s)], eval=[]) for s in (1, slower))
    rows = compare(a, b, known=Calibration(testbed=a.testbed))
    assert {row.verdict for row in rows} == {verdict}
    assert all("tuneship bench calibrate" in row.next_step for row in rows if verdict == UNKNOWN)


def test_blocks_noisier_than_the_calibration_count(make_report, make_level) -> None:
    def level(factors):
        block = {"requests": 9, "ttft_ms": 80.0, "tpot_ms": 20.0, "itl_ms": 20.0, "e2e_ms": 900.0}
        blocks = [
            report.Block(start_s=i, output_tokens_per_s=80 / f, **(block | {"ttft_ms": 80 * f, "e2e_ms": 900 * f}))
            for i, f in enumerate(factors)
        ]
        return make_level(4, blocks=blocks)

    a, b = (make_report(load=[level(f)], eval=[]) for f in ([1.0] * 6, [0.8, 1.2, 0.7, 1.3, 0.6, 1.4]))
    verdicts = {row.metric.removeprefix("poisson 4/s "): row.verdict for row in compare(a, b)}
    assert verdicts == {"TTFT p50 ms": UNKNOWN, "TPOT p50 ms": OK, "E2E p50 ms": UNKNOWN, "output tokens/s": UNKNOWN}


@pytest.mark.parametrize(("right", "verdict"), [(190, OK), (180, OK), (177, UNKNOWN), (165, REGRESSED), (0, REGRESSED)])
def test_paired_items(make_report, items, right: int, verdict: str) -> None:
    (a, folder_a), (b, folder_b) = items("a", 180), items("b", right)
    row = compare(make_report(load=[], eval=[a]), make_report(load=[], eval=[b]), (folder_a, folder_b))[0]
    assert (row.metric, row.verdict, row.pairs) == ("json-fields invoice.heldout.jsonl (tuned)", verdict, 200)
    assert row.worse_by == pytest.approx((180 - right) / 200)
    assert ("items" in row.next_step) == (verdict == UNKNOWN)


def test_other_questions_are_not_paired(make_report, items) -> None:
    (a, folder_a), (b, folder_b) = items("a", 180), items("b", 20, question="another")
    row = compare(make_report(load=[], eval=[a]), make_report(load=[], eval=[b]), (folder_a, folder_b))[0]
    assert (row.verdict, row.reason) == (UNKNOWN, "the items are not the same")


@pytest.mark.parametrize(("score", "verdict"), [(1.0, OK), (0.9, UNKNOWN), (0.8, REGRESSED)])
def test_without_items_the_standard_errors_are_all_there_is(make_report, make_eval, tmp_path, score, verdict) -> None:
    a, b = (make_report(load=[], eval=[make_eval(score=s)]) for s in (0.9, score))
    assert compare(a, b, (tmp_path, tmp_path))[0].verdict == verdict


@pytest.mark.parametrize(("more", "verdict"), [(-0.1, OK), (0.0, OK), (0.1, REGRESSED)])
def test_held_out_likelihood(make_report, tmp_path, more: float, verdict: str) -> None:
    def side(name: str, by: float):
        folder = tmp_path / name
        folder.mkdir()
        rows = [{"index": i, "tokens": 10, "nll": 1 + 0.1 * (i % 7) + by * (1 + i % 3) / 2} for i in range(40)]
        (folder / "nll.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        mean = sum(row["nll"] for row in rows) / 40
        found = NllResult(
            data="h.jsonl", model="m", role="tuned", rows=40, tokens=400, nll=mean, stderr=0.03, items_file="nll.jsonl"
        )
        return make_report(load=[], eval=[], nll=[found]), folder

    (a, folder_a), (b, folder_b) = side("a", 0.0), side("b", more)
    row = compare(a, b, (folder_a, folder_b))[0]
    assert (row.metric, row.unit, row.verdict) == ("nll h.jsonl (tuned)", "nats", verdict)
    assert row.worse_by == pytest.approx(more * 39.0 / 40, abs=0.02)


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
        rows = compare(a, b)
        assert {row.verdict for row in rows} == {UNKNOWN}
        assert all(reason in row.reason for row in rows)


@pytest.mark.parametrize("changes", [{"errors": 1}, {"items": 19}, {"role": "other"}, {"data": "/else.jsonl"}])
def test_thin_evals_cannot_tell(make_report, make_eval, tmp_path, changes: dict) -> None:
    a, b = make_report(load=[], eval=[make_eval()]), make_report(load=[], eval=[make_eval(**changes)])
    assert {row.verdict for row in compare(a, b, (tmp_path, tmp_path))} == {UNKNOWN}


@pytest.mark.parametrize("theirs", ["python:/other/checkout/score.py:f", "python:score.py:f"])
def test_an_own_scorer_in_another_checkout_is_the_same_task(make_report, make_eval, tmp_path, theirs: str) -> None:
    tasks = ("python:/one/checkout/score.py:f", theirs)
    a, b = (make_report(load=[], eval=[make_eval(task=task, score=0.9)]) for task in tasks)
    assert compare(a, b, (tmp_path, tmp_path))[0].worse_by == 0
    other = make_report(load=[], eval=[make_eval(task="python:/one/checkout/score.py:g")])
    assert compare(a, other, (tmp_path, tmp_path))[0].reason == "the candidate was not measured so"


def test_levels_of_several_models_are_paired_by_name(make_report, make_level) -> None:
    a = make_report(load=[make_level(4, model="x"), make_level(4, model="y", slower=2)], eval=[])
    b = make_report(load=[make_level(4, model="y", slower=2), make_level(4, model="x")], eval=[])
    assert {row.ratio for row in compare(a, b)} == {1.0}


def test_closed_loops_are_told_apart_by_what_is_in_flight(make_report, make_level) -> None:
    levels = [make_level(0, arrivals="closed", concurrency=count, slower=count) for count in (1, 4)]
    one = make_report(load=levels, eval=[])
    rows = compare(one, one)
    assert {row.ratio for row in rows} == {1}
    assert [row.metric for row in rows if "TTFT" in row.metric] == [
        *("closed 1 in flight TTFT p50 ms", "closed 4 in flight TTFT p50 ms"),
    ]


def _other_testbed() -> report.Testbed:
    return report.Testbed.build(
        gpu="1 x NVIDIA L4", cpu="Test CPU, 2 cores", driver="", versions={"sglang": "0.5.23"}, flags=["--y 2"]
    )


def test_different_testbeds_are_refused_by_name(make_report) -> None:
    a, b = make_report(eval=[]), make_report(testbed=_other_testbed(), eval=[])
    with pytest.raises(EndpointError) as caught:
        compare(a, b)
    for difference in ("gpu: none / 1 x NVIDIA L4", "sglang: 0.5.17 / 0.5.23", "--x 1", "--y 2"):
        assert difference in caught.value.message
    assert "--allow-different-testbeds" in caught.value.hint
    assert compare(a, b, allow_different_testbeds=True)


def test_nothing_to_compare_is_no_pass(make_report) -> None:
    with pytest.raises(EndpointError, match="no load level, no task"):
        compare(make_report(load=[], eval=[]), make_report())


def test_exit_codes(make_report, make_level, tmp_path, capsys) -> None:
    def verb(b, **options) -> None:
        write_report(make_report(eval=[]), tmp_path / "report.json")
        write_report(b, tmp_path / "b.json")
        compare_verb(str(tmp_path), str(tmp_path / "b.json"), **options)

    one = make_report(eval=[])
    with pytest.raises(SystemExit):  # nothing is known of this testbed's noise
        verb(one)
    add_measurements(one.testbed, _measurements(one, 0.005, 12))
    thin = make_level(1, completed=3)
    assert verb(one) is None
    with pytest.raises(RegressionFound, match="poisson 4/s TTFT") as regressed:
        verb(make_report(load=[thin, make_level(4, slower=1.2)], eval=[]))
    assert regressed.value.exit_code == ExitCode.FAILED
    verb(make_report(load=[make_level(1), make_level(4, slower=1.2)], eval=[]), latency_margin=0.3)
    with pytest.raises(SystemExit) as unknown:
        verb(make_report(load=[thin, make_level(4)], eval=[]))
    assert unknown.value.code == ExitCode.CANNOT_TELL == 3
    out = capsys.readouterr()
    assert "cannot tell: the candidate has 3 requests, 20 are needed" in " ".join(out.out.split())
    assert "cannot tell" in out.err
    verb(one, html=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "poisson 4/s TTFT p50 ms" in page
    assert str(tmp_path / "b.json") in page
    with pytest.raises(EndpointError, match="no report at"):
        compare_verb(str(tmp_path), str(tmp_path / "missing.json"))
