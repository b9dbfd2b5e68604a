"""What `guard.Guard` costs: microseconds of processor time per request, and per chunk of a stream.

The same ASGI application, bare and guarded, called without a socket: only the difference is the guard's. Blocks of both
take turns (bare, guarded, guarded, bare); the figure is the median over the blocks, with the 5th and 95th percentile.

    .venv/bin/python bench/studies/guard_cost.py
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tuneship.core import hardware
from tuneship.serve import keys
from tuneship.serve.guard import Guard
from tuneship.serve.keys import Keyring

BLOCKS, REQUESTS, CHUNKS = 20, 300, 100
_CHUNK: Message = {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True}


async def stream(_scope: Scope, _receive: Receive, send: Send) -> None:
    """An application that sends `CHUNKS` chunks."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
    for _ in range(CHUNKS):
        await send(_CHUNK)
    await send({"type": "http.response.body", "body": b""})


async def answer(_scope: Scope, _receive: Receive, send: Send) -> None:
    """An application that answers at once."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def seconds(app: ASGIApp, key: str) -> float:
    """Of `REQUESTS` requests to `app`, one after the other."""
    headers = [(f"x-{n}".encode(), b"some value") for n in range(8)]
    headers.append((b"authorization", f"Bearer {key}".encode()))
    scope = {"type": "http", "method": "POST", "path": "/v1/x", "raw_path": b"/v1/x", "query_string": b""}

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    def send(_message: Message) -> Awaitable[None]:
        return _nothing()

    began = time.perf_counter()
    for _ in range(REQUESTS):
        await app({**scope, "headers": headers}, receive, send)
    return time.perf_counter() - began


async def _nothing() -> None:
    pass


async def cost(app: ASGIApp, keyring: Keyring, key: str) -> list[float]:
    """Seconds per request that the guard adds, by block."""
    guarded = Guard(app, keyring)
    added = []
    for _ in range(BLOCKS):
        first, second, third, last = [await seconds(each, key) for each in (app, guarded, guarded, app)]
        added.append((second + third - first - last) / 2 / REQUESTS)
    return added


def main() -> None:
    """Print the figures as JSON."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.toml"
        key = [keys.add(path, f"key-{n}") for n in range(10)][-1]
        keyring = Keyring(path)
        per_request = asyncio.run(cost(answer, keyring, key))
        per_stream = asyncio.run(cost(stream, keyring, key))
    per_chunk = [(whole - statistics.median(per_request)) / CHUNKS for whole in per_stream]
    figures = {name: _described(values) for name, values in (("request_us", per_request), ("chunk_us", per_chunk))}
    print(json.dumps({"keys": 10, "cpu": hardware.detect().cpu, **figures}, indent=1))


def _described(values: list[float]) -> dict[str, float]:
    ranks = statistics.quantiles((value * 1e6 for value in values), n=20)
    return {"p05": round(ranks[0], 2), "p50": round(statistics.median(values) * 1e6, 2), "p95": round(ranks[-1], 2)}


if __name__ == "__main__":
    main()
