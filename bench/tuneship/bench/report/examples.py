"""A few answers to look at: what one model said and what another says to the same question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


class Group(NamedTuple):
    """Examples of one kind; `total` counts all of that kind, shown or not."""

    title: str
    total: int
    examples: list[Example]


def choose(base: EvalResult | None, other: EvalResult, folder: Path, count: int = 3) -> list[Group]:
    """What was lost first, then what was won, then what is still wrong; `folder` is where the report lies.

    Right is a score of 1. Without a base there are only answers that are wrong, and ones that are right if none is.
    """
    items = read(other, folder)
    before = {item.index: item for item in read(base, folder)} if base else {}
    wrong = [item for item in items if item.score < 1]
    still = [item for item in wrong if item.index not in before or before[item.index].score < 1]
    groups = [
        *_changes(items, before),
        ("Wrong" if not before else "Still wrong", still),
        ("Right", items if not before and not wrong else []),
    ]
    return _shown(groups, before, count)


def changed(before: Mapping[int, Item], items: Sequence[Item], count: int) -> list[Group]:
    """What was lost, then what was won, of the items that `before` has too; `count` of each are shown."""
    return _shown(_changes(items, before), before, count)


def read(result: EvalResult, folder: Path) -> Sequence[Item]:
    """The items of `result`; none when their file is gone."""
    path = folder / result.items_file
    return read_items(path) if path.is_file() else []


def _changes(items: Sequence[Item], before: Mapping[int, Item]) -> list[tuple[str, Sequence[Item]]]:
    known = [item for item in items if item.index in before]
    return [
        ("From right to wrong", [item for item in known if before[item.index].score == 1 and item.score < 1]),
        ("From wrong to right", [item for item in known if before[item.index].score < 1 and item.score == 1]),
    ]


def _shown(groups: Sequence[tuple[str, Sequence[Item]]], before: Mapping[int, Item], count: int) -> list[Group]:
    return [
        Group(title, len(found), [_example(item, before.get(item.index)) for item in found[:count]])
        for title, found in groups
        if found
    ]


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
