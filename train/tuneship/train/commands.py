"""The verbs of the train stage that need no run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuneship.core.recipe import Recipe

if TYPE_CHECKING:
    from tuneship.train.plan import Plan


def fetch(model: str, *, revision: str = "main") -> None:
    """Bring a base model to this disk and print its folder.

    Parameters
    ----------
    model
        Hub id, local path, or bundled:smollm2-135m-instruct.
    revision
        Branch, tag or commit of a hub model.

    """
    from tuneship.train.fetch import fetch as bring  # noqa: PLC0415 - loads transformers

    print(bring(model, revision).path)


def make_plan(recipe: Recipe) -> Plan:
    """Read all rows and plan the run; loads the tokenizer, and no model."""
    from tuneship.train.fetch import fetch as bring  # noqa: PLC0415
    from tuneship.train.prepare import plan, prepare, read_rows  # noqa: PLC0415

    bring(recipe.model.id, recipe.model.revision)
    prepared = prepare(recipe)
    return plan(recipe, prepared.source, read_rows(recipe, prepared.template).train)
