"""How a run will fit this machine: micro-batch, accumulation, which layers keep their activations, memory, time.

A larger micro-batch at the same effective batch does the same optimiser step with fewer, larger kernels, which on a GPU
is the difference between 3,850 and 22,676 tokens/s (1.5B, 1024 tokens a row, one H100). Layers that keep their
activations are not computed again, which is worth up to a third. The two compete for memory: of all pairs that fit, the
planner takes the fastest, by a probe's measurements (`probe.py`) where there are any, else by arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from tuneship.core.errors import PlanError
from tuneship.core.hardware import Hardware, gib
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.planning import memory
from tuneship.train.planning.calibration import Calibration
from tuneship.train.planning.memory import Memory, Setting

_USABLE = 0.9
"""Of the device's memory by arithmetic, which may be a tenth off."""
_USABLE_CALIBRATED = 0.95
_LAUNCH_TOKENS = 16384
"""A micro-step of fewer tokens takes as long: a fast GPU waits for its kernels to be launched (0.3 s on an H100)."""
_SHORTEST = 16


class Plan(NamedTuple):
    """What a run will do."""

    device: str
    micro_batch: int
    accumulation: int
    kept_layers: int
    """Layers that keep their activations; the others compute them again."""
    layers: int
    rows: int
    steps: int
    tokens_per_epoch: int
    longest_row: int
    memory: Memory
    estimated_bytes: int
    """The process's peak on its device: by a probe where `step_s` is above 0, else the sum of `memory`."""
    budget_bytes: int
    step_s: float
    """Of one optimizer step, if all rows were as long as the longest; 0 where nothing was measured."""

    @property
    def checkpointing(self) -> bool:
        """Whether any layer is computed again."""
        return self.kept_layers < self.layers

    @property
    def tokens(self) -> int:
        """Of all steps."""
        return round(self.tokens_per_epoch / self.rows * self.steps * self.micro_batch * self.accumulation)

    @property
    def hours(self) -> float:
        """Of all steps, by their tokens; 0 where nothing was measured."""
        a_step = self.longest_row * self.micro_batch * self.accumulation
        return self.step_s * self.tokens / a_step / 3600

    def table(self) -> dict[str, str]:
        """For people."""
        again = f"{self.layers - self.kept_layers} of {self.layers} layers" if self.checkpointing else "none"
        terms = self.memory._asdict()
        return {
            "device": f"{self.device}, {gib(self.budget_bytes)} to use",
            "step": f"{self.micro_batch} rows x {self.accumulation} = {self.micro_batch * self.accumulation}",
            "computed again": f"{again} (activation checkpointing)",
            "rows": f"{self.rows:,}, {self.tokens_per_epoch:,} tokens, the longest {self.longest_row:,}",
            "steps": f"{self.steps:,}, {self.tokens:,} tokens",
            "time": f"{self.hours:.2f} h" if self.step_s else "not known: nothing was measured here yet",
            "memory": f"{gib(self.estimated_bytes)}, {'measured' if self.step_s else 'by arithmetic'}",
            **{f"  {name}": gib(value) for name, value in terms.items()},
        }


def make(
    recipe: Recipe,
    shape: Shape,
    hardware: Hardware,
    *,
    rows: int,
    tokens: int,
    longest: int,
    measured: Calibration | None = None,
) -> Plan:
    """Choose micro-batch and kept layers for `recipe` on `hardware`.

    Args:
        recipe: the resolved recipe.
        shape: the base model's.
        hardware: this machine's.
        rows: training rows.
        tokens: training tokens of one epoch.
        longest: tokens of the longest training row.
        measured: by a probe of this recipe on this machine.

    Raises:
        PlanError: nothing fits that the recipe allows; the hint names the largest setting that would.

    """
    if not hardware.gpus:  # kernels are a GPU's
        own = recipe.train.model_copy(update={"kernels": "peft", "liger": False})
        recipe = recipe.model_copy(update={"train": own})
    work = _Work(recipe, shape, longest, measured, budget_bytes(hardware, calibrated=measured is not None))
    found = min(work.fitting(), key=work.step_s, default=None)
    if found is None:
        raise work.refusal()
    train = recipe.train
    return Plan(
        device="cuda" if hardware.gpus else "cpu",
        micro_batch=found.micro_batch,
        accumulation=train.effective_batch // found.micro_batch,
        kept_layers=found.kept_layers,
        layers=shape.layers,
        rows=rows,
        steps=train.steps or math.ceil(train.epochs * rows / train.effective_batch),
        tokens_per_epoch=tokens,
        longest_row=longest,
        memory=work.terms(found),
        estimated_bytes=int(work.peak_bytes(found)),
        budget_bytes=work.budget,
        step_s=work.step_s(found) if measured else 0.0,
    )


def budget_bytes(hardware: Hardware, *, calibrated: bool) -> int:
    """What a run may take of its device."""
    total = hardware.gpus[0].memory_bytes if hardware.gpus else hardware.memory_bytes
    return int(total * (_USABLE_CALIBRATED if calibrated else _USABLE))


def largest(recipe: Recipe, shape: Shape, longest: int, budget: int, *, kept_layers: int) -> int:
    """Rows of `longest` tokens that fit by arithmetic, at most an effective batch; 0 where not even one does."""
    work = _Work(recipe, shape, longest, None, budget)
    fitting = (rows for rows in range(recipe.train.effective_batch, 0, -1) if work.fits(Setting(rows, kept_layers)))
    return next(fitting, 0)


class _Work(NamedTuple):
    """One search."""

    recipe: Recipe
    shape: Shape
    longest: int
    measured: Calibration | None
    budget: int

    def fitting(self) -> Iterator[Setting]:
        """For every micro-batch the most layers that can keep their activations."""
        train, layers = self.recipe.train, self.shape.layers
        checkpointing = train.checkpointing
        kept = range(layers, -1, -1) if checkpointing == "auto" else [0 if checkpointing else layers]
        for micro in self._micro_batches():
            settings = (Setting(micro, count) for count in kept)
            yield from [setting for setting in settings if self.fits(setting)][:1]

    def fits(self, setting: Setting) -> bool:
        """Whether its peak is within the budget."""
        return self.peak_bytes(setting) <= self.budget

    def peak_bytes(self, setting: Setting) -> float:
        """Measured where there is a measurement."""
        return self.measured.peak_bytes(setting) if self.measured else self.terms(setting).total

    def terms(self, setting: Setting) -> Memory:
        """By arithmetic."""
        return memory.estimate(self.recipe, self.shape, setting, self.longest)

    def step_s(self, setting: Setting) -> float:
        """Of one optimizer step; without measurements in no unit, for comparison alone."""
        accumulation = self.recipe.train.effective_batch // setting.micro_batch
        if self.measured:
            return accumulation * self.measured.step_s(setting)
        # Forward and backward, and a second forward of what is computed again.
        passes = 2 + 1 - setting.kept_layers / self.shape.layers
        return accumulation * passes * max(setting.micro_batch * self.longest, _LAUNCH_TOKENS)

    def refusal(self) -> PlanError:
        """Says what does not fit, and the largest setting that would."""
        train = self.recipe.train
        micro = 1 if train.micro_batch == "auto" else train.micro_batch
        kept = self.shape.layers if train.checkpointing is False else 0
        needed = self.peak_bytes(Setting(micro, kept))
        if not math.isfinite(needed):
            needed = self.terms(Setting(micro, kept)).total
        return PlanError(
            f"{micro} x {self.longest} tokens need about {gib(needed)}, "
            f"over the {gib(self.budget)} that may be used of this device",
            hint=self._what_would_fit(micro),
        )

    def _what_would_fit(self, micro: int) -> str:
        if self.recipe.train.checkpointing is False and self.fits(Setting(micro, 0)):
            return "--train.checkpointing auto"
        for rows in self._divisors():
            if rows < micro and self.fits(Setting(rows, 0)):
                return f"the largest that fits: --train.micro_batch {rows}"
        lengths = range(self.longest - 1, _SHORTEST - 1, -1)
        length = next((n for n in lengths if self._replace(longest=n, measured=None).fits(Setting(1, 0))), 0)
        if length:
            return f"the largest that fits: --train.micro_batch 1 --data.max_length {length}"
        weights = self.terms(Setting(1, 0)).weights
        return f"its weights alone take {gib(weights)}: choose a smaller base, or a larger device"

    def _micro_batches(self) -> list[int]:
        chosen = self.recipe.train.micro_batch
        return self._divisors() if chosen == "auto" else [chosen]

    def _divisors(self) -> list[int]:
        batch = self.recipe.train.effective_batch
        return [rows for rows in range(batch, 0, -1) if batch % rows == 0]
