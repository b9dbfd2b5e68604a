"""A few answers to look at: what the base said and what the tuned model says to the same question."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import NamedTuple

from tuneship.bench.quality.evaluate import Item, read_items
from tuneship.core.report import EvalResult

_LONGEST = 700


class Example(NamedTuple):
    """One question with its answers; `base` is None when only one model was asked."""

    question: str
    reference: str
    base: str | None
    base_score: float
    answer: str
    score: float


def choose(base: EvalResult | None, other: EvalResult, folder: Path, count: int = 3) -> list[Example]:
    """What was won and what is still wrong, in turn; `folder` is where the report lies."""
    items = _read(other, folder)
    before = {item.index: item for item in _read(base, folder)} if base else {}
    won = [item for item in items if item.score == 1 and _score(before, item) < 1]
    wrong = [item for item in items if item.score < 1]
    turns = [item for pair in zip_longest(won, wrong) for item in pair if item]
    chosen = list(islice(turns or items, count))
    return [_example(item, before.get(item.index)) for item in sorted(chosen, key=lambda item: -item.score)]


def _read(result: EvalResult, folder: Path) -> Sequence[Item]:
    path = folder / result.items_file
    return read_items(path) if path.is_file() else []


def _score(before: dict[int, Item], item: Item) -> float:
    return before[item.index].score if item.index in before else 0.0


def _example(item: Item, before: Item | None) -> Example:
    return Example(
        question=_cut(item.prompt[-1]["content"]),
        reference=_cut(item.reference),
        base=_cut(before.error or before.answer) if before else None,
        base_score=before.score if before else 0.0,
        answer=_cut(item.error or item.answer),
        score=item.score,
    )


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
