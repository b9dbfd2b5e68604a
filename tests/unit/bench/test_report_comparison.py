"""The page of two stored reports: verdicts, and which answers changed from right to wrong and back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tuneship.bench.report.comparison import common_tasks
from tuneship.bench.report.page import render_comparison, write_comparison_html
from tuneship.core.report import Comparison, Report

VERDICT = Comparison(
    metric="json-fields score", a=0.75, b=0.5, ratio=0.667, unit="points", worse_by=0.25, ci=(0.1, 0.4), margin=0.02,
    p=0.01, pairs=4, verdict="regressed", detectable=0.1,
)  # fmt: skip


@pytest.fixture
def stored(make_report, make_eval, tmp_path):
    """Factory (folder's name, scores, ...) -> a report of one task and its file, with its items beside it."""

    def store(name: str, scores: list[float], *, question: str = "question", **changes) -> tuple[Report, Path]:
        folder = tmp_path / name
        folder.mkdir()
        items = [
            {"index": n, "prompt": [{"role": "user", "content": f"{question} {n}"}], "reference": "r",
             "answer": f"{name} says {n}", "score": score, "error": ""}
            for n, score in enumerate(scores)
        ]  # fmt: skip
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
        result = make_eval(items=len(scores), score=sum(scores) / len(scores), **changes)
        return make_report(name=name, eval=[result]), folder / "report.json"

    return store


def _text(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.split("</style>")[1]).split())


def test_what_was_lost_and_what_was_won(stored) -> None:
    before, after = stored("old", [1, 1, 0.5, 0, 1]), stored("new", [1, 0.25, 1, 0, 0])
    page = _text(render_comparison([VERDICT], before, after))
    assert page.index("new against old") < page.index("json-fields score") < page.index("Answers that changed")
    lost, won = page.index("From right to wrong 2 of 2"), page.index("From wrong to right 1 of 1")
    assert lost < page.index("question 1 reference r baseline 1.00 old says 1 candidate 0.25 new says 1") < won
    assert lost < page.index("question 4 reference r") < won
    assert won < page.index("question 2 reference r baseline 0.50 old says 2 candidate 1.00 new says 2")
    assert "question 0" not in page  # right on both sides
    assert "question 3" not in page  # wrong on both
    assert "0.700 &plusmn; 0.020 0.450 &plusmn; 0.020 5 2 1" in page
    assert "+25.0 pt" in page


def test_the_page_loads_nothing_and_what_models_say_is_text(stored, tmp_path: Path) -> None:
    before = stored("old", [1], question="<script>alert(1)</script> \ud800")
    after = stored("new", [0], question="<script>alert(1)</script> \ud800")
    write_comparison_html([VERDICT], before, after, tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text()
    assert html.startswith("<!doctype html>")
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt; ?" in html
    assert not re.search(r"(src|href)=|@import|url\(", html)
    assert "default-src 'none'" in html


def test_other_questions_are_not_compared(stored) -> None:
    before, after = stored("old", [1, 1]), stored("new", [0, 0], question="another")
    (task,) = common_tasks(before[0], before[1].parent, after[0], after[1].parent)
    assert (task.common, task.groups) == (0, [])
    assert "No answers to show: the items files are gone, or hold other questions" in _text(
        render_comparison([], before, after)
    )


def test_items_that_are_gone(stored) -> None:
    before, after = stored("old", [1, 1]), stored("new", [0, 0])
    (before[1].parent / "items.jsonl").unlink()
    assert "the items files are gone" in _text(render_comparison([], before, after))


def test_only_tasks_that_both_have(stored, make_eval) -> None:
    before, after = stored("old", [1, 1]), stored("new", [0, 0], data="/elsewhere/invoice.heldout.jsonl")
    more = [make_eval(task="sql"), make_eval(role="base"), make_eval(samples=3)]
    with_more = before[0].model_copy(update={"eval": [*more, *before[0].eval]})
    (task,) = common_tasks(with_more, before[1].parent, after[0], after[1].parent)
    assert (task.candidate.task, task.common) == ("json-fields", 2)  # the file's folder does not matter
    assert common_tasks(before[0], before[1].parent, after[0].model_copy(update={"eval": []}), Path()) == []


def test_the_model_decides_between_twins(stored, make_eval) -> None:
    before, after = stored("old", [1], model="b"), stored("new", [0], model="b")
    twins = after[0].model_copy(update={"eval": [make_eval(model="a", score=0.125), *after[0].eval]})
    (task,) = common_tasks(before[0], before[1].parent, twins, after[1].parent)
    assert task.candidate.model == "b"


def test_an_own_scorer_is_the_same_in_another_checkout(stored) -> None:
    before = stored("old", [1], task="python:/a/mine.py:f")
    after = stored("new", [0], task="python:/b/mine.py:f")
    (task,) = common_tasks(before[0], before[1].parent, after[0], after[1].parent)
    assert task.common == 1


def test_many_are_counted_and_some_shown(stored) -> None:
    page = _text(render_comparison([], stored("old", [1] * 30), stored("new", [0] * 30)))
    assert "From right to wrong 20 of 30" in page
    assert "question 19" in page
    assert "question 20" not in page


def test_different_testbeds_are_said(stored) -> None:
    before, after = stored("old", [1]), stored("new", [1])
    other = after[0].testbed.model_copy(update={"gpu": "1 x NVIDIA L4", "digest": "other"})
    page = _text(render_comparison([], before, (after[0].model_copy(update={"testbed": other}), after[1])))
    assert "Measured on different testbeds: gpu: none / 1 x NVIDIA L4" in page
