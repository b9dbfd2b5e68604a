"""The load generator: open loop, one pooled aiohttp session, every request sent at its scheduled time.

It never waits for an answer before it sends the next request, so a slow server is seen as slow (no coordinated
omission). It watches itself as well: how late requests left, and how late the event loop woke. `metrics.summarise`
turns a `Recording` into figures and says whether they can be believed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import aiohttp

from tuneship.bench.load.stream import Clock, RequestRecord, encode, send
from tuneship.bench.load.workload import Request

_CONNECT_TIMEOUT_S = 10
# Below the 5 s after which uvicorn hangs up on an idle connection: a POST on a dying one fails and is not repeated.
_KEEPALIVE_S = 2
_WATCH_INTERVAL_S = 0.01


class Recording(NamedTuple):
    """One level as it was: every request, and how late the event loop woke (seconds, sampled at 100 Hz)."""

    records: list[RequestRecord]
    loop_lag_s: list[float]


Watcher = Callable[[float, Sequence[RequestRecord]], None]


@asynccontextmanager
async def connect(key: str = "") -> AsyncIterator[aiohttp.ClientSession]:
    """One pooled session for all levels, without a limit on connections."""
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
        headers={
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        },
    ) as session:
        yield session


async def drive(
    session: aiohttp.ClientSession,
    url: str,
    requests: Sequence[Request],
    *,
    drain_s: float,
    watch: Watcher | None = None,
) -> Recording:
    """Send `requests` on their schedule and wait for the answers, at most `drain_s` after the last was sent.

    Failures are recorded by kind, never raised: `timeout`, `connection`, `http_<status>`, `stream_error` (the server
    reported one in mid-stream, or sent no JSON), `stream_closed`, `missing_usage`, `no_content`.
    """
    target = f"{url}/v1/chat/completions"
    bodies = [encode(request) for request in requests]  # before the clock starts: dispatch must stay cheap
    records = [RequestRecord(request.model, request.at_s) for request in requests]
    loop_lag_s: list[float] = []
    clock = Clock()
    helpers = [asyncio.create_task(_watch_loop(loop_lag_s))]
    if watch:
        helpers.append(asyncio.create_task(_tick(watch, clock, records)))
    tasks: list[asyncio.Task[None]] = []
    try:
        for body, record in zip(bodies, records, strict=True):
            await clock.sleep_until(record.scheduled_s)
            tasks.append(asyncio.create_task(send(session, target, body, record, clock)))
        await asyncio.wait(tasks, timeout=drain_s)
    finally:
        await _cancel([*tasks, *helpers])
    for task in [*tasks, *helpers]:
        if not task.cancelled():
            task.result()  # raises our own bugs; the expected failures are in the records
    return Recording(records, loop_lag_s)


async def _watch_loop(lags_s: list[float]) -> None:
    """Note how much later than asked the event loop wakes: what a busy client adds to every timestamp."""
    while True:
        due = time.perf_counter() + _WATCH_INTERVAL_S
        await asyncio.sleep(_WATCH_INTERVAL_S)
        lags_s.append(max(0.0, time.perf_counter() - due))


async def _tick(watch: Watcher, clock: Clock, records: Sequence[RequestRecord]) -> None:
    while True:
        await asyncio.sleep(1)
        watch(clock.now(), records)


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
