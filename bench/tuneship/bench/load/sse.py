"""Server-sent events from a byte stream that is cut anywhere (https://html.spec.whatwg.org/#event-stream-interpretation)."""

from __future__ import annotations

import re
from typing import NamedTuple

# A carriage return at the end of what has arrived may be half of "\r\n": it waits for the next byte.
_LINE_END = re.compile(rb"\r\n|\n|\r(?=[\s\S])")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Event(NamedTuple):
    """One event; `type` is `message` unless the server named it."""

    type: str
    data: str


class SseParser:
    """Feed it bytes as they arrive; it hands out the events that are complete. Comments, ids, retries are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._at_start = True
        self._type = ""
        self._data: list[str] = []

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that `chunk` completes, in order."""
        buffer = self._rest + chunk
        if self._at_start:
            if len(buffer) < len(_BYTE_ORDER_MARK) and _BYTE_ORDER_MARK.startswith(buffer):
                self._rest = buffer
                return []
            buffer = buffer.removeprefix(_BYTE_ORDER_MARK)
            self._at_start = False
        *lines, self._rest = _LINE_END.split(buffer)
        events = (self._line(line.decode("utf-8", errors="replace")) for line in lines)
        return [event for event in events if event]

    def _line(self, line: str) -> Event | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._type = value
        return None

    def _dispatch(self) -> Event | None:
        event = Event(self._type or "message", "\n".join(self._data)) if self._data else None
        self._type, self._data = "", []
        return event
