"""What `--dry-run` prints: every key of the recipe, the plan, and what the same command would do without it."""

from __future__ import annotations

from collections.abc import Sequence

from tuneship.cli import summary
from tuneship.cli.console import out
from tuneship.cli.pipeline import Pipeline, identify
from tuneship.core import hardware, model_source, recipe_file
from tuneship.core.files import short
from tuneship.core.model_source import ModelSource
from tuneship.core.progress import say
from tuneship.core.recipe import Recipe


def show(work: Pipeline, until: str, forgotten: Sequence[str]) -> None:
    """Print it, for a run until a stage in which the `forgotten` stages count as not done; nothing is changed."""
    out.print(recipe_file.dump(work.recipe), markup=False, highlight=False, soft_wrap=True)
    source = show_plan(work.recipe, serving=until != "train")
    say(f"nothing was done; without --dry-run: {_next(work, until, forgotten, source)}")


def show_plan(recipe: Recipe, *, serving: bool = True) -> ModelSource:
    """Print what training and, if that is asked, serving would take; the base that was looked at."""
    from tuneship.serve import choice  # noqa: PLC0415 - not for `--help`
    from tuneship.train.commands import make_plan  # noqa: PLC0415 - loads transformers

    summary.show_plan(make_plan(recipe).table())
    source = model_source.resolve(recipe.model.id, recipe.model.revision)
    if serving:
        decision = choice.decide(recipe, source, hardware.detect())
        summary.show_serving(decision)
        choice.require(decision, recipe, source, hardware.detect())
    return source


def _next(work: Pipeline, until: str, forgotten: Sequence[str], source: ModelSource) -> str:
    """The stages up to `until`, and whether training is one of them or was done already."""
    place = short(work.run.path)
    merged = work.recipe.serve.mode != "adapters"
    stages = ["train", *(["merge"] if merged else []), "serve", "bench"]
    if until == "merge" and not merged:
        until = "train"
    later = stages[1 : stages.index(until) + 1]
    then = f", then {', '.join(later)}" if later else ""
    done = None if "train" in forgotten else work.trained(source, identify(source))
    if done is None:
        begins = "goes on with the training that was stopped" if work.resume else "trains"
        return f"{begins} in {place}{then}"
    again = "" if later else " (`tuneship up RECIPE --from train` trains again)"
    return f"{place} has what this trains, {done.name}: it is kept{again}{then}"
