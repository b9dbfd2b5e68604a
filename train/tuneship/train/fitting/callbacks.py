"""What happens beside a step: it is recorded, judged, and now and then kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tuneship.core.errors import TrainError
from tuneship.core.progress import progress
from tuneship.train.fitting import checkpoints, metrics, tracking
from tuneship.train.fitting.checkpoints import Identity
from tuneship.train.fitting.faults import Request, Watch
from tuneship.train.fitting.trainer import Trainer

_SAVE_EVERY_S = 600
_WORTH_SAVING_S = 60
"""Of training, at its end: what comes then takes minutes, and may be killed too."""


class Record(TrainerCallback):
    """One line a step to a file, progress to the user, and an end to a training whose loss is gone."""

    def __init__(self, trainer: Trainer, attempt: Path, watch: Watch) -> None:
        self._trainer = trainer
        self._attempt = attempt
        self._watch = watch
        self._began, self._first = time.perf_counter(), 0

    def on_train_begin(self, _args: Any, state: TrainerState, _control: Any, **_: Any) -> None:
        """The clock starts with the first step of this process."""
        self._began, self._first = time.perf_counter(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """After each step, and before it can be kept."""
        if not logs or "loss" not in logs:
            return
        step, loss, grad_norm = state.global_step, float(logs["loss"]), float(logs.get("grad_norm", 0))
        record = {
            "step": step,
            "total": state.max_steps,
            "loss": loss,
            "learning_rate": float(logs.get("learning_rate", 0)),
            "grad_norm": grad_norm,
            "tokens_per_s": logs["tokens_per_s"],
            "mfu": logs.get("mfu"),
            "peak_memory_bytes": logs["peak_memory_bytes"],
            "micro_batch": self._trainer.micro_batch,
            "accumulation": self._trainer.accumulation,
        }
        heldout = logs.get(metrics.HELDOUT_NLL)
        metrics.append(self._attempt, record | ({} if heldout is None else {metrics.HELDOUT_NLL: heldout}))
        # With fp16 a gradient that overflows is usual: its step is left out and the loss scaled down.
        wrong = self._watch.judge(loss, 0.0 if args.fp16 else grad_norm)
        if wrong:
            raise TrainError(f"{wrong} at step {step}", hint=_way_back(self._attempt))
        if self._watch.suspicious:
            control.should_save = False
        a_step_s = (time.perf_counter() - self._began) / (step - self._first)
        left = tracking.duration(a_step_s * (state.max_steps - step))
        beside = "" if heldout is None else f"  held-out {heldout:.3f}"
        detail = f"loss {loss:.3f}{beside}  {logs['tokens_per_s']:,.0f} tok/s  {left} left"
        progress("train", step, state.max_steps, detail)


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
