"""`json-fields`: how many of the reference's fields the answer's JSON object has, exactly equal.

A code fence around the object and text after it are tolerated, text before it is not. Further fields cost nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from tuneship.bench.quality.tasks.text import unfence


def score_json_fields(answer: str, reference: str, _extra: Mapping[str, Any]) -> float:
    """Share of the reference's fields that the answer has; 0.0 when it is not a JSON object.

    Raises:
        ValueError: the reference is no JSON object with at least one field.

    """
    wanted = json.loads(reference)
    if not isinstance(wanted, dict) or not wanted:
        raise ValueError("the reference is no JSON object with fields")
    try:
        found, _ = _DECODER.raw_decode(unfence(answer))
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(found, dict):
        return 0.0
    return sum(name in found and _same(found[name], value) for name, value in wanted.items()) / len(wanted)


def _same(a: Any, b: Any) -> bool:
    """Equal as JSON: 12 is 12.0, but true is not 1 (in Python it is)."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
