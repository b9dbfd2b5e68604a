"""A few real steps at the longest rows, before training: what they take calibrates the plan for this machine.

Steps of two sizes, with every layer keeping its activations and with none: memory and time are straight lines in the
tokens of a micro-batch and in the layers that keep, so four short measurements say what any setting takes. Arithmetic
(`memory.py`) decides only which sizes are safe to try. Rows of unequal length are used, as data has them: padding costs
a mask.
"""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pynvml
import torch
from transformers import TrainerCallback

from tuneship.core import hardware
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.data.template import Encoded
from tuneship.train.fitting import fit
from tuneship.train.fitting.trainer import Trainer
from tuneship.train.planning import calibration
from tuneship.train.planning import plan as planner
from tuneship.train.planning.calibration import Calibration, Sample, sizes
from tuneship.train.planning.memory import Setting, estimate
from tuneship.train.planning.plan import Plan

_STEPS = 3
"""The first one is not timed: it makes the optimizer's state and compiles kernels."""


def calibrate(base: Any, tokenizer: Any, recipe: Recipe, longest: int, *, again: int, kept: int) -> Calibration:
    """Measure with every layer computed again, and with none, up to so many rows; 0 rows leaves that out."""
    layers = Shape.of(base.config.to_dict()).layers

    def line(most: int, keeping: int) -> tuple[Sample, ...]:
        rows = sizes(longest, most) if most else ()
        samples = (measure(base, tokenizer, recipe, Setting(micro, keeping), longest) for micro in rows)
        return tuple(found for found in samples if found)

    return Calibration(layers, line(again, 0), line(kept, layers))


def refine(base: Any, tokenizer: Any, recipe: Recipe, planned: Plan) -> Plan:
    """`planned` by arithmetic, chosen again by steps on this device, which are remembered for the next time.

    As it is on a CPU, where the recipe sets its micro-batch, and where it was measured before.

    Raises:
        PlanError: nothing fits that the recipe allows.

    """
    fixed = recipe.train.micro_batch != "auto" or recipe.train.method == "full"  # whose base would learn from the probe
    if not torch.cuda.is_available() or fixed or planned.step_s:
        return planned
    shape, longest = Shape.of(base.config.to_dict()), planned.longest_row
    say(f"measuring a few steps of rows of {longest} tokens")

    def most(kept_layers: int, *, wanted: bool) -> int:
        return planner.largest(recipe, shape, longest, planned.budget_bytes, kept_layers=kept_layers) if wanted else 0

    checkpointing = recipe.train.checkpointing
    found = calibrate(
        base,
        tokenizer,
        recipe,
        longest,
        again=most(0, wanted=checkpointing is not False),
        kept=most(shape.layers, wanted=checkpointing is not True),
    )
    calibration.keep(found, recipe, shape, longest)
    return planner.make(
        recipe,
        shape,
        hardware.detect(),
        rows=planned.rows,
        tokens=planned.tokens_per_epoch,
        longest=longest,
        measured=found,
    )


def measure(base: Any, tokenizer: Any, recipe: Recipe, setting: Setting, longest: int) -> Sample | None:
    """Real steps of `setting` on `base`, which is left as it was; None where memory ran out."""
    clock = Clock()
    with _as_it_was(base), TemporaryDirectory(prefix="tuneship-probe-") as work:
        try:
            trainer = _trainer(base, tokenizer, recipe, setting, longest, Path(work))
            trainer.add_callback(clock)
            forget_peak()
            trainer.train()
        except torch.OutOfMemoryError:
            return None
        if trainer.micro_batch < setting.micro_batch:  # it ran out, and went on in smaller pieces
            return None
        return Sample(setting, peak_bytes(), min(clock.step_s[1:]))


def peak_bytes() -> int:
    """Peak of this process on its device: what PyTorch reserved at most, and what it has beside that."""
    if not torch.cuda.is_available():
        return 0
    return int(torch.cuda.max_memory_reserved()) + outside_bytes()


def outside_bytes() -> int:
    """What this process has on its device beside PyTorch's memory: context, libraries, their kernels.

    NVML names no processes in some virtual machines and containers; then it is what nobody's tensors explain, which
    counts other processes of the device in.
    """
    pynvml.nvmlInit()
    try:
        handle = hardware.visible_gpus()[torch.cuda.current_device()]
        mine = [p.usedGpuMemory for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
        used = mine[0] if mine and mine[0] else pynvml.nvmlDeviceGetMemoryInfo(handle).used
    finally:
        pynvml.nvmlShutdown()
    return max(int(used) - int(torch.cuda.memory_reserved()), 0)


def forget_peak() -> None:
    """Give memory back that nobody needs, and count from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def _as_it_was(base: Any) -> Iterator[None]:
    """Take off again what a trainer puts on a base, and give random numbers back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 - the libraries' own
    on_devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    forwards = {module: module.__dict__.get("forward") for module in base.modules()}
    try:
        yield
    finally:
        for module in list(base.modules()):
            if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
                _put_back(base, module)
        for module, forward in forwards.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward
        base.__dict__.pop("peft_config", None)
        base.gradient_checkpointing_disable()
        with suppress(AttributeError):  # they were not asked for
            base.disable_input_require_grads()
        base.requires_grad_(requires_grad=False)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if on_devices:
            torch.cuda.set_rng_state_all(on_devices)
        forget_peak()


def _put_back(base: Any, layer: Any) -> None:
    name = next(name for name, module in base.named_modules() if module is layer)
    parent, _, child = name.rpartition(".")
    setattr(base.get_submodule(parent), child, layer.base_layer)


def _trainer(base: Any, tokenizer: Any, recipe: Recipe, setting: Setting, longest: int, work: Path) -> Trainer:
    """As `fit` builds it, for steps of one micro-batch; the second row is shorter by a token, so there is padding."""
    shape = Shape.of(base.config.to_dict())
    rng = np.random.default_rng(0)
    lengths = [longest, *[max(longest - 1, 1)] * (setting.micro_batch - 1)]
    ids = [rng.integers(0, shape.vocab, length).tolist() for length in lengths]
    one = {"effective_batch": setting.micro_batch, "micro_batch": setting.micro_batch, "report_to": ()}
    alone = recipe.train.model_copy(update=one)
    cut = Plan(
        device="cuda" if torch.cuda.is_available() else "cpu",
        micro_batch=setting.micro_batch,
        accumulation=1,
        kept_layers=setting.kept_layers,
        layers=shape.layers,
        rows=setting.micro_batch,
        steps=_STEPS,
        tokens_per_epoch=sum(lengths),
        longest_row=longest,
        memory=estimate(recipe, shape, setting, longest),
        estimated_bytes=0,
        budget_bytes=0,
        step_s=0.0,
    )
    rows = [Encoded(row, row) for row in ids]
    return fit.build(base, tokenizer, rows, recipe.model_copy(update={"train": alone}), cut, work)


class Clock(TrainerCallback):
    """Seconds of each step, device included."""

    def __init__(self) -> None:
        self.step_s: list[float] = []
        self._since = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """Start, once the device has nothing left to do."""
        self._since = self._now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Stop, when it is done."""
        self.step_s.append(self._now() - self._since)

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()
