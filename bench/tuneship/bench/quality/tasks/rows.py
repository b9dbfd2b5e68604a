"""A task file: JSONL of `{"messages": [..., {"role": "assistant", "content": <reference>}], ...extra keys}`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuneship.core.errors import DataError
from tuneship.core.recipe import TABLES
from tuneship.core.recipe_file import data_files


class Row(NamedTuple):
    """One item: the chat to send, the answer that is right, and what else the scorer may need."""

    place: str
    """`file:line`, for messages about it."""
    prompt: list[dict[str, str]]
    reference: str
    extra: dict[str, Any]


class _Message(BaseModel):
    role: str
    content: str


class _Line(BaseModel):
    model_config = ConfigDict(extra="allow")

    messages: list[_Message] = Field(min_length=2)


def read_rows(pattern: str, limit: int) -> list[Row]:
    """The first `limit` rows of the file (or glob) `pattern`.

    Raises:
        DataError: no file, no row, or a line that is no such chat; names file and line.

    """
    rows: list[Row] = []
    for path in data_files(pattern):
        for number, line in enumerate(_text(path).split("\n"), start=1):
            if line.strip() and len(rows) < limit:
                rows.append(_parse(line, f"{path}:{number}"))
    if not rows:
        raise DataError(f"{pattern} has no rows")
    return rows


def _text(path: Path) -> str:
    if path.suffix.lower() in {*TABLES, ".gz"}:
        raise DataError(f"{path}: a bench reads JSONL of messages, not {path.suffix}", hint=_SHAPE)
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text", hint=_SHAPE) from None


def _parse(line: str, place: str) -> Row:
    try:
        row = _Line.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error}", hint=_SHAPE) from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise DataError(f"{place}: {key}: {first['msg']}", hint=_SHAPE) from None
    *prompt, last = row.messages
    if last.role != "assistant":
        raise DataError(f"{place}: the last message is from {last.role!r}, not 'assistant'", hint=_SHAPE)
    return Row(place, [message.model_dump() for message in prompt], last.content, row.model_extra or {})


_SHAPE = (
    'a row is {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": <reference>}]}; '
    "`tuneship train` writes data.heldout so, whatever it was read from: runs/NAME/stages/train/latest/heldout.jsonl"
)
