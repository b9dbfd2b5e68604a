"""`exact`: the answer is the reference, but for case and white space."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def score_exact(answer: str, reference: str, _extra: Mapping[str, Any]) -> float:
    """1.0 when both are the same words in the same order, else 0.0."""
    return float(_normalise(answer) == _normalise(reference))


def _normalise(text: str) -> str:
    return " ".join(text.split()).casefold()
