"""A training small enough for a test: the tiny model in float32, rows of unequal length, steps of 4 rows.

python fitting.py MODEL ATTEMPT STEP    # trains, and ends itself by SIGKILL in the middle of that step
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.data.template import IGNORED, Encoded
from tuneship.train.fitting import fit
from tuneship.train.fitting.checkpoints import Checkpoint, Identity
from tuneship.train.fitting.trainer import Trainer
from tuneship.train.planning.memory import Memory
from tuneship.train.planning.plan import Plan

LENGTHS = (5, 40, 9, 23, 12, 31, 7, 18, 27, 6, 35, 14)
"""Three steps an epoch."""
DROPOUT = 0.2
"""So that a step's loss depends on the random numbers before it."""


def rows(lengths: Sequence[int] = LENGTHS) -> list[Encoded]:
    """The second half of each carries loss."""
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 400, (length,), generator=draw).tolist() for length in lengths]
    return [Encoded(row, [IGNORED] * (len(row) // 2) + row[len(row) // 2 :]) for row in ids]


def recipe(model: Path, **train: Any) -> Recipe:
    """Plain LoRA, as float32 as the model."""
    train = {"method": "lora", "effective_batch": 4, "steps": 8, "learning_rate": 5e-3, "optimizer": "adamw"} | train
    method = "nf4" if train["method"] == "qlora" else "none"
    sections = {
        "model": {"id": str(model), "dtype": "float32"},
        "quantization": {"method": method},
        "data": {"train": "t", "heldout": "h"},
        "lora": {"rank": 4, "dropout": DROPOUT},
    }
    return Recipe.model_validate(sections | {"train": train})


def plan(given: Recipe, micro_batch: int, count: int = len(LENGTHS), device: str = "cpu") -> Plan:
    """Nothing is computed again."""
    accumulation = given.train.effective_batch // micro_batch
    return Plan(
        device=device, micro_batch=micro_batch, accumulation=accumulation, kept_layers=2, layers=2, rows=count,
        steps=given.train.steps, tokens_per_epoch=sum(LENGTHS), longest_row=max(LENGTHS), memory=Memory(0, 0, 0, 0, 0),
        estimated_bytes=0, budget_bytes=0, step_s=0,
    )  # fmt: skip


def load(path: Path) -> tuple[Any, Any]:
    """Model and tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert Shape.of(model.config.to_dict()).layers == 2
    return model, AutoTokenizer.from_pretrained(path)


def train(
    path: Path,
    attempt: Path,
    *,
    micro_batch: int = 2,
    resume: Checkpoint | None = None,
    model: Any = None,
    heldout: Sequence[Encoded] = (),
    **keys: Any,
) -> Any:
    """`fit` as the stage calls it; the model it returns."""
    attempt.mkdir(parents=True, exist_ok=True)
    given = recipe(path, **keys)
    loaded, tokenizer = load(path)
    cut, identity = plan(given, micro_batch), Identity.of(given, {})
    return fit.fit(model or loaded, tokenizer, rows(), given, cut, attempt, identity, resume, heldout)


def without_dropout(given: Recipe) -> Recipe:
    """The same otherwise: two ways to cut a step draw other numbers."""
    return given.model_copy(update={"lora": given.lora.model_copy(update={"dropout": 0.0})})


def first_step(trainer: Trainer) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the first step, before clipping and update."""
    catch = _Catch()
    trainer.add_callback(catch)
    trainer.train()
    return trainer.state.log_history[0]["loss"], catch.gradient


class _Catch(TrainerCallback):
    gradient: torch.Tensor

    def on_pre_optimizer_step(self, _args: Any, _state: Any, control: Any, model: Any, **_: Any) -> None:
        self.gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone()
        control.should_training_stop = True


class KillMidStep(TrainerCallback):
    """After a step's backward, before its update."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_pre_optimizer_step(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step + 1 == self._step:
            os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    path, attempt, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    build = fit.build

    def build_to_be_killed(*given: Any, **more: Any) -> Trainer:
        trainer = build(*given, **more)
        trainer.add_callback(KillMidStep(step))
        return trainer

    fit.build = build_to_be_killed
    train(path, attempt, save_steps=1, keep_checkpoints=3)


if __name__ == "__main__":
    main()
