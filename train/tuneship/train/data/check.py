"""`tuneship data check`: all rows, read as training reads them, and what is wrong with them by file and line.

A row that training would refuse is refused here, with its reason. What it would take without a word is counted too:
rows that stand twice, train rows that stand in held-out, answers without an end, a second BOS, special tokens in what
people wrote. Rows are read one after another; of each some 30 bytes are kept, and never its text.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel, Field

from tuneship.core.errors import DataError
from tuneship.core.progress import say
from tuneship.core.recipe import Data
from tuneship.train.data import dataset, sources
from tuneship.train.data.seen import Seen, What
from tuneship.train.data.suspects import Suspects
from tuneship.train.data.template import IGNORED, ChatTemplate, Conversation, Encoded

_SHOWN = 5
"""Places that are named of each kind."""
_EVERY = 50_000
"""Rows after which it is said how far it is: half a minute."""
_REASONS = 30
"""That are told apart; rows refused for yet another one are counted together."""
_PERCENTS = (95, 99, 100)
_DETAILS = (
    (re.compile(r"^(not [A-Z]+): .*", re.DOTALL), r"\1"),
    (re.compile(r"has the keys .*?;"), "has the keys ...;"),
    (re.compile(r"'[^']*'"), "'...'"),
    (re.compile(r"\d+"), "N"),
)
"""{what rows that are refused for one reason differ in: what stands for it}."""


class Finding(BaseModel):
    """How many rows, and where the first of them are."""

    rows: int = 0
    first: list[str] = []
    hint: str = ""
    """What to do about the first."""

    def add(self, place: str) -> None:
        """One more, at `place`."""
        self.rows += 1
        if len(self.first) < _SHOWN:
            self.first.append(place)


class Split(BaseModel):
    """One split. `tokens` and `loss_tokens` are of its usable rows, as one epoch has them."""

    rows: int = 0
    usable: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    median: int = 0
    """Tokens of a row, of all that could be rendered; so is what follows."""
    needed: dict[str, int] = {}
    """{share of the rows, as "95 %": the max_length that leaves them whole}."""
    refused: dict[str, Finding] = {}
    """{reason: rows}, but for those that are too long."""
    too_long: Finding = Field(default_factory=Finding)
    cut: Finding = Field(default_factory=Finding)
    """Of those: whose last answer would lose its end, were rows cut at max_length instead."""
    lost: int = 0
    """Of those: whose last answer would be lost whole."""
    duplicates: Finding = Field(default_factory=Finding)
    without_end: Finding = Field(default_factory=Finding)
    """Something is learnt whose end is not: no token at which generation stops."""
    double_bos: Finding = Field(default_factory=Finding)
    special_text: Finding = Field(default_factory=Finding)
    """A special token written out in a message, which becomes that token."""

    @property
    def unusable(self) -> int:
        """Rows that training refuses, or skips."""
        return self.rows - self.usable


class Report(BaseModel):
    """What was found; the last two findings are of train rows."""

    max_length: int
    train: Split
    heldout: Split | None = None
    same_conversation: Finding = Field(default_factory=Finding)
    """A held-out row is the same."""
    same_prompt: Finding = Field(default_factory=Finding)
    """A held-out row has the same prompt, and another answer."""
    notes: list[str] = []

    @property
    def rows(self) -> int:
        """Of both splits."""
        return self.train.rows + (self.heldout.rows if self.heldout else 0)

    @property
    def unusable(self) -> int:
        """Those of both splits that training refuses, or skips."""
        return self.train.unusable + (self.heldout.unusable if self.heldout else 0)


def check(data: Data, template: ChatTemplate, end_ids: Sequence[int]) -> Report:
    """Read every row of both splits; `end_ids` are where generation stops.

    Raises:
        DataError: there is no data where a split should be, or it cannot be read at all.

    """
    suspects = Suspects(template, end_ids)
    train = _Pass(data, template, suspects)
    report = Report(max_length=data.max_length, train=train.read(data.train), notes=suspects.notes)
    if data.heldout:
        heldout = _Pass(data, template, suspects)
        report.heldout = heldout.read(data.heldout)
        same = train.seen.standing_in(heldout.seen, "conversation")
        asked = set(train.seen.standing_in(heldout.seen, "prompt")) - set(same)
        report.same_conversation = _named(same, train.seen, heldout.seen, "conversation")
        report.same_prompt = _named(sorted(asked), train.seen, heldout.seen, "prompt")
    return report


def needed(lengths: Sequence[int]) -> dict[str, int]:
    """{share of the rows: the smallest `max_length` that leaves so many whole}."""
    ordered = np.sort(np.asarray(lengths, np.uint32))
    return {f"{percent}%": int(ordered[-(-percent * len(ordered) // 100) - 1]) for percent in _PERCENTS}


class _Pass:
    """Over one split."""

    def __init__(self, data: Data, template: ChatTemplate, suspects: Suspects) -> None:
        self._data, self._template, self._suspects = data, template, suspects
        self._lengths = array("I")
        self._split = Split()
        self.seen = Seen()

    def read(self, pattern: str) -> Split:
        """Every row of what `pattern` names."""
        split = self._split
        for raw in sources.read(pattern):
            split.rows += 1
            if split.rows % _EVERY == 0:
                say(f"{split.rows:,} rows of {pattern} read")
            try:
                conversation, encoded = dataset.read(raw, self._data, self._template)
            except DataError as error:
                self._refuse(raw.place, error)
                continue
            self._count(raw.place, conversation, encoded)
        if not split.rows:
            raise DataError(f"{pattern} holds no row")
        split.duplicates = _named(self.seen.twice(), self.seen, self.seen, "conversation")
        if self._lengths:
            split.median = int(np.median(np.frombuffer(self._lengths, np.uint32)))
            split.needed = needed(self._lengths)
        return split

    def _refuse(self, place: str, error: DataError) -> None:
        """Reasons that differ in a number, a name or in where JSON ends are one."""
        reason, refused = error.message, self._split.refused
        for detail, instead in _DETAILS:
            reason = detail.sub(instead, reason)
        if reason not in refused and len(refused) >= _REASONS:
            reason = "other reasons"
        finding = refused.setdefault(reason, Finding(hint=error.hint))
        finding.add(place if reason == error.message else f"{place}: {error.message}")

    def _count(self, place: str, conversation: Conversation, encoded: Encoded) -> None:
        split, length = self._split, len(encoded.input_ids)
        self._lengths.append(length)
        self.seen.add(conversation, place)
        if length > self._data.max_length:
            self._count_too_long(f"{place}: {length} tokens", encoded)
        else:
            split.usable += 1
            split.tokens += length
            split.loss_tokens += encoded.loss_tokens
        for finding, suspect in (
            (split.without_end, self._suspects.without_end(encoded)),
            (split.double_bos, self._suspects.double_bos(encoded)),
            (split.special_text, self._suspects.special_text(conversation)),
        ):
            if suspect:
                finding.add(f"{place}: {suspect}")

    def _count_too_long(self, place: str, encoded: Encoded) -> None:
        self._split.too_long.add(place)
        learnt = np.flatnonzero(np.asarray(encoded.labels) != IGNORED)
        if learnt[-1] >= self._data.max_length:
            self._split.cut.add(place)
            breaks = np.flatnonzero(np.diff(learnt) > 1)
            self._split.lost += bool(learnt[breaks[-1] + 1 if len(breaks) else 0] >= self._data.max_length)


def _named(indices: Sequence[int], rows: Seen, others: Seen, what: What) -> Finding:
    first: Iterable[object] = rows.pairs(list(indices[:_SHOWN]), others, what)
    return Finding(rows=len(indices), first=[str(pair) for pair in first])
