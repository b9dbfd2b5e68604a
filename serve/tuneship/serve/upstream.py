"""The way to the engine and back: one pooled session, streams passed on event by event."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import aiohttp
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tuneship.core.endpoint import VERSION_HEADER
from tuneship.core.errors import EngineError
from tuneship.serve.calls import Call
from tuneship.serve.catalog import Entry
from tuneship.serve.joined import Joined
from tuneship.serve.refusals import Refusal, UpstreamError, engine_unavailable

EVENT_END = b"\n\n"
LAST_EVENT = b"data: [DONE]" + EVENT_END
_CONNECT_S = 5
# SGLang closes idle connections after 5 s; one that it is just closing must not be picked for a new request.
_KEEP_ALIVE_S = 2
_METRICS_S = 5
_LONG_AGO_S = 60
"""What was owed before the engine had nothing to do for so long says nothing of it now."""
# Plain text: the older form of the page, which can be put behind another one, and no compression, which cannot.
_METRICS_HEADERS = {"Accept": "text/plain", "Accept-Encoding": "identity"}
# Failures on the way: refused, reset, ended early. aiohttp's own exceptions, and the system's below them.
_BROKEN = (aiohttp.ClientError, OSError)
_OURSELVES = Entry("", "", None, Path(), "", "")
"""In place of a model that a client named."""


class Upstream:
    """The engine behind the door, while there is one: what is asked before `open` or after `shut` gets 503."""

    def __init__(self, url: str = "") -> None:
        self.waiting = 0
        """Requests that the engine has not finished answering."""
        self.answered_at = time.monotonic()
        """When anything last came back."""
        self._owed_since = 0.0
        """When the first request began after which nothing came, to it or to any other; 0: there is none."""
        self._idle_since = 0.0
        self.joined = Joined(self._generate)
        """For what the server itself asks."""
        self._url = url

    @property
    def heard_at(self) -> float:
        """When a request last began to wait for an engine that owed nothing, or anything came back.

        Clients who lose patience and go away are no sign of life: what they asked stays owed.
        """
        return max(self.answered_at, self._owed_since)

    def open(self, url: str) -> None:
        """From now on the engine is at `url`; what the one before owed is forgotten."""
        self._url = url
        self._owed_since = 0.0

    def shut(self) -> None:
        """There is no engine for now."""
        self._url = ""

    async def __aenter__(self) -> Self:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        pool = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
        self._session = aiohttp.ClientSession(auto_decompress=False, connector=pool, timeout=timeout)
        once = aiohttp.TCPConnector(limit=0, force_close=True)
        self._unpooled = aiohttp.ClientSession(auto_decompress=False, connector=once, timeout=timeout)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()
        await self._unpooled.close()

    async def ask(self, path: str, call: Call) -> Response:
        """Send `call` and return the engine's answer: a stream as a stream, bytes untouched, everything else whole.

        Raises:
            Refusal: the engine refused (4xx), failed (502) or is not there (503).

        """
        version = call.entry.version
        if not self._url:
            raise engine_unavailable(version)
        work, streams = self._begun(), False
        try:
            answer = await self._post(f"{self._url}{path}", call.body)
            work.heard()
            if answer.content_type == "text/event-stream" and answer.status == 200:
                streams = True
                return _Stream(answer, version, work)
            async with answer:
                body = await answer.read()
            work.heard()
        except _BROKEN:
            raise engine_unavailable(version) from None
        finally:
            if not streams:
                work.done()
        if answer.status != 200:
            raise UpstreamError(answer.status, body).refusal(version)
        return Response(body, media_type=answer.content_type, headers={VERSION_HEADER: version})

    async def _post(self, url: str, body: bytes) -> aiohttp.ClientResponse:
        # SGLang ends a connection after a 500 on it without saying so, and the next request may meet its end.
        headers = {"Content-Type": "application/json"}
        try:
            return await self._session.post(url, data=body, headers=headers)
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
            return await self._unpooled.post(url, data=body, headers=headers)

    async def fetch(self, path: str, call: Call) -> bytes:
        """Send `call` and return the body of the engine's answer, for the door's own use.

        Raises:
            Refusal: as `ask`.

        """
        answer = await self.ask(path, call)
        return bytes(answer.body)

    async def _generate(self, body: dict[str, Any]) -> bytes:
        return await self.fetch("/generate", Call(_OURSELVES, json.dumps(body).encode()))

    async def tell(self, path: str, body: dict[str, Any], timeout_s: float) -> tuple[int, bytes]:
        """POST `body`, a word between us and the engine that no client asked for; (status, what it says).

        Raises:
            EngineError: it is not there, or says nothing within `timeout_s`.

        """
        if not self._url:
            raise EngineError("the engine is not there", hint="try again when /ready says so")
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_CONNECT_S)
        try:
            async with self._session.post(f"{self._url}{path}", json=body, timeout=timeout) as answer:
                return answer.status, await answer.read()
        except TimeoutError:
            raise EngineError(f"the engine said nothing to {path} within {timeout_s:g} s") from None
        except _BROKEN as error:
            raise EngineError(f"the engine broke off at {path}: {type(error).__name__}") from None

    async def is_working(self, timeout_s: float) -> bool:
        """Whether the engine's scheduler does anything at all, by SGLang's own word within `timeout_s`."""
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.get(f"{self._url}/health_generate", timeout=timeout) as answer:
                return answer.status == 200
        except (TimeoutError, *_BROKEN):
            return False

    async def metrics(self) -> Response:
        """The engine's Prometheus page.

        Raises:
            Refusal: it has none (404), failed (502), or is not there (503).

        """
        if not self._url:
            raise engine_unavailable()
        timeout = aiohttp.ClientTimeout(total=_METRICS_S)
        try:
            async with self._session.get(f"{self._url}/metrics", headers=_METRICS_HEADERS, timeout=timeout) as answer:
                page = await answer.read()
        except _BROKEN:
            raise engine_unavailable() from None
        if answer.status == 404:
            raise Refusal(404, "no_metrics", "The inference engine was started without metrics.")
        if answer.status != 200:
            raise UpstreamError(answer.status, page).refusal("")
        return Response(page, headers={"Content-Type": answer.headers.get("Content-Type", "text/plain")})

    def _begun(self) -> _Work:
        now = time.monotonic()
        if not self.waiting and (not self._owed_since or now - self._idle_since > _LONG_AGO_S):
            self._owed_since = now
        self.waiting += 1
        return _Work(self)

    def _heard(self) -> None:
        self.answered_at, self._owed_since = time.monotonic(), 0.0

    def _ended(self) -> None:
        self.waiting -= 1
        self._idle_since = time.monotonic()


class _Work:
    """One request that the engine has."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream: Upstream | None = upstream

    def heard(self) -> None:
        """Something came of it."""
        if self._upstream:
            self._upstream._heard()

    def done(self) -> None:
        """It is over, however it went; once."""
        if self._upstream:
            self._upstream._ended()
            self._upstream = None


class _Stream(StreamingResponse):
    """Passes a stream on. However it ends (also when the client went away), the engine's connection is closed."""

    def __init__(self, answer: aiohttp.ClientResponse, version: str, work: _Work) -> None:
        headers = {VERSION_HEADER: version, "Cache-Control": "no-cache"}
        super().__init__(_events(answer, version, work), media_type="text/event-stream", headers=headers)
        self._answer = answer
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()
            self._work.done()


async def _events(answer: aiohttp.ClientResponse, version: str, work: _Work) -> AsyncIterator[bytes]:
    """Whole events as they come; an error event in place of the rest when the engine stops in the middle."""
    held, last = b"", b""
    try:
        async for chunk in answer.content.iter_any():
            work.heard()
            whole, end, held = (held + chunk).rpartition(EVENT_END)
            if end:
                last = whole + end
                yield last
    except _BROKEN:
        held = b""  # a torn event; what came so far does not end as it should, which is said below
    if not last.endswith(LAST_EVENT):
        yield engine_unavailable(version).event()
