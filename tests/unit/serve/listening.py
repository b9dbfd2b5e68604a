"""An application on a port of its own, as uvicorn serves it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import uvicorn
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
