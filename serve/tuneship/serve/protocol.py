"""The wire below ASGI: uvicorn's HTTP/1.1, with an end to waiting and with errors in OpenAI's form.

uvicorn alone waits for ever for a request's headers, answers what is no HTTP with a line of text, and keeps a
connection whose client reads nothing. None of that reaches a middleware.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from tuneship.serve.guard import LIMITS, headers_too_large
from tuneship.serve.refusals import Refusal

REQUEST_WITHIN_S = 15.0
"""From the connection, or a request's first byte, to the end of its headers."""
KEEP_ALIVE_S = 75
"""Longer than clients keep a connection: one that is just being closed must not be picked for a new request. It is
uvicorn's too (`timeout_keep_alive`), whose own 5 s are what `Retry-After` tells clients to wait."""
_ANSWERED_WITHIN_S = LIMITS.request_s + 30.0
"""The guard ends a request long before; this ends a connection whose client reads nothing."""
_LINGER_S = 2.0
"""For a client to read why it was refused."""
_NOT_ANSWERED = (h11.IDLE, h11.SEND_RESPONSE)


class DoorProtocol(H11Protocol):
    """One connection."""

    _timer: asyncio.TimerHandle | None = None
    _refused = False
    _begun = False
    """Whether a part of a next request is there."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request."""
        super().connection_made(cast(asyncio.Transport, transport))
        self._after(REQUEST_WITHIN_S, self._no_request)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for."""
        if self._timer:
            self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take it in, or throw it away: closed on unread bytes, the system would take the refusal back."""
        if not self._refused:
            super().data_received(data)

    def handle_events(self) -> None:
        """Note when a request has begun, and when its headers are there."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._begun = False
            self._after(_ANSWERED_WITHIN_S, self.transport.abort)
        elif not self._begun and self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]:
            self._begun = True
            self._after(REQUEST_WITHIN_S, self._no_request)

    def on_response_complete(self) -> None:
        """Wait for the next one, even while the rest of this one's body drips in."""
        read = self.conn.their_state is h11.DONE
        self._after(KEEP_ALIVE_S if read else REQUEST_WITHIN_S, self._no_request)
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's words, in uvicorn's form
        """Answer what is no HTTP; called where h11's error is being handled."""
        if getattr(sys.exception(), "error_status_hint", 400) == 431:
            self._refuse(headers_too_large())
        else:
            self._refuse(Refusal(400, "invalid_http", "This is not a valid HTTP request."))

    def _no_request(self) -> None:
        if self.transport.is_closing():
            self.transport.abort()  # what was still to be sent nobody reads
            return
        half_a_request = self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]
        if half_a_request:
            self._refuse(Refusal(408, "request_timeout", f"No whole request came within {REQUEST_WITHIN_S:g} s."))
            return
        self.transport.close()
        self._after(REQUEST_WITHIN_S, self._no_request)

    def _refuse(self, refusal: Refusal) -> None:
        """Answer, if there is no answer yet, and close; whoever works on one need not go on."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state in _NOT_ANSWERED:
            answer = refusal.response()
            headers = [*answer.raw_headers, (b"connection", b"close")]
            for event in (
                h11.Response(status_code=answer.status_code, headers=headers),
                h11.Data(data=bytes(answer.body)),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
            self.transport.write_eof()
            self._refused = True
            self._after(_LINGER_S, self.transport.abort)
        else:
            self.transport.close()

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = self.loop.call_later(seconds, then)
