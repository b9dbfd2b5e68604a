"""Half precision, for cards without bf16 (the T4): when it is taken, and that adapters are float32 under it."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import pytest

from tuneship.core.errors import TrainError
from tuneship.core.recipe import Recipe

torch = pytest.importorskip("torch")

from transformers import TrainerControl, TrainerState  # noqa: E402 - needs torch

from tests.unit.train import fitting  # noqa: E402
from tuneship.train.fitting import fit  # noqa: E402
from tuneship.train.fitting.arguments import arguments  # noqa: E402
from tuneship.train.fitting.callbacks import Record  # noqa: E402
from tuneship.train.fitting.faults import Watch  # noqa: E402
from tuneship.train.model import load_base, pick_dtype  # noqa: E402


def given(tiny_model: Path, dtype: str, **train) -> Recipe:
    recipe = fitting.without_dropout(fitting.recipe(tiny_model, **train))
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": dtype})})


@pytest.mark.parametrize(("capability", "wanted"), [((7, 5), "float16"), ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_the_dtype_of_a_card_is_by_its_capability(monkeypatch, capability, wanted):
    """A T4 is 7.5; torch says that it supports bf16, which it emulates."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert pick_dtype("auto") == getattr(torch, wanted)
    assert pick_dtype("float32") == torch.float32


@pytest.mark.parametrize(
    ("dtype", "device", "mixed"),
    [
        ("float16", "cuda", (True, False)),
        ("float32", "cuda", (False, False)),
        ("float16", "cpu", (False, False)),
    ],
)
def test_losses_are_scaled_in_fp16_on_a_card_alone(tiny_model, tmp_path, dtype, device, mixed):
    recipe = given(tiny_model, dtype)
    args = arguments(recipe, fitting.plan(recipe, 2, device=device), tmp_path)
    assert (args.fp16, args.bf16) == mixed


@pytest.mark.parametrize("kernels", ["peft", "fused"])
def test_adapters_of_a_base_in_half_precision_are_float32_and_learn(tiny_model, tmp_path, kernels):
    """What a T4 computes, without what only a GPU has: autocast and the scaler of the loss."""
    recipe = given(tiny_model, "float16", method="qlora", kernels=kernels, liger=False, steps=12)
    torch.manual_seed(0)
    base = load_base(tiny_model, recipe.model, recipe.quantization)
    assert base.model.layers[0].mlp.up_proj.compute_dtype == torch.float16
    assert base.model.norm.weight.dtype == torch.float16
    _, tokenizer = fitting.load(tiny_model)
    trainer = fit.build(base, tokenizer, fitting.rows(), recipe, fitting.plan(recipe, 2, device="cuda"), tmp_path)
    assert trainer.args.fp16
    assert not trainer.args.bf16
    trainer.args.dataloader_pin_memory = False  # there is no card to copy to
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0] - 2
    learnt = {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {value.dtype for value in learnt.values()} == {torch.float32}
    assert all("lora" in name for name in learnt)


@pytest.mark.parametrize("fp16", [True, False])
def test_a_gradient_that_overflows_is_usual_in_fp16_and_nowhere_else(tiny_model, tmp_path, fp16):
    """The scaler leaves that step out and scales the next one's loss less."""
    recipe = given(tiny_model, "float32")
    model, tokenizer = fitting.load(tiny_model)
    trainer = fit.build(model, tokenizer, fitting.rows(), recipe, fitting.plan(recipe, 2), tmp_path)
    trainer.args.fp16 = fp16
    record, state = Record(trainer, tmp_path, Watch(recipe.train.spike)), TrainerState(global_step=1, max_steps=8)
    logs = {"loss": 7.0, "grad_norm": math.inf, "tokens_per_s": 1.0, "peak_memory_bytes": 1}
    ends = contextlib.nullcontext() if fp16 else pytest.raises(TrainError, match="the gradient's norm is inf at step 1")
    with ends:
        record.on_log(trainer.args, state, TrainerControl(), logs)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line)["grad_norm"] is None
