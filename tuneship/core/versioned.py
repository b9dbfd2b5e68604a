"""JSON files that carry `schema`: a newer one is refused by name, before its unknown shape is complained about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tuneship.core.errors import TuneshipError
from tuneship.core.quoting import on_one_line

Model = TypeVar("Model", bound=BaseModel)


def parse(
    model: type[Model], text: bytes, file: Path, newest: int, error: type[TuneshipError], hint: str = ""
) -> Model:
    """The `model` in `text`, which was read from `file`.

    Raises:
        error: of a newer schema than `newest`; or not such a file at all, with `hint`.

    """
    try:
        found = _schema(text, newest)
    except (ValueError, AttributeError, RecursionError):
        raise error(f"{file} cannot be read: not a JSON object", hint=hint) from None
    if found > newest:
        raise error(f"{file} has schema {found}; this tuneship reads up to {newest}", hint="upgrade tuneship")
    try:
        return model.model_validate_json(text)
    except ValidationError as complaint:
        first = complaint.errors()[0]
        where = on_one_line(".".join(str(part) for part in first["loc"]))
        raise error(f"{file} cannot be read: {where}: {first['msg'].lower()}", hint=hint) from None


def is_newer(text: bytes, newest: int) -> bool:
    """Whether `text` is whole, and of a newer schema than `newest`."""
    try:
        return _schema(text, newest) > newest
    except (ValueError, AttributeError, RecursionError):
        return False


def _schema(text: bytes, newest: int) -> int:
    found = json.loads(text).get("schema", newest)
    return found if isinstance(found, int) else newest
