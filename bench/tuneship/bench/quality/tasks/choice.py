"""`choice`: one of a few options, named by its letter or by its label.

With the row's `choices` (a list of labels) letter and label are the same answer: A is the first. Without, the reference
is a single letter, or the label itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tuneship.bench.quality.tasks.normalised import normalise

# "B", "(B)", "**B.**", "B) Paris"; "A dog" is no letter.
_LETTER = re.compile(r"\A\W*([A-Za-z])(?:\W*\Z|\W*[).:\]*\n])")
# "The answer is B."
_SENTENCE = re.compile(r"\b(?i:answer|choice|option)(?:\s+(?i:is))?\W*([A-Z])\b")


def score_choice(answer: str, reference: str, extra: Mapping[str, Any]) -> float:
    """1.0 when `answer` picks what `reference` picks, else 0.0.

    Raises:
        ValueError: `choices` is no list of labels, or the reference is none of them.

    """
    labels = _labels(extra.get("choices"))
    wanted = _pick(reference, labels)
    if wanted is None or (labels and wanted not in labels):
        raise ValueError("the reference is none of the choices")
    return float(_pick(answer, labels) == wanted)


def _labels(choices: Any) -> list[str]:
    if choices is None:
        return []
    if not isinstance(choices, list) or not choices:
        raise ValueError("'choices' is no list of labels")
    return [normalise(str(label)) for label in choices]


def _pick(text: str, labels: list[str]) -> str | None:
    """The label that `text` names; its letter where there are no labels; None when it names nothing."""
    said = normalise(text)
    if said in labels:
        return said
    found = _LETTER.search(text) or _SENTENCE.search(text)
    if found:
        letter = found[1].upper()
        index = ord(letter) - ord("A")
        return labels[index] if index < len(labels) else letter
    named = [label for label in labels if label and f" {label} " in f" {said} "]
    if labels:
        return named[0] if len(named) == 1 else None
    return said or None
