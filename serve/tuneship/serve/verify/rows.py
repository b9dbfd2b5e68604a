"""Which rows of the evidence are asked about, and their answer tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from tuneship.core import versioned
from tuneship.core.errors import ArtifactError
from tuneship.core.files import read_up_to
from tuneship.core.parity import REFERENCE_FILE, Deferred, ReferenceRow, read_reference
from tuneship.core.parity import SCHEMA as PARITY_SCHEMA
from tuneship.serve.verify.scorer import Scorer
from tuneship.serve.verify.statistics import Rows


class Budget(NamedTuple):
    """At most so many rows, of so many tokens, prompts and answers together.

    Where answers are long, fewer: as many as have `answers` answer tokens by their mean length, and half of `rows` at
    least.
    """

    rows: int = 16
    tokens: int = 4096
    answers: int = 900


AT_A_LOAD = Budget()
_LONGEST_DEFERRED = 1 << 20


def read_evidence(folder: Path, budget: Budget = AT_A_LOAD) -> list[ReferenceRow]:
    """Rows of the reference in `folder`, evenly spread over it, within `budget`; the same ones each time.

    Rows without an answer are left out; one is taken however long it is. Empty when there is no reference.

    Raises:
        ArtifactError: the reference cannot be read, or has a row whose lists are not about the same tokens.

    """
    if not (folder / REFERENCE_FILE).is_file():
        return []
    usable = [_checked(row, folder) for row in read_reference(folder) if any(row.loss_mask[1:])]
    count = _count(usable, budget)
    chosen: list[ReferenceRow] = []
    left = budget.tokens
    for row in (usable[index * len(usable) // count] for index in range(count)):
        left -= len(row.input_ids)
        if left >= 0 or not chosen:
            chosen.append(row)
    return chosen


def _count(usable: Sequence[ReferenceRow], budget: Budget) -> int:
    """How many rows the budget is for, by their mean length."""
    most = min(budget.rows, len(usable))
    if not most:
        return 0
    answer = sum(sum(row.loss_mask[1:]) for row in usable) / len(usable)
    length = sum(len(row.input_ids) for row in usable) / len(usable)
    enough = max(math.ceil(budget.answers / answer), budget.rows // 2)
    return max(1, min(most, enough, int(budget.tokens / length)))


def read_deferred(folder: Path) -> Deferred | None:
    """What merging left to `verify`, by the evidence in `folder`; None where it measured, or nothing is known.

    Raises:
        ArtifactError: the file is something else.

    """
    files = sorted(folder.glob("deferred-*.json"))
    if not files:
        return None
    text = read_up_to(files[-1], _LONGEST_DEFERRED)
    if len(text) > _LONGEST_DEFERRED:
        raise ArtifactError(
            f"{files[-1]} cannot be read: it has at most {_LONGEST_DEFERRED} bytes", hint="merge again: tuneship merge"
        )
    return versioned.parse(Deferred, text, files[-1], PARITY_SCHEMA, ArtifactError)


def _checked(row: ReferenceRow, folder: Path) -> ReferenceRow:
    lists = (row.loss_mask, row.base, row.trained, row.input_ids if row.merged is None else row.merged)
    if any(len(figures) != len(row.input_ids) for figures in lists):
        raise ArtifactError(
            f"{folder / REFERENCE_FILE}: a row's lists are not of one length",
            hint="restore it from a copy, or `tuneship up RECIPE --from train`",
        )
    return row


class Answers(NamedTuple):
    """The answer tokens of some rows; `base` and `trained` are as stored, in nats."""

    ids: list[list[int]]
    masks: list[list[int]]
    base: Rows
    trained: Rows

    @classmethod
    def of(cls, reference: Sequence[ReferenceRow], *, merged: bool = False) -> Self:
        """Those of `reference`; `trained` is the merged model's where that is what shall answer."""
        # Nothing stands before a row's first token: it has no likelihood.
        masks = [[0, *row.loss_mask[1:]] for row in reference]
        target = [row.merged or [] if merged else row.trained for row in reference]
        return cls(
            [row.input_ids for row in reference],
            masks,
            [_masked(row.base, mask) for row, mask in zip(reference, masks, strict=True)],
            [_masked(figures, mask) for figures, mask in zip(target, masks, strict=True)],
        )

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(map(sum, self.masks))

    async def score(self, scorer: Scorer, selector: str | None) -> Rows:
        """The same tokens under a served model."""
        starts = [mask.index(1) for mask in self.masks]
        found = await scorer.logprobs(selector, self.ids, starts)
        return [_masked(figures, mask[start:]) for figures, mask, start in zip(found, self.masks, starts, strict=True)]

    async def score_apart(self, scorer: Scorer, selector: str | None) -> Rows:
        """The same, each row in a request of its own: other batches, and so other roundings."""
        alone = [self._replace(ids=[ids], masks=[mask]) for ids, mask in zip(self.ids, self.masks, strict=True)]
        return [(await one.score(scorer, selector))[0] for one in alone]


def _masked(figures: Iterable[float], mask: Sequence[int]) -> list[float]:
    return [figure for figure, kept in zip(figures, mask, strict=True) if kept]
