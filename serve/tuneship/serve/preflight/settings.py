"""`adapter_config.json`, read and typed; and which modules it names, by PEFT's own rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneship.core.errors import ArtifactError
from tuneship.core.quoting import on_one_line

_LONGEST_BYTES = 1 << 22
"""A list of every module of a large model is some 100 KB."""
_Rank = Annotated[int, Field(ge=1, le=1 << 31)]
"""No matrix is so large; what is no float cannot be computed with."""


class _Shape(BaseModel):
    """The fields that we compute with; a list of strings where PEFT takes a string or a list."""

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: str
    r: _Rank
    lora_alpha: Annotated[float, Field(allow_inf_nan=False)]
    target_modules: str | list[str]
    rank_pattern: dict[str, _Rank] | None = None
    alpha_pattern: dict[str, Annotated[float, Field(allow_inf_nan=False)]] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None


def read(file: Path) -> dict[str, Any]:
    """The adapter's settings, those that we compute with of the right type.

    Raises:
        ArtifactError: not PEFT's JSON, or a pattern in it that is no regular expression.

    """
    if file.stat().st_size > _LONGEST_BYTES:
        raise ArtifactError(f"{file} is not an adapter's configuration: it has {file.stat().st_size} bytes")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        _Shape.model_validate(config)
        for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
            before = "" if key.endswith("_modules") else r".*\."  # PEFT puts the other ones behind a beginning
            for pattern in _listed(config.get(key)):
                re.compile(before + pattern)
    except ValidationError as wrong:
        first = wrong.errors()[0]
        where = on_one_line(".".join(map(str, first["loc"])))
        raise ArtifactError(f"{file} is not an adapter's configuration: {where}: {first['msg']}") from None
    except (ValueError, RecursionError, OverflowError, re.error) as fault:
        error = on_one_line(str(fault))
        raise ArtifactError(f"{file} is not an adapter's configuration: {error}") from None
    return dict(config)


def chosen(config: dict[str, Any], modules: Iterable[str]) -> set[str]:
    """Those of `modules` that PEFT wraps under `config`: a string is a pattern for the whole name, a list has ends."""
    targets, excluded = config["target_modules"], config.get("exclude_modules") or []
    if targets == "all-linear":
        targets = ".*"
    return {
        module
        for module in modules
        if _matches(targets, module)
        and not _matches(excluded, module)
        and (isinstance(targets, str) or module in targets or _in_its_layers(config, module))
    }


def _matches(names: str | list[str], module: str) -> bool:
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names)


def _in_its_layers(config: dict[str, Any], module: str) -> bool:
    """PEFT looks at the layers only for modules that are not listed by their whole name."""
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    patterns = _listed(config.get("layers_pattern") or r"[^.]*")
    found = (re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns)
    number = next((int(match.group(1)) for match in found if match), None)
    return number in ([layers] if isinstance(layers, int) else layers)


def _listed(value: str | Iterable[str] | None) -> list[str]:
    """Of a dictionary its keys."""
    return [value] if isinstance(value, str) else list(value or [])
