"""Trackers are told what metrics.jsonl is told, and a person how long it will take."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import types
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from transformers import TrainerCallback  # noqa: E402 - needs torch

from tests.unit.train import fitting  # noqa: E402
from tuneship.train.fitting import callbacks, fit, tracking  # noqa: E402
from tuneship.train.fitting.arguments import arguments  # noqa: E402

STEPS = 3
FIGURES = ("loss", "learning_rate", "grad_norm", "tokens_per_s", "mfu", "peak_memory_bytes")
VARIABLES = ("TENSORBOARD_LOGGING_DIR", "WANDB_PROJECT", "WANDB_DIR")


def metrics(attempt: Path) -> list[dict]:
    return [json.loads(line) for line in (attempt / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> pytest.MonkeyPatch:
    """Nobody's variables, and after the test none of ours."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize("trackers", [(), ("tensorboard",), ("wandb", "trackio")])
def test_the_trainer_is_told_who_is_told(tiny_model, tmp_path, trackers):
    recipe = fitting.recipe(tiny_model, report_to=trackers).model_copy(update={"name": "invoices"})
    args = arguments(recipe, fitting.plan(recipe, 2), tmp_path)
    assert args.report_to == list(trackers)
    assert (args.project, args.run_name) == ("tuneship", "invoices")


def test_trackers_write_into_the_attempt_unless_their_own_variables_say_so(tmp_path, environment):
    tracking.prepare(("tensorboard", "wandb"), tmp_path)
    set_by_us = {name: value for name in VARIABLES if (value := tracking.os.environ[name])}
    assert set_by_us == {
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
        "WANDB_PROJECT": "tuneship",
        "WANDB_DIR": str(tmp_path),
    }
    environment.setenv("WANDB_PROJECT", "mine")
    tracking.prepare(("wandb",), tmp_path)
    assert tracking.os.environ["WANDB_PROJECT"] == "mine"


class Told(TrainerCallback):
    """As a tracker is."""

    def __init__(self) -> None:
        self.steps: list[dict] = []

    def on_log(self, _args, state, _control, logs, **_) -> None:
        if "loss" in logs:
            self.steps.append({"step": state.global_step} | logs)


@pytest.mark.parametrize("peak", [1e9, None])
def test_a_callback_sees_the_figures_of_metrics_jsonl(tiny_model, tmp_path, monkeypatch, peak):
    """On a card whose peak is known, the share of it; else nothing of it."""
    told, build = Told(), fit.build

    def build_with_tracker(*given, **more):
        trainer = build(*given, **more)
        trainer.add_callback(told)
        return trainer

    monkeypatch.setattr(fit, "build", build_with_tracker)
    monkeypatch.setattr(tracking, "peak_flops", lambda: peak)
    fitting.train(tiny_model, tmp_path, steps=STEPS)
    assert [step["step"] for step in told.steps] == list(range(1, STEPS + 1))
    for step, line in zip(told.steps, metrics(tmp_path), strict=True):
        assert {key: step.get(key) for key in FIGURES} == {key: line[key] for key in FIGURES}
        assert step["tokens_per_s"] > 0
        assert step["peak_memory_bytes"] > 10**8
        assert ("mfu" in step) == bool(peak)
        if peak:
            assert step["mfu"] > 0


def test_how_long_is_left_is_said_of_each_step(tiny_model, tmp_path, monkeypatch, capsys):
    """By the mean of the steps so far, here of 100 s each."""
    clock = itertools.count(0.0, 100.0)
    slow = types.SimpleNamespace(perf_counter=lambda: next(clock), monotonic=callbacks.time.monotonic)
    monkeypatch.setattr(callbacks, "time", slow)
    fitting.train(tiny_model, tmp_path, steps=8)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train  ")]
    assert re.fullmatch(r"train  1/8  loss \d\.\d{3}  [\d,]+ tok/s  12 min left", said[0]), said[0]
    assert re.fullmatch(r"train  8/8  loss \d\.\d{3}  [\d,]+ tok/s  0 s left", said[-1]), said[-1]


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="NOT RUN: tensorboard is not installed")
def test_tensorboard_has_the_figures(tiny_model, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fitting.train(tiny_model, tmp_path, steps=STEPS, report_to=("tensorboard",))
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key in ("loss", "tokens_per_s", "peak_memory_bytes"):
        found = [(event.step, event.value) for event in written.Scalars(f"train/{key}")]
        assert found == [(line["step"], pytest.approx(line[key], rel=1e-5)) for line in metrics(tmp_path)]


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="NOT RUN: wandb is not installed")
def test_wandb_writes_offline_into_the_attempt(tiny_model, tmp_path, environment):
    environment.setenv("WANDB_MODE", "offline")
    fitting.train(tiny_model, tmp_path, steps=STEPS, report_to=("wandb",))
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.skipif(not importlib.util.find_spec("trackio"), reason="NOT RUN: trackio is not installed")
def test_trackio_has_the_figures(tiny_model, tmp_path, environment):
    environment.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    fitting.train(tiny_model, tmp_path, steps=STEPS, report_to=("trackio",))
    from trackio.sqlite_storage import SQLiteStorage

    kept = [line for line in SQLiteStorage.get_logs("tuneship", "run") if "train/loss" in line]
    for key in ("loss", "tokens_per_s", "peak_memory_bytes"):
        assert [line[f"train/{key}"] for line in kept] == [line[key] for line in metrics(tmp_path)]
