"""Rows on disk -> conversations -> token ids with labels. A row that cannot be used is refused by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core import recipe_file
from tuneship.core.errors import DataError
from tuneship.core.identity import data_sha256
from tuneship.core.progress import say
from tuneship.core.recipe import Data
from tuneship.train.data.template import ChatTemplate, Conversation, Encoded, Message

_ROLES = {"system", "user", "assistant", "tool"}
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
    files = recipe_file.data_files(pattern)
    rows: list[Encoded] = []
    refused: list[str] = []
    for file in files:
        for number, line in _lines(file):
            try:
                rows.append(_encode(line, data, template))
            except DataError as error:
                refused.append(f"{file.name}:{number}: {error.message}")
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


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _encode(line: str, data: Data, template: ChatTemplate) -> Encoded:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"not JSON: {error}") from None
    encoded = template.encode(Conversation(to_messages(row, data.format)), data.loss)
    if len(encoded.input_ids) > data.max_length:
        raise DataError(f"{len(encoded.input_ids)} tokens, over data.max_length = {data.max_length}")
    return encoded


def to_messages(row: Any, format_: str) -> list[Message]:
    """One row of any known format as a conversation.

    Raises:
        DataError: the row is of none of them, a message lacks a role or text, or the last is not the assistant's.

    """
    if not isinstance(row, dict):
        raise DataError(f"a row is an object, not {type(row).__name__}")
    if format_ in {"auto", "messages"} and "messages" in row:
        messages = row["messages"]
    elif format_ in {"auto", "prompt-completion"} and {"prompt", "completion"} <= row.keys():
        messages = [
            {"role": "user", "content": row["prompt"]},
            {"role": "assistant", "content": row["completion"]},
        ]
    else:
        wanted = "messages, or prompt and completion" if format_ == "auto" else format_
        raise DataError(f"has the keys {', '.join(sorted(row)) or 'none'}; wanted {wanted}")
    _check(messages)
    return list(messages)


def _check(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError("messages is not a list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in _ROLES:
            raise DataError(f"message {index} has no role out of {', '.join(sorted(_ROLES))}")
        if not isinstance(message.get("content"), str) or not message["content"].strip():
            raise DataError(f"message {index} ({message['role']}) has no text")
    if messages[-1]["role"] != "assistant":
        raise DataError("the last message is not the assistant's")
