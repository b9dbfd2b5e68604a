"""`regex`: what the option `pattern` finds in the answer is what it finds in the reference."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def score_regex(answer: str, reference: str, extra: Mapping[str, Any]) -> float:
    """1.0 when the first match's group (the whole match without one) is the same in both, else 0.0.

    Raises:
        ValueError: no `pattern`, not a pattern, or one that the reference does not match.

    """
    if not isinstance(extra.get("pattern"), str):
        raise ValueError("the task has no option 'pattern' with a regular expression")  # noqa: TRY004 - the user's
    try:
        pattern = re.compile(extra["pattern"])
    except re.error as error:
        raise ValueError(f"pattern: {error}") from None
    wanted = _extract(pattern, reference)
    if wanted is None:
        raise ValueError("the reference does not match 'pattern'")
    return float(_extract(pattern, answer) == wanted)


def _extract(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    if match is None:
        return None
    return (match[1] if pattern.groups else match[0]) or ""
