"""`tuneship data`: what is wrong with a recipe's rows, and what of them is learnt; no model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from tuneship.cli import data_tables
from tuneship.cli import overrides as dotted
from tuneship.cli.console import out
from tuneship.core import recipe_file
from tuneship.core.errors import DataError, RecipeError
from tuneship.core.recipe import Recipe

if TYPE_CHECKING:
    from tuneship.train.data.show import Shown
    from tuneship.train.prepare import Prepared

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]


def check(recipe: Path, *overrides: Overrides, json: bool = False) -> None:
    """Read all rows of a recipe and say what is wrong with them, by file and line; exit 1 where training would refuse.

    Parameters
    ----------
    recipe
        The recipe's TOML file.
    overrides
        Any recipe key: --data.max_length 2048.
    json
        Print everything as JSON instead.

    """
    from tuneship.train.data.check import check as look  # noqa: PLC0415 - not for `--help`

    loaded = recipe_file.load(recipe, dotted.parse(overrides))
    prepared = _prepared(loaded)
    report = look(loaded.data, prepared.template, prepared.end_ids)
    if json:
        print(report.model_dump_json(indent=1))
    else:
        data_tables.show_check(report)
    if report.unusable and loaded.data.on_bad_row == "fail":
        leave_out = ', or leave them out: data.on_bad_row = "skip"' if report.unusable < report.rows else ""
        raise DataError(f"{report.unusable} of {report.rows} rows cannot be used", hint=f"mend them{leave_out}")


def show(
    recipe: Path,
    *overrides: Overrides,
    rows: Annotated[int, Parameter(validator=Number(gte=1))] = 3,
    split: Literal["train", "heldout"] = "train",
) -> None:
    """Print rows as the model reads them, and mark what is learnt.

    Parameters
    ----------
    recipe
        The recipe's TOML file.
    overrides
        Any recipe key: --data.loss completion.
    rows
        How many, from the first on.
    split
        Of which data.

    """
    from tuneship.train.data.show import show as render  # noqa: PLC0415

    loaded = recipe_file.load(recipe, dotted.parse(overrides))
    pattern = loaded.data.train if split == "train" else loaded.data.heldout
    if not pattern:
        raise RecipeError("the recipe has no data.heldout")
    for row in render(pattern, loaded.data, _prepared(loaded).template, rows):
        _print(row)


def _prepared(recipe: Recipe) -> Prepared:
    from tuneship.train.fetch import fetch_all  # noqa: PLC0415 - loads transformers
    from tuneship.train.prepare import prepare  # noqa: PLC0415

    fetch_all(recipe)
    return prepare(recipe)


def _print(row: Shown) -> None:
    """In colour on a terminal; elsewhere {+what is learnt+} stands in braces."""
    if row.refused:
        out.print(Text(f"--- {row.place}, refused: {row.refused}", style="red"), soft_wrap=True)
        return
    share = f"{row.loss_tokens / row.tokens:.0%}" if row.tokens else "none"
    out.print(Text(f"--- {row.place}, {row.tokens} tokens, {row.loss_tokens} with loss ({share})", style="dim"))
    in_colour = out.is_terminal and not out.no_color
    text = Text()
    for span in row.spans:
        if not span.is_trained:
            text.append(span.text, style="dim")
        else:
            text.append(span.text if in_colour else f"{{+{span.text}+}}", style="bold green")
    out.print(text, soft_wrap=True)
