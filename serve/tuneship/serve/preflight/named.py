"""The model that an adapter from elsewhere says it was trained on, beside the base that it shall be served on.

Nothing proves a name: copies of a model have many, verify has no evidence of such an adapter, and `outputs/merged` is a
folder as well as an id of a hub. So only a name of which more than its form speaks for the hub is refused: one of the
same organisation as the base's id, or that of a folder in the hub's cache, where the two models are called differently.
All else that differs is remarked. What stands for other bits of the same weights (`-bnb-4bit`) makes no other model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuneship.core.quoting import on_one_line, quoted
from tuneship.core.recipe import BUNDLED_PREFIX
from tuneship.core.servable import Reason
from tuneship.serve.preflight.base import BaseModel

_KEY = "base_model_name_or_path"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_IN_CACHE = re.compile(r"(?:.*/)?models--([^/]+?)--([^/]+)/snapshots/[^/]+/?")
"""Where the hub's cache keeps a model, which is what a trainer writes down that was given the folder."""
_BITS = re.compile(r"(?:-(?:unsloth|dynamic|bnb|[48]bit|int[48]|nf4|fp8|awq|gptq))+")


def check(config: Mapping[str, Any], base: BaseModel) -> list[Reason]:
    """Refuse an adapter that names another model of a hub than `base` is."""
    named, served = _named(config), base.record.id
    if not named or _alike(named, served) or not _both_of_a_hub(config, named, served):
        return []
    named = quoted(named)
    return [
        Reason(
            f"says that it was trained on {named}, and the base is {served}",
            f"serve it on {named}; if that is a folder's name, or both are the same weights, write {served} as "
            f"{_KEY} into its adapter_config.json",
        )
    ]


def remarks(name: str, config: Mapping[str, Any], base: BaseModel) -> tuple[str, ...]:
    """What to say where it is not known whether `base` is the model that the adapter `name` was trained on."""
    named, served = _named(config), base.record.id
    if not named or _alike(named, served) or check(config, base):
        return ()
    said = f"adapter {quoted(name)} says that it was trained on {quoted(named)}, and is served on {on_one_line(served)}"
    return (f"{said}: nothing shows that these are the same weights",)


def _both_of_a_hub(config: Mapping[str, Any], named: str, served: str) -> bool:
    if not (_HUB_ID.fullmatch(named) and _HUB_ID.fullmatch(served)):
        return False
    return named != config[_KEY] or _organisation(named) == _organisation(served)


def _named(config: Mapping[str, Any]) -> str:
    named = config.get(_KEY)
    if not isinstance(named, str):
        return ""
    cached = _IN_CACHE.fullmatch(named)
    return "/".join(cached.groups()) if cached else named


def _organisation(named: str) -> str:
    return named.partition("/")[0].lower()


def _alike(one: str, other: str) -> bool:
    return _model(one) == _model(other)


def _model(named: str) -> str:
    """The last part of an id or a path, without the bits."""
    return _BITS.sub("", named.removeprefix(BUNDLED_PREFIX).rstrip("/").rpartition("/")[2].lower())
