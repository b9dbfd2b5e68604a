"""`train.backend = "unsloth"`: the same rows, adapter and steps through Unsloth, in an environment of its own.

Unsloth wants other versions of transformers and TRL than SGLang here, so uv builds it an environment when it is first
used. What comes back is a PEFT adapter on disk; reference, export and parity are then those of every adapter.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tuneship.core.errors import TrainError
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.train.data.template import Encoded
from tuneship.train.elsewhere import own_environment
from tuneship.train.merging import skeleton
from tuneship.train.model import linear_layers
from tuneship.train.planning.plan import Plan

REQUIREMENTS = (
    "unsloth==2026.10.9",
    "unsloth-zoo==2026.10.9",
    "torch==2.11.0",
    "trl==1.15.0",
    "transformers==5.17.0",
    "bitsandbytes==0.50.2",
    "peft==0.21.2",
)
_PROGRAM = Path(__file__).with_name("unsloth_trainer.py")
_OPTIMIZERS = {"paged_adamw_8bit": "paged_adamw_8bit", "adamw_8bit": "adamw_8bit", "adamw": "adamw_torch"}


class Made(NamedTuple):
    """What it left: a PEFT adapter, PyTorch's own peak, and what its environment had."""

    adapter: Path
    peak_bytes: int
    versions: dict[str, str]
    attention: dict[str, Any]


def fit(
    base: Path,
    pad_id: int,
    rows: Sequence[Encoded],
    recipe: Recipe,
    plan: Plan,
    attempt: Path,
    *,
    interpreter: Path | None = None,
    env: dict[str, str] | None = None,
) -> Made:
    """Train on `rows`; a line per step goes to `attempt/metrics.jsonl`.

    Args:
        base: its folder.
        pad_id: what rows are padded with.
        rows: to learn from.
        recipe: how.
        plan: how a step is cut.
        attempt: where everything goes.
        interpreter: with Unsloth in it; None: of the environment of its own.
        env: beside this process's.

    Raises:
        TrainError: no CUDA device, no such environment, or Unsloth failed.

    """
    if not torch.cuda.is_available():
        raise TrainError("train.backend = 'unsloth' needs a CUDA device", hint="--train.backend trl")
    folder = attempt / "unsloth"
    folder.mkdir()
    job = _job(base, pad_id, recipe, plan, folder) | {"metrics": str(attempt / "metrics.jsonl")}
    with Path(job["rows"]).open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"input_ids": row.input_ids, "labels": row.labels}) + "\n" for row in rows)
    (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
    python = interpreter or own_environment.python("unsloth", REQUIREMENTS, extra="unsloth")
    say(f"training with Unsloth; its own words: {folder / 'log'}")
    environment = {"HF_HUB_OFFLINE": "1"} | (env or {})
    own_environment.run(python, _PROGRAM, str(folder / "job.json"), log=folder / "log", env=environment)
    result = json.loads((folder / "adapter" / "result.json").read_text(encoding="utf-8"))
    return Made(folder / "adapter", int(result["peak_bytes"]), result["versions"], result["attention"])


def _job(base: Path, pad_id: int, recipe: Recipe, plan: Plan, folder: Path) -> dict[str, Any]:
    targets = recipe.lora.target_modules
    modules = linear_layers(skeleton.build(base, recipe.model)) if isinstance(targets, str) else list(targets)
    train, lora = recipe.train, recipe.lora
    return {
        "base": str(base),
        "rows": str(folder / "rows.jsonl"),
        "out": str(folder / "adapter"),
        "length": plan.longest_row,
        "pad_id": pad_id,
        "double": recipe.quantization.double,
        "lora": {
            "rank": lora.rank,
            "alpha": lora.alpha,
            "dropout": lora.dropout,
            "rslora": lora.rslora,
            "modules": modules,
        },
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "steps": plan.steps,
        "learning_rate": train.learning_rate,
        "scheduler": train.scheduler,
        "warmup_steps": round(train.warmup * plan.steps),
        "optimizer": _OPTIMIZERS[train.optimizer],
        "max_grad_norm": train.max_grad_norm,
        "seed": train.seed,
    }
