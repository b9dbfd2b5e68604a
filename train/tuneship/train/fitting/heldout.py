"""Held-out NLL while training: the best adapter is kept, and training ends when it gets no better."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from tuneship.core.progress import say
from tuneship.train import parity
from tuneship.train.data.template import Encoded
from tuneship.train.fitting import checkpoints, metrics
from tuneship.train.fitting.trainer import Trainer

_BEST = "best"


class HeldOut(TrainerCallback):
    """Every so many steps, and after the last: teacher-forced NLL per answer token of the same rows.

    Args:
        trainer: whose model is measured.
        rows: held out.
        attempt: whose metrics.jsonl says what was measured before a resume.
        every: steps.
        patience: measurements without a better one that end training; 0: it never ends early.

    """

    def __init__(self, trainer: Trainer, rows: Sequence[Encoded], attempt: Path, every: int, patience: int) -> None:
        self._trainer = trainer
        self._rows = rows
        self._best_path = attempt / checkpoints.FOLDER / _BEST
        self._every = every
        self._patience = patience
        self._nlls = dict(metrics.column(attempt, metrics.HELDOUT_NLL))

    @property
    def exhausted(self) -> bool:
        """Whether it has not got better for too long."""
        return bool(self._patience) and list(self._nlls).index(self._best_step) + self._patience < len(self._nlls)

    @property
    def _best_step(self) -> int:
        return min(self._nlls, key=self._nlls.__getitem__)

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Before the step is logged, so that its line has the figure."""
        step = state.global_step
        if step % self._every and step < state.max_steps:
            return
        tokenizer = self._trainer.processing_class
        nll = parity.nll(self._trainer.model, self._rows, tokenizer.pad_token_id or 0)
        self._nlls[step] = self._trainer.heldout_nll = nll
        if self._best_step == step:
            self._save()
        if self.exhausted:
            say(f"no better on held-out rows since step {self._best_step}: training ends")
            control.should_training_stop = True

    def take_over(self, before: Path) -> None:
        """Bring the best adapter of the attempt that is resumed."""
        best = before / checkpoints.FOLDER / _BEST
        if best.exists():
            shutil.copytree(best, self._best_path)

    def load_best(self) -> None:
        """Let the model be what it was when held-out rows were likeliest."""
        best = self._best_step
        if best != list(self._nlls)[-1]:
            self._trainer._load_from_checkpoint(str(self._best_path))
            last = list(self._nlls.values())[-1]
            say(f"the adapter of step {best} is kept: held-out NLL {self._nlls[best]:.4f}, at the end {last:.4f}")

    def _save(self) -> None:
        """Whole or not at all."""
        written = self._best_path.with_name(f"{_BEST}.new")
        shutil.rmtree(written, ignore_errors=True)
        self._trainer.save_model(str(written))
        shutil.rmtree(self._best_path, ignore_errors=True)
        written.rename(self._best_path)
