"""`--lora.rank 8 --train.steps=20` -> {"lora.rank": "8", "train.steps": "20"}: any recipe key on the command line."""

from __future__ import annotations

from collections.abc import Sequence

from tuneship.core.errors import RecipeError


def parse(tokens: Sequence[str]) -> dict[str, str]:
    """Dotted flags as a mapping.

    Raises:
        RecipeError: a token that is no `--section.key`, or a flag without a value.

    """
    found: dict[str, str] = {}
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if not token.startswith("--"):
            raise RecipeError(f"unexpected argument {token!r}", hint="recipe keys look like --lora.rank 8")
        key, equals, value = token.removeprefix("--").partition("=")
        if not equals:
            if not rest:
                hint = "recipe keys look like --lora.rank 8; what else there is: --help of this verb"
                raise RecipeError(f"{token} needs a value", hint=hint)
            value = rest.pop(0)
        found[key] = value
    return found
