"""Asking and scoring, against a real server that answers, refuses, or goes away."""

import json
import math

import pytest

from tuneship.bench.quality import evaluate as module
from tuneship.bench.quality.evaluate import Task, evaluate, read_items, standard_error
from tuneship.bench.target import Target
from tuneship.core.errors import DataError, EndpointError


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(module, "_RETRIES", 0)


def _double_it(folder, count: int):
    rows = []
    for n in range(count):
        messages = [{"role": "system", "content": "Double it."}, {"role": "user", "content": str(n)}]
        rows.append({"messages": [*messages, {"role": "assistant", "content": str(2 * n)}]})
    file = folder / "double.heldout.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def task_file(tmp_path):
    return _double_it(tmp_path, 10)


def _double_up_to(limit: int):
    def reply(body) -> str:
        n = int(body["messages"][-1]["content"])
        return str(2 * n) if n < limit else "no idea"

    return reply


def test_scores_every_row_and_keeps_the_answers(server, behaviour, tmp_path, task_file) -> None:
    server.behaviours["doubler"] = behaviour(reply=_double_up_to(7))
    result = evaluate(
        Target(server.url, "", ("doubler",)), Task("exact", str(task_file), max_tokens=9), tmp_path, "tuned"
    )
    assert (result.score, result.items, result.errors, result.role) == (0.7, 10, 0, "tuned")
    assert result.stderr == pytest.approx(math.sqrt(0.7 * 0.3 / 9))
    items = read_items(tmp_path / result.items_file)
    assert [item.index for item in items] == list(range(10))
    assert (items[3].answer, items[3].reference, items[3].score) == ("6", "6", 1)
    assert (items[9].answer, items[9].score, items[9].error) == ("no idea", 0, "")
    assert items[0].prompt[0]["role"] == "system"
    assert {body["temperature"] for body in server.bodies} == {0}
    assert {body["max_tokens"] for body in server.bodies} == {9}
    assert {len(body["messages"]) for body in server.bodies} == {2}  # the reference is not sent


def test_answers_of_any_characters_are_kept(server, behaviour, tmp_path, task_file) -> None:
    odd = "line\u2028separator \x85 half a pair \ud800 \U0001f600\n"
    server.behaviours["odd"] = behaviour(reply=lambda _: odd)
    result = evaluate(Target(server.url, "", ("odd",)), Task("exact", str(task_file)), tmp_path / "new")
    assert {item.answer for item in read_items(tmp_path / "new" / result.items_file)} == {odd}


def test_runs_eight_at_a_time_and_keeps_both_of_two_tasks(server, tmp_path, task_file) -> None:
    target = Target(server.url, "", ("steady",))
    one, two = (evaluate(target, Task("exact", str(task_file), limit=n), tmp_path) for n in (10, 3))
    assert (one.items, two.items, one.score) == (10, 3, 0)
    assert one.items_file != two.items_file
    assert 1 < server.most_in_flight <= 8


def test_a_failed_item_scores_zero_and_is_counted(server, behaviour, tmp_path, task_file) -> None:
    def reply(body) -> str:
        if body["messages"][-1]["content"] == "4":
            raise RuntimeError("so it was asked")  # the server answers 500
        return _double_up_to(99)(body)

    server.behaviours["shaky"] = behaviour(reply=reply)
    result = evaluate(Target(server.url, "", ("shaky",)), Task("exact", str(task_file)), tmp_path)
    assert (result.score, result.errors) == (0.9, 1)
    assert "InternalServerError" in read_items(tmp_path / result.items_file)[4].error


def test_failures_are_tried_again(server, behaviour, tmp_path, task_file, monkeypatch) -> None:
    monkeypatch.setattr(module, "_RETRIES", 2)
    seen = set()

    def reply(body) -> str:
        question = body["messages"][-1]["content"]
        if question not in seen:
            seen.add(question)
            raise RuntimeError("the first time is always refused")
        return _double_up_to(99)(body)

    server.behaviours["shy"] = behaviour(reply=reply)
    result = evaluate(Target(server.url, "", ("shy",)), Task("exact", str(task_file)), tmp_path)
    assert (result.score, result.errors) == (1, 0)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("http_500", "InternalServerError.*so it was asked"), ("http_400", "BadRequest"), ("hang", "timeout")],
)
def test_a_server_that_answers_nothing_is_no_low_score(
    server, behaviour, tmp_path, task_file, monkeypatch, fault, reason
):
    monkeypatch.setattr(module, "_ITEM_TIMEOUT_S", 0.3)
    server.behaviours["broken"] = behaviour(fault=fault)
    with pytest.raises(EndpointError, match=f"8 requests in a row to {server.url} failed: {reason}"):
        evaluate(Target(server.url, "", ("broken",)), Task("exact", str(task_file)), tmp_path)
    assert not list(tmp_path.glob("items*"))


def test_nobody_listens(tmp_path, task_file) -> None:
    with pytest.raises(EndpointError, match="APIConnectionError"):
        evaluate(Target("http://127.0.0.1:9", "", ("m",)), Task("exact", str(task_file)), tmp_path)


def test_bad_tasks_are_refused_before_anything_is_asked(server, tmp_path, task_file) -> None:
    target = Target(server.url, "", ("steady",))
    with pytest.raises(DataError, match="no task 'rouge'"):
        evaluate(target, Task("rouge", str(task_file)), tmp_path)
    with pytest.raises(DataError, match=r"double\.heldout\.jsonl:1: the reference is no JSON object"):
        evaluate(target, Task("json-fields", str(task_file)), tmp_path)
    assert server.bodies == []


def test_several_samples_an_item(server, behaviour, tmp_path, task_file) -> None:
    def reply(body) -> str:  # the first sample of three is right, and of question 0 all are
        n = int(body["messages"][-1]["content"])
        return str(2 * n) if body["seed"] == 5 or n == 0 else "no"

    server.behaviours["lucky"] = behaviour(reply=reply)
    task = Task("exact", str(task_file), limit=2, samples=3, temperature=0.7, seed=5)
    result = evaluate(Target(server.url, "", ("lucky",)), task, tmp_path)
    assert (result.items, result.samples) == (2, 3)
    assert result.score == pytest.approx((1 + 1 / 3) / 2)
    assert result.stderr == pytest.approx(1 / 3)  # over items, not over their six answers
    assert result.extra == {"pass@3": 1.0}
    assert read_items(tmp_path / result.items_file)[1].scores == [1, 0, 0]
    assert sorted(body["seed"] for body in server.bodies) == [5, 5, 6, 6, 7, 7]
    assert {body["temperature"] for body in server.bodies} == {0.7}


def test_an_eval_that_was_cut_off_goes_on(server, behaviour, tmp_path) -> None:
    # So many rows that eight fail in a row, however late the two right answers come in between.
    target, task = Target(server.url, "", ("cut",)), Task("exact", str(_double_it(tmp_path, 30)))

    def fails_from_2_on(body) -> str:
        assert int(body["messages"][-1]["content"]) < 2
        return _double_up_to(99)(body)

    server.behaviours["cut"] = behaviour(reply=fails_from_2_on)
    with pytest.raises(EndpointError):
        evaluate(target, task, tmp_path)
    (partial,) = tmp_path.glob("*.partial")
    with partial.open("a") as file:
        file.write('[7, 0, "cut sho')
    with pytest.raises(DataError, match="another task, model, rows or sampling"):
        evaluate(target, task._replace(max_tokens=9), tmp_path)
    server.bodies.clear()
    server.behaviours["cut"] = behaviour(reply=_double_up_to(99))
    result = evaluate(target, task, tmp_path)
    assert (result.score, result.items, result.errors) == (1, 30, 0)
    assert sorted(int(body["messages"][-1]["content"]) for body in server.bodies) == list(range(2, 30))
    assert not partial.exists()


def test_options_reach_the_scorer(server, behaviour, tmp_path, task_file) -> None:
    server.behaviours["wordy"] = behaviour(reply=lambda body: f"it is {_double_up_to(99)(body)}!")
    target = Target(server.url, "", ("wordy",))
    result = evaluate(target, Task("regex", str(task_file), options={"pattern": r"\d+"}), tmp_path)
    assert result.score == 1


def test_standard_error() -> None:
    assert standard_error([1.0]) == 0
    assert standard_error([1.0, 1.0, 0.0, 0.0]) == pytest.approx(math.sqrt((4 * 0.25) / 3) / 2)
