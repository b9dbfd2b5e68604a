"""`report.html`: loads nothing from anywhere, escapes what models say, and shows what was measured."""

import json
import re
from html.parser import HTMLParser

import pytest

from tuneship.bench.report import charts
from tuneship.bench.report.headline import format_ms
from tuneship.bench.report.page import render, write_html
from tuneship.core.parity import Parity
from tuneship.core.report import Comparison, LossPoint, NllResult

PARITY = Parity(
    reference="trained", candidate="merged", rows=200, tokens=6012, nll_base=1.9, nll_reference=0.071, nll=0.0724,
    kl_mean=0.0021, kl_p99=0.031, limit=0.02, passed=True,
)  # fmt: skip
TRAINING = [LossPoint(step=n, loss=2.0 / (1 + n), tokens_per_s=150, learning_rate=1e-4) for n in range(1, 40)]


class _Loads(HTMLParser):
    """Every URL that a browser would fetch by itself, from attributes; links that a reader may click are not such."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        loading = {"src", "srcset", "data", "poster", "background"} | ({"href"} if tag != "a" else set())
        self.urls += [value or "" for name, value in attrs if name in loading]


@pytest.fixture
def full(make_report, make_eval, tmp_path):
    """A report with every section, its items files beside it."""
    for role, answer, score in (("base", "<script>alert(1)</script> \ud800", 0.25), ("tuned", '{"total": 3}', 1.0)):
        items = [
            {"index": n, "prompt": [{"role": "user", "content": f"Invoice {n}: pay 3 & go"}],
             "reference": '{"total": 3}', "answer": answer, "score": score, "error": ""}
            for n in range(5)
        ]  # fmt: skip
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    evals = [
        make_eval(role="base", score=0.25, items_file="base.jsonl"),
        make_eval(role="tuned", score=0.912, items_file="tuned.jsonl"),
    ]
    return make_report(eval=evals, parity=PARITY, training=TRAINING, provenance={"command": "tuneship up x.toml"})


def test_loads_nothing(full, tmp_path) -> None:
    write_html(full, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    parser = _Loads()
    parser.feed(html)
    assert parser.urls == []
    assert not re.search(r"@import|url\(\s*['\"]?(?!#|data:)", html.split("</style>")[0])
    assert not re.search(r'"url":\s*"', html.split("const specs")[1])  # no chart fetches its data
    assert "default-src 'none'" in html  # and the browser is told to refuse it if one did
    assert not re.search(r"cdn\.|jsdelivr|unpkg|googleapis", html)


def test_shows_what_was_measured(full, tmp_path) -> None:
    html = render(full, tmp_path)
    page = html.split("<script>")[0]
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    for expected in (
        "0.25 → 0.91",
        "0.250 ± 0.020 0.912 ± 0.020 +0.662",
        "84.0 ms median at 4/s",
        "Parity passed",
        "6,012 answer tokens",
        "+0.0014",
        "tuneship up x.toml",
        "Invoice 0: pay 3 &amp; go",
        "39 logged steps",
    ):
        assert expected in text.replace("&rarr;", "→").replace("&plusmn;", "±").replace("&middot;", "·"), expected
    assert "{&#34;total&#34;: 3}" in page
    for chart in ("loss", "ttft_ms", "itl_ms", "e2e_ms"):
        assert f'id="{chart}"' in page


def test_what_models_say_is_text(full, tmp_path) -> None:
    write_html(full, tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ?" in html
    assert html.count("<script>") == html.count("</script>") == 2


def test_tells_why_not_to_believe_it(make_report, make_level, make_eval, tmp_path) -> None:
    level = make_level(
        16, client={"lag_p99_ms": 33.0, "valid": False}, errors={"timeout": 4, "http_500": 2}, completed=34
    )
    failed = PARITY.model_copy(update={"passed": False, "forced": True})
    html = render(make_report(load=[level], eval=[make_eval(errors=3)], parity=failed), tmp_path)
    for warning in (
        "the load generator itself lagged by 33.0 ms",
        "6 of 40 requests failed: 2 http_500, 4 timeout.",
        "3 of 200 items of json-fields (tuned) failed",
        "over the parity limit and was forced",
    ):
        assert warning in html


def test_what_was_lost_comes_before_what_was_won(make_report, make_eval, tmp_path) -> None:
    scores = {"base": (1, 0, 0.5, 1, 1), "tuned": (0.5, 1, 0, 1, 0)}
    for role, row in scores.items():
        items = [
            {"index": n, "prompt": [{"role": "user", "content": f"question {n}"}], "reference": "r",
             "answer": f"{role} {n}", "score": score, "error": ""}
            for n, score in enumerate(row)
        ]  # fmt: skip
        (tmp_path / f"{role}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    evals = [make_eval(role=role, items_file=f"{role}.jsonl") for role in scores]
    page = render(make_report(eval=evals), tmp_path).split("<script>", maxsplit=1)[0]
    marks = ["From right to wrong", "question 0", "question 4", "From wrong to right", "question 1", "Still wrong"]
    places = [page.index(mark) for mark in [*marks, "question 2"]]
    assert places == sorted(places)
    assert "question 3" not in page  # right before and after: nothing to see


def test_a_closed_loop_is_named_by_what_is_in_flight(make_report, make_level, tmp_path) -> None:
    level = make_level(0, arrivals="closed", concurrency=16, errors={"timeout": 1}, completed=39)
    page = render(make_report(load=[level]), tmp_path)
    assert "median at 16 in flight" in page
    assert "At 16 in flight 1 of 40 requests failed" in page
    assert "0/s" not in page.split("<script>", maxsplit=1)[0]


def test_what_the_engine_counted_is_folded_away(make_report, make_level, tmp_path) -> None:
    level = make_level(4, engine={"sglang:num_running_reqs": 7.25, "sglang:context_len": 8192.0})
    page = render(make_report(load=[level]), tmp_path).split("<script>", maxsplit=1)[0]
    folded = re.search(r"<details>(.*?)</details>", page, re.DOTALL)[1]
    assert "The engine's own figures: 2" in folded
    assert "sglang:context_len" in folded
    assert {"load", "provenance"} <= set(re.findall(r'<section id="(\w+)"', page))


def test_a_verdict_tells_what_it_rests_on(make_report, tmp_path) -> None:
    row = Comparison(
        metric="score", a=0.9, b=0.89, ratio=0.989, unit="points", worse_by=0.012, ci=(-0.02, 0.043), margin=0.03,
        p=0.31, pairs=200, verdict="cannot tell", detectable=0.045, reason="too few", next_step="ask 450 items",
    )  # fmt: skip
    page = " ".join(render(make_report(comparison=[row]), tmp_path).split("<script>", maxsplit=1)[0].split())
    for expected in (
        "+1.2 pt",
        "-2.0 to +4.3 pt",
        "+3.0 pt",
        "0.310",
        ">200<",
        "+4.5 pt",
        "too few. To decide: ask",
    ):
        assert expected in page, expected


def _nll(role: str, value: float, tokens: int = 6012) -> NllResult:
    return NllResult(
        data="/d/invoice.heldout.jsonl", model=f"m-{role}", role=role, rows=200, tokens=tokens, nll=value, stderr=0.004,
        items_file="n.jsonl",
    )  # fmt: skip


def test_held_out_text_is_shown_against_the_base(make_report, tmp_path) -> None:
    page = render(make_report(nll=[_nll("base", 1.5), _nll("tuned", 0.25)], eval=[]), tmp_path)
    text = " ".join(re.sub(r"<[^>]+>", " ", page.split("<script>", maxsplit=1)[0]).split())
    assert "invoice.heldout.jsonl m-base base 200 6,012 1.5000 &plusmn; 0.0040 4.482 -" in text
    assert "invoice.heldout.jsonl m-tuned tuned 200 6,012 0.2500 &plusmn; 0.0040 1.284 -1.2500" in text
    assert "Held-out NLL 1.500 &rarr; 0.250 nats a token, 200 rows, base to tuned" in text  # no task was scored


def test_other_tokens_are_no_change(make_report, tmp_path) -> None:
    page = render(make_report(nll=[_nll("base", 1.5, tokens=99), _nll("tuned", 0.25)]), tmp_path)
    assert "-1.2500" not in page.split("<script>", maxsplit=1)[0]
    assert "Held-out NLL" not in page  # a task's score is the headline


def test_several_answers_an_item_are_said(make_report, make_eval, tmp_path) -> None:
    said = "json-fields: an item's score is the mean of 5 answers"
    assert said in render(make_report(eval=[make_eval(samples=5)]), tmp_path).replace("&#39;", "'")
    assert "is the mean of" not in render(make_report(), tmp_path).split("<script>", maxsplit=1)[0]


def test_an_empty_report_is_a_page_too(make_report, tmp_path) -> None:
    html = render(make_report(load=[], eval=[]), tmp_path)
    assert "Provenance" in html
    assert "<script>" not in html


def test_ecdf_is_the_empirical_distribution(make_level) -> None:
    level = make_level(4, samples={"ttft_ms": [10.0, 20.0, 30.0, 40.0]})
    spec = charts.latency_ecdf([level], "ttft_ms", "TTFT")
    rows = next(iter(spec["datasets"].values())) if "datasets" in spec else spec["data"]["values"]
    assert [(row["ms"], row["share"]) for row in rows] == [(10, 0.25), (20, 0.5), (30, 0.75), (40, 1.0)]
    assert charts.latency_ecdf([level], "itl_ms", "ITL") is None


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (4.368, "4.37"), (43.68, "43.7"), (436.8, "437"), (4368, "4,368"), (0.0, "0.00")]
)
def test_three_figures(value, text: str) -> None:
    assert format_ms(value) == text
