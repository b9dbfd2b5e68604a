"""The model that an adapter from elsewhere says it was trained on, beside the base that it shall be served on.

Nothing proves a name: copies of a model have many, and verify has no evidence of such an adapter. So only two ids of a
hub whose models are called differently are two models for sure, and refused; all else that differs is remarked. What
stands for other bits of the same weights (`-bnb-4bit`) makes no other model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuneship.core.recipe import BUNDLED_PREFIX
from tuneship.core.servable import Reason
from tuneship.serve.preflight.base import BaseModel

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+", re.ASCII)
_IN_CACHE = re.compile(r"(?:.*/)?models--([^/]+?)--([^/]+)/snapshots/[^/]+/?")
"""Where the hub's cache keeps a model, which is what a trainer writes down that was given the folder."""
_BITS = re.compile(r"(?:-(?:unsloth|dynamic|bnb|[48]bit|int[48]|nf4|fp8|awq|gptq))+")


def check(config: Mapping[str, Any], base: BaseModel) -> list[Reason]:
    """Refuse an adapter that names another model of a hub than `base` is."""
    named, served = _named(config), base.record.id
    if not named or _alike(named, served) or not (_HUB_ID.fullmatch(named) and _HUB_ID.fullmatch(served)):
        return []
    return [
        Reason(
            f"says that it was trained on {named}, and the base is {served}",
            f"serve it on {named}; if both are the same weights, write {served} as base_model_name_or_path into its "
            "adapter_config.json",
        )
    ]


def remarks(name: str, config: Mapping[str, Any], base: BaseModel) -> tuple[str, ...]:
    """What to say where it is not known whether `base` is the model that the adapter `name` was trained on."""
    named, served = _named(config), base.record.id
    if not named or _alike(named, served) or check(config, base):
        return ()
    said = f"adapter {name!r} says that it was trained on {named}, and is served on {served}"
    return (f"{said}: nothing shows that these are the same weights",)


def _named(config: Mapping[str, Any]) -> str:
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str):
        return ""
    cached = _IN_CACHE.fullmatch(named)
    return "/".join(cached.groups()) if cached else named


def _alike(one: str, other: str) -> bool:
    return _model(one) == _model(other)


def _model(named: str) -> str:
    """The last part of an id or a path, without the bits."""
    return _BITS.sub("", named.removeprefix(BUNDLED_PREFIX).rstrip("/").rpartition("/")[2].lower())
