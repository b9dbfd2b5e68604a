"""How a run will be served, settled before it trains: as its recipe says, or, for `serve.mode = "auto"`, as it fits."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from tuneship.cli.pipeline import Pipeline
from tuneship.core import hardware, recipe_file
from tuneship.core.errors import PlanError, PreflightError
from tuneship.core.files import write_atomic
from tuneship.core.model_source import ModelSource
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe

if TYPE_CHECKING:
    from tuneship.serve.choice import Decision

_SCHEMA = 1
_BASES = {"none": "16-bit", "dequantized": "dequantized NF4"}


def serves(recipe: Recipe, until: str) -> bool:
    """Whether a run until this stage asks how it will be served: it starts a server, or `auto` says whether it merges.

    `--until merge` of a mode that the recipe names does neither: a card that SGLang does not serve on is no obstacle.
    """
    return until in {"serve", "bench"} or (until == "merge" and recipe.serve.mode == "auto")


def settle(work: Pipeline, source: ModelSource) -> Pipeline:
    """Decide, say and record how the run will be served; the pipeline goes on with the mode that was decided.

    `plan.json` and the resolved recipe then lie in the run directory. A mode that the recipe names is kept where its
    memory cannot be planned, or looks too small: that is an estimate, and SGLang decides.

    Raises:
        PreflightError: SGLang would refuse to start, or two models would have one name.
        PlanError: `auto` has nothing that fits.

    """
    from tuneship.serve import choice  # noqa: PLC0415 - not for `--help`

    recipe = work.recipe
    auto = recipe.serve.mode == "auto"
    require_two_names(recipe, source, recipe.serve.mode)
    try:
        decision = choice.decide(recipe, source, hardware.detect())
    except PlanError as error:
        if auto:
            raise
        say(f"the server's memory is not planned: {error.message}")
        return work
    require_two_names(recipe, source, decision.mode)
    if auto:
        say(f"serve.mode = auto: {describe(decision)}: {decision.reason}")
    elif not decision.plan.fits:
        say(f"warning: the server may not fit this machine: tuneship plan {work.run.recipe}")
    chosen = {"mode": decision.mode, "quantization": decision.quantization}
    decided = recipe.model_copy(update={"serve": recipe.serve.model_copy(update=chosen)})
    recipe_file.save(decided, work.run.recipe)
    record = {"asked": recipe.serve.mode, **chosen, "reason": decision.reason, "memory": decision.plan._asdict()}
    write_atomic(work.run.path / "plan.json", json.dumps({"schema": _SCHEMA, "serve": record}, indent=1) + "\n")
    return replace(work, recipe=decided)


def require_two_names(recipe: Recipe, source: ModelSource, mode: str) -> None:
    """Refuse, where `mode` serves an adapter beside its base, that both have one name.

    Raises:
        PreflightError: they have.

    """
    if mode == "adapters" and recipe.name == source.name:
        raise PreflightError(
            f"both the base and the adapter would be called {recipe.name!r}", hint="give the recipe another name"
        )


def describe(decision: Decision) -> str:
    """What is served, in a few words."""
    if decision.mode == "merged":
        return "merged"
    packed = decision.quantization if decision.quantization == "dequantized" else decision.plan.quantization
    return f"as an adapter on the {_BASES.get(packed, packed.upper())} base"
