"""`rouge-l`: the longest common subsequence of words, as F-measure (Lin 2004; the package rouge-score)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any


def score_rouge_l(answer: str, reference: str, _extra: Mapping[str, Any]) -> float:
    """F1 of ROUGE-L in 0..1, without stemming; rouge-score sees the words of a-z and 0-9 only."""
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]  # noqa: PLC0415 - nltk is slow

    return RougeScorer(["rougeL"], use_stemmer=False)
