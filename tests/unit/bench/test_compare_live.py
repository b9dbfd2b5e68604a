"""Pairs in ABBA order, and what is planted in them is found."""

import itertools
import json

import pytest

from tuneship.bench.compare.again import Again
from tuneship.bench.compare.commands import BlockLoad, Questions
from tuneship.bench.compare.commands import compare as compare_verb
from tuneship.bench.compare.live import Pair, log_ratios, measure_pairs, weigh_pairs
from tuneship.bench.compare.metrics import LOAD_METRICS
from tuneship.bench.compare.verdict import judge
from tuneship.bench.target import Target
from tuneship.core.errors import ExitCode, RegressionFound, TuneshipError
from tuneship.core.report import ClientHealth, read_report

A, B = Target("http://a", "", ("m",)), Target("http://b", "", ("m",))
METRICS = ["TTFT p50 ms", "TPOT p50 ms", "E2E p50 ms", "output tokens/s"]


def compare_pairs(pairs, margin: float, again: Again | None = None):
    return judge(weigh_pairs(pairs, margin, again=again))


def _pairs(make_level, slower: float, count: int = 12) -> list[Pair]:
    jitter = [1 + 0.01 * ((7 * i) % 12 - 5.5) / 5.5 for i in range(count)]
    return [Pair(make_level(), make_level(slower=slower * j)) for j in jitter]


def test_order_and_seeds(make_level) -> None:
    seen = []

    def measure(target: Target, seed: int):
        seen.append((target.url[-1], seed))
        return make_level(slower=2 if target is B else 1)

    pairs = measure_pairs(A, B, measure, 3)
    assert seen == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert all(log_ratios(metric, pairs) == pytest.approx([0.6931472] * 3) for metric in LOAD_METRICS)


@pytest.mark.parametrize(("slower", "verdict"), [(1.0, "no worse than the margin"), (1.1, "regressed")])
def test_verdicts(make_level, slower: float, verdict: str) -> None:
    rows = compare_pairs(_pairs(make_level, slower), 0.05)
    assert [row.metric for row in rows] == METRICS
    for row in rows:
        assert row.verdict == verdict
        assert row.worse_by == pytest.approx(slower - 1, abs=0.002)
        assert row.ci
        assert row.ci[0] < row.worse_by < row.ci[1]
        assert row.detectable
        assert 0 < row.detectable < 0.02


def test_few_pairs_cannot_tell_and_say_how_many_can(make_level) -> None:
    again = Again("tuneship bench compare a b", limit=200, pairs=4, asks=False)
    for row in compare_pairs(_pairs(make_level, 1.02, 4), 0.05, again):
        assert (row.verdict, row.next_step, row.ci) == ("cannot tell", "tuneship bench compare a b --pairs 5", None)
        assert row.reason == "too few for an interval, the margin is 0.05"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"errors": {"timeout": 1}}, "the candidate has errors"),
        ({"ttft_ms": None, "tpot_ms": None, "e2e_ms": None, "output_tokens_per_s": 0}, "one side has no figure"),
    ],
)
def test_doubtful_blocks_cannot_tell(make_level, changes: dict, reason: str) -> None:
    pairs = _pairs(make_level, 2)
    pairs[3] = Pair(pairs[3].a, pairs[3].b.model_copy(update=changes))
    assert {(row.verdict, row.reason) for row in compare_pairs(pairs, 0.05)} == {("cannot tell", reason)}


@pytest.mark.parametrize(("lagged", "verdict", "pairs"), [(3, "regressed", 9), (7, "cannot tell", 0)])
def test_pairs_during_which_the_client_lagged_are_set_aside(make_level, lagged: int, verdict: str, pairs: int) -> None:
    found = _pairs(make_level, 2)
    lag = {"client": ClientHealth(lag_p99_ms=50, valid=False)}
    found[:lagged] = [Pair(pair.a.model_copy(update=lag), pair.b) for pair in found[:lagged]]
    rows = compare_pairs(found, 0.05)
    assert {(row.verdict, row.pairs) for row in rows} == {(verdict, pairs)}
    if verdict == "cannot tell":
        assert {row.reason for row in rows} == {"the client was the bottleneck in 7 of 12 pairs"}


@pytest.mark.timing
def test_a_model_twice_as_slow_is_found(separate_server) -> None:
    with pytest.raises(RegressionFound, match="TTFT p50 ms"):
        compare_verb(
            separate_server, separate_server, model="truth", candidate_model="slow",
            pairs=8, block=BlockLoad(rate=20, duration_s=0.5, output_tokens=4),
        )  # fmt: skip


def test_two_models_of_one_server_need_more_than_two_pairs(server, behaviour, tmp_path) -> None:
    server.behaviours = {"a": behaviour(0.03, 0.002), "b": behaviour(0.06, 0.004)}
    block = BlockLoad(rate=20, duration_s=0.3, output_tokens=4)
    options = {"pairs": 2, "block": block, "junit": tmp_path / "j.xml"}
    with pytest.raises(SystemExit) as unknown:
        compare_verb(server.url, server.url, model="a", candidate_model="b", **options)
    assert unknown.value.code == ExitCode.CANNOT_TELL
    assert (tmp_path / "j.xml").read_text().count("<error") == len(METRICS)
    order = [model for model, _ in itertools.groupby(body["model"] for body in server.bodies)]
    # Both are warmed up, then A once more; AB, BA.
    assert order == ["a", "b", "a", "b", "a"]


def test_a_server_and_a_report_are_refused(server, tmp_path) -> None:
    with pytest.raises(TuneshipError, match="a server and a report"):
        compare_verb(server.url, str(tmp_path))


def test_both_answer_the_same_items_and_all_is_kept(server, behaviour, tmp_path, capsys) -> None:
    server.behaviours = {
        "right": behaviour(0.01, 0.001, reply=lambda body: body["messages"][-1]["content"]),
        "wrong": behaviour(0.01, 0.001, reply=lambda _body: "no"),
    }
    data = tmp_path / "echo.jsonl"
    rows = ([("user", f"say {i}"), ("assistant", f"say {i}")] for i in range(30))
    data.write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows)
    )
    with pytest.raises(RegressionFound, match=r"exact echo\.jsonl"):
        compare_verb(
            server.url, server.url, model="right", candidate_model="wrong", pairs=2,
            block=BlockLoad(rate=20, duration_s=0.3, output_tokens=4),
            questions=Questions(task="exact", data=str(data)), out=tmp_path / "out",
        )  # fmt: skip
    report = read_report(tmp_path / "out" / "report.json")
    assert [result.score for result in report.eval] == [1, 0]
    assert all((tmp_path / "out" / result.items_file).is_file() for result in report.eval)
    assert [row.metric for row in report.comparison] == [*METRICS, "exact echo.jsonl (other)"]
    assert report.comparison[-1].worse_by == 1
    assert len((tmp_path / "out" / "pairs.jsonl").read_text().splitlines()) == 2
    with pytest.raises(TuneshipError, match="already holds a report"):
        compare_verb(server.url, server.url, model="right", out=tmp_path / "out")


def test_a_task_without_data_is_refused(server) -> None:
    with pytest.raises(TuneshipError, match="a task needs data"):
        compare_verb(server.url, server.url, questions=Questions(task="exact"))
