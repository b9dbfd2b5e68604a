"""`bench train`: how fast this card trains a recipe, beside the recipe that everybody copies and beside Unsloth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from tuneship.cli import overrides as dotted
from tuneship.core import extras, recipe_file
from tuneship.core.files import write_atomic

Way = Literal["copied-recipe", "tuneship", "unsloth"]


def bench_train(
    recipe: Path,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    ways: Annotated[tuple[Way, ...], Parameter(consume_multiple=True)] = ("copied-recipe", "tuneship", "unsloth"),
    steps: Annotated[int, Parameter(validator=Number(gte=3))] = 6,
    out: Path | None = None,
) -> None:
    """Measure how fast this card trains a recipe: as everybody copies it, as we do, as Unsloth does.

    Parameters
    ----------
    recipe
        The recipe's TOML file.
    overrides
        Any recipe key: --train.effective_batch 64 --train.kernels fused.
    ways
        Which of the three.
    steps
        Optimizer steps of each; the first two are not counted.
    out
        Write the rows there as JSON, too.

    """
    extras.require("train")
    from tuneship.train import speed  # noqa: PLC0415 - not for `--help`

    found = speed.compare(recipe_file.load(recipe, dotted.parse(overrides)), ways, steps)
    text = json.dumps([row._asdict() for row in found], indent=1)
    print(text)
    if out:
        write_atomic(out, text + "\n")
