"""Fetching and training as `tuneship up` runs them, each in a process of its own."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig

from tuneship.core import artifact as artifacts
from tuneship.core import checkpoint, hardware, recipe_file, servable
from tuneship.core.artifact import Manifest
from tuneship.core.errors import DataError, TrainError
from tuneship.core.identity import data_sha256
from tuneship.core.parity import write_reference
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.core.rundir import HELDOUT_FILE
from tuneship.core.stage import Job
from tuneship.train import export, fetch, model, parity, prepare
from tuneship.train.data import dataset, packing
from tuneship.train.data.dataset import Dataset
from tuneship.train.elsewhere import unsloth_backend
from tuneship.train.fitting import checkpoints, fit, full, smoke, tracking
from tuneship.train.fitting.checkpoints import Checkpoint, Identity
from tuneship.train.merging import skeleton
from tuneship.train.planning import probe
from tuneship.train.planning.plan import Plan
from tuneship.train.prepare import Prepared, Rows


def fetch_all(job: Job) -> Path:
    """Bring the recipe's base, and rows that lie on the hub, to this disk."""
    return fetch.fetch_all(job.recipe).path


def train(job: Job) -> Path:
    """Data and base -> an adapter artifact, or a checkpoint, with its reference log-probabilities."""
    recipe = job.recipe
    _seed(recipe.train.seed)
    tracking.require(recipe.train.report_to)
    prepared = prepare.prepare(recipe)
    _look_at_template(prepared, recipe)
    identity = _identity(recipe, prepared)
    resume = _checkpoint(job, identity)
    rows, heldout = prepare.read_rows(recipe, prepared.template, job.attempt)
    if heldout:
        _keep_heldout(heldout, recipe, job.attempt)
    few = int(job.inputs.get("smoke", 0))
    all_rows, rows = len(rows.rows), smoke.subset(rows, few)
    learnt, read = rows, Rows(rows, heldout)
    if recipe.train.packs:
        learnt = rows._replace(rows=packing.pack(rows.rows, recipe.data.max_length, job.attempt))
    planned = smoke.shortened(recipe, all_rows * len(learnt.rows) / len(rows.rows), len(learnt.rows)) if few else recipe
    todo = prepare.plan(planned, prepared.source, learnt)
    chosen = parity.choose_rows(heldout.rows) if heldout else []
    whole, before = recipe.train.method == "full", None
    began = time.perf_counter()
    if recipe.train.backend == "unsloth":
        trained, todo = _learn_elsewhere(prepared, rows, recipe, todo, job.attempt, resume)
    else:
        base = _load(prepared, recipe)
        before = full.Before(base, chosen, prepared.pad_id) if whole else None
        todo = probe.refine(base, prepared.tokenizer, planned, todo)
        _say_what_comes(todo)
        began = time.perf_counter()
        trained = fit.fit(base, prepared.tokenizer, learnt.rows, recipe, todo, job.attempt, identity, resume, chosen)
    train_s = round(time.perf_counter() - began, 2)
    if few:
        smoke.require_fall(job.attempt)
    with artifacts.draft(job.run.artifacts) as work:
        if before:
            reference = before.reference(trained)
            measured = full.write(trained, prepared, recipe, reference, work, force=job.force)
            dtype = str(model.pick_dtype(recipe.model.dtype)).removeprefix("torch.")
            manifest = _manifest(job, recipe, prepared, read, dtype, None, measured | {"train_s": train_s})
        else:
            config = export.save_adapter(trained, work)
            prepared.tokenizer.save_pretrained(work)
            dtype = str(trained.dtype).removeprefix("torch.")
            if chosen:
                reference = parity.measure_reference(trained, chosen, prepared.pad_id, dtype)
                write_reference(work / artifacts.EVIDENCE, reference)
            manifest = _manifest(job, recipe, prepared, read, dtype, config, {"train_s": train_s})
        sealed = artifacts.seal(work, manifest)
    checkpoints.remove_all(job.attempt.parent)
    return sealed.path


def _look_at_template(prepared: Prepared, recipe: Recipe) -> None:
    """A model that learnt to read chats in one form is taught another; one that reads none cannot be asked any."""
    own = checkpoint.chat_template(prepared.source.path)
    if not prepared.template.text and recipe.bench.eval:
        raise DataError(
            "bench.eval asks chats, but the model has no chat template", hint='data.template = "alpaca" gives it one'
        )
    if prepared.template.source == "recipe" and own not in {"", prepared.template.text}:
        say("data.template takes the place of the chat template that the model has")


def _keep_heldout(heldout: Dataset, recipe: Recipe, attempt: Path) -> None:
    """Conversations for a load to ask, which does not read what they came from."""
    asked = dataset.write_conversations(heldout.rows, attempt / HELDOUT_FILE)
    if not asked:
        (attempt / HELDOUT_FILE).unlink()
    if not asked and recipe.bench.load.workload == "heldout":
        raise DataError("bench.load.workload = 'heldout', but what is held out is plain text, which asks nothing")


def _load(prepared: Prepared, recipe: Recipe) -> Any:
    if recipe.train.method == "full":
        return full.load_base(prepared.source.path, recipe)
    base = model.load_base(prepared.source.path, recipe.model, recipe.quantization)
    _say_what_cannot_be_served(model.lora_config(recipe.lora, base))
    return base


def _learn_elsewhere(
    prepared: Prepared, rows: Dataset, recipe: Recipe, todo: Plan, attempt: Path, resume: Checkpoint | None
) -> tuple[Any, Plan]:
    """Through Unsloth, whose adapter then stands on our own base; nothing of ours is on the device meanwhile."""
    if resume:
        raise TrainError("train.backend = 'unsloth' does not go on from a checkpoint", hint="without --resume")
    _say_what_cannot_be_served(model.lora_config(recipe.lora, skeleton.build(prepared.source.path, recipe.model)))
    _say_what_comes(todo)
    made = unsloth_backend.fit(prepared.source.path, prepared.pad_id, rows.rows, recipe, todo, attempt)
    return model.load_trained(prepared.source.path, made.adapter, recipe), todo


def _say_what_comes(todo: Plan) -> None:
    say(
        f"{todo.rows} rows, {todo.steps} steps of {todo.micro_batch} x {todo.accumulation} on {todo.device}, "
        f"about {hardware.gib(todo.estimated_bytes)}" + (f" and {todo.hours:.1f} h" if todo.step_s else "")
    )


def _identity(recipe: Recipe, prepared: Prepared) -> Identity:
    contents = {
        "model.id": checkpoint.identify(prepared.source.path, prepared.source.id, "").weights_sha256,
        "the tokenizer": checkpoint.tokenizer_sha256(prepared.source.path),
        "the chat template": prepared.template.sha256,
        "data.train": data_sha256(recipe.data.train),
        "data.heldout": data_sha256(recipe.data.heldout),
    }
    return Identity.of(recipe, contents)


def _checkpoint(job: Job, identity: Identity) -> Checkpoint | None:
    """Where to go on from, if that was asked for and there is one."""
    last = checkpoints.newest(job.attempt.parent)
    if not job.inputs.get("resume"):
        if last:
            checkpoints.remove_all(job.attempt.parent, but=last.attempt)
            say(f"{last.attempt.name} left a checkpoint of step {last.marker.step}; --resume would go on from it")
        return None
    if last is None:
        say("nothing to resume: training from the start")
        return None
    checkpoints.require_unchanged(last, identity)
    say(f"going on after step {last.marker.step} of {last.attempt.name}")
    return last


def _say_what_cannot_be_served(planned: LoraConfig) -> None:
    """Before hours of training: an adapter that SGLang does not serve is a result, once it is merged."""
    modules = {name.rpartition(".")[2] for name in planned.target_modules}
    for reason in [*servable.unserved({"use_dora": planned.use_dora}), *servable.unserved_modules(modules)]:
        say(f"the adapter cannot be served beside its base: it {reason.fact}. It has to be merged")


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - what the libraries below us draw from
    torch.manual_seed(seed)


def _manifest(
    job: Job,
    recipe: Recipe,
    prepared: Prepared,
    read: Rows,
    dtype: str,
    config: dict[str, Any] | None,
    metrics: dict[str, float],
) -> Manifest:
    """Of an adapter with these settings, or of a checkpoint without any."""
    quantization = recipe.quantization
    quantized = artifacts.quantized_base(prepared.source.path)
    return Manifest(
        kind="adapter" if config else "merged",
        name=recipe.name,
        input_id=job.input_id,
        parents=(quantized.content_id,) if quantized else (),
        base=checkpoint.identify(prepared.source.path, prepared.source.id, prepared.source.revision),
        quantization=artifacts.QuantizationRecord(
            method=quantization.method,
            double=quantization.double,
            compute_dtype=dtype,
            stored_dtype=checkpoint.dtype(prepared.source.path),
        ),
        lora=artifacts.LoraRecord(
            rank=config["r"],
            alpha=config["lora_alpha"],
            scaling=servable.scaling(config),
            rslora=config["use_rslora"],
            target_modules=tuple(sorted(config["target_modules"])),
        )
        if config
        else None,
        template=artifacts.TemplateRecord(
            text=prepared.template.text, sha256=prepared.template.sha256, source=prepared.template.source
        ),
        end_token_ids=prepared.end_ids,
        tokenizer_sha256=checkpoint.tokenizer_sha256(prepared.source.path),
        data=artifacts.DataRecord(
            train_sha256=read.train.sha256,
            heldout_sha256=read.heldout.sha256 if read.heldout else "",
            rows=len(read.train.rows),
            tokens=read.train.tokens,
            loss_tokens=read.train.loss_tokens,
        ),
        recipe_digest=recipe_file.digest(recipe, "model", "quantization", "data", "lora", "train"),
        seeds={"train": recipe.train.seed},
        versions=hardware.versions(),
        hardware=hardware.detect().as_record(),
        metrics={key: round(value, 6) for key, value in metrics.items()},
    )
