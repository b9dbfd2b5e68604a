"""JSON files that carry `schema`: a newer one is refused by name, before its unknown shape is complained about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from tuneship.core.errors import TuneshipError

Model = TypeVar("Model", bound=BaseModel)


def parse(model: type[Model], text: bytes, file: Path, newest: int, error: type[TuneshipError]) -> Model:
    """The `model` in `text`, which was read from `file`.

    Raises:
        error: of a newer schema than `newest`, or not such a file at all.

    """
    try:
        found = json.loads(text).get("schema", newest)
    except (ValueError, AttributeError):
        raise error(f"{file} cannot be read: not a JSON object") from None
    if isinstance(found, int) and found > newest:
        raise error(f"{file} has schema {found}; this tuneship reads up to {newest}", hint="upgrade tuneship")
    try:
        return model.model_validate_json(text)
    except ValidationError as complaint:
        first = complaint.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise error(f"{file} cannot be read: {where}: {first['msg'].lower()}") from None
