"""The recipe and the plan in the trainer's words."""

from __future__ import annotations

from pathlib import Path

import torch
from trl import SFTConfig

from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.train.fitting import checkpoints, tracking
from tuneship.train.model import pick_dtype
from tuneship.train.planning.plan import Plan

_OPTIMIZERS = {
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw": "paged_adamw_32bit",
    "adamw": "adamw_torch",
}


def arguments(recipe: Recipe, plan: Plan, attempt: Path) -> SFTConfig:
    """What TRL is told; rows are tokenized, masked and ordered by us, and checkpoints written when we say so."""
    train = recipe.train
    tracking.prepare(train.report_to, attempt)
    on_gpu = plan.device == "cuda"
    dtype = pick_dtype(recipe.model.dtype)
    return SFTConfig(
        output_dir=str(attempt / checkpoints.FOLDER),
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        max_steps=plan.steps,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.scheduler,
        warmup_steps=round(train.warmup * plan.steps),
        optim=_optimizer(train.optimizer, on_gpu=on_gpu),
        max_grad_norm=train.max_grad_norm,
        gradient_checkpointing=plan.checkpointing,
        bf16=on_gpu and dtype == torch.bfloat16,
        fp16=on_gpu and dtype == torch.float16,
        use_cpu=not on_gpu,
        seed=train.seed,
        padding_free=train.packs,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        save_total_limit=train.keep_checkpoints,
        report_to=list(train.report_to) or "none",
        run_name=recipe.name,
        project="tuneship",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )


def _optimizer(name: str, *, on_gpu: bool) -> str:
    if not on_gpu and name != "adamw":
        say(f"train.optimizer {name} needs CUDA: using adamw (32-bit)")
        return "adamw_torch"
    return _OPTIMIZERS[name]
