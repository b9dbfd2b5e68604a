"""A row as it lies on disk."""

from __future__ import annotations

from typing import Any, NamedTuple


class Raw(NamedTuple):
    """A row, or why there is none. `place` is `file:line`, for what has no lines `name:row`."""

    place: str
    row: Any
    error: str = ""
