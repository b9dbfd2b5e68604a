"""Two models on the same items or rows: from what each made of every one of them to what can be said of both.

Items are paired by their place; a pair counts only where both were asked the same question. Where the items of a side
are gone, its score and standard error are all there is, and the two are compared as if their items had been others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

from scipy import stats  # type: ignore[import-untyped]

from tuneship.bench.compare.again import Again
from tuneship.bench.compare.paired import Paired, compare_nll, compare_scores
from tuneship.bench.compare.statistics import detectable_at
from tuneship.bench.compare.verdict import Evidence
from tuneship.bench.quality.evaluate import Item, read_items
from tuneship.core.report import EvalResult, NllResult

_Result = TypeVar("_Result", EvalResult, NllResult)

FEWEST_ITEMS = 20
_MOST_ITEMS = 100_000


class Side(NamedTuple, Generic[_Result]):
    """What one model made of the items, and the folder that its items file is named from."""

    result: _Result
    folder: Path

    @property
    def file(self) -> Path:
        """Its items file."""
        return self.folder / self.result.items_file


def weigh_scores(
    a: Side[EvalResult], b: Side[EvalResult] | None, margin: float, alpha: float, again: Again | None = None
) -> Evidence:
    """One task; effect and `margin` in points of score (0..1). McNemar or a bootstrap over paired items.

    `again` would ask more of them.
    """
    name = f"{a.result.task} {Path(a.result.data).name} ({a.result.role})"
    if b is None:
        return _doubtful(name, a.result.score, None, margin, "points", "the candidate was not measured so")
    doubt = _thin(a.result, "baseline") or _thin(b.result, "candidate")
    if doubt:
        few = not a.result.errors and not b.result.errors
        step = _next(FEWEST_ITEMS, "items", a.result.items, a.result.data, again) if few and again else ""
        return _doubtful(name, a.result.score, b.result.score, margin, "points", doubt, step)
    items_a, items_b = _items(a), _items(b)
    if not items_a or not items_b:
        found = _unpaired(a.result, b.result, alpha)
    elif [item.question for item in items_a] != [item.question for item in items_b]:
        return _doubtful(name, a.result.score, b.result.score, margin, "points", "the items are not the same")
    else:
        found = compare_scores([item.score for item in items_a], [item.score for item in items_b], alpha)
    step = _next(_items_needed(found, margin), "items", a.result.items, a.result.data, again)
    return Evidence(name, a.result.score, b.result.score, margin, "points", *found, next_step=step)


def weigh_nll(
    a: Side[NllResult], b: Side[NllResult] | None, margin: float, alpha: float, again: Again | None = None
) -> Evidence:
    """One file of held-out text; effect and `margin` in nats per token, rows as clusters. `again`: as above."""
    name = f"nll {Path(a.result.data).name} ({a.result.role})"
    if b is None:
        return _doubtful(name, a.result.nll, None, margin, "nats", "the candidate was not measured so")
    rows_a, rows_b = _rows(a), _rows(b)
    tokens = [int(row["tokens"]) for row in rows_a]
    doubt = step = ""
    if not rows_a or not rows_b:
        doubt = "the rows' own figures are gone"
    elif tokens != [row["tokens"] for row in rows_b]:
        doubt = "the rows are not the same"
    elif len(tokens) < FEWEST_ITEMS:
        doubt = f"{len(tokens)} rows, {FEWEST_ITEMS} are needed"
        step = _next(FEWEST_ITEMS, "rows", len(tokens), a.result.data, again) if again else ""
    if doubt:
        return _doubtful(name, a.result.nll, b.result.nll, margin, "nats", doubt, step)
    sums_a, sums_b = ([row["nll"] * row["tokens"] for row in rows] for rows in (rows_a, rows_b))
    found = compare_nll(sums_a, sums_b, tokens, alpha)
    step = _next(_items_needed(found, margin), "rows", len(tokens), a.result.data, again)
    return Evidence(name, a.result.nll, b.result.nll, margin, "nats", *found, next_step=step)


def _thin(side: EvalResult, name: str) -> str:
    if side.errors:
        return f"the {name} has errors"
    return f"the {name} has {side.items} items, {FEWEST_ITEMS} are needed" if side.items < FEWEST_ITEMS else ""


def _unpaired(a: EvalResult, b: EvalResult, alpha: float) -> Paired:
    """By the standard errors alone; wider than pairs would be."""
    worse_by, se = a.score - b.score, math.hypot(a.stderr, b.stderr)
    if not se:  # all right, or all wrong, on both sides: the rule of three bounds what was not seen
        se = 1 / min(a.items, b.items)
    reach = float(stats.norm.ppf(1 - alpha)) * se
    p = float(stats.norm.sf(worse_by / se))
    return Paired(worse_by, worse_by - reach, worse_by + reach, p, min(a.items, b.items), detectable_at(se, alpha))


def _items_needed(found: Paired, margin: float) -> int:
    """Noise falls with the root of their number: as many as bring it below the distance that has to be told."""
    distance = max(margin - found.worse_by, found.worse_by, margin / 4)
    factor = max(found.detectable, found.upper - found.worse_by) / distance
    return min(_MOST_ITEMS, max(found.pairs + 1, math.ceil(found.pairs * factor**2)))


def _items(side: Side[EvalResult]) -> Sequence[Item]:
    return read_items(side.file) if side.file.is_file() else []


def _rows(side: Side[NllResult]) -> list[dict[str, float]]:
    lines = side.file.read_text(encoding="utf-8").splitlines() if side.file.is_file() else []
    return [json.loads(line) for line in lines]


def _next(needed: int, what: str, asked: int, data: str, again: Again | None) -> str:
    """The command that asks so many; in words, where there is none, or the file has no more than were `asked`."""
    if again and asked >= again.limit:
        return again.of_items(needed)
    there_are = f", and {Path(data).name} has {asked}: add to it" if again else ""
    return f"about {needed} {what}{there_are}"


def _doubtful(
    name: str, a: float, b: float | None, margin: float, unit: Literal["points", "nats"], doubt: str, step: str = ""
) -> Evidence:
    return Evidence(name, a, b, margin, unit, doubt=doubt, next_step=step)
