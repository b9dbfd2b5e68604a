"""Answers kept as they come, so that an eval that was cut off goes on where it stopped.

A `.partial` file's first line says what was asked (model, rows, sampling); each further line is one answer.
Failures are not kept: they are asked again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tuneship.core.errors import DataError
from tuneship.core.files import write_atomic
from tuneship.core.progress import say

Key = tuple[int, int]
"""(row, sample), both from 0."""


class Partial:
    """The answers to `asked` that lie in `path`; nothing is written before the first answer."""

    def __init__(self, path: Path, asked: dict[str, Any]) -> None:
        """Read what is there.

        Raises:
            DataError: the file holds answers to something else.

        """
        self._path = path
        self._header = json.dumps(asked, sort_keys=True)
        self.answers: dict[Key, str] = {}
        if path.is_file():
            self._read()

    def add(self, key: Key, answer: str) -> None:
        """Keep one answer."""
        if not self.answers:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(self._path, self._header + "\n")
        self.answers[key] = answer
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(key, answer))

    def remove(self) -> None:
        """All is in the final file."""
        self._path.unlink(missing_ok=True)

    def _read(self) -> None:
        header, *lines = self._path.read_text(encoding="utf-8").split("\n")
        if header != self._header:
            raise DataError(
                f"{self._path} holds answers to another task, model, rows or sampling",
                hint="delete it to start anew, or name another folder",
            )
        for line in lines[:-1]:  # the last is empty, or was cut short
            row, sample, answer = json.loads(line)
            self.answers[row, sample] = answer
        kept = "".join(_line(key, answer) for key, answer in self.answers.items())
        write_atomic(self._path, f"{self._header}\n{kept}")
        say(f"{self._path.name}: going on after {len(self.answers)} answers")


def _line(key: Key, answer: str) -> str:
    return json.dumps([*key, answer]) + "\n"
