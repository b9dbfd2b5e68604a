"""lm-eval's own program against a real server with adapters: each is asked by its name, and no failure is a score."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tomli_w

from tuneship.bench.quality.evaluate import Task, evaluate, read_items
from tuneship.bench.target import Target, resolve
from tuneship.core import recipe_file
from tuneship.core.errors import DataError, EndpointError
from tuneship.core.report import read_report
from tuneship.core.rundir import RunDir
from tuneship.core.stage import Job, run_job

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ROWS = 6
GENERATES = """
task: marker
dataset_path: json
dataset_kwargs:
  data_files: {test: rows.json}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
filter_list:
  - name: marker
    filter: [{function: regex, regex_pattern: "^(<[a-z]+>)"}, {function: take_first}]
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOOSES = """
task: choices
dataset_path: json
dataset_kwargs:
  data_files: {test: rows.json}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["<alpha>", "<beta>"]
doc_to_target: 0
"""


@pytest.fixture
def url(adapter_server) -> str:
    return adapter_server.endpoint.url


@pytest.fixture
def tasks(tmp_path: Path, chats, monkeypatch) -> Path:
    """A folder of two tasks over the same rows; the right answer is alpha's marker."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"question": chat[-1]["content"], "answer": "<alpha>"} for chat in chats(ROWS, 5)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "marker.yaml").write_text(GENERATES)
    (tmp_path / "choices.yaml").write_text(CHOOSES)
    return tmp_path


def test_two_adapters_behind_one_url_have_scores_of_their_own(adapter_server, url, tasks: Path) -> None:
    """The right one's by the stage of `up` that a recipe's task file is run by."""
    recipe = {
        "model": {"id": "any"},
        "data": {"train": "t.jsonl"},
        "bench": {"eval": [{"task": "lm-eval:marker.yaml"}]},
    }
    (tasks / "recipe.toml").write_text(tomli_w.dumps(recipe))
    run = RunDir(tasks / "run")
    run.path.mkdir()
    recipe_file.save(recipe_file.load(tasks / "recipe.toml"), run.recipe)
    inputs = {"endpoint": str(adapter_server.endpoint_file), "model": "alpha"}
    job = Job(stage="baseline", input_id="i", run_path=run.path, attempt=run.new_attempt("baseline"), inputs=inputs)
    (alpha,) = read_report(run_job(job, "tuneship.bench")).eval
    assert (alpha.task, alpha.role, alpha.model, alpha.items) == ("lm-eval:marker", "base", "alpha", ROWS)
    assert alpha.data == str(tasks / "marker.yaml")
    beta = evaluate(resolve(url, "beta"), Task(f"lm-eval:{tasks}/marker.yaml", ""), tasks / "out", "tuned")
    assert (alpha.score, beta.score) == (1.0, 0.0)
    for file, marker in ((job.attempt / alpha.items_file, "<alpha>"), (tasks / "out" / beta.items_file, "<beta>")):
        answers = [item.answer for item in read_items(file)]
        assert len(answers) == ROWS
        assert all(answer.startswith(marker) for answer in answers)


def test_a_model_that_is_not_served_is_an_error_and_no_score(url, tasks: Path) -> None:
    with pytest.raises(EndpointError, match="404"):
        evaluate(Target(url, "", ("nobody",)), Task(f"lm-eval:{tasks}/marker.yaml", ""), tasks / "out")
    assert list((tasks / "out").glob("items-*")) == []


def test_likelihoods_and_unknown_names_are_refused_in_plain_words(tasks: Path) -> None:
    target = Target("http://127.0.0.1:9", "", ("m",))
    with pytest.raises(DataError, match="compares likelihoods of given answers"):
        evaluate(target, Task(f"lm-eval:{tasks}/choices.yaml", ""), tasks / "out")
    with pytest.raises(DataError, match="lm-eval has no task 'gsm8kk'") as caught:
        evaluate(target, Task("lm-eval:gsm8kk", ""), tasks / "out")
    assert "did you mean 'gsm8k'" in caught.value.hint
