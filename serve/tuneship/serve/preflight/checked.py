"""What the preflight says of an adapter that can be served."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class CheckedAdapter(NamedTuple):
    """An adapter that can be served. `name` is the recipe's, else the directory's."""

    name: str
    content_id: str
    """Of what was checked, not of the copy: folding changes the words, not the answers."""
    path: Path
    """What SGLang shall load."""
    remarks: tuple[str, ...] = ()
    """What is legal, and hardly meant."""
