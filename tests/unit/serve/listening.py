"""An application on a port of its own: ours as uvicorn serves it, and aiohttp's, which stands in for an engine."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import uvicorn
from aiohttp import web
from starlette.types import ASGIApp

from tuneship.serve.engine import free_port


class Listening(NamedTuple):
    """`server` is uvicorn's."""

    url: str
    server: uvicorn.Server


@contextlib.asynccontextmanager
async def listening(app: ASGIApp, **options: Any) -> AsyncIterator[Listening]:
    """Serve `app` for the block; `options` are those of `uvicorn.Config`."""
    config = uvicorn.Config(app, port=free_port(), log_config=None, lifespan="off", **options)
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn offers a flag, no event
        await asyncio.sleep(0.01)
    try:
        yield Listening(f"http://127.0.0.1:{config.port}", server)
    finally:
        server.should_exit = True
        await serving


@contextlib.asynccontextmanager
async def answering(app: web.Application, **options: Any) -> AsyncIterator[str]:
    """Serve aiohttp's `app` for the block, at this URL; `options` are those of `web.AppRunner`."""
    runner = web.AppRunner(app, **options)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
