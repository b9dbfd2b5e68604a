"""The outermost layer of the door: what became of every request, and the end of its lease.

    app = Observed(door, metrics)

Pure ASGI: bytes pass untouched, and of a stream only the last two chunks are kept, to read the end of it. A request is
over when the whole answer was handed to the socket, when its client left (499), or when the door failed (500). Then,
whatever happened, the lease in `scope["tuneship.lease"]` is released.

A stream says how many tokens it had only where its client asked for `usage`. Of others, and of those that were left,
the events with text are counted: one a token, unless SGLang's own front falls behind and puts several into one.

The clock starts when the request's head is there. TTFT is of streams alone (the first body chunk of a whole answer is
its end), E2E of completions that went well: neither an error after 2 ms nor `/v1/tokenize` says how fast a model is.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any, NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneship.serve.metrics import Answer, Metrics
from tuneship.serve.routes import LEASE
from tuneship.serve.upstream import EVENT_END, LAST_EVENT

CLIENT_LEFT = 499
_FRAME = {"/v1/chat/completions": 3, "/v1/completions": 1}
"""Events of a stream without text: the role, the reason why it ended, and the last."""
_BROKEN_OFF = {"engine_unavailable": 503, "timeout": 504, "internal_error": 500}
"""How the door ends a stream, by code, and the status that each has elsewhere."""
_USAGE = b'"usage"'
_USAGE_CHARACTERS = 2000
"""More than `usage` ever takes; its value is read from this much."""
_DECODER = json.JSONDecoder()


class Observed:
    """An application whose requests are counted in `metrics`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request of `app` and record its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(receive, send)
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            exchange.left = True
            raise
        finally:
            lease = scope.get(LEASE)
            try:
                self._record(scope["path"], exchange, lease.entry.version if lease else "")
            finally:
                if lease:
                    lease.release()

    def _record(self, path: str, exchange: _Exchange, version: str) -> None:
        outcome = exchange.outcome()
        if outcome.code:
            self._metrics.refused(outcome.code, version)
        if not version:
            return
        completion = path in _FRAME
        usage = find_usage(exchange.tail) if completion else Usage()
        self._metrics.answered(
            Answer(
                version,
                outcome.status,
                e2e_s=exchange.age_s(time.perf_counter()) if completion and outcome.status == 200 else None,
                # Also of those who left later: leaving them out would leave out the slow ones.
                ttft_s=exchange.age_s(exchange.first_at)
                if completion and exchange.streams and exchange.first_at and outcome.status in {200, CLIENT_LEFT}
                else None,
                prompt_tokens=usage.prompt_tokens,
                completion_tokens=usage.completion_tokens,
                chunks=0 if usage.completion_tokens else max(exchange.events - _FRAME.get(path, 0), 0),
            )
        )


class Outcome(NamedTuple):
    """How a request ended. `code` is the refusal's, empty where there was none."""

    status: int
    code: str = ""


class Usage(NamedTuple):
    """Tokens, as the answer itself says; zeros where it does not."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Exchange:
    """One request and its answer, as they pass by. Times of `time.perf_counter`; 0 is not yet."""

    __slots__ = (
        *("_before", "_last", "_receive", "_send"),
        *("began_at", "done", "events", "first_at", "left", "status", "streams"),
    )

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive, self._send = receive, send
        self.began_at, self.first_at = time.perf_counter(), 0.0
        self.status = 500  # what the client sees of an application that never began to answer
        self.streams = self.left = self.done = False
        self.events = 0
        """Of a stream; JSON holds no line ends of its own."""
        self._before = self._last = b""

    async def receive(self) -> Message:
        """Pass on what the client sends."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.left = True
        return message

    async def send(self, message: Message) -> None:
        """Pass on what the client gets."""
        if message["type"] == "http.response.body":
            if chunk := message.get("body"):
                if not self.first_at:
                    self.first_at = time.perf_counter()
                if self.streams:
                    self.events += chunk.count(EVENT_END)
                self._before, self._last = self._last, chunk
            await self._send(message)
            self.done = not message.get("more_body")
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.streams = any(
                name.lower() == b"content-type" and value.startswith(b"text/event-stream")
                for name, value in message["headers"]
            )
        await self._send(message)

    def age_s(self, at: float) -> float:
        """How old the request was at `at`."""
        return at - self.began_at

    @property
    def tail(self) -> bytes:
        """The end of the body: all of it where it came whole, the last events of a stream."""
        return self._before + self._last

    def outcome(self) -> Outcome:
        """What became of it."""
        # A client may hang up as soon as it has read the last event.
        if not self.done and not (self.streams and self._last.endswith(LAST_EVENT)):
            return Outcome(CLIENT_LEFT if self.left else 500)
        if self.status >= 400:
            return Outcome(self.status, _code(self.tail))
        return _stream_outcome(self.tail) if self.streams else Outcome(self.status)


def find_usage(tail: bytes) -> Usage:
    """The last `usage` in the end of an answer, without parsing the rest of it.

    Inside a string its quotes would be escaped: the name in plain quotes with a colon behind is a key. A key can be a
    token's text (`top_logprobs`), whose value is no object.
    """
    end = len(tail)
    while (at := tail.rfind(_USAGE, 0, end)) >= 0:
        end = at
        value = tail[at + len(_USAGE) : at + _USAGE_CHARACTERS].lstrip()
        found = _object(value[1:].lstrip()) if value.startswith(b":") else {}
        if "completion_tokens" in found or "prompt_tokens" in found:
            return Usage(_count(found.get("prompt_tokens")), _count(found.get("completion_tokens")))
    return Usage()


def _stream_outcome(tail: bytes) -> Outcome:
    """A stream that broke off says so in its last event: with a code of ours, or with SGLang's, which is a status."""
    last = tail.removesuffix(LAST_EVENT).removesuffix(EVENT_END).rpartition(EVENT_END)[2]
    if not last.startswith(b'data: {"error"'):
        return Outcome(200)
    error = _object(last.removeprefix(b"data: ")).get("error")
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, int) and 400 <= code < 500:
        return Outcome(code, "invalid_request")
    if isinstance(code, str) and code in _BROKEN_OFF:
        return Outcome(_BROKEN_OFF[code], code)
    return Outcome(502, "engine_error")


def _code(body: bytes) -> str:
    """The code in an error of ours. Only the door makes such answers: no client's word is in it."""
    error = _object(body).get("error")
    return str(error.get("code") or "") if isinstance(error, dict) else ""


def _object(text: bytes) -> dict[str, Any]:
    """The JSON object that `text` begins with; empty where it is none."""
    try:
        found, _ = _DECODER.raw_decode(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _count(tokens: object) -> int:
    return tokens if isinstance(tokens, int) and tokens > 0 else 0
