"""How a run will fit this machine, before anything is loaded: micro-batch, accumulation, steps, memory.

A larger micro-batch at the same effective batch does the same optimiser step with fewer, larger kernels, which on a GPU
is the difference between 3,850 and 22,676 tokens/s (1.5B, 1024 tokens a row, one H100). So the planner takes the
largest that fits, and drops activation checkpointing when even that fits.

The estimate is arithmetic over the model's shape with two constants fitted to measured peaks of a 1.5B Qwen2 shape on
an H100 (4.6 GiB at 16 x 1024 tokens with checkpointing, 14.8 at 64 x 1024, 43.4 at 16 x 1024 without). It is not yet
calibrated by a probe on the machine itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from tuneship.core.errors import PlanError
from tuneship.core.hardware import Hardware
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape

_USABLE = 0.9
"""Of the device's memory; the rest is the CUDA context and fragmentation."""
_BYTES_PER_LAYER_UNIT = 6.6
"""Kept for backward, per token and layer, in units of (4 hidden + intermediate)."""
_BYTES_TRANSIENT_UNIT = 9.2
"""Alive within one layer while it is recomputed, per token, in the same units."""
_LOSS_CHUNK_BYTES = 256 * 1024**2
"""The chunked LM head's working set."""


class Plan(NamedTuple):
    """What a run will do. Memory in bytes, of the training process on its device."""

    device: str
    micro_batch: int
    accumulation: int
    checkpointing: bool
    rows: int
    steps: int
    tokens_per_epoch: int
    longest_row: int
    estimated_bytes: int
    budget_bytes: int


def make(recipe: Recipe, shape: Shape, hardware: Hardware, *, rows: int, tokens: int, longest: int) -> Plan:
    """Choose micro-batch and checkpointing for `recipe` on `hardware`.

    Args:
        recipe: the resolved recipe.
        shape: the base model's.
        hardware: this machine's.
        rows: training rows.
        tokens: training tokens of one epoch.
        longest: tokens of the longest training row.

    Raises:
        PlanError: not even a micro-batch of 1 with checkpointing fits.

    """
    train = recipe.train
    total = hardware.gpus[0].memory_bytes if hardware.gpus else hardware.memory_bytes
    budget = int(total * _USABLE)
    for micro, checkpointing in _candidates(recipe):
        estimate = estimate_bytes(recipe, shape, micro * longest, checkpointing=checkpointing)
        if estimate <= budget:
            steps = train.steps or math.ceil(train.epochs * rows / train.effective_batch)
            return Plan(
                device="cuda" if hardware.gpus else "cpu",
                micro_batch=micro,
                accumulation=train.effective_batch // micro,
                checkpointing=checkpointing,
                rows=rows,
                steps=steps,
                tokens_per_epoch=tokens,
                longest_row=longest,
                estimated_bytes=estimate,
                budget_bytes=budget,
            )
    raise PlanError(
        f"rows of {longest} tokens need about {estimate / 2**30:.1f} GiB, over this device's {budget / 2**30:.1f} GiB",
        hint="lower data.max_length, train.micro_batch or lora.rank, or choose a smaller base",
    )


def estimate_bytes(recipe: Recipe, shape: Shape, tokens: int, *, checkpointing: bool) -> int:
    """Peak memory of a training step over `tokens` padded tokens."""
    four_bit = recipe.quantization.method == "nf4"
    weights = shape.linear_parameters * (0.53 if four_bit else 2) + 2 * shape.embedding_parameters
    # Adapter, gradient and two Adam moments in fp32.
    adapter = 16 * shape.lora_parameters(recipe.lora.rank)
    # What activations of one token in one layer are proportional to.
    unit = 4 * shape.hidden + shape.intermediate
    if checkpointing:
        per_token = 2 * shape.hidden * shape.layers + _BYTES_TRANSIENT_UNIT * unit
    else:
        per_token = _BYTES_PER_LAYER_UNIT * shape.layers * unit
    return int(weights + adapter + per_token * tokens + _LOSS_CHUNK_BYTES)


def _candidates(recipe: Recipe) -> list[tuple[int, bool]]:
    """(micro-batch, checkpointing) from what should be fastest to what needs least memory."""
    train = recipe.train
    if train.micro_batch == "auto":
        micros = [m for m in range(train.effective_batch, 0, -1) if train.effective_batch % m == 0]
    else:
        micros = [train.micro_batch]
    checkpointings = [False, True] if train.checkpointing == "auto" else [train.checkpointing]
    return [(micro, c) for micro in micros for c in checkpointings]
