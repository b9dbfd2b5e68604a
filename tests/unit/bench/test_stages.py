"""The stages of `up` against a real server; what matters in a child process is tried in one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tuneship.bench.stages import baseline, bench, newest_parity, read_training
from tuneship.core import recipe_file
from tuneship.core.artifact import Artifact, Base, Manifest, QuantizationRecord, TemplateRecord, draft, seal
from tuneship.core.endpoint import Endpoint, EngineInfo, ServedModel, write_endpoint
from tuneship.core.errors import EndpointError
from tuneship.core.parity import ReferenceRow, rows_sha256, write_reference
from tuneship.core.recipe import Recipe
from tuneship.core.report import read_report
from tuneship.core.rundir import RunDir
from tuneship.core.stage import Job, run_job

PARITY = {
    "reference": "trained", "candidate": "merged", "rows": 2, "tokens": 9, "nll_base": 2, "nll_reference": 1, "nll": 1,
    "kl_mean": 0, "kl_p99": 0, "limit": 0.02, "passed": True,
}  # fmt: skip


@pytest.fixture
def run(tmp_path, server) -> RunDir:
    """A run directory with a recipe, a task file and an endpoint."""
    rows = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": '{"ok": 1}'}] for n in range(4)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    recipe = Recipe.model_validate(
        {
            "name": "tiny",
            "model": {"id": "any"},
            "data": {"train": "train.jsonl"},
            "bench": {
                "load": {"rates": [20], "duration_s": 1, "output_tokens": 3, "input_tokens": 5},
                "eval": [{"task": "json-fields", "data": str(tmp_path / "task.jsonl")}],
            },
        }
    )
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    recipe_file.save(recipe, run.recipe)
    (run.path / "command.txt").write_text("tuneship up tiny.toml\n")
    models = [ServedModel(name="tiny", version="tiny@1", artifact_id="1", base_id="b")]
    engine = EngineInfo(version="0.5.17", flags=["--dtype", "bfloat16"])
    endpoint = Endpoint(url=server.url, mode="merged", pid=1, started_at="now", engine=engine, models=models)
    write_endpoint(endpoint, run.endpoint)
    return run


@pytest.fixture
def trained(tmp_path) -> Artifact:
    return sealed(tmp_path)


def sealed(tmp_path: Path, template: str = "{{ messages }}") -> Artifact:
    """An adapter with two held-out rows of three answer tokens in its evidence."""
    manifest = Manifest(
        kind="adapter",
        name="tiny",
        input_id="1",
        base=Base(id="org/base", revision="main", weights_sha256="a" * 64, architecture="LlamaForCausalLM"),
        quantization=QuantizationRecord(method="nf4", double=True, compute_dtype="bfloat16"),
        template=TemplateRecord(text=template, sha256="c", source="model"),
        end_token_ids=(2,),
        tokenizer_sha256="b",
    )
    with draft(tmp_path / "artifacts") as work:
        (work / "adapter_config.json").write_text("{}")
        write_reference(work / "evidence", [_reference_row([5, 6, 7], [0, 1, 1]), _reference_row([8, 9], [0, 1])])
        return seal(work, manifest)


def _reference_row(ids: list[int], mask: list[int], said: float = 0.0) -> ReferenceRow:
    log_p = [said] * len(ids)
    return ReferenceRow(input_ids=ids, loss_mask=mask, dtype="float32", base=log_p, trained=log_p)


def _job(run: RunDir, stage: str, model: str, **inputs: Path) -> Job:
    paths = {"endpoint": str(run.endpoint), "model": model} | {name: str(path) for name, path in inputs.items()}
    return Job(stage=stage, input_id="i", run_path=run.path, attempt=run.new_attempt(stage), inputs=paths)


def test_baseline_then_bench(run, server, behaviour, tmp_path, capsys) -> None:
    server.behaviours |= {
        "base": behaviour(reply=lambda _: "I do not know."),
        "tiny": behaviour(ttft_s=0.02, itl_s=0.01, reply=lambda _: '{"ok": 1}'),
    }
    scored = baseline(_job(run, "baseline", "base"))
    assert scored == run.path / "stages/baseline/attempt-1/eval.json"

    train = tmp_path / "train"
    train.mkdir()
    lines = [{"step": n, "total": 3, "loss": 1 / n, "tokens_per_s": 9.0, "learning_rate": 1e-4} for n in (1, 2, 3)]
    (train / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = run_job(_job(run, "bench", "tiny", baseline=scored, train_attempt=train), "tuneship.bench")
    assert output == run.report
    report = read_report(output)
    assert [(r.role, r.model, r.score) for r in report.eval] == [("base", "base", 0), ("tuned", "tiny", 1)]
    assert all((run.path / r.items_file).is_file() for r in report.eval)
    assert not any(Path(r.items_file).is_absolute() for r in report.eval)  # the run can be moved
    assert (report.load[0].rate, report.load[0].errors) == (20, {})
    assert [point.step for point in report.training] == [1, 2, 3]
    assert report.testbed.flags == ["--dtype bfloat16"]
    assert report.provenance["command"] == "tuneship up tiny.toml"
    html = (run.path / "report.html").read_text()
    assert "I do not know." in html
    assert "eval json-fields-task tuned  4/4" in capsys.readouterr().err  # progress came through the pipe


def test_a_load_asks_what_training_held_out(run, server, behaviour, tmp_path) -> None:
    """And not the recipe's own file, which may be a table."""
    server.behaviours["tiny"] = behaviour()
    table = tmp_path / "rows.csv"
    table.write_text("prompt,completion\nhi,ho\n")
    overrides = {"bench.load.workload": "heldout", "data.heldout": str(table)}
    recipe_file.save(recipe_file.load(run.recipe, overrides), run.recipe)
    heldout = tmp_path / "heldout.jsonl"
    row = [{"role": "user", "content": "what is held out"}, {"role": "assistant", "content": "ho"}]
    heldout.write_text(json.dumps({"messages": row}) + "\n")
    (level,) = read_report(bench(_job(run, "bench", "tiny", heldout=heldout))).load
    assert level.completed == level.requests > 0
    streamed = [body["messages"] for body in server.bodies if body.get("stream")]
    assert all(messages[-1]["content"].endswith("what is held out") for messages in streamed)


@pytest.mark.parametrize("own", ["prompt,completion\nhi,ho\n", '{"messages": [ASK, ANSWER], "more": 1}\n'])
def test_a_task_of_held_out_rows_asks_their_conversations(run, server, behaviour, tmp_path, own) -> None:
    """The recipe's own file where it has chats: its rows may have more columns, which a scorer needs."""
    server.behaviours["base"] = behaviour(reply=lambda _: "ho")
    ask, answer = ({"role": role, "content": "ho"} for role in ("user", "assistant"))
    file, heldout = tmp_path / "rows", tmp_path / "heldout.jsonl"
    file.write_text(own.replace("ASK", json.dumps(ask)).replace("ANSWER", json.dumps(answer)))
    heldout.write_text(json.dumps({"messages": [ask | {"content": "from training"}, answer]}) + "\n")
    overrides = {"data.heldout": str(file), "bench.eval.0.data": str(file), "bench.eval.0.task": "exact"}
    recipe_file.save(recipe_file.load(run.recipe, overrides), run.recipe)
    (result,) = read_report(baseline(_job(run, "baseline", "base", heldout=heldout))).eval
    assert result.score == 1
    asked = {body["messages"][-1]["content"] for body in server.bodies}
    assert asked == ({"ho"} if "messages" in own else {"from training"})


def test_a_model_without_a_template_is_scored_and_asked_nothing(run, server, behaviour, tmp_path, capsys) -> None:
    server.behaviours["tiny"] = behaviour(nats=0.5)
    recipe = recipe_file.load(run.recipe)
    asks_none = recipe.bench.model_copy(update={"eval": ()})
    recipe_file.save(recipe.model_copy(update={"bench": asks_none}), run.recipe)
    report = read_report(bench(_job(run, "bench", "tiny", artifact=sealed(tmp_path, template="").path)))
    assert (report.load, [result.nll for result in report.nll]) == ([], [0.5])
    assert not server.bodies
    assert "has no chat template: no load is sent" in capsys.readouterr().err
    assert (run.path / "report.html").is_file()


def test_the_load_is_the_recipe_s(run, server, behaviour) -> None:
    server.behaviours["tiny"] = behaviour(reply=lambda _: '{"ok": 1}')
    recipe_file.save(recipe_file.load(run.recipe, {"bench.load.processes": "2"}), run.recipe)
    (level,) = read_report(bench(_job(run, "bench", "tiny"))).load
    assert level.client.processes == 2
    assert level.completed == level.requests > 0


def test_paths_of_a_recipe_s_tasks_are_relative_to_it(run, server, behaviour, tmp_path, monkeypatch) -> None:
    server.behaviours["base"] = behaviour(reply=lambda _: '{"ok": 3}')
    home = tmp_path / "recipes"
    home.mkdir()
    rows = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": '{"ok": 1}'}]]
    (home / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (home / "mine.py").write_text("def same(answer, reference, row):\n    return 1 if answer == reference else 0.25\n")
    (home / "ok.json").write_text('{"properties": {"ok": {"type": "number"}}}')
    (home / "r.toml").write_text(
        'model.id = "any"\ndata.train = "rows.jsonl"\n'
        '[[bench.eval]]\ntask = "python:mine.py:same"\ndata = "rows.jsonl"\n'
        '[[bench.eval]]\ntask = "json-schema"\ndata = "rows.jsonl"\noptions = {schema = "ok.json"}\n'
    )
    monkeypatch.chdir(tmp_path)
    recipe_file.save(recipe_file.load(Path("recipes/r.toml")), run.recipe)
    report = read_report(baseline(_job(run, "baseline", "base")))
    assert [result.score for result in report.eval] == [0.25, 1]


def test_held_out_likelihood_of_base_and_tuned_on_the_rows_of_training(run, server, behaviour, trained) -> None:
    server.behaviours |= {
        "base": behaviour(nats=2.5),
        "tiny": behaviour(ttft_s=0.02, itl_s=0.01, nats=0.5, reply=lambda _: '{"ok": 1}'),
    }
    scored = baseline(_job(run, "baseline", "base", artifact=trained.path))
    report = read_report(bench(_job(run, "bench", "tiny", baseline=scored, artifact=trained.path)))
    assert [(r.role, r.model, r.rows, r.tokens, r.nll) for r in report.nll] == [
        ("base", "base", 2, 3, 2.5),
        ("tuned", "tiny", 2, 3, 0.5),
    ]
    assert all((run.path / r.items_file).is_file() and not Path(r.items_file).is_absolute() for r in report.nll)
    assert "-2.0000" in (run.path / "report.html").read_text()


def test_a_server_that_cannot_score_text_is_measured_all_the_same(run, server, behaviour, trained, capsys) -> None:
    server.behaviours["tiny"] = behaviour(ttft_s=0.02, itl_s=0.01, reply=lambda _: '{"ok": 1}')
    report = read_report(bench(_job(run, "bench", "tiny", artifact=trained.path)))
    assert report.nll == []
    assert (report.eval[0].score, report.load[0].errors) == (1, {})
    assert "likelihood is not measured" in (said := capsys.readouterr().err)
    assert "has no /v1/logprobs" in said


def test_rows_are_the_same_whatever_was_learnt_of_them(tmp_path) -> None:
    ids = {}
    for name, row in {
        "one": _reference_row([1, 2, 3], [0, 1, 1]),
        "again": _reference_row([1, 2, 3], [0, 1, 1], said=-0.5),
        "mask": _reference_row([1, 2, 3], [0, 0, 1]),
        "ids": _reference_row([1, 2, 4], [0, 1, 1]),
    }.items():
        write_reference(tmp_path / name, [row])
        ids[name] = rows_sha256(tmp_path / name)
    assert ids["one"] == ids["again"]
    assert len({*ids.values(), rows_sha256(tmp_path)}) == 4  # a folder without rows is another one again


def test_a_server_that_is_gone_is_one_clear_error(run, server, behaviour) -> None:
    server.behaviours["tiny"] = behaviour(fault="http_500")
    with pytest.raises(EndpointError, match=r"4 requests in a row .* failed: InternalServerError"):
        bench(_job(run, "bench", "tiny"))
    assert not run.report.exists()


def test_sigterm_in_mid_load_ends_it_at_once(run, server, behaviour) -> None:
    server.behaviours["tiny"] = behaviour(ttft_s=0.02, itl_s=120, reply=lambda _: '{"ok": 1}')
    job = _job(run, "bench", "tiny")
    (job.attempt / "job.json").write_text(job.model_dump_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "tuneship.bench", str(job.attempt)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 60
    while not any(body.get("stream") for body in server.bodies):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    try:
        said, _ = process.communicate(timeout=60)  # a busy machine is slow, and the next token is not due yet
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert b"Traceback" not in said
    assert not run.report.exists()


def test_newest_parity_is_the_highest_number(tmp_path) -> None:
    assert newest_parity(tmp_path) is None
    for number in (1, 2, 10):
        (tmp_path / f"parity-{number}.json").write_text(json.dumps(PARITY | {"rows": number}))
    assert newest_parity(tmp_path).rows == 10


def test_training_lines_of_another_kind_are_passed_over(tmp_path) -> None:
    assert read_training(tmp_path) == []
    lines = ['{"step": 1, "total": 2, "loss": 0.5}', '{"step": 2, "loss": NaN}', '{"note": "end"}', '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert [point.step for point in read_training(tmp_path)] == [1]
