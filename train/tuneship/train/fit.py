"""Train the adapter: TRL's `SFTTrainer` over rows that we tokenized and masked ourselves.

TRL is given `input_ids` and `labels`: its own masking needs generation markers that most templates lack, and its own
truncation cuts answers silently.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tuneship.core.errors import TrainError
from tuneship.core.progress import progress, say
from tuneship.core.recipe import Recipe
from tuneship.train.model import lora_config, pick_dtype
from tuneship.train.plan import Plan
from tuneship.train.template import Encoded

_OPTIMIZERS = {"paged_adamw_8bit": "paged_adamw_8bit", "adamw_8bit": "adamw_bnb_8bit", "adamw": "adamw_torch"}


def fit(model: Any, tokenizer: Any, rows: Sequence[Encoded], recipe: Recipe, plan: Plan, attempt: Path) -> Any:
    """Train LoRA adapters on `model` and return the PEFT model; a line per step goes to `attempt/metrics.jsonl`.

    Raises:
        TrainError: the loss is not finite, or memory ran out.

    """
    trainer = SFTTrainer(
        model=model,
        args=_arguments(recipe, plan, attempt),
        train_dataset=datasets.Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in rows]),
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora, model),
        callbacks=[_Metrics(attempt / "metrics.jsonl")],
    )
    _quiet(trainer)
    try:
        trainer.train()
    except torch.OutOfMemoryError:
        raise TrainError(
            f"out of memory at a micro-batch of {plan.micro_batch} x {plan.longest_row} tokens",
            hint=f"--train.micro_batch {max(plan.micro_batch // 2, 1)}, or --train.checkpointing true",
        ) from None
    return trainer.model.eval()


def _arguments(recipe: Recipe, plan: Plan, attempt: Path) -> SFTConfig:
    train = recipe.train
    on_gpu = plan.device == "cuda"
    dtype = pick_dtype("auto")
    return SFTConfig(
        output_dir=str(attempt / "trainer"),
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=round(train.warmup * plan.steps),
        optim=_optimizer(train.optimizer, on_gpu=on_gpu),
        max_grad_norm=train.max_grad_norm,
        train_sampling_strategy="group_by_length" if train.group_by_length else "random",
        gradient_checkpointing=plan.checkpointing,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        seed=train.seed,
        data_seed=train.seed,
        packing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )


def _optimizer(name: str, *, on_gpu: bool) -> str:
    if not on_gpu and name != "adamw":
        say(f"train.optimizer {name} needs CUDA: using adamw (32-bit)")
        return "adamw_torch"
    return _OPTIMIZERS[name]


def _quiet(trainer: SFTTrainer) -> None:
    """Our callback prints; the trainer's own printer would say it twice."""
    from transformers import PrinterCallback, ProgressCallback  # noqa: PLC0415

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


class _Metrics(TrainerCallback):
    """One line a step to a file, progress to the user, and an end to a run whose loss is no number."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._since = time.perf_counter()
        self._tokens = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the trainer's signature
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        now, tokens = time.perf_counter(), float(logs.get("num_tokens", 0))
        rate = (tokens - self._tokens) / max(now - self._since, 1e-9)
        self._since, self._tokens = now, tokens
        record = {
            "step": state.global_step,
            "total": state.max_steps,
            "loss": loss,
            "learning_rate": float(logs.get("learning_rate", 0)),
            "grad_norm": float(logs.get("grad_norm", 0)),
            "tokens_per_s": round(rate, 1),
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        if not math.isfinite(loss):
            raise TrainError(
                f"the loss is {loss} at step {state.global_step}",
                hint="lower train.learning_rate, or set quantization.compute_dtype",
            )
        progress("train", state.global_step, state.max_steps, f"loss {loss:.3f}  {rate:,.0f} tok/s")
