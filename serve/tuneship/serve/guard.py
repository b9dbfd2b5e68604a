"""What stands before the door's routes: who may come in, and how much of it one request may take.

    app = Guard(build_door(...), Keyring(cache.keys_file()))
    uvicorn.Config(app, http=DoorProtocol, ws="none", ...)

| limit | answer | where |
|---|---|---|
| time for a request's headers, their size | 408, 431 | `protocol.py`, before ASGI; the size also here |
| a body's size, time to read it | 413, 408 | `calls.py` |
| requests in flight | 429, `Retry-After` | here |
| time for a whole request | 504; in a stream an error event | here |

A chunk of a stream costs one plain function call here: `bench/studies/guard_cost.py`. What fails inside is said with
its type and place, never with its words: those may be a client's prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import traceback
from collections.abc import Awaitable
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneship.core.errors import PreflightError
from tuneship.core.progress import say
from tuneship.serve.keys import SCOPE_KEY, Keyring
from tuneship.serve.refusals import Refusal

PUBLIC = frozenset({"/health", "/ready"})
"""Need no key: a load balancer asks, and learns one bit."""
OF_ALL_MODELS = frozenset({"/metrics"})
"""Name every model: not for a key that may use only some."""
_LAST_WORDS_S = 5.0
"""For an error to a client that may have stopped reading."""
_RETRY_S = 1


class Limits(NamedTuple):
    """How much of the door one request, and all of them, may take."""

    header_bytes: int = 32 * 1024
    request_s: float = 600.0
    in_flight: int = 1024
    """Requests with a body; others ask the door alone, and are answered at once."""


LIMITS = Limits()


class Guard:
    """ASGI middleware: lets a request in, or answers it with an error in OpenAI's form."""

    def __init__(self, app: ASGIApp, keyring: Keyring, limits: Limits = LIMITS) -> None:
        self._app = app
        self._keyring = keyring
        self._limits = limits
        self._in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, receive, send)
        try:
            self._admit(scope)
        except Refusal as refusal:
            await answer.end_with(refusal)
            return
        counts = int(scope["method"] == "POST")
        self._in_flight += counts
        try:
            await self._within_its_time(scope, receive, answer)
        finally:
            self._in_flight -= counts

    def _admit(self, scope: Scope) -> None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        size = sum(len(name) + len(value) for name, value in headers) + len(scope["query_string"])
        if size + len(scope["raw_path"]) > self._limits.header_bytes:
            raise headers_too_large()
        path = scope["path"]
        if path not in PUBLIC:
            authorization = next((value for name, value in headers if name == b"authorization"), b"")
            key = scope[SCOPE_KEY] = self._keyring.authenticate(authorization)
            if key and key.models is not None and path in OF_ALL_MODELS:
                raise Refusal(403, "not_allowed", "This API key is for some models, and this is about all.")
        if scope["method"] == "POST" and self._in_flight >= self._limits.in_flight:
            message = f"{self._limits.in_flight} requests are being answered: try again later."
            raise Refusal(429, "too_many_requests", message, headers={"Retry-After": str(_RETRY_S)})

    async def _within_its_time(self, scope: Scope, receive: Receive, answer: _Answer) -> None:
        limit_s = self._limits.request_s
        try:
            async with asyncio.timeout(limit_s) as limit:
                await self._app(scope, receive, answer.send)
        except Exception as error:  # noqa: BLE001 - the boundary: it is said, and the client gets an answer
            if isinstance(error, TimeoutError) and limit.expired():
                await answer.end_with(Refusal(504, "timeout", f"The request took longer than {limit_s:g} s."))
                return
            say(f"error: the door failed on a request: {_place(error)}")
            await answer.end_with(our_fault())


class _Answer:
    """The answer to one request, as far as it has been sent."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._start: Message | None = None
        self._ended = False

    def send(self, message: Message) -> Awaitable[None]:
        """Pass a part of it on. No coroutine of its own: this is called for every chunk."""
        if self._start is None:
            self._start = message
        elif not message.get("more_body"):
            self._ended = True
        return self._send(message)

    async def end_with(self, refusal: Refusal) -> None:
        """Say `refusal`: as the whole answer, or as the last event of a stream that has begun."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_WORDS_S):
                if self._start is None:
                    await refusal.response()(self._scope, self._receive, self._send)
                elif not self._ended and _is_stream(self._start):
                    await self._send({"type": "http.response.body", "body": refusal.event(), "more_body": False})


def check_listen(host: str, keyring: Keyring) -> None:
    """Refuse to be reached from other machines by whoever likes to.

    Raises:
        PreflightError: `host` is beyond loopback, and no key is asked for or there is none yet.

    """
    if is_loopback(host) or keyring.keys:
        return
    raise PreflightError(
        f"{host or 'this address'} can be reached from other machines, and there is no API key",
        hint="tuneship keys add NAME, or set TUNESHIP_API_KEY; without a key stay on --host 127.0.0.1",
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; of a name that is not `localhost` nobody knows."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def headers_too_large() -> Refusal:
    """More than any client of this door needs to say."""
    return Refusal(431, "headers_too_large", "The request's headers are too large.")


def our_fault() -> Refusal:
    """A bug of ours, of which a client learns nothing but that."""
    return Refusal(500, "internal_error", "The door failed on this request.")


def _is_stream(start: Message) -> bool:
    return any(name == b"content-type" and value.startswith(b"text/event-stream") for name, value in start["headers"])


def _place(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    frames = traceback.extract_tb(error.__traceback__)
    return (
        f"{type(error).__name__} at {Path(frames[-1].filename).name}:{frames[-1].lineno}"
        if frames
        else repr(type(error))
    )
