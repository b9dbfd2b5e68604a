"""`tuneship train`, ended by SIGKILL with all that it started, goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tuneship.core.process import descendants
from tuneship.core.rundir import RunDir
from tuneship.train.fitting import checkpoints

pytestmark = pytest.mark.integration

STEPS = 100
SAVE_STEPS = 10
# Dropout makes a step's loss depend on the random numbers before it; an epoch is nine steps, so none ends at a
# checkpoint of the first eighty.
RECIPE = """
name = "{name}"
[model]
id = "{model}"
dtype = "float32"
[quantization]
method = "none"
[data]
train = "train.jsonl"
[lora]
rank = 8
dropout = 0.2
[train]
method = "lora"
effective_batch = 8
micro_batch = 4
steps = {steps}
learning_rate = 1e-3
optimizer = "adamw"
save_steps = {save_steps}
"""

STOPS = f"""
import os, signal, sys

def look(event, arguments):
    if event == "os.mkdir" and os.fsdecode(arguments[0]).endswith("/checkpoint-{2 * SAVE_STEPS}"):
        os.kill(os.getpid(), signal.SIGSTOP)

sys.addaudithook(look)
"""
"""A training stops where it begins its second checkpoint: whoever kills it may take any time, and finds steps behind
the first."""


class Training(NamedTuple):
    """One that was started."""

    process: subprocess.Popen[bytes]
    stderr: Path


@pytest.fixture
def project(tiny_model, tmp_path) -> Path:
    """A folder with its rows, of unequal length, and two recipes that differ in nothing but their names."""
    turns = [("user", "count {0}"), ("assistant", "the total is {0}")]
    rows = [
        {"messages": [{"role": role, "content": text.format(str(i) * (1 + i % 5))} for role, text in turns]}
        for i in range(72)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.toml").write_text(
            RECIPE.format(name=name, model=tiny_model, steps=STEPS, save_steps=SAVE_STEPS)
        )
    (tmp_path / "stops").mkdir()
    (tmp_path / "stops/sitecustomize.py").write_text(STOPS)
    return tmp_path


@pytest.fixture
def start(project):
    """(arguments...) -> `tuneship train ...` as a user does, stderr in a file; all that is left ends with the test."""
    started: list[Training] = []

    def begin(*arguments: str, **environment: str) -> Training:
        argv = [sys.executable, "-m", "tuneship", "train", *arguments]
        stderr = project / f"stderr-{len(started)}"
        with stderr.open("wb") as output:
            process = subprocess.Popen(argv, cwd=project, stderr=output, env={**os.environ, **environment})
        started.append(Training(process, stderr))
        return started[-1]

    yield begin
    for training in started:
        kill_all(training.process)


def finish(training: Training) -> str:
    """What it said, once it has ended well."""
    code = training.process.wait(200)
    said = training.stderr.read_text()
    assert code == 0, said
    return said


def metrics(run: RunDir) -> list[dict]:
    """Of the newest attempt, whose last line a kill may have cut."""
    lines = (run.latest("train") / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_until_it_stopped(training: Training) -> None:
    """The stage, see STOPS."""
    deadline = time.monotonic() + 120
    while not any(one.status() == psutil.STATUS_STOPPED for one in descendants(training.process.pid)):
        assert training.process.poll() is None, f"it ended before it could be killed: {training.stderr.read_text()}"
        assert time.monotonic() < deadline, "no second checkpoint was begun"
        time.sleep(0.05)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """The stage first, which would be asked to end (and then write a checkpoint) if its parent went before it."""
    family = descendants(process.pid)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.kill()
    process.wait(60)
    psutil.wait_procs(family, timeout=60)


def test_killed_with_all_that_it_started_it_goes_on_with_the_losses_it_would_have_had(project, start):
    finish(start("whole.toml"))
    whole = metrics(RunDir(project / "runs" / "whole"))
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))

    run = RunDir(project / "runs" / "killed")
    training = start("killed.toml", PYTHONPATH=str(project / "stops"))
    wait_until_it_stopped(training)
    kill_all(training.process)
    last = checkpoints.newest(run.path / "stages" / "train")
    assert last.marker.step == SAVE_STEPS, "somebody wrote a checkpoint while it was killed"
    assert last.marker.step < len(metrics(run)) < STEPS
    assert not list(run.artifacts.glob("adapter-*"))

    said = finish(start("killed.toml", "--resume"))
    assert f"going on after step {last.marker.step} of attempt-1" in said
    resumed = metrics(run)
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in resumed] == pytest.approx([line[key] for line in whole], abs=1e-5), key
    assert len({round(line["loss"], 4) for line in whole}) > 0.9 * STEPS, "equal losses would prove nothing"
    assert len(list(run.artifacts.glob("adapter-*"))) == 1
    assert not list(run.path.rglob("checkpoint-*")), "what has been sealed needs no checkpoints"
