"""`tuneship up` the whole way on a tiny model: train, merge, serve, bench, keep serving, Ctrl-C."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tuneship.core.endpoint import read_endpoint
from tuneship.core.report import read_report
from tuneship.core.rundir import RunDir

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

RECIPE = """
name = "adder"
[model]
id = "{model}"
dtype = "float32"
[data]
train = "rows.jsonl"
heldout = "rows.jsonl"
[lora]
rank = 8
[train]
effective_batch = 8
steps = 60
learning_rate = 1e-2
optimizer = "adamw"
[merge]
max_nll_increase = 1.0
[serve]
dtype = "float32"
port = 0
[bench.load]
rates = [4]
duration_s = 3
input_tokens = 8
output_tokens = 16
[[bench.eval]]
task = "exact"
data = "rows.jsonl"
limit = 8
max_tokens = 12
"""


@pytest.fixture(scope="module")
def served(tiny_model, tmp_path_factory):
    """(run, the process of `up`, its log) while it serves after the bench."""
    folder = tmp_path_factory.mktemp("up")
    (folder / "adder.toml").write_text(RECIPE.format(model=tiny_model))
    rows = [
        {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": "as you wish"}]}
        for i in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = RunDir(folder / "runs" / "adder")
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tuneship", "up", "adder.toml", "--keep-serving"],
            cwd=folder,
            stdout=file,
            stderr=file,
        )
        deadline = time.monotonic() + 500
        while "serving until Ctrl-C" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield run, process, log
        process.kill()


def processes_of(run: RunDir) -> list[psutil.Process]:
    return [p for p in psutil.process_iter(["cmdline"]) if str(run.path) in " ".join(p.info["cmdline"] or [])]


def test_the_report_has_all_that_was_measured(served):
    run, _, _ = served
    report = read_report(run.report)
    scores = {result.role: result.score for result in report.eval}
    assert scores["tuned"] == 1.0
    assert scores["base"] < 0.5
    (level,) = report.load
    # To random words a model this small may answer nothing but special tokens, which have no text to time.
    assert level.completed + level.errors.get("no_content", 0) == level.requests
    assert level.completed > 0
    assert level.ttft_ms is not None
    assert len(report.training) == 60
    assert report.parity is not None
    assert report.parity.passed
    assert "as you wish" in (run.path / "report.html").read_text()


def test_held_out_likelihood_is_that_of_the_tokens_that_training_saw(served):
    run, _, log = served
    report = read_report(run.report)
    base, tuned = report.nll
    assert (base.role, tuned.role) == ("base", "tuned")
    assert base.rows == tuned.rows == report.parity.rows
    assert base.tokens == tuned.tokens == report.parity.tokens
    assert tuned.nll == pytest.approx(report.parity.nll, abs=2e-3)  # one float32 checkpoint, two implementations
    assert base.nll > tuned.nll + 1
    assert all((run.path / result.items_file).is_file() for result in report.nll)
    assert re.search(r"rows\.jsonl +tuned", log.read_text())


def test_what_was_trained_is_what_answers(served):
    import openai

    run, _, _ = served
    endpoint = read_endpoint(run.endpoint)
    (model,) = endpoint.models
    (artifact,) = run.artifacts.glob("merged-*")
    client = openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none")
    answer = client.chat.completions.with_raw_response.create(
        model="adder", messages=[{"role": "user", "content": "say 3"}], temperature=0, max_tokens=16
    )
    assert answer.headers["x-tuneship-version"] == model.version == f"adder@{artifact.name.removeprefix('merged-')}"
    choice = answer.parse().choices[0]
    assert choice.message.content == "as you wish"
    assert choice.finish_reason == "stop", "the end of turn was not learnt, or is not where the server stops"


def test_ctrl_c_ends_everything(served):
    run, process, log = served
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130, log.read_text()
    assert not processes_of(run)
    assert not run.endpoint.exists()
    assert "Traceback" not in log.read_text()


def test_a_second_up_measures_nothing_again(served):
    run, process, _ = served
    process.wait(timeout=60)
    before = Path(run.report).stat().st_mtime_ns
    again = subprocess.run(
        [sys.executable, "-m", "tuneship", "up", "adder.toml"],
        cwd=run.path.parents[1], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "bench: unchanged" in again.stderr
    assert Path(run.report).stat().st_mtime_ns == before
    (merged,) = run.artifacts.glob("merged-*")
    assert f"tuneship serve runs/adder/artifacts/{merged.name}" in again.stdout
    assert "curl http://127.0.0.1:30000/v1/chat/completions" in again.stdout
    assert re.search(r"trained +8 rows, \d+ tokens with loss, on ", again.stdout)


def test_the_gate_of_the_recipe_cannot_tell_from_so_few_requests(served):
    run, process, _ = served
    process.wait(timeout=60)
    gated = subprocess.run(
        [sys.executable, "-m", "tuneship", "up", "adder.toml", "--bench.gate.baseline", str(run.report)],
        cwd=run.path.parents[1], capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert gated.returncode == 3, gated.stderr
    assert "bench: unchanged" in gated.stderr
    assert "cannot tell" in gated.stdout


def test_a_gate_without_its_baseline_is_refused_before_anything_runs(served):
    run, process, _ = served
    process.wait(timeout=60)
    refused = subprocess.run(
        [sys.executable, "-m", "tuneship", "up", "adder.toml", "--bench.gate.baseline", "gone.json"],
        cwd=run.path.parents[1], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "no report at" in refused.stderr
    assert "train: unchanged" not in refused.stderr


def test_ctrl_c_while_measuring_ends_everything_and_keeps_the_report(served):
    run, process, log = served
    process.wait(timeout=60)
    before = run.report.read_bytes()
    second = log.with_name("second")
    with second.open("w") as file:
        args = ["up", "adder.toml", "--bench.load.duration_s", "100"]
        bench = subprocess.Popen([sys.executable, "-m", "tuneship", *args], cwd=run.path.parents[1], stderr=file)
    try:
        deadline = time.monotonic() + 200
        while "load 4/s" not in second.read_text():
            assert bench.poll() is None, second.read_text()
            assert time.monotonic() < deadline, second.read_text()
            time.sleep(0.2)
        bench.send_signal(signal.SIGINT)
        assert bench.wait(timeout=60) == 130, second.read_text()
    finally:
        bench.kill()
    assert not processes_of(run)
    assert not run.endpoint.exists()
    assert run.report.read_bytes() == before
    assert "Traceback" not in second.read_text()
