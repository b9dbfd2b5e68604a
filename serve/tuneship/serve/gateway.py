"""The door: a thin OpenAI-compatible proxy in front of the engine that decides which model answers.

It looks `model` up in the catalog and answers 404 to anything else: SGLang itself would answer an unknown name with the
base. Every answer says in `x-tuneship-version` which immutable version gave it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneship.core.endpoint import VERSION_HEADER
from tuneship.serve.calls import read_asked, read_call
from tuneship.serve.catalog import Catalog, Entry
from tuneship.serve.refusals import Refusal, unknown_model
from tuneship.serve.scoring import score
from tuneship.serve.upstream import Upstream

Endpoint = Callable[[Request], Awaitable[Response]]
_CLIENT_LEFT = 499


def build_door(catalog: Catalog, engine_url: str, alive: Callable[[], bool]) -> Starlette:
    """Build the ASGI application that serves `catalog` from the engine at `engine_url`; `alive` says if that lives."""
    opened_at = int(time.time())
    upstream = Upstream(engine_url)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        async with upstream:
            yield

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [_card(entry, opened_at) for entry in catalog.entries]})

    async def model(request: Request) -> Response:
        entry = catalog.find(request.path_params["name"])
        if entry is None:
            raise unknown_model(request.path_params["name"])
        return JSONResponse(_card(entry, opened_at), headers={VERSION_HEADER: entry.version})

    async def generate(request: Request) -> Response:
        call = await read_call(request, catalog)
        return await _unless_client_leaves(request, upstream.ask(request.url.path, call))

    async def logprobs(request: Request) -> Response:
        entry, asked = await read_asked(request, catalog)
        return await _unless_client_leaves(request, score(upstream, entry, asked))

    async def metrics(_: Request) -> Response:
        return await upstream.metrics()

    async def health(_: Request) -> Response:
        return Response(status_code=200 if alive() else 503)

    return Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", generate, methods=["POST"]),
            Route("/v1/completions", generate, methods=["POST"]),
            Route("/v1/tokenize", generate, methods=["POST"]),
            Route("/v1/logprobs", logprobs, methods=["POST"]),
            Route("/metrics", metrics),
            Route("/health", health),
        ],
        exception_handlers={
            Refusal: _refused,
            HTTPException: _not_routed,
            ClientDisconnect: _left,
            Exception: _our_fault,
        },
        lifespan=lifespan,
    )


async def _unless_client_leaves(request: Request, answer: Coroutine[Any, Any, Response]) -> Response:
    """Wait for `answer`, and give it up (closing the engine's connection, which ends its work) when nobody waits."""
    asking = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(request.receive())  # the body is read: all that can come is a disconnect
    try:
        await asyncio.wait({asking, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not asking.done():
            raise ClientDisconnect
        return asking.result()
    finally:
        for task in (asking, leaving):
            task.cancel()


def _card(entry: Entry, created: int) -> dict[str, str | int]:
    return {"id": entry.name, "object": "model", "created": created, "owned_by": "tuneship"}


async def _refused(_: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return refusal.response()


async def _not_routed(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return Refusal(error.status_code, "unknown_url", f"{error.detail}.").response()


async def _left(_: Request, __: Exception) -> Response:
    return Response(status_code=_CLIENT_LEFT)  # nobody reads it


async def _our_fault(_: Request, __: Exception) -> Response:
    return Refusal(500, "internal_error", "The door failed on this request.").response()
