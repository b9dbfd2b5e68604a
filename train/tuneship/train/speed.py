"""How fast this machine trains a recipe: as everybody copies it, as we do, as Unsloth does, in one run on one card.

    tuneship bench train RECIPE

Each way takes a few steps over the same rows in a process of its own, so that none finds memory or compiled kernels of
another. A figure is the median of whole optimizer steps after the first two. Tokens do not count padding. Beside them
stands the limit: what the card's own speed in a large matrix product would give, if every product that has to be done
(forward, and backward through frozen weights) took no longer than that and nothing else took any time.
"""

from __future__ import annotations

import json
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple

from tuneship.core import hardware, recipe_file
from tuneship.core.errors import TrainError
from tuneship.core.process import tail
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe

Way = Literal["copied-recipe", "tuneship", "unsloth"]
WAYS: tuple[Way, ...] = ("copied-recipe", "tuneship", "unsloth")
_WARM_UP = 2
_GIB = 2**30


class Speed(NamedTuple):
    """One way, measured. `peak_gib` is PyTorch's own, without CUDA's context: what all ways can say of themselves.

    `versions` and `attention` are of the environment that trained; Unsloth has its own.
    """

    name: str
    tokens_per_s: float
    peak_gib: float
    micro_batch: int
    accumulation: int
    first_loss: float
    limit_tokens_per_s: float
    versions: dict[str, str]
    attention: dict[str, Any]
    command: str


def compare(recipe: Recipe, ways: Sequence[Way], steps: int) -> list[Speed]:
    """Measure `ways` one after another; what fails is said and left out.

    Raises:
        TrainError: none could be measured.

    """
    found = []
    for way in ways:
        say(f"measuring {way}")
        with TemporaryDirectory(prefix="tuneship-speed-") as folder:
            work = Path(folder)
            recipe_file.save(variant(recipe, way), work / "recipe.toml")
            command = [sys.executable, "-m", "tuneship.train.speed", way, str(steps), folder]
            with (work / "log").open("wb") as log:
                code = subprocess.run(command, stdout=log, stderr=log, check=False).returncode
            if code:
                say(f"{way} could not be measured:\n{tail(work / 'log', 6)}")
                continue
            measured = json.loads((work / "speed.json").read_text(encoding="utf-8"))
        found.append(Speed(**measured, command=shlex.join(["tuneship", *sys.argv[1:]])))
    if not found:
        raise TrainError("nothing could be measured")
    return found


def variant(recipe: Recipe, way: Way) -> Recipe:
    """`recipe` as `way` trains it; what is learnt stays, how a step is cut does not."""
    if way == "copied-recipe":
        cut = {"micro_batch": 2, "effective_batch": 16, "checkpointing": True, "kernels": "peft", "liger": False}
        lora = recipe.lora.model_copy(update={"dropout": 0.05})
        return recipe.model_copy(update={"train": recipe.train.model_copy(update=cut), "lora": lora})
    return recipe


def _measure(way: Way, steps: int, work: Path) -> dict[str, Any]:
    """In the child: a few steps; what `Speed` says of them."""
    from tuneship.core import checkpoint  # noqa: PLC0415
    from tuneship.core.shape import Shape  # noqa: PLC0415
    from tuneship.train import prepare  # noqa: PLC0415 - seconds

    recipe = recipe_file.load(work / "recipe.toml")
    prepared = prepare.prepare(recipe)
    every = prepare.read_rows(recipe, prepared.template).train.rows
    batch = recipe.train.effective_batch
    rows = random.Random(0).choices(every, k=batch)
    tokens = sum(len(row.input_ids) for row in rows)
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps, "warmup": 0.0})})
    longest = max(len(row.input_ids) for row in rows)
    todo = prepare.plan_for(short, prepared.source, rows=len(rows), tokens=tokens, longest=longest)
    if way == "unsloth":
        from tuneship.train.elsewhere import unsloth_backend  # noqa: PLC0415

        todo = todo._replace(micro_batch=batch, accumulation=1)
        made = unsloth_backend.fit(prepared.source.path, prepared.pad_id, rows, short, todo, work)
        lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
        step_s, first, peak = [line["step_s"] for line in lines], lines[0]["loss"], made.peak_bytes
        versions, attention = made.versions, made.attention
    else:
        step_s, first, peak, todo, attention = _ours(prepared, rows, short, todo, work)
        versions = hardware.versions()
    median_s = statistics.median(step_s[_WARM_UP:] or step_s)
    return {
        "name": way,
        "tokens_per_s": round(tokens / median_s, 1),
        "peak_gib": round(peak / _GIB, 2),
        "micro_batch": todo.micro_batch,
        "accumulation": todo.accumulation,
        "first_loss": round(first, 4),
        "limit_tokens_per_s": round(_limit(Shape.of(checkpoint.read_config(prepared.source.path)))),
        "versions": versions,
        "attention": attention,
    }


def _ours(
    prepared: Any, rows: Any, recipe: Recipe, todo: Any, work: Path
) -> tuple[list[float], float, int, Any, dict[str, Any]]:
    import torch  # noqa: PLC0415

    from tuneship.train import model  # noqa: PLC0415
    from tuneship.train.fitting import fit  # noqa: PLC0415
    from tuneship.train.planning import probe  # noqa: PLC0415

    base = model.load_base(prepared.source.path, recipe.model, recipe.quantization)
    todo = probe.refine(base, prepared.tokenizer, recipe, todo)
    trainer = fit.build(base, prepared.tokenizer, rows, recipe, todo, work)
    clock = probe.Clock()
    trainer.add_callback(clock)
    probe.forget_peak()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    attention = {"implementation": trainer.model.config._attn_implementation}
    return clock.step_s, float(trainer.state.log_history[0]["loss"]), peak, todo, attention


def _limit(shape: Any) -> float:
    """Tokens a second of the products alone: 2 FLOP a weight forward and 2 backward, at this card's own speed."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return 0.0
    size = 8192
    matrix = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    for count in (3, 10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(count):
            matrix @ matrix
        torch.cuda.synchronize()
        flops = 2 * size**3 * count / (time.perf_counter() - began)
    weights = shape.linear_parameters + shape.vocab * shape.hidden
    return float(flops / (4 * weights))


if __name__ == "__main__":
    _way, _steps, _folder = sys.argv[1:]
    _found = _measure(_way, int(_steps), Path(_folder))  # type: ignore[arg-type]
    (Path(_folder) / "speed.json").write_text(json.dumps(_found), encoding="utf-8")
