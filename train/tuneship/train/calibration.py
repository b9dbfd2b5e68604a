"""What a probe measured of a machine, a shape and a recipe, and the straight lines through it; kept in the cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core import hardware
from tuneship.core.cache import cache_dir
from tuneship.core.files import sha256_text, write_atomic
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.memory import LOSS_TOKENS, Setting


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
        return self._between(setting, "peak_bytes")

    def step_s(self, setting: Setting) -> float:
        """Expected seconds of one micro-step."""
        return self._between(setting, "step_s")

    def _between(self, setting: Setting, field: str) -> float:
        share = setting.kept_layers / self.layers
        kept = share * _line(self.kept, field, setting.micro_batch) if share else 0.0
        again = (1 - share) * _line(self.again, field, setting.micro_batch) if share < 1 else 0.0
        return kept + again


def _line(samples: tuple[Sample, ...], field: str, micro: int) -> float:
    """The value at `micro` of the line through two samples; infinity where there are none, or beyond a single one."""
    if not samples:
        return math.inf
    first, last = samples[0], samples[-1]
    low, high = float(getattr(first, field)), float(getattr(last, field))
    between = last.setting.micro_batch - first.setting.micro_batch
    if not between:
        return low if micro <= first.setting.micro_batch else math.inf
    return low + max(high - low, 0.0) / between * (micro - first.setting.micro_batch)


def sizes(longest: int, most: int) -> tuple[int, ...]:
    """Rows to measure: as many as fill the LM head's tile, and twice as many; at most `most`, which fit."""
    full = max(math.ceil(LOSS_TOKENS / longest), 2)
    high = min(2 * full, most)
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
