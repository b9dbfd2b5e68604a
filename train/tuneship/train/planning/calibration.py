"""What a probe measured of a machine, a shape and a recipe, and the straight lines through it; kept in the cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core import hardware
from tuneship.core.cache import cache_dir
from tuneship.core.files import sha256_text, write_atomic
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.planning.memory import LOSS_TOKENS, Setting

_BEYOND = 1.03
"""Of what is added beyond the larger sample: eight times its rows took 2.6 % more of everything than the line said."""


class Sample(NamedTuple):
    """One setting, measured. The peak is that of the process on the device; the time that of one micro-step."""

    setting: Setting
    peak_bytes: int
    step_s: float


class Calibration(NamedTuple):
    """Samples, and the straight lines through them."""

    layers: int
    again: tuple[Sample, ...]
    """Every layer computed again, from fewer rows to more."""
    kept: tuple[Sample, ...]
    """No layer computed again; empty where not even the fewest rows fitted."""

    def peak_bytes(self, setting: Setting) -> float:
        """Expected peak of the process; infinite where nothing was measured."""
        return self._between(setting, _peak_at)

    def step_s(self, setting: Setting) -> float:
        """Expected seconds of one micro-step."""
        return self._between(setting, _step_s_at)

    def _between(self, setting: Setting, at: Callable[[tuple[Sample, ...], int], float]) -> float:
        share, micro = setting.kept_layers / self.layers, setting.micro_batch
        kept = share * at(self.kept, micro) if share else 0.0
        again = (1 - share) * at(self.again, micro) if share < 1 else 0.0
        return kept + again


def _peak_at(samples: tuple[Sample, ...], micro: int) -> float:
    """On the line through two samples, and a little more beyond the larger."""
    if not _knows(samples, micro):
        return math.inf
    first, last = samples[0], samples[-1]
    rows, past = last.setting.micro_batch - first.setting.micro_batch, micro - last.setting.micro_batch
    a_row = max(last.peak_bytes - first.peak_bytes, 0) / max(rows, 1)
    return last.peak_bytes + a_row * past * (_BEYOND if past > 0 else 1)


def _step_s_at(samples: tuple[Sample, ...], micro: int) -> float:
    """On the line between two samples; beyond the larger in proportion to it, which is no less than it takes."""
    if not _knows(samples, micro):
        return math.inf
    first, last = samples[0], samples[-1]
    rows, past = last.setting.micro_batch - first.setting.micro_batch, micro - last.setting.micro_batch
    if past > 0:
        return last.step_s * micro / last.setting.micro_batch
    return last.step_s + max(last.step_s - first.step_s, 0) / max(rows, 1) * past


def _knows(samples: tuple[Sample, ...], micro: int) -> bool:
    """Nothing is known of no samples, nor beyond a single one."""
    return len(samples) > 1 or (bool(samples) and micro <= samples[0].setting.micro_batch)


def sizes(longest: int, most: int) -> tuple[int, ...]:
    """Rows to measure: as many as fill the LM head's tile, and four times as many; at most `most`, which fit."""
    full = max(math.ceil(LOSS_TOKENS / longest), 2)
    high = min(4 * full, most)
    return tuple(sorted({max(min(full, high // 2), 1), high}))


def find(recipe: Recipe, shape: Shape, longest: int) -> Calibration | None:
    """What a probe of the same kind measured here before."""
    try:
        found = json.loads(_place(recipe, shape, longest).read_text(encoding="utf-8"))
        return Calibration(found["layers"], _samples(found["again"]), _samples(found["kept"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(found: Calibration, recipe: Recipe, shape: Shape, longest: int) -> None:
    """For the next plan of the kind."""
    write_atomic(_place(recipe, shape, longest), json.dumps(found._asdict()))


def _samples(listed: list[Any]) -> tuple[Sample, ...]:
    return tuple(Sample(Setting(*setting), int(peak), float(step_s)) for setting, peak, step_s in listed)


def _place(recipe: Recipe, shape: Shape, longest: int) -> Path:
    """A file named by all that decides a measurement: machine, versions, shape, and the recipe's say in a step."""
    train, machine = recipe.train, hardware.detect()
    decisive: dict[str, Any] = {
        "machine": [machine.gpu, machine.driver, machine.cpu],
        "versions": hardware.versions(),
        "shape": shape,
        "longest": longest,
        "model": recipe.model.model_dump(include={"dtype", "attention"}),
        "quantization": recipe.quantization.model_dump(),
        "lora": recipe.lora.model_dump(),
        "train": [train.method, train.optimizer, train.kernels, train.liger, train.compile],
    }
    folder = cache_dir() / "probes"
    folder.mkdir(exist_ok=True)
    return folder / f"{sha256_text(json.dumps(decisive, sort_keys=True))[:32]}.json"
