"""Which conversations were read before: by 8-byte hashes and numbers, so that what is kept does not grow with texts."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tuneship.train.data.template import Conversation, Message

What = Literal["conversation", "prompt"]


class Pair(NamedTuple):
    """Two rows that are the same, by their places; `other` came first, or is of the other split."""

    place: str
    other: str

    def __str__(self) -> str:
        return f"{self.place} is {self.other}"


class Seen:
    """The rows of one split. A conversation is what is said and which tools there are; a prompt, all before its end."""

    def __init__(self) -> None:
        self._hashes: dict[What, array[int]] = {"conversation": array("Q"), "prompt": array("Q")}
        self._names: dict[str, int] = {}
        self._files, self._numbers = array("I"), array("Q")

    def add(self, conversation: Conversation, place: str) -> None:
        """One more row, at `place` (`name:number`)."""
        name, _, number = place.rpartition(":")
        self._files.append(self._names.setdefault(name, len(self._names)))
        self._numbers.append(int(number))
        messages = [_said(message) for message in conversation.messages]
        self._hashes["conversation"].append(_hash([messages, conversation.tools, conversation.text]))
        # A plain text has no prompt: what is hashed instead is the same for the same text alone.
        prompt = [messages[:-1], conversation.tools] if messages else [conversation.text]
        self._hashes["prompt"].append(_hash(prompt))

    def twice(self) -> list[int]:
        """The rows whose conversation came before, by index."""
        hashes = self._array("conversation")
        order = np.argsort(hashes, kind="stable")
        same = hashes[order][1:] == hashes[order][:-1]
        found: list[int] = np.sort(order[1:][same]).tolist()
        return found

    def standing_in(self, other: Seen, what: What) -> list[int]:
        """The rows whose `what` is a row's of `other`, by index."""
        found: list[int] = np.flatnonzero(np.isin(self._array(what), other._array(what))).tolist()
        return found

    def pairs(self, indices: list[int], other: Seen, what: What) -> Iterator[Pair]:
        """Each of those rows with the first of `other` that has the same `what`."""
        theirs = other._array(what)
        for index in indices:
            first = int(np.flatnonzero(theirs == self._array(what)[index])[0])
            yield Pair(self._place(index), other._place(first))

    def _place(self, index: int) -> str:
        name = next(name for name, number in self._names.items() if number == self._files[index])
        return f"{name}:{self._numbers[index]}"

    def _array(self, what: What) -> NDArray[np.uint64]:
        return np.frombuffer(self._hashes[what], np.uint64) if self._hashes[what] else np.zeros(0, np.uint64)


def _said(message: Message) -> list[Any]:
    """Without what names a call, or stands in a row beside what is said."""
    functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
    return [message["role"], (message.get("content") or "").strip(), functions]


def _hash(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())
