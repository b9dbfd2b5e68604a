"""The load generator: one pooled aiohttp session, an open or a closed loop.

An open loop sends every request at its scheduled time and never waits for an answer first, so a slow server is seen as
slow (no coordinated omission). A closed loop keeps a fixed number in flight. Both watch themselves as well: how late
requests left, and how late the event loop woke. `metrics.summarise` turns a `Recording` into figures and says whether
they can be believed.
"""

from __future__ import annotations

import asyncio
import gc
import math
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import NamedTuple

import aiohttp

from tuneship.bench.load.stream import Clock, RequestRecord, encode, send
from tuneship.bench.load.workload import Request

_CONNECT_TIMEOUT_S = 10
# Below the 5 s after which uvicorn hangs up on an idle connection: a POST on a dying one fails and is not repeated.
_KEEPALIVE_S = 2
_WATCH_INTERVAL_S = 0.01


class Recording(NamedTuple):
    """One level as it was: every request sent, and how late the event loops woke (seconds, sampled at 100 Hz)."""

    records: list[RequestRecord]
    loop_lag_s: list[float]
    cpu_s: float = 0.0
    """What the client used of processors while it sent and read: the sum over its processes."""
    processes: int = 1


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
    concurrency: int = 0,
    stop_s: float | None = None,
    start: float | None = None,
) -> Recording:
    """Send `requests` and wait for the answers, at most `drain_s` after the last was sent.

    Failures are recorded by kind, never raised: `timeout`, `connection`, `http_<status>`, `stream_error` (the server
    reported one in mid-stream, or sent no JSON), `stream_closed`, `missing_usage`, `no_content`.

    Args:
        session: from `connect`.
        url: of the endpoint, without `/v1`.
        requests: in the order in which they are to leave.
        drain_s: see above.
        watch: called every second with the time and the records; in a closed loop, what is not due yet is scheduled
            at infinity.
        concurrency: 0 is an open loop: each leaves at its `at_s`. Else the most in flight: the next leaves when one
            ends, whatever its `at_s` says, and its `scheduled_s` is the moment at which that was.
        stop_s: from then on nothing is sent; what was not is left out of the recording.
        start: the `time.perf_counter()` that counts as 0, by default now.

    """
    target = f"{url}/v1/chat/completions"
    if stop_s is not None and not concurrency:
        requests = [request for request in requests if request.at_s < stop_s]
    bodies = [encode(request) for request in requests]  # before the clock starts: dispatch must stay cheap
    records = [RequestRecord(request.model, math.inf if concurrency else request.at_s) for request in requests]
    loop_lag_s: list[float] = []
    clock = Clock(start)
    await clock.sleep_until(0)
    cpu_before_s = time.process_time()
    gc.disable()  # a full collection stalls every stream (18 ms with 256 of them), and aiohttp leaves no cycles
    helpers = [asyncio.create_task(_watch_loop(loop_lag_s))]
    if watch:
        helpers.append(asyncio.create_task(_tick(watch, clock, records)))
    tasks: list[asyncio.Task[None]] = []
    jobs = zip(bodies, records, strict=True)
    try:
        if concurrency:
            stop_at_s = math.inf if stop_s is None else stop_s
            slot = partial(_slot, session, target, jobs, clock, stop_at_s)
            tasks += [asyncio.create_task(slot()) for _ in range(min(concurrency, len(records)))]
        else:
            for body, record in jobs:
                await clock.sleep_until(record.scheduled_s)
                tasks.append(asyncio.create_task(send(session, target, body, record, clock)))
        await _drain(tasks, drain_s, clock, records)
    finally:
        await _cancel([*tasks, *helpers])
        gc.enable()
    for task in [*tasks, *helpers]:
        if not task.cancelled():
            task.result()  # raises our own bugs; the expected failures are in the records
    sent = [record for record in records if record.scheduled_s < math.inf]
    return Recording(sent, loop_lag_s, time.process_time() - cpu_before_s)


async def _slot(
    session: aiohttp.ClientSession,
    target: str,
    jobs: Iterator[tuple[bytes, RequestRecord]],
    clock: Clock,
    stop_s: float,
) -> None:
    """One place in a closed loop: send the next of the jobs that all slots share, until `stop_s`."""
    while (due_s := clock.now()) < stop_s and (job := next(jobs, None)):
        body, record = job
        record.scheduled_s = due_s
        await send(session, target, body, record, clock)


async def _drain(
    tasks: Sequence[asyncio.Task[None]], drain_s: float, clock: Clock, records: Sequence[RequestRecord]
) -> None:
    """Wait until all `tasks` ended, or nothing was sent for `drain_s`."""
    pending = set(tasks)
    while pending:
        last_sent_s = max((record.sent_s for record in records), default=0.0)
        if (left_s := last_sent_s + drain_s - clock.now()) <= 0:
            return
        _, pending = await asyncio.wait(pending, timeout=left_s)


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
