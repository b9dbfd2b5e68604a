"""lm-eval's tasks: what it is asked for, how its files are read, and why it failed; once it runs itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from tuneship.bench.quality import lm_eval as module
from tuneship.bench.quality.evaluate import Task, evaluate, read_items
from tuneship.bench.quality.lm_eval import plan_config
from tuneship.bench.quality.lm_eval_failures import explain, explain_silent
from tuneship.bench.quality.lm_eval_results import read_outcome
from tuneship.bench.target import Target
from tuneship.core.errors import DataError, EndpointError, TuneshipError

SUMS = """
task: sums
dataset_path: json
dataset_kwargs:
  data_files: {test: rows.json}
test_split: test
output_type: generate_until
doc_to_text: "What is {{question}}?"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 16}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A task file with its rows beside it, and beside them a file that has the name of a library."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "rows.json").write_text(
        "".join(json.dumps({"question": f"{n}+{n}", "answer": 2 * n}) + "\n" for n in (1, 2))
    )
    (folder / "datasets.py").write_text("raise RuntimeError\n")
    (folder / "sums.yaml").write_text(SUMS)
    return folder / "sums.yaml"


def sample(number: int, score: Any, task_filter: str = "none", metric: str = "exact_match") -> dict[str, Any]:
    prompt = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": f"{number}?"}])
    return {
        "doc_id": number, "target": str(number), "arguments": {"gen_args_0": {"arg_0": [prompt], "arg_1": {}}},
        "resps": [["so"]], "filter": task_filter, metric: score,
    }  # fmt: skip


def written(out: Path, figures: dict[str, Any], samples: list[dict[str, Any]], **more: Any) -> Path:
    """What lm-eval leaves: a folder named by the model, with results and one file of samples a task."""
    folder = out / "model"
    folder.mkdir(parents=True)
    results = {"results": {"sums": {"alias": "sums", **figures}}, "configs": {"sums": {}}} | more
    (folder / "results_2026-01-01.json").write_text(json.dumps(results))
    for task in results["configs"]:
        lines = [json.dumps(one) for one in samples if one.get("task", task) == task]
        (folder / f"samples_{task}_2026-01-01.jsonl").write_text("\n".join(lines))
    return out


def test_the_config_names_the_model_exactly_and_never_the_key(tmp_path: Path) -> None:
    target = Target("http://h:1", "sesame", ("1e3,x=true",))
    task = Task("lm-eval:gsm8k", "", limit=7, max_tokens=9, temperature=0.5, seed=3, options={"num_fewshot": 2})
    config = plan_config(target, task, "gsm8k", tmp_path)
    assert config["model"] == "local-chat-completions"
    assert config["model_args"]["model"] == "1e3,x=true"
    assert config["model_args"]["base_url"] == "http://h:1/v1/chat/completions"
    assert (config["limit"], config["num_fewshot"], config["seed"], config["model_args"]["seed"]) == (7, 2, 3, 3)
    assert config["gen_kwargs"] == {"max_tokens": 9, "temperature": 0.5, "do_sample": True}
    assert "sesame" not in json.dumps(config)
    usual = plan_config(target, Task("lm-eval:gsm8k", ""), "gsm8k", tmp_path)
    assert {"gen_kwargs", "num_fewshot"} & set(usual) == set()  # the task's own hold


def test_reads_the_first_metric_and_the_items_of_its_filter(tmp_path: Path) -> None:
    figures = {
        "exact_match,strict": 0.5,
        "exact_match_stderr,strict": 0.25,
        "exact_match,loose": 1.0,
        "bleu,none": 31.0,
    }
    samples = [sample(1, 0.0, "strict"), sample(0, 1.0, "strict"), sample(0, 1.0, "loose"), sample(1, 1.0, "loose")]
    out = written(tmp_path, figures, samples)
    found = read_outcome(out, "sums")
    assert (found.score, found.stderr) == (0.5, 0.25)
    assert found.figures == {"exact_match,strict": 0.5, "exact_match,loose": 1.0, "bleu,none": 31.0}
    assert [(item.index, item.reference, item.score) for item in found.items] == [(0, "0", 1.0), (1, "1", 0.0)]
    assert found.items[0].prompt == [{"role": "system", "content": "s"}, {"role": "user", "content": "0?"}]
    assert found.items[0].answer == "so"
    assert read_outcome(out, "sums", "exact_match,loose").score == 1.0
    with pytest.raises(DataError, match="has no metric 'f1'"):
        read_outcome(out, "sums", "f1")


def test_a_group_is_the_mean_over_all_its_items(tmp_path: Path) -> None:
    both = {"results": {"a": {}, "b": {}}, "configs": {"a": {}, "b": {}}}
    samples = [sample(n, float(n == 0)) | {"task": task} for task in "ab" for n in range(2)]
    groups = {"groups": {"ab": {"exact_match,none": 0.5, "exact_match_stderr,none": "N/A"}}}
    found = read_outcome(written(tmp_path / "weighted", {}, samples, **both, **groups), "ab")
    assert (found.score, found.stderr, [item.index for item in found.items]) == (0.5, None, [0, 1, 2, 3])
    out = written(tmp_path / "tag", {}, samples, **both)
    with pytest.raises(DataError, match="no figure of its own") as caught:
        read_outcome(out, "ab")
    assert "a, b" in caught.value.hint


@pytest.mark.parametrize(
    ("figures", "scores", "more"),
    [
        ({"m,none": 31.0}, [["ref", "answer"], ["ref", "answer"]], {}),  # BLEU, over the corpus
        ({"m,none": 3.0}, [2.0, 4.0], {}),  # not in 0..1
        ({"m,none": 0.75}, [0.0, 1.0], {}),  # not the mean of its items
        ({"m,none": 0.5}, [0.0, 1.0], {"higher_is_better": {"sums": {"m": False}}}),
    ],
)
def test_a_figure_that_is_no_score_is_refused(tmp_path: Path, figures: Any, scores: list[Any], more: Any) -> None:
    samples = [sample(n, score, metric="m") for n, score in enumerate(scores)]
    with pytest.raises(DataError, match="is no score: a mean over items"):
        read_outcome(written(tmp_path, figures, samples, **more), "sums")


def test_no_items_and_no_results_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="scored no item"):
        read_outcome(written(tmp_path / "a", {"m,none": 0.0}, []), "sums")
    with pytest.raises(TuneshipError, match="wrote no results"):
        read_outcome(tmp_path / "b", "sums")


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("ValueError: Tasks not found: gsm8kk\n", DataError, "lm-eval has no task 'gsm8kk'"),
        ("NotImplementedError: Loglikelihood is not supported for chat completions.\n", DataError, "likelihoods"),
        (
            "Requesting API: 0/2\naiohttp.client_exceptions.ClientResponseError: 404\nUnclosed\n",
            EndpointError,
            "ClientResponseError: 404",
        ),
        ("Requesting API: 0/2\nTimeoutError\n", EndpointError, "TimeoutError"),
        ("TimeoutError\n", TuneshipError, "lm-eval gsm8kk: TimeoutError"),
        ("ConnectionError: Couldn't reach 'openai/gsm8k' on the Hub\n", TuneshipError, "'openai/gsm8k' on the Hub"),
        ("Requesting API: 0/2\nTimeoutError\nRuntimeError: Session is closed\n", EndpointError, "failed: TimeoutError"),
        (
            (
                "Requesting API: 0/2\nAPI request failed! Status code: 404, Response text: no. Retrying...\n"
                "RuntimeError: Session is closed\n"
            ),
            EndpointError,
            "failed: Status code: 404, Response text: no.",
        ),
        ("ModuleNotFoundError: No module named 'langdetect'\n\r 0%|  |", TuneshipError, "No module named 'langdetect'"),
        ("", TuneshipError, "exit code 1"),
    ],
)
def test_why_it_failed(tmp_path: Path, text: str, error: type[TuneshipError], says: str) -> None:
    (tmp_path / "log").write_text(text)
    found = explain("gsm8kk", "http://h:1", 1, tmp_path / "log")
    assert type(found) is error
    assert says in found.message
    assert found.hint


def test_an_unknown_name_is_answered_with_near_ones(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("ValueError: Tasks not found: gsm8kk\n")
    assert "did you mean 'gsm8k'" in explain("gsm8kk", "", 1, tmp_path / "log").hint


def test_an_answer_that_is_taken_for_an_empty_one_is_an_error(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("WARNING [x:1] Could not parse generations: 'choices'\n")
    assert "no chat completion: Could not parse generations: 'choices'" in explain_silent("t", "http://h", log).message
    log.write_text("all is well\n")
    assert explain_silent("t", "http://h", log) is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"options": {"pattern": "x"}}, "no option 'pattern'"),
        ({"options": {"num_fewshot": "two"}}, "is no number of examples"),
        ({"samples": 3}, "samples = 3"),
        ({"scorer": "lm-eval:FOLDER/none.yaml"}, "cannot read the task"),
        ({"scorer": "lm-eval:FOLDER/sums.yml"}, "ends in .yaml"),
        ({"scorer": "lm-eval:FOLDER/broken.yaml"}, "not YAML"),
        ({"scorer": "lm-eval:FOLDER/group.yaml"}, "no key 'task'"),
    ],
)
def test_a_task_that_cannot_run_is_refused_before_lm_eval_starts(sums: Path, change: Any, says: str, tmp_path) -> None:
    (sums.parent / "broken.yaml").write_text("a: [")
    (sums.parent / "group.yaml").write_text("group: g\ntask: [a, b]\nf: !function utils.f\n")
    task = Task("lm-eval:FOLDER/sums.yaml", "")._replace(**change)
    task = task._replace(scorer=task.scorer.replace("FOLDER", str(sums.parent)))
    with pytest.raises(DataError, match=says):
        evaluate(Target("http://127.0.0.1:9", "", ("m",)), task, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_extra_the_install_line_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(TuneshipError, match="needs lm-eval") as caught:
        evaluate(Target("http://127.0.0.1:9", "", ("m",)), Task("lm-eval:gsm8k", ""), tmp_path)
    assert caught.value.hint == "pip install 'tuneship[eval]'"


@pytest.mark.parametrize(
    ("content", "offline"),
    [
        ("dataset_path: json\ndataset_kwargs: {data_files: {test: rows.json}}", True),
        ("dataset_path: json\ndataset_kwargs: {data_files: 'hf://datasets/x/y.json'}", False),
        ("dataset_path: openai/gsm8k", False),
        ("include: other.yaml", False),
    ],
)
def test_only_what_reads_local_files_runs_offline(sums: Path, content: str, offline: bool) -> None:
    sums.write_text(f"task: sums\n{content}\n")
    assert module._find(str(sums)).offline == offline


def test_lm_eval_itself_asks_the_model_that_was_named(
    server, behaviour, sums: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-service")
    name = "half,temperature=1"
    server.behaviours[name] = behaviour(reply=lambda _: "4")
    target = Target(server.url, "sesame", (name, "steady"))
    result = evaluate(target, Task(f"lm-eval:{sums}", "", max_tokens=7), tmp_path / "out", "tuned")
    assert {(body["model"], body["max_tokens"], body["temperature"]) for body in server.bodies} == {(name, 7, 0)}
    assert (len(server.bodies), set(server.keys)) == (2, {"Bearer sesame"})
    assert "sesame" not in "".join(
        file.read_text() for file in tmp_path.glob("out/lm-eval-sums-tuned/*") if file.is_file()
    )
    assert (result.task, result.data, result.model, result.role) == ("lm-eval:sums", str(sums), name, "tuned")
    assert (result.score, result.items, result.extra) == (0.5, 2, {"exact_match,none": 0.5})
    items = read_items(tmp_path / "out" / result.items_file)
    assert [(item.prompt[-1]["content"], item.reference, item.answer, item.score) for item in items] == [
        ("What is 1+1?", "2", "4", 0.0),
        ("What is 2+2?", "4", "4", 1.0),
    ]
