"""The recipe in the trainer's words: schedulers, optimizers, clipping."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import get_args

import pytest

from tuneship.core.recipe import Recipe
from tuneship.core.recipe_train import Train

torch = pytest.importorskip("torch")

from transformers import get_scheduler  # noqa: E402 - needs torch
from transformers.training_args import OptimizerNames  # noqa: E402

from tests.unit.train import fitting  # noqa: E402
from tuneship.train.fitting import fit  # noqa: E402
from tuneship.train.fitting.arguments import arguments  # noqa: E402
from tuneship.train.fitting.trainer import Trainer  # noqa: E402

RATE = 5e-3
STEPS, WARMUP = 20, 5
SCHEDULERS = get_args(Train.model_fields["scheduler"].annotation)
# Of AdamW: the bits of its moments, and whether they may move to host memory.
OPTIMIZERS = {"paged_adamw_8bit": (8, True), "adamw_8bit": (8, False), "paged_adamw": (32, True), "adamw": (32, False)}


def given(tiny_model: Path, **train) -> Recipe:
    return fitting.recipe(tiny_model, learning_rate=RATE, **train)


def told(recipe: Recipe, attempt: Path, device: str = "cpu"):
    return arguments(recipe, fitting.plan(recipe, 2, device=device), attempt)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_can_be_built_and_falls_or_stays(tiny_model, tmp_path, name):
    args = told(given(tiny_model, scheduler=name, steps=STEPS, warmup=WARMUP / STEPS), tmp_path)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    kind, more = args.lr_scheduler_type, args.lr_scheduler_kwargs
    scheduler = get_scheduler(kind, optimizer, args.warmup_steps, args.max_steps, scheduler_specific_kwargs=more)
    rates = []
    for _ in range(args.max_steps):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert max(rates) == pytest.approx(RATE)
    if name != "constant":  # which has no warm-up
        assert rates[:WARMUP] == pytest.approx([RATE * step / WARMUP for step in range(WARMUP)])
    after = rates[WARMUP:]
    if name.startswith("constant"):
        assert after == pytest.approx([RATE] * len(after))
    else:  # restarts, too: transformers gives them one cycle
        assert after == sorted(after, reverse=True)
        assert after[-1] < 0.6 * RATE


def test_every_optimizer_is_one_of_the_trainers(tiny_model, tmp_path):
    assert set(get_args(Train.model_fields["optimizer"].annotation)) == OPTIMIZERS.keys()
    for name, (bits, paged) in OPTIMIZERS.items():
        args = told(given(tiny_model, optimizer=name), tmp_path, "cuda")
        assert args.optim in set(OptimizerNames)
        made, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        assert "AdamW" in made.__name__
        assert settings["lr"] == RATE
        assert (settings.get("optim_bits", 32), settings.get("is_paged", False)) == (bits, paged), name


def test_without_cuda_it_is_adamw_and_that_is_said(tiny_model, tmp_path, capsys):
    assert told(given(tiny_model, optimizer="paged_adamw_8bit"), tmp_path).optim == OptimizerNames.ADAMW_TORCH
    assert "train.optimizer paged_adamw_8bit needs CUDA: using adamw (32-bit)" in capsys.readouterr().err


def test_gradients_are_scaled_down_to_the_recipes_norm(tiny_model, tmp_path):
    """Of plain SGD's first step: its length is the rate times the norm."""
    recipe = given(tiny_model, max_grad_norm=0.017, steps=1, warmup=0.0)
    assert told(recipe, tmp_path).max_grad_norm == 0.017
    model, tokenizer = fitting.load(tiny_model)
    trainer = fit.build(model, tokenizer, fitting.rows(), recipe, fitting.plan(recipe, 2), tmp_path)
    learnt = [value for value in trainer.model.parameters() if value.requires_grad]
    trainer.optimizer = torch.optim.SGD(learnt, lr=RATE)
    before = torch.cat([value.detach().flatten() for value in learnt])
    trainer.train()
    assert trainer.state.log_history[0]["grad_norm"] > 1
    after = torch.cat([value.detach().flatten() for value in learnt])
    assert (after - before).norm().item() == pytest.approx(RATE * 0.017, rel=1e-3)


def test_the_learning_rate_of_each_step_is_the_schedules(tiny_model, tmp_path):
    """Steps of a real training: two of eight rise, six fall along half a cosine, the last short of 0."""
    fitting.train(tiny_model, tmp_path, scheduler="cosine", warmup=0.25, steps=8, learning_rate=RATE)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    falling = [RATE * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)]
    assert [line["learning_rate"] for line in lines] == pytest.approx([0, RATE / 2, *falling])
