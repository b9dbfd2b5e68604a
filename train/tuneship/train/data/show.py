"""`tuneship data show`: rows as the model reads them, cut where loss begins and ends."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from tuneship.core.errors import DataError
from tuneship.core.recipe import Data
from tuneship.train.data import dataset, sources
from tuneship.train.data.template import ChatTemplate, Encoded


class Span(NamedTuple):
    """Neighbouring tokens, as text: all of them carry loss, or none does."""

    text: str
    is_trained: bool


class Shown(NamedTuple):
    """A row; `refused` says why it is none that training takes."""

    place: str
    tokens: int = 0
    loss_tokens: int = 0
    spans: tuple[Span, ...] = ()
    refused: str = ""


def show(pattern: str, data: Data, template: ChatTemplate, rows: int) -> Iterator[Shown]:
    """The first `rows` rows of what `pattern` names, one after another.

    Raises:
        DataError: nothing is there, or it cannot be read at all.

    """
    for raw in itertools.islice(sources.read(pattern), rows):
        try:
            encoded = dataset.encode(raw, data, template)
        except DataError as error:
            yield Shown(raw.place, refused=error.message)
            continue
        found = tuple(spans(encoded, template.tokenizer))
        yield Shown(raw.place, len(encoded.input_ids), encoded.loss_tokens, found)


def spans(row: Encoded, tokenizer: Any) -> Iterator[Span]:
    """The row's text, whole, special tokens among it."""
    before, at = "", 0
    for is_trained, group in itertools.groupby(row.loss_mask):
        at += sum(1 for _ in group)
        # From the start each time: some decoders drop the first space of what they are given.
        through = tokenizer.decode(row.input_ids[:at], clean_up_tokenization_spaces=False)
        yield Span(through[len(before) :], bool(is_trained))
        before = through
