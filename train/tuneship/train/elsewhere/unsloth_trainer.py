"""Run by the Python of Unsloth's own environment: `python unsloth_trainer.py job.json`. Imports nothing of ours.

The job is {base, rows, out, metrics, length, pad_id, lora{rank, alpha, dropout, rslora, modules}, micro_batch,
accumulation, steps, learning_rate, scheduler, warmup_steps, optimizer, max_grad_norm, seed, double}. `rows` is a JSONL
of {input_ids, labels}; the adapter is written to `out`, a line a step to `metrics`, and to `out`/result.json the peak
of the memory that PyTorch allocated, the versions of this environment, and what attention can be computed with.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

# Before everything that it patches.
from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip

import datasets
import torch
from transformers import BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

_IGNORED = -100
_PACKAGES = (
    "unsloth",
    "unsloth_zoo",
    "torch",
    "transformers",
    "trl",
    "bitsandbytes",
    "peft",
    "datasets",
    "triton",
    "xformers",
    "flash-attn",
)
_KERNELS = ("flash_attn", "xformers")
"""What Unsloth computes attention with where it can import them, whatever the model's configuration says."""


def main(job: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    lora = job["lora"]
    packing = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=job["double"],
        bnb_4bit_compute_dtype=dtype,
    )
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["base"],
        max_seq_length=job["length"],
        dtype=dtype,
        load_in_4bit=True,
        quantization_config=packing,
        fix_tokenizer=False,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        use_rslora=lora["rslora"],
        bias="none",
        target_modules=lora["modules"],
        use_gradient_checkpointing="unsloth",
        random_state=job["seed"],
    )
    # Into a file that is mapped, and not into memory.
    rows = datasets.Dataset.from_generator(_rows, gen_kwargs={"path": job["rows"]}, cache_dir=f"{job['rows']}.mapped")
    trainer = Trainer(
        model=model,
        args=_arguments(job, dtype),
        train_dataset=rows,
        data_collator=lambda batch: _collate(batch, job["pad_id"]),
        callbacks=[_Metrics(Path(job["metrics"]))],
    )
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    model.save_pretrained(job["out"])
    peak = {"peak_bytes": torch.cuda.max_memory_allocated(), "reserved_bytes": torch.cuda.max_memory_reserved()}
    result = peak | {"versions": _versions(), "attention": _attention(model)}
    (Path(job["out"]) / "result.json").write_text(json.dumps(result))
    del tokenizer


def _rows(path: str) -> Iterator[dict[str, list[int]]]:
    with Path(path).open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _arguments(job: dict[str, Any], dtype: torch.dtype) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(Path(job["out"]) / "trainer"),
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["accumulation"],
        max_steps=job["steps"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type=job["scheduler"],
        warmup_steps=job["warmup_steps"],
        optim=job["optimizer"],
        max_grad_norm=job["max_grad_norm"],
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        seed=job["seed"],
        data_seed=job["seed"],
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def _collate(batch: list[dict[str, list[int]]], pad_id: int) -> dict[str, torch.Tensor]:
    """Rows of unequal length, padded on the right."""
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (longest - len(values))

    return {
        "input_ids": torch.tensor([padded(row["input_ids"], pad_id) for row in batch]),
        "labels": torch.tensor([padded(row["labels"], _IGNORED) for row in batch]),
        "attention_mask": torch.tensor([padded([1] * len(row["input_ids"]), 0) for row in batch]),
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _attention(model: Any) -> dict[str, Any]:
    return {
        "implementation": getattr(model.config, "_attn_implementation", None),
        "importable": [name for name in _KERNELS if _can_be_imported(name)],
    }


def _can_be_imported(name: str) -> bool:
    try:
        import_module(name)
    except Exception:  # noqa: BLE001 - one that was built for another torch fails in its own way
        return False
    return True


class _Metrics(TrainerCallback):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._since = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        self._since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        torch.cuda.synchronize()
        self._since = time.perf_counter() - self._since

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:  # noqa: ARG002
        if not logs or "loss" not in logs:
            return
        record = {
            "step": state.global_step,
            "total": state.max_steps,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs.get("learning_rate", 0)),
            "grad_norm": float(logs.get("grad_norm", 0)),
            "step_s": self._since,
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
