"""Held-out rows decide which adapter is kept and when training ends; every step's figures are on record."""

from __future__ import annotations

import json
import shlex
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tuneship.core.errors import TrainError
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape

torch = pytest.importorskip("torch")

from tests.unit.train import fitting  # noqa: E402 - needs torch
from tuneship.train import parity  # noqa: E402
from tuneship.train.fitting import checkpoints, tracking  # noqa: E402
from tuneship.train.fitting.tracking import Meter  # noqa: E402

# Rows that training never sees: the better it knows its own, the worse it does on these.
STRANGERS = fitting.rows((11, 30, 19, 8))[::-1]
LEARNS_BY_HEART = {"steps": 24, "learning_rate": 2e-2, "scheduler": "constant", "warmup": 0.0, "eval_steps": 2}

STOPS = LEARNS_BY_HEART | {"patience": 3, "save_steps": 1, "keep_checkpoints": 12}


def metrics(attempt: Path) -> list[dict]:
    return [json.loads(line) for line in (attempt / "metrics.jsonl").read_text().splitlines()]


def nlls(attempt: Path) -> dict[int, float]:
    return {line["step"]: line["heldout_nll"] for line in metrics(attempt) if "heldout_nll" in line}


@pytest.fixture(scope="module")
def stopped(tiny_model, tmp_path_factory):
    """(model, attempt) of a training that patience ended."""
    attempt = tmp_path_factory.mktemp("stopped") / "attempt-1"
    model = fitting.train(tiny_model, attempt, heldout=STRANGERS, **STOPS)
    return model, attempt


def test_the_nll_is_that_of_a_plain_forward(stopped):
    model, _ = stopped
    total, tokens = 0.0, 0
    for row in STRANGERS:
        logits = model(torch.tensor([row.input_ids])).logits[0].detach().log_softmax(-1)
        for at in range(1, len(row.input_ids)):
            if row.labels[at] >= 0:
                total -= float(logits[at - 1, row.input_ids[at]])
                tokens += 1
    assert parity.nll(model, STRANGERS, 0) == pytest.approx(total / tokens, abs=1e-5)


def test_training_ends_when_it_gets_no_better_and_the_best_is_kept(stopped):
    model, attempt = stopped
    seen = nlls(attempt)
    best = min(seen, key=seen.get)
    assert list(seen) == list(range(2, best + 2 * 3 + 1, 2)), "three measurements after the best"
    assert max(seen) < 24
    assert max(seen.values()) > seen[best] + 0.01
    assert parity.nll(model, STRANGERS, 0) == pytest.approx(seen[best], abs=1e-5)


@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_resumed_training_knows_what_was_best(stopped, tiny_model, tmp_path, before):
    """Steps before the end: at it, before the last measurement, before the best."""
    _, attempt = stopped
    shutil.copytree(attempt, tmp_path / "attempt-1")
    seen = nlls(attempt)
    for later in range(before):
        shutil.rmtree(tmp_path / "attempt-1" / "checkpoints" / f"checkpoint-{max(seen) - later}")
    last = checkpoints.newest(tmp_path)
    assert last.marker.step == max(seen) - before
    model = fitting.train(tiny_model, tmp_path / "attempt-2", resume=last, heldout=STRANGERS, **STOPS)
    assert nlls(tmp_path / "attempt-2") == pytest.approx(seen, abs=1e-4)
    assert [line["step"] for line in metrics(tmp_path / "attempt-2")] == list(range(1, max(seen) + 1))
    assert parity.nll(model, STRANGERS, 0) == pytest.approx(min(seen.values()), abs=1e-4)


def test_without_patience_it_goes_on_to_its_last_step(tiny_model, tmp_path):
    fitting.train(tiny_model, tmp_path / "attempt-1", heldout=STRANGERS, steps=5, eval_steps=2)
    assert list(nlls(tmp_path / "attempt-1")) == [2, 4, 5]


def test_figures_of_every_step(stopped):
    lines = metrics(stopped[1])
    assert all(line["tokens_per_s"] > 0 and line["peak_memory_bytes"] > 10**8 for line in lines)
    assert all(line["mfu"] is None for line in lines) or torch.cuda.is_available()


def test_tokens_are_counted_without_padding_and_flop_by_weights(monkeypatch):
    shape = Shape(hidden=8, intermediate=16, layers=2, heads=2, kv_heads=1, head_dim=4, vocab=32, tied=True)
    weights = shape.linear_parameters + 8 * 32
    monkeypatch.setattr(tracking, "peak_flops", lambda: 1e6)
    clock = iter([0.0, 2.0, 4.0])
    monkeypatch.setattr(tracking.time, "perf_counter", lambda: next(clock))
    lap = Meter(shape, frozen=True).lap(100)
    assert lap["tokens_per_s"] == 50
    assert lap["mfu"] == pytest.approx(50 * 4 * weights / 1e6, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("Voodoo 2", None),
    ],
)
def test_a_cards_peak_is_found_by_its_name(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert tracking.peak_flops() == (tflops and tflops * 1e12)


def test_a_tracker_that_is_not_installed_is_said_at_once(monkeypatch):
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(TrainError, match="names trackio, which is not installed") as missing:
        tracking.require(("trackio",))
    assert missing.value.hint == "pip install trackio 'huggingface-hub<2'"
    with pytest.raises(TrainError) as missing:
        tracking.require(("wandb",))
    assert missing.value.hint == "pip install wandb"
    tracking.require(())


def test_what_is_installed_with_a_tracker_is_what_transformers_takes():
    wanted = Requirement(shlex.split(tracking._PACKAGES["trackio"])[1])
    known = map(Requirement, metadata.requires("transformers"))
    (allowed,) = [one for one in known if one.name == wanted.name and not one.marker]
    assert str(next(s for s in allowed.specifier if s.operator == "<")).removesuffix(".0") == str(wanted.specifier)


def test_durations():
    assert [tracking.duration(s) for s in (0, 89, 240, 11_520)] == ["0 s", "89 s", "4 min", "3 h 12 min"]


@pytest.mark.parametrize(
    ("train", "data", "complaint"),
    [
        ({"patience": 2}, {"heldout": "h"}, "patience = 2 needs train.eval_steps"),
        ({"eval_steps": 2}, {}, "eval_steps = 2 needs data.heldout"),
        ({"report_to": ["mlflow"]}, {}, "trackio"),
    ],
)
def test_recipes_that_cannot_be_followed(train, data, complaint):
    with pytest.raises(ValueError, match=complaint):
        Recipe.model_validate({"model": {"id": "m"}, "data": {"train": "t"} | data, "train": train})
