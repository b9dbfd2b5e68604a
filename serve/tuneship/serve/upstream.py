"""The way to the engine and back: one pooled session, streams passed on event by event."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Self

import aiohttp
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tuneship.core.endpoint import VERSION_HEADER
from tuneship.serve.calls import Call
from tuneship.serve.refusals import Refusal, UpstreamError, engine_unavailable

EVENT_END = b"\n\n"
LAST_EVENT = b"data: [DONE]" + EVENT_END
_CONNECT_S = 5
# SGLang closes idle connections after 5 s; one that it is just closing must not be picked for a new request.
_KEEP_ALIVE_S = 2
_METRICS_S = 5
# Plain text: the older form of the page, which can be put behind another one, and no compression, which cannot.
_METRICS_HEADERS = {"Accept": "text/plain", "Accept-Encoding": "identity"}
# Failures on the way: refused, reset, ended early. aiohttp's own exceptions, and the system's below them.
_BROKEN = (aiohttp.ClientError, OSError)


class Upstream:
    """The engine behind the door."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            self._url,
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._session.close()

    async def ask(self, path: str, call: Call) -> Response:
        """Send `call` and return the engine's answer: a stream as a stream, bytes untouched, everything else whole.

        Raises:
            Refusal: the engine refused (4xx), failed (502) or is not there (503).

        """
        version = call.entry.version
        try:
            answer = await self._session.post(path, data=call.body, headers={"Content-Type": "application/json"})
            if answer.content_type == "text/event-stream" and answer.status == 200:
                return _Stream(answer, version)
            async with answer:
                body = await answer.read()
                if answer.status >= 500:
                    answer.close()  # the engine ends this connection too, and the next request must not meet its end
        except _BROKEN:
            raise engine_unavailable(version) from None
        if answer.status != 200:
            raise UpstreamError(answer.status, body).refusal(version)
        return Response(body, media_type=answer.content_type, headers={VERSION_HEADER: version})

    async def fetch(self, path: str, call: Call) -> bytes:
        """Send `call` and return the body of the engine's answer, for the door's own use.

        Raises:
            Refusal: as `ask`.

        """
        answer = await self.ask(path, call)
        return bytes(answer.body)

    async def metrics(self) -> Response:
        """The engine's Prometheus page.

        Raises:
            Refusal: it has none (404), failed (502), or is not there (503).

        """
        timeout = aiohttp.ClientTimeout(total=_METRICS_S)
        try:
            async with self._session.get("/metrics", headers=_METRICS_HEADERS, timeout=timeout) as answer:
                page = await answer.read()
        except _BROKEN:
            raise engine_unavailable() from None
        if answer.status == 404:
            raise Refusal(404, "no_metrics", "The inference engine was started without metrics.")
        if answer.status != 200:
            raise UpstreamError(answer.status, page).refusal("")
        return Response(page, headers={"Content-Type": answer.headers.get("Content-Type", "text/plain")})


class _Stream(StreamingResponse):
    """Passes a stream on. However it ends (also when the client went away), the engine's connection is closed."""

    def __init__(self, answer: aiohttp.ClientResponse, version: str) -> None:
        headers = {VERSION_HEADER: version, "Cache-Control": "no-cache"}
        super().__init__(_events(answer, version), media_type="text/event-stream", headers=headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.close()


async def _events(answer: aiohttp.ClientResponse, version: str) -> AsyncIterator[bytes]:
    """Whole events as they come; an error event in place of the rest when the engine stops in the middle."""
    held, last = b"", b""
    try:
        async for chunk in answer.content.iter_any():
            whole, end, held = (held + chunk).rpartition(EVENT_END)
            if end:
                last = whole + end
                yield last
    except _BROKEN:
        held = b""  # a torn event; what came so far does not end as it should, which is said below
    if not last.endswith(LAST_EVENT):
        yield engine_unavailable(version).event()
