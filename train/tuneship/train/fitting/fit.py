"""Train the adapter: TRL's `SFTTrainer` over rows that we tokenized and masked ourselves.

TRL is given `input_ids` and `labels`: its own masking needs generation markers that most templates lack, and its own
truncation cuts answers silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import PrinterCallback
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from tuneship.core.errors import Checkpointed, TrainError
from tuneship.core.recipe import Recipe
from tuneship.train.data import store
from tuneship.train.data.template import Encoded
from tuneship.train.fitting import checkpoints, metrics
from tuneship.train.fitting.arguments import arguments
from tuneship.train.fitting.callbacks import Keep, Record
from tuneship.train.fitting.checkpoints import Checkpoint, Identity
from tuneship.train.fitting.faults import Watch, termination
from tuneship.train.fitting.heldout import HeldOut
from tuneship.train.fitting.order import Order
from tuneship.train.fitting.trainer import Trainer
from tuneship.train.kernels import fused
from tuneship.train.kernels.keep import CompileLayers, KeepLayers
from tuneship.train.model import lora_config
from tuneship.train.planning.plan import Plan


def fit(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    recipe: Recipe,
    plan: Plan,
    attempt: Path,
    identity: Identity,
    resume: Checkpoint | None = None,
    heldout: Sequence[Encoded] = (),
) -> Any:
    """Train LoRA adapters on `model`, or all of it, and return the PEFT model, or the model itself.

    A line per step goes to `attempt/metrics.jsonl`.

    Args:
        model: the base.
        tokenizer: its.
        rows: to learn from.
        recipe: how.
        plan: how a step is cut.
        attempt: where metrics and checkpoints go.
        identity: what is written beside checkpoints.
        resume: where to go on from; of this identity.
        heldout: rows for `train.eval_steps`.

    Raises:
        TrainError: the loss is gone, or memory ran out at a single row.
        Checkpointed: SIGTERM came; a checkpoint was written.

    """
    if resume:
        metrics.carry_over(resume.attempt, attempt, resume.marker.step)
    trainer = build(model, tokenizer, rows, recipe, plan, attempt, at_most=_at_most(plan, resume))
    train = recipe.train
    watched = HeldOut(trainer, heldout, attempt, train.eval_steps, train.patience) if train.eval_steps else None
    with termination() as request:
        if watched:
            trainer.add_callback(watched)
        trainer.add_callback(Record(trainer, attempt, Watch(train.spike)))
        trainer.add_callback(Keep(trainer, train.save_steps, request, identity, resumed=bool(resume)))
        if watched and resume:
            watched.take_over(resume.attempt)
        _run(trainer, plan, resume, ended=bool(watched and resume and watched.exhausted))
        if request.made and trainer.state.global_step < plan.steps and not (watched and watched.exhausted):
            raise _checkpointed(attempt)
    if watched:
        watched.load_best()
    return trainer.model.eval()


def build(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Encoded],
    recipe: Recipe,
    plan: Plan,
    attempt: Path,
    *,
    at_most: int = 0,
) -> Trainer:
    """The trainer, adapters attached; `at_most` rows at a time where that is fewer than planned."""
    train = recipe.train
    learnt = store.stored(rows)
    order = Order(learnt.lengths, train.seed, train.effective_batch * train.group_by_length)
    trainer = Trainer(
        order,
        at_most,
        model=model,
        args=arguments(recipe, plan, attempt),
        # Lists of Python's numbers take four times as long, in which the device has nothing to do (step_waits.py).
        train_dataset=learnt.learnt.with_format("numpy", dtype=np.int64),
        processing_class=tokenizer,
        peft_config=None if train.method == "full" else lora_config(recipe.lora, model),
    )
    trainer.remove_callback(PrinterCallback)  # our own says it
    trainer.add_callback(KeepLayers(model, plan.kept_layers))
    if plan.device == "cuda" and not train.compile:
        install_liger(trainer.model, train.liger)
    if train.kernels == "fused" or (train.kernels == "auto" and plan.device == "cuda"):
        # Over Liger's MLP; its norms and rotations stay.
        fused.install(trainer.model)
    if train.compile:
        trainer.add_callback(CompileLayers(trainer.model))
    if trainer.args.fp16:
        widen(trainer.model)
    return trainer


def install_liger(model: Any, wanted: Literal["auto"] | bool) -> None:
    """Liger's norms, rotations and activations; the loss stays TRL's, which builds no logits either.

    Raises:
        TrainError: wanted, and not installed.

    """
    there = is_liger_kernel_available()
    if wanted is True and not there:
        raise TrainError("train.liger = true, but Liger is not installed", hint="pip install liger-kernel")
    if wanted and there:
        apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})


def widen(model: Any) -> None:
    """Adapters in float32, for cards without bf16: TRL makes those of a 4-bit base bf16, which no loss scaler takes."""
    for value in model.parameters():
        if value.requires_grad:
            value.data = value.data.float()


def _run(trainer: Trainer, plan: Plan, resume: Checkpoint | None, *, ended: bool) -> None:
    if resume and (ended or resume.marker.step >= plan.steps):  # the trainer would take one more step
        trainer._load_from_checkpoint(str(resume.path))
        return
    try:
        trainer.train(resume_from_checkpoint=str(resume.path) if resume else None)
    except torch.OutOfMemoryError:
        what = "a single row" if trainer.micro_batch == 1 else f"{trainer.micro_batch} rows, outside of their step,"
        raise TrainError(
            f"out of memory at {what} of up to {plan.longest_row} tokens",
            hint="--train.checkpointing true, or lower data.max_length or lora.rank",
        ) from None


def _at_most(plan: Plan, resume: Checkpoint | None) -> int:
    """What memory allowed before."""
    return resume.marker.micro_batch if resume and resume.marker.micro_batch < plan.micro_batch else 0


def _checkpointed(attempt: Path) -> TrainError | Checkpointed:
    last = checkpoints.last_of(attempt)
    if last is None:
        return TrainError("ended by SIGTERM in a step that was not worth keeping")
    return Checkpointed(
        f"training was stopped after step {last.marker.step}, which is kept", hint="the same command with --resume"
    )
