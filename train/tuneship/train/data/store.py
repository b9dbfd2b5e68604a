"""Encoded rows in an Arrow file that is mapped and not read: memory does not grow with their number.

A file has no name any more once it is mapped, so it is gone with the process that reads it, however that ends, and no
later run finds what an earlier one left.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self, overload

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from tuneship.train.data.template import IGNORED, Encoded

_ROWS = 1000
_TOKENS = 250_000
"""Of one batch: whichever comes first. What is being written is all that is in memory."""
_LEARNT = ("input_ids", "labels", "seq_lengths")
_IDS = pa.list_(pa.int32())
_SCHEMA = pa.schema([("input_ids", _IDS), ("labels", _IDS), ("conversation", pa.string())])


class Stored(Sequence[Encoded]):
    """Rows on disk. In memory are two numbers a row: `lengths` in tokens, and `loss_tokens` of them."""

    def __init__(self, table: Any, lengths: NDArray[np.int32], loss_tokens: NDArray[np.int32]) -> None:
        self._table = table
        self.lengths = lengths
        self.loss_tokens = loss_tokens

    @classmethod
    def of(cls, write: Callable[[str], Any], folder: Path | None = None) -> Self:
        """What `write` puts into the file that it is given the path of.

        Args:
            write: writes an Arrow stream of `input_ids` and `labels`, with `conversation` or `seq_lengths`.
            folder: on whose disk it lies; None: where temporary files are.

        """
        handle, path = tempfile.mkstemp(dir=folder, prefix="rows-", suffix=".arrow")
        os.close(handle)
        try:
            write(path)
            table = datasets.Dataset.from_file(path)
        finally:
            Path(path).unlink()
        batches = table.data.table.to_batches()
        return cls(table, _numbers(batches, _lengths), _numbers(batches, _loss_tokens))

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, index: int) -> Encoded: ...
    @overload
    def __getitem__(self, index: slice) -> list[Encoded]: ...
    def __getitem__(self, index: int | slice) -> Encoded | list[Encoded]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        row = self._table[index]
        messages, tools = json.loads(row.get("conversation") or "[[], null]")
        return Encoded(row["input_ids"], row["labels"], messages or (), tuple(row.get("seq_lengths") or ()), tools)

    def select(self, indices: Sequence[int]) -> Stored:
        """Those rows."""
        return Stored(self._table.select(indices), self.lengths[indices], self.loss_tokens[indices])

    @property
    def learnt(self) -> Any:
        """As the trainer takes them: a `datasets.Dataset` of what is learnt alone."""
        return self._table.select_columns([name for name in _LEARNT if name in self._table.column_names])


def stored(rows: Sequence[Encoded]) -> Stored:
    """`rows`, in a file unless they lie in one already."""
    return rows if isinstance(rows, Stored) else store(rows)


def store(rows: Iterable[Encoded], folder: Path | None = None) -> Stored:
    """`rows` in a file in `folder`; they are taken one by one."""

    def write(path: str) -> None:
        with pa.OSFile(path, "wb") as file, pa.ipc.new_stream(file, _SCHEMA) as stream:
            batch: list[Encoded] = []
            tokens = 0
            for row in rows:
                batch.append(row)
                tokens += len(row.input_ids)
                if len(batch) == _ROWS or tokens >= _TOKENS:
                    stream.write_batch(_batch(batch))
                    batch, tokens = [], 0
            stream.write_batch(_batch(batch))

    return Stored.of(write, folder)


def _batch(rows: list[Encoded]) -> Any:
    columns = [
        pa.array([row.input_ids for row in rows], _IDS),
        pa.array([row.labels for row in rows], _IDS),
        pa.array([json.dumps([list(row.messages), row.tools]) if row.messages else "" for row in rows]),
    ]
    return pa.record_batch([columns[0], columns[1], columns[2].cast(pa.string())], schema=_SCHEMA)


def _numbers(batches: Iterable[Any], count: Callable[[Any], Any]) -> NDArray[np.int32]:
    """One a row."""
    found = [np.asarray(count(batch), np.int32) for batch in batches]
    return np.concatenate(found) if found else np.zeros(0, np.int32)


def _lengths(batch: Any) -> Any:
    return pc.list_value_length(batch.column("input_ids"))


def _loss_tokens(batch: Any) -> Any:
    labels = batch.column("labels")
    learnt = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != IGNORED)])
    ends = np.cumsum(_lengths(batch).to_numpy())
    return np.diff(learnt[np.concatenate([[0], ends])])
