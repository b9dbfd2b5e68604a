"""`tuneship train`, ended by SIGKILL with all that it started, goes on as if nothing had been."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tuneship.core.process import descendants
from tuneship.core.rundir import RunDir
from tuneship.train.fitting import checkpoints
from tuneship.train.fitting.checkpoints import Checkpoint

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
    return tmp_path


def start(project: Path, *arguments: str) -> subprocess.Popen[str]:
    """`tuneship train ...` as a user does."""
    argv = [sys.executable, "-m", "tuneship", "train", *arguments]
    return subprocess.Popen(argv, cwd=project, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What it said, once it has ended well."""
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    return said


def metrics(run: RunDir) -> list[dict]:
    """Of the newest attempt, whose last line a kill may have cut."""
    lines = (run.latest("train") / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_checkpoint(run: RunDir, process: subprocess.Popen[str]) -> Checkpoint:
    """One, and steps after it."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        last = checkpoints.newest(run.path / "stages" / "train")
        if last and len(metrics(run)) > last.marker.step + 1:
            return last
        time.sleep(0.01)
    raise AssertionError("no checkpoint was written")


def kill_all(process: subprocess.Popen[str]) -> None:
    """The stage first, which would be asked to end (and then write a checkpoint) if its parent went before it."""
    family = descendants(process.pid)
    assert family, "nothing was training"
    for member in family:
        member.kill()
    process.kill()
    process.communicate(timeout=60)
    psutil.wait_procs(family, timeout=60)


def test_killed_with_all_that_it_started_it_goes_on_with_the_losses_it_would_have_had(project):
    finish(start(project, "whole.toml"))
    whole = metrics(RunDir(project / "runs" / "whole"))
    assert [line["step"] for line in whole] == list(range(1, STEPS + 1))

    run = RunDir(project / "runs" / "killed")
    process = start(project, "killed.toml")
    wait_for_checkpoint(run, process)
    kill_all(process)
    last = checkpoints.newest(run.path / "stages" / "train")
    assert last.marker.step % SAVE_STEPS == 0, "somebody wrote a checkpoint while it was killed"
    assert last.marker.step < len(metrics(run)) < STEPS
    assert not list(run.artifacts.glob("adapter-*"))

    said = finish(start(project, "killed.toml", "--resume"))
    assert f"going on after step {last.marker.step} of attempt-1" in said
    resumed = metrics(run)
    assert [line["step"] for line in resumed] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm", "learning_rate"):
        assert [line[key] for line in resumed] == pytest.approx([line[key] for line in whole], abs=1e-5), key
    assert len({round(line["loss"], 4) for line in whole}) > 0.9 * STEPS, "equal losses would prove nothing"
    assert len(list(run.artifacts.glob("adapter-*"))) == 1
    assert not list(run.path.rglob("checkpoint-*")), "what has been sealed needs no checkpoints"
