"""Rows on disk -> conversations -> token ids with labels. A row that cannot be used is refused by file and line."""

from __future__ import annotations

from typing import NamedTuple

from tuneship.core.errors import DataError
from tuneship.core.identity import data_sha256
from tuneship.core.progress import say
from tuneship.core.recipe import Data
from tuneship.train.data import formats, sources
from tuneship.train.data.sources import Raw
from tuneship.train.data.template import ChatTemplate, Encoded

_SHOWN = 5


class Dataset(NamedTuple):
    """Encoded rows of one split, and what identifies the files they came from."""

    rows: list[Encoded]
    sha256: str

    @property
    def tokens(self) -> int:
        """Tokens of one epoch."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def loss_tokens(self) -> int:
        """Tokens of one epoch that carry loss."""
        return sum(row.loss_tokens for row in self.rows)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.input_ids) for row in self.rows)


def load(pattern: str, data: Data, template: ChatTemplate) -> Dataset:
    """Read, check and encode every row of the files at `pattern`.

    Raises:
        DataError: no file, no row, or (with `on_bad_row = "fail"`) a row that cannot be used; the first few are named.

    """
    rows: list[Encoded] = []
    refused: list[str] = []
    for raw in sources.read(pattern):
        try:
            rows.append(_encode(raw, data, template))
        except DataError as error:
            refused.append(f"{raw.place}: {error.message}")
    if refused and data.on_bad_row == "fail":
        more = f"\nand {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise DataError(
            f"{len(refused)} of {len(refused) + len(rows)} rows cannot be used:\n" + "\n".join(refused[:_SHOWN]) + more,
            hint='mend them, or set data.on_bad_row = "skip"',
        )
    if not rows:
        raise DataError(f"{pattern} holds no usable row")
    if refused:
        say(f"skipped {len(refused)} of {len(refused) + len(rows)} rows, the first: {refused[0]}")
    return Dataset(rows, data_sha256(pattern))


def _encode(raw: Raw, data: Data, template: ChatTemplate) -> Encoded:
    if raw.error:
        raise DataError(raw.error)
    encoded = template.encode(formats.conversation(raw.row, data), data.loss)
    if len(encoded.input_ids) > data.max_length:
        raise DataError(f"{len(encoded.input_ids)} tokens, over data.max_length = {data.max_length}")
    return encoded
