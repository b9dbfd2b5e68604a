"""What happens beside a step: it is recorded, judged, and now and then kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuneship.core.errors import TrainError
from tuneship.core.progress import progress
from tuneship.train import checkpoints, metrics
from tuneship.train.checkpoints import Identity
from tuneship.train.faults import Request, Watch
from tuneship.train.trainer import Trainer

_SAVE_EVERY_S = 600
_WORTH_SAVING_S = 60
"""Of training, at its end: what comes then takes minutes, and may be killed too."""


class Record(TrainerCallback):
    """One line a step to a file, progress to the user, and an end to a training whose loss is gone."""

    def __init__(self, trainer: Trainer, attempt: Path, watch: Watch) -> None:
        self._trainer = trainer
        self._attempt = attempt
        self._watch = watch
        self._since = time.perf_counter()
        self._tokens = 0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts with the first step."""
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """After each step, and before it can be kept."""
        if not logs or "loss" not in logs:
            return
        loss, grad_norm = float(logs["loss"]), float(logs.get("grad_norm", 0))
        now, tokens = time.perf_counter(), int(self._trainer.tokens_seen)
        rate = (tokens - self._tokens) / max(now - self._since, 1e-9)
        self._since, self._tokens = now, tokens
        metrics.append(
            self._attempt,
            {
                "step": state.global_step,
                "total": state.max_steps,
                "loss": loss,
                "learning_rate": float(logs.get("learning_rate", 0)),
                "grad_norm": grad_norm,
                "tokens_per_s": round(rate, 1),
                "micro_batch": self._trainer.micro_batch,
                "accumulation": self._trainer.accumulation,
            },
        )
        # With fp16 a gradient that overflows is usual: its step is left out and the loss scaled down.
        wrong = self._watch.judge(loss, 0.0 if args.fp16 else grad_norm)
        if wrong:
            raise TrainError(f"{wrong} at step {state.global_step}", hint=_way_back(self._attempt))
        if self._watch.suspicious:
            control.should_save = False
        progress("train", state.global_step, state.max_steps, f"loss {loss:.3f}  {rate:,.0f} tok/s")


def _way_back(attempt: Path) -> str:
    good = checkpoints.last_of(attempt)
    kept = f"the last good checkpoint is of step {good.marker.step}, {good.path}; " if good else ""
    return f"{kept}lower train.learning_rate, raise train.warmup, or look at the rows of that step"


class Keep(TrainerCallback):
    """Checkpoints: every so many steps, every ten minutes, when somebody asks for an end, and at the end."""

    def __init__(
        self, trainer: Trainer, every: Literal["auto"] | int, request: Request, identity: Identity, *, resumed: bool
    ) -> None:
        self._trainer = trainer
        self._folder = Path(trainer.args.output_dir)
        self._every = every
        self._request = request
        self._identity = identity
        self._resumed = resumed
        self._began = self._saved = time.monotonic()

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Say whether this step is kept, and whether it is the last."""
        if self._request.made:
            control.should_training_stop = True
        control.should_save = (control.should_training_stop and self._is_worth_it()) or self._is_due(state.global_step)

    def on_save(self, _args: Any, state: TrainerState, _control: Any, **_: Any) -> None:
        """What the trainer wrote is whole. A resumed training then has no use for what it was resumed from."""
        written = self._folder / f"checkpoint-{state.global_step}"
        checkpoints.seal(written, state.global_step, self._trainer.micro_batch, self._identity)
        self._saved = time.monotonic()
        if self._resumed:
            attempt = self._folder.parent
            checkpoints.remove_all(attempt.parent, but=attempt)

    def _is_worth_it(self) -> bool:
        return self._request.made or (self._every != 0 and time.monotonic() - self._began > _WORTH_SAVING_S)

    def _is_due(self, step: int) -> bool:
        if self._every == "auto":
            return time.monotonic() - self._saved > _SAVE_EVERY_S
        return self._every > 0 and step % self._every == 0
