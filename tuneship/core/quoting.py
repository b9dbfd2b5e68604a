"""What somebody else's files say, as it is repeated in a remark or a refusal: on one line, and not without end.

Artifacts and adapters come from anywhere, and a log or a terminal would take a line end or an escape in their settings,
or in the name of a tensor, for our own.
"""

from __future__ import annotations

LONGEST = 200
_LONGEST_FACT = 2000


def quoted(text: str) -> str:
    """`text` in quotes, its first `LONGEST` letters, escaped where they do not print."""
    return repr(text) if len(text) <= LONGEST else f"{text[:LONGEST]!r}..."


def on_one_line(text: str) -> str:
    """`text` without quotes, escaped in the same way; one that is far too long for a reader is cut."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[:_LONGEST_FACT])
    return shown if len(text) <= _LONGEST_FACT else f"{shown}..."
