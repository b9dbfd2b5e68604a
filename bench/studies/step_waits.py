"""What a training step does beside the model: rows fetched and put together, figures written; and where it waits.

    python bench/studies/step_waits.py [--out FILE]

The product's own `fit` on a small NF4 model on the CPU, with steps of 64 rows of 1,024 tokens, 32 at a time: what is
timed here does not depend on the model, and is the same work beside a large one. Milliseconds are medians of the steps
after the first two. Steps of another training are only counted: whenever a value of a tensor is asked for as a Python
number (`aten::_local_scalar_dense`: item, int, bool), a program on a GPU waits until all that was launched before is
done. Each such place is named, with how often a step comes by. AdamW's own counters lie on the CPU on every device, and
are left out. What only a GPU's path has is not seen: batches copied to it, a paged optimizer.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from plan_memory import TINY, _model
from torch.utils._python_dispatch import TorchDispatchMode

from tuneship.core import hardware
from tuneship.core.recipe import Recipe
from tuneship.core.shape import Shape
from tuneship.train.data.template import IGNORED, Encoded
from tuneship.train.fitting import fit
from tuneship.train.fitting.callbacks import Record
from tuneship.train.fitting.checkpoints import Identity
from tuneship.train.fitting.trainer import Trainer
from tuneship.train.planning import plan as planner

ROOT = Path(__file__).parents[2]
ROWS, LENGTH, MICRO_BATCH = 64, 1024, 32
STEPS, WARM_UP = 8, 2
PARTS = {
    "rows of a step: fetched, put together, counted": (Trainer, "get_batch_samples"),
    "figures of a step: metrics.jsonl, progress, the trainer's log": (Trainer, "log"),
    "of these, our own record": (Record, "on_log"),
}


def main() -> None:
    """Time some steps, count in others, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="", help="write the record there, too")
    args = parser.parse_args()
    spent: dict[str, list[float]] = {}
    for part, (owner, name) in PARTS.items():
        setattr(owner, name, _timed(getattr(owner, name), spent.setdefault(part, [])))
    _train(STEPS)
    milliseconds = {part: round(1000 * statistics.median(times[WARM_UP:STEPS]), 2) for part, times in spent.items()}
    few, more = _waits(2), _waits(4)
    waits = {where: (more[where] - few[where]) / 2 for where in more if more[where] > few[where]}
    record = {
        "what": f"{ROWS} rows of {LENGTH} tokens a step, {MICRO_BATCH} at a time, on the CPU",
        "command": f"python {' '.join(sys.argv)}",
        "machine": hardware.detect().as_record() | {"system": platform.system()},
        "versions": hardware.versions(),
        "ms_a_step": milliseconds,
        "waits_a_step": waits,
    }
    text = json.dumps(record, indent=1)
    print(text)
    if args.out:
        Path(args.out).write_text(text + "\n", encoding="utf-8")


def _train(steps: int) -> None:
    base, tokenizer = _model(TINY, "cpu")
    train = {"effective_batch": ROWS, "micro_batch": MICRO_BATCH, "checkpointing": True, "steps": steps}
    recipe = Recipe.model_validate({"model": {"id": "random"}, "data": {"train": "none"}, "train": train})
    draw = random.Random(0)
    ids = [[draw.randrange(3, TINY.vocab) for _ in range(LENGTH)] for _ in range(4 * ROWS)]
    rows = [Encoded(row, [IGNORED] * (LENGTH // 2) + row[LENGTH // 2 :]) for row in ids]
    todo = planner.make(
        recipe,
        Shape.of(base.config.to_dict()),
        hardware.detect(),
        rows=len(rows),
        tokens=len(rows) * LENGTH,
        longest=LENGTH,
    )
    with TemporaryDirectory(prefix="tuneship-waits-") as attempt:
        fit.fit(base, tokenizer, rows, recipe, todo, Path(attempt), Identity.of(recipe, {}))


def _timed(method: Callable[..., Any], times: list[float]) -> Callable[..., Any]:
    def timed(*given: Any, **more: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*given, **more)
        finally:
            times.append(time.perf_counter() - began)

    return timed


def _waits(steps: int) -> Counter[str]:
    """How often a training of so many steps asks for a value, by the line of Python that does."""
    asked = _Asked()
    with asked:
        _train(steps)
    return asked.where


class _Asked(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.where: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            where = _who()
            if "/optim/" not in where:
                self.where[where] += 1
        return func(*args, **(kwargs or {}))


def _who() -> str:
    """The innermost line that is not PyTorch's own, and none of ours here."""
    frame = sys._getframe(2)
    while frame.f_back and ("/torch/" in frame.f_code.co_filename and "/optim/" not in frame.f_code.co_filename):
        frame = frame.f_back
    file = frame.f_code.co_filename.removeprefix(f"{ROOT}/").rpartition("site-packages/")[2]
    return f"{file}:{frame.f_lineno} {frame.f_code.co_name}"


if __name__ == "__main__":
    main()
