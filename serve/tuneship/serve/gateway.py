"""The door: a thin OpenAI-compatible proxy in front of the engine that decides which model answers.

It looks `model` up in its table and answers 404 to anything else: SGLang itself would answer an unknown name with the
base. Every answer says in `x-tuneship-version` which immutable version gave it. A request keeps the version that it was
given until its answer is over (`routes.Lease`); who asks, and how long it may take, is `guard.py`'s, what is counted
`observe.py`'s.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tuneship.core.endpoint import VERSION_HEADER
from tuneship.serve import bounds, keys
from tuneship.serve.calls import lease, read_asked, read_call
from tuneship.serve.catalog import Entry
from tuneship.serve.metrics import CONTENT_TYPE, Metrics
from tuneship.serve.refusals import Refusal, engine_unavailable
from tuneship.serve.routes import Routes
from tuneship.serve.scoring import score
from tuneship.serve.upstream import Upstream

Endpoint = Callable[[Request], Awaitable[Response]]
_CLIENT_LEFT = 499


def build_door(routes: Routes, upstream: Upstream, metrics: Metrics, ready: Callable[[], bool]) -> Starlette:
    """Build the ASGI application that serves `routes` from the engine behind `upstream`, while that is `ready`."""
    opened_at = int(time.time())

    def card(entry: Entry) -> dict[str, Any]:
        return _card(entry, opened_at, bounds.facts(routes.base.path).ends)

    async def models(request: Request) -> Response:
        shown = [entry for entry in routes.entries if keys.permits(request.scope, entry.name)]
        return JSONResponse({"object": "list", "data": [card(entry) for entry in shown]})

    async def model(request: Request) -> Response:
        entry = lease(request, routes, request.path_params["name"]).entry
        return JSONResponse(card(entry), headers={VERSION_HEADER: entry.version})

    async def ask(request: Request, *, streams: bool) -> Response:
        _must_be(ready)
        call = await read_call(request, routes, streams=streams)
        return await _unless_client_leaves(request, upstream.ask(request.url.path, call))

    generate, tokenize = partial(ask, streams=True), partial(ask, streams=False)

    async def logprobs(request: Request) -> Response:
        _must_be(ready)
        entry, asked = await read_asked(request, routes)
        return await _unless_client_leaves(request, score(upstream, entry, asked))

    async def figures(_: Request) -> Response:
        page = metrics.text()
        with contextlib.suppress(Refusal):  # an engine that is not there, or counts nothing
            page += bytes((await upstream.metrics()).body)
        return Response(page, headers={"Content-Type": CONTENT_TYPE})

    async def health(_: Request) -> Response:
        return Response()

    async def readiness(_: Request) -> Response:
        _must_be(ready)
        return Response()

    door = Starlette(
        routes=[
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", model),
            Route("/v1/chat/completions", generate, methods=["POST"]),
            Route("/v1/completions", generate, methods=["POST"]),
            Route("/v1/tokenize", tokenize, methods=["POST"]),
            Route("/v1/logprobs", logprobs, methods=["POST"]),
            Route("/metrics", figures),
            Route("/health", health),
            Route("/ready", readiness),
        ],
        exception_handlers={
            Refusal: _refused,
            HTTPException: _not_routed,
            ClientDisconnect: _left,
            Exception: _our_fault,
        },
    )
    door.router.redirect_slashes = False  # a redirect would repeat the client's own `Host`
    return door


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


def _must_be(ready: Callable[[], bool]) -> None:
    """Before the model is looked up: while the engine starts nobody knows yet what it will serve."""
    if not ready():
        raise engine_unavailable()


def _card(entry: Entry, created: int, ends: Sequence[int]) -> dict[str, Any]:
    """OpenAI's fields, and ours: which immutable version answers now, where it stops, and the base below an adapter."""
    card = {"id": entry.name, "object": "model", "created": created, "owned_by": "tuneship"}
    ours = {"version": entry.version, "end_token_ids": list(ends)}
    return {**card, **ours, **({"parent": entry.base_id} if entry.selector else {})}


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
