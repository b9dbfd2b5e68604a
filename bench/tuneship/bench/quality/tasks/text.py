"""What models put around the answer that was asked for."""

from __future__ import annotations

import re

_FENCED = re.compile(r"\A```(?:\w*[ \t]*\n|json\b|sql\b)?(?P<inside>.*?)(?:```|\Z)", re.DOTALL)


def unfence(answer: str) -> str:
    """The inside of the code fence that `answer` begins with; `answer` itself when it begins with none."""
    text = answer.strip()
    fenced = _FENCED.match(text)
    return fenced["inside"].strip() if fenced else text
