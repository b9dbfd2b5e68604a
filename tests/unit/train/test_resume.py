"""A training that was killed goes on as if nothing had been; one that is another is refused by key."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tuneship.core.errors import Checkpointed, TrainError
from tuneship.core.recipe import Recipe
from tuneship.train.fitting import checkpoints, fit
from tuneship.train.fitting.checkpoints import Checkpoint, Identity
from tuneship.train.model import load_base

torch = pytest.importorskip("torch")

from tests.unit.train import fitting  # noqa: E402 - needs torch

KILLED_AT = 6


def metrics(attempt: Path) -> list[dict]:
    return [json.loads(line) for line in (attempt / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory) -> list[dict]:
    """What a training logs that nobody stops."""
    attempt = tmp_path_factory.mktemp("whole") / "attempt-1"
    fitting.train(tiny_model, attempt, save_steps=0)
    return metrics(attempt)


@pytest.fixture(scope="module")
def killed(tiny_model, tmp_path_factory) -> Path:
    """A stage's folder whose first attempt was ended by SIGKILL in the middle of its sixth step."""
    attempt = tmp_path_factory.mktemp("killed") / "attempt-1"
    attempt.mkdir()
    done = subprocess.run(
        [sys.executable, fitting.__file__, tiny_model, attempt, str(KILLED_AT)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return attempt.parent


# The third step ends the first epoch.
@pytest.mark.parametrize("step", [3, 4, 5])
def test_it_goes_on_as_if_it_had_not_been_killed(tiny_model, killed, whole, tmp_path, step):
    stage = tmp_path / "stage"
    shutil.copytree(killed, stage)
    for later in range(step + 1, KILLED_AT):
        shutil.rmtree(stage / "attempt-1" / "checkpoints" / f"checkpoint-{later}")
    last = checkpoints.newest(stage)
    assert last.marker.step == step
    fitting.train(tiny_model, stage / "attempt-2", resume=last, save_steps=0)
    resumed = metrics(stage / "attempt-2")
    assert [line["step"] for line in resumed] == [1, 2, 3, 4, 5, 6, 7, 8]
    for ours, theirs in zip(resumed, whole, strict=True):
        for key in ("loss", "grad_norm", "learning_rate"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), (ours["step"], key)
    assert len({round(line["loss"], 4) for line in whole}) == len(whole), "equal losses would prove nothing"


def test_another_micro_batch_goes_on_too(tiny_model, killed, whole, tmp_path):
    stage = tmp_path / "stage"
    shutil.copytree(killed, stage)
    fitting.train(tiny_model, stage / "attempt-2", micro_batch=1, resume=checkpoints.newest(stage))
    resumed = metrics(stage / "attempt-2")
    assert [line["micro_batch"] for line in resumed] == [2] * 5 + [1] * 3
    # Dropout draws in another order; the rows are the same.
    for ours, theirs in zip(resumed, whole, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.2)


def test_checkpoints_are_few_and_whole(killed):
    folder = killed / "attempt-1" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-3", "checkpoint-4", "checkpoint-5"]
    assert [line["step"] for line in metrics(killed / "attempt-1")] == [1, 2, 3, 4, 5]


def test_half_a_checkpoint_is_none(killed, tmp_path):
    stage = tmp_path / "stage"
    shutil.copytree(killed, stage)
    folder = stage / "attempt-1" / "checkpoints"
    (folder / "checkpoint-5" / "tuneship.json").unlink()
    weights = folder / "checkpoint-4" / "optimizer.pt"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert checkpoints.newest(stage).marker.step == 3
    shutil.rmtree(folder)
    assert checkpoints.newest(stage) is None


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train": {"learning_rate": 1e-3}}, "train.learning_rate was 0.005 and is 0.001"),
        ({"lora": {"rank": 8}}, "lora.rank was 4 and is 8"),
    ],
)
def test_another_recipe_is_refused_by_key(tiny_model, killed, change, named):
    given = fitting.recipe(tiny_model).model_dump()
    for section, keys in change.items():
        given[section] = given[section] | keys
    with pytest.raises(TrainError, match="cannot be resumed") as refused:
        checkpoints.require_unchanged(checkpoints.newest(killed), Identity.of(Recipe.model_validate(given), {}))
    assert named in refused.value.message
    assert refused.value.message.count(" was ") == 1


def test_other_rows_are_refused_by_key(tiny_model):
    then = Identity.of(fitting.recipe(tiny_model), {"data.train": "a", "data.heldout": "b"})
    now = Identity.of(fitting.recipe(tiny_model), {"data.train": "a", "data.heldout": "c"})
    marker = checkpoints.Marker(step=1, micro_batch=1, identity=then, files={})
    with pytest.raises(TrainError, match=r"what data\.heldout leads to has changed$"):
        checkpoints.require_unchanged(Checkpoint(Path("attempt-1/checkpoints/checkpoint-1"), marker), now)
    checkpoints.require_unchanged(Checkpoint(Path("attempt-1/checkpoints/checkpoint-1"), marker), then)


def test_what_changes_no_loss_may_change(tiny_model):
    then = Identity.of(fitting.recipe(tiny_model), {})
    assert not then.changes(
        Identity.of(fitting.recipe(tiny_model, micro_batch=1, save_steps=7, checkpointing=True), {})
    )


def test_a_request_to_end_is_granted_between_two_steps(tiny_model, whole, tmp_path):
    attempt = tmp_path / "attempt-1"
    threading.Thread(target=_terminate_after, args=(attempt, 2), daemon=True).start()
    with pytest.raises(Checkpointed, match="is kept") as stopped:
        fitting.train(tiny_model, attempt, steps=4000)
    assert stopped.value.exit_code == 75
    logged = metrics(attempt)
    assert checkpoints.last_of(attempt).marker.step == len(logged) >= 2
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    # Nothing is left to do: what was learnt is there, and no step more.
    last = checkpoints.last_of(attempt)
    model = fitting.train(tiny_model, tmp_path / "attempt-2", steps=last.marker.step, resume=last)
    assert len(metrics(tmp_path / "attempt-2")) == len(logged)
    assert any(bool(p.any()) for name, p in model.named_parameters() if "lora_B" in name)


def _terminate_after(attempt: Path, steps: int) -> None:
    while not (attempt / "metrics.jsonl").exists() or len(metrics(attempt)) < steps:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_resumed_training_removes_what_it_was_resumed_from(tiny_model, killed, tmp_path):
    stage = tmp_path / "stage"
    shutil.copytree(killed, stage)
    fitting.train(tiny_model, stage / "attempt-2", resume=checkpoints.newest(stage), save_steps=2)
    assert not (stage / "attempt-1" / "checkpoints").exists()
    assert checkpoints.newest(stage).marker.step == 8
    assert math.isfinite(metrics(stage / "attempt-2")[-1]["loss"])


def test_adapters_of_a_4_bit_base_go_on_in_their_own_dtype(tiny_model, tmp_path):
    def base():
        given = fitting.recipe(tiny_model, method="qlora")
        torch.manual_seed(0)
        return load_base(tiny_model, given.model, given.quantization)

    keys = {"method": "qlora", "steps": 4, "save_steps": 2}
    fitting.train(tiny_model, tmp_path / "attempt-1", model=base(), **keys)
    shutil.rmtree(tmp_path / "attempt-1" / "checkpoints" / "checkpoint-4")
    half = checkpoints.newest(tmp_path)
    assert half.marker.step == 2
    model = fitting.train(tiny_model, tmp_path / "attempt-2", model=base(), resume=half, **keys)
    assert {p.dtype for name, p in model.named_parameters() if "lora" in name} == {torch.bfloat16}
    for ours, theirs in zip(metrics(tmp_path / "attempt-2"), metrics(tmp_path / "attempt-1"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    fit.widen(model)
    assert {p.dtype for name, p in model.named_parameters() if "lora" in name} == {torch.float32}


def test_rows_grouped_by_length_go_on_in_the_middle_of_an_epoch(tiny_model, tmp_path):
    keys = {"group_by_length": True, "steps": 6, "save_steps": 1, "keep_checkpoints": 6}
    fitting.train(tiny_model, tmp_path / "attempt-1", **keys)
    for later in (5, 6):
        shutil.rmtree(tmp_path / "attempt-1" / "checkpoints" / f"checkpoint-{later}")
    fitting.train(tiny_model, tmp_path / "attempt-2", resume=checkpoints.newest(tmp_path), **keys)
    ours, theirs = metrics(tmp_path / "attempt-2"), metrics(tmp_path / "attempt-1")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
