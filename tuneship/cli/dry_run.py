"""What `--dry-run` prints: every key of the recipe, the plan, and what the same command would do without it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tuneship.cli import summary
from tuneship.cli.console import out
from tuneship.cli.pipeline import Pipeline, identify
from tuneship.cli.settling import require_two_names, serves
from tuneship.core import hardware, model_source, recipe_file
from tuneship.core.files import short
from tuneship.core.model_source import ModelSource
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe


class Planned(NamedTuple):
    """What was planned: of which base, and how it will be served, decided where that was asked."""

    source: ModelSource
    mode: str


def show(work: Pipeline, until: str, forgotten: Sequence[str]) -> None:
    """Print it, for a run until a stage in which the `forgotten` stages count as not done; nothing is changed."""
    out.print(recipe_file.dump(work.recipe), markup=False, highlight=False, soft_wrap=True)
    planned = show_plan(work.recipe, serving=serves(work.recipe, until))
    say(f"nothing was done; without --dry-run: {_next(work, until, forgotten, planned)}")


def show_plan(recipe: Recipe, *, serving: bool = True) -> Planned:
    """Print what training and, if that is asked, serving would take; the base that was looked at, and the mode."""
    from tuneship.serve import choice  # noqa: PLC0415 - not for `--help`
    from tuneship.train.commands import make_plan  # noqa: PLC0415 - loads transformers

    summary.show_plan(make_plan(recipe).table())
    source = model_source.resolve(recipe.model.id, recipe.model.revision)
    if not serving:
        return Planned(source, recipe.serve.mode)
    decision = choice.decide(recipe, source, hardware.detect())
    summary.show_serving(decision)
    choice.require(decision, recipe, source, hardware.detect())
    require_two_names(recipe, source, decision.mode)
    return Planned(source, decision.mode)


def _next(work: Pipeline, until: str, forgotten: Sequence[str], planned: Planned) -> str:
    """The stages up to `until`, and whether training is one of them or was done already."""
    place, source = short(work.run.path), planned.source
    merges = planned.mode != "adapters" and work.recipe.train.method != "full"  # that trains the checkpoint itself
    stages = ["train", *(["merge"] if merges else []), "serve", "bench"]
    last = until if until in stages else "train"
    later = stages[1 : stages.index(last) + 1]
    then = f", then {', '.join(later)}" if later else ""
    done = None if "train" in forgotten else work.trained(source, identify(source))
    if done is None:
        begins = "goes on with the training that was stopped" if work.resume else "trains"
        return f"{begins} in {place}{then}"
    again = "" if later else " (`tuneship up RECIPE --from train` trains again)"
    # Its bytes are not read here: they may be gigabytes, and `up` reads them.
    return f"{place} has what this trains, {done.name}: it is kept if it is whole{again}{then}"
