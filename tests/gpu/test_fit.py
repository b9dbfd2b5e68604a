"""Training on a CUDA device: it goes on from a checkpoint, memory that really runs out cuts the step, Liger is exact,
and what a card without bf16 does, it does in fp16.

Not run where there is none, and said so. The model is the tiny one, in NF4.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tuneship.core.hardware import detect
from tuneship.core.recipe import Recipe

torch = pytest.importorskip("torch")

from tests.unit.train import fitting  # noqa: E402 - needs torch
from tuneship.train.fitting import checkpoints, fit  # noqa: E402
from tuneship.train.fitting.checkpoints import Identity  # noqa: E402
from tuneship.train.model import load_base  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not detect().gpus, reason="NOT RUN: this machine has no CUDA device"),
]

ROWS = 64


def train(path: Path, attempt: Path, lengths, micro_batch: int, resume=None, **keys: Any) -> list[dict]:
    """The metrics of a training on this device."""
    fitted(recipe(path, "auto", **keys), attempt, lengths, micro_batch, resume)
    return metrics(attempt)


def recipe(path: Path, dtype: str, **keys: Any) -> Recipe:
    keys = {"method": "qlora", "optimizer": "paged_adamw_8bit", "warmup": 0.0} | keys
    given = fitting.recipe(path, **keys)
    return given.model_copy(update={"model": given.model.model_copy(update={"dtype": dtype})})


def fitted(given: Recipe, attempt: Path, lengths, micro_batch: int, resume=None) -> Any:
    """The model that training on this device makes."""
    path = Path(given.model.id)
    attempt.mkdir(parents=True)
    torch.manual_seed(0)
    base = load_base(path, given.model, given.quantization)
    _, tokenizer = fitting.load(path)
    cut = fitting.plan(given, micro_batch, len(lengths), device="cuda")
    return fit.fit(base, tokenizer, fitting.rows(lengths), given, cut, attempt, Identity.of(given, {}), resume)


def metrics(attempt: Path) -> list[dict]:
    return [json.loads(line) for line in (attempt / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def whole_card() -> Iterator[None]:
    """Take back what a test takes of the card's memory."""
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def test_it_goes_on_from_a_checkpoint(tiny_model, tmp_path):
    whole = train(tiny_model, tmp_path / "attempt-1", fitting.LENGTHS, 2, save_steps=3)
    shutil.rmtree(tmp_path / "attempt-1" / "checkpoints" / "checkpoint-6")
    half = checkpoints.newest(tmp_path)
    assert half.marker.step == 3
    resumed = train(tiny_model, tmp_path / "attempt-2", fitting.LENGTHS, 2, half, save_steps=3)
    assert [line["step"] for line in resumed] == list(range(1, 9))
    # Sums of a GPU come in another order each time.
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in whole], abs=5e-3)


def test_memory_that_runs_out_cuts_the_step(tiny_model, tmp_path, whole_card, capsys):
    lengths = [1500 + 7 * (i % 50) for i in range(ROWS)]
    keys = {"effective_batch": ROWS, "steps": 3, "learning_rate": 1e-4, "kernels": "peft", "liger": False}
    free = train(tiny_model, tmp_path / "attempt-1", lengths, ROWS, **keys)
    assert {line["micro_batch"] for line in free} == {ROWS}
    total = torch.cuda.get_device_properties(0).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_per_process_memory_fraction(0.7 * free[-1]["peak_memory_bytes"] / total)
    tight = train(tiny_model, tmp_path / "attempt-2", lengths, ROWS, **keys)
    assert "out of memory at step 1: again with 32 rows at a time" in capsys.readouterr().err
    assert all(line["micro_batch"] < ROWS and line["accumulation"] > 1 for line in tight)
    assert tight[-1]["peak_memory_bytes"] < free[-1]["peak_memory_bytes"]
    # Dropout draws other numbers.
    assert [line["loss"] for line in tight] == pytest.approx([line["loss"] for line in free], abs=0.05)


def test_liger_computes_the_same_loss(tiny_model, tmp_path):
    losses = [
        train(tiny_model, tmp_path / str(liger), fitting.LENGTHS, 4, steps=1, kernels="peft", liger=liger)[0]["loss"]
        for liger in (False, True)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=1e-2)


@pytest.mark.parametrize("kernels", ["peft", "fused"])
def test_half_precision_learns_with_adapters_in_float32(tiny_model, tmp_path, kernels):
    """As on a T4. The first steps may be left out, until the scale of the loss is one whose gradients are finite."""
    given = fitting.without_dropout(recipe(tiny_model, "float16", kernels=kernels, steps=24))
    model = fitted(given, tmp_path / "attempt-1", fitting.LENGTHS, 2)
    losses = [line["loss"] for line in metrics(tmp_path / "attempt-1")]
    assert len(losses) == 24
    assert None not in losses, "a loss that is no number"
    assert losses[-1] < losses[0] - 1
    assert {value.dtype for name, value in model.named_parameters() if "lora" in name} == {torch.float32}
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.q_proj.get_base_layer().compute_dtype == torch.float16
    assert ("forward" in vars(attention.q_proj)) == (kernels == "fused")
