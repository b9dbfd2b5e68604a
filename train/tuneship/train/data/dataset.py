"""Rows on disk -> conversations -> token ids with labels. A row that cannot be used is refused by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tuneship.core.errors import DataError
from tuneship.core.identity import data_sha256
from tuneship.core.progress import say
from tuneship.core.recipe import Data
from tuneship.train.data import formats, sources, store
from tuneship.train.data.sources import Raw
from tuneship.train.data.store import Stored
from tuneship.train.data.template import ChatTemplate, Conversation, Encoded

_SHOWN = 5


class Dataset(NamedTuple):
    """Encoded rows of one split, and what identifies the files they came from."""

    rows: Stored
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return int(self.rows.lengths.sum())

    @property
    def loss_tokens(self) -> int:
        """Tokens of one epoch that carry loss."""
        return int(self.rows.loss_tokens.sum())

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.rows.lengths.max())


def load(pattern: str, data: Data, template: ChatTemplate, folder: Path | None = None) -> Dataset:
    """Read, check and encode every row of what `pattern` names.

    Args:
        pattern: `data.train` or `data.heldout`.
        data: what its rows are.
        template: what makes tokens of them.
        folder: on whose disk they are kept while they are used; None: where temporary files are.

    Raises:
        DataError: no file, no row, or (with `on_bad_row = "fail"`) a row that cannot be used; the first few are named.

    """
    reading = _Reading(data, template)
    rows = store.store(reading.usable(pattern), folder)
    refused, total = reading.refused, reading.refused + len(rows)
    if refused and data.on_bad_row == "fail":
        more = f"\nand {refused - _SHOWN} more" if refused > _SHOWN else ""
        raise DataError(
            f"{refused} of {total} rows cannot be used:\n" + "\n".join(reading.first) + more,
            hint='mend them, or set data.on_bad_row = "skip"; `tuneship data check` counts them by reason',
        )
    if not rows:
        raise DataError(f"{pattern} holds no usable row")
    if refused:
        say(f"skipped {refused} of {total} rows, the first: {reading.first[0]}")
    return Dataset(rows, data_sha256(pattern))


def write_conversations(rows: Stored, file: Path) -> int:
    """Write `rows` as a JSONL of messages, for whoever reads no other format; how many have any.

    Plain text asks nothing, and is left out.
    """
    written = 0
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            if row.messages:
                lines.write(json.dumps({"messages": list(row.messages)}, ensure_ascii=False) + "\n")
                written += 1
    return written


class _Reading:
    """One pass over rows; what was refused is counted, and the first few are kept."""

    def __init__(self, data: Data, template: ChatTemplate) -> None:
        self._data = data
        self._template = template
        self.refused = 0
        self.first: list[str] = []

    def usable(self, pattern: str) -> Iterator[Encoded]:
        """The rows that can be learnt from."""
        for raw in sources.read(pattern):
            try:
                yield encode(raw, self._data, self._template)
            except DataError as error:
                self.refused += 1
                if self.refused <= _SHOWN:
                    self.first.append(f"{raw.place}: {error.message}")


def read(raw: Raw, data: Data, template: ChatTemplate) -> tuple[Conversation, Encoded]:
    """What one row says, and as tokens, however many they are.

    Raises:
        DataError: it cannot be used, and why.

    """
    if raw.error:
        raise DataError(raw.error)
    conversation = formats.conversation(raw.row, data)
    return conversation, template.encode(conversation, data.loss)


def encode(raw: Raw, data: Data, template: ChatTemplate) -> Encoded:
    """One row as tokens.

    Raises:
        DataError: it cannot be used, and why.

    """
    _, encoded = read(raw, data, template)
    if len(encoded.input_ids) > data.max_length:
        raise DataError(f"{len(encoded.input_ids)} tokens, over data.max_length = {data.max_length}")
    return encoded
