"""`normalised`: the answer is the reference, but for case, punctuation, articles and white space.

As SQuAD's evaluation script does it (Rajpurkar et al. 2016, https://arxiv.org/abs/1606.05250).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")


def score_normalised(answer: str, reference: str, _extra: Mapping[str, Any]) -> float:
    """1.0 when both say the same words, else 0.0.

    Raises:
        ValueError: nothing is left of the reference, so that an empty answer would be right.

    """
    wanted = normalise(reference)
    if not wanted:
        raise ValueError("the reference has no word but articles and punctuation")
    return float(normalise(answer) == wanted)


def normalise(text: str) -> str:
    """`text` in lower case, without punctuation (of any script) and articles, words one space apart."""
    kept = "".join(c for c in text.casefold() if not unicodedata.category(c).startswith("P"))
    return " ".join(_ARTICLE.sub(" ", kept).split())
