"""The load generator in as many processes as a load needs: one Python process reads at most what one core can.

    recording = run(url, key, requests, drain_s=60, processes=4)

The requests are dealt round-robin. Every process stamps with `time.perf_counter`, which on Linux is CLOCK_MONOTONIC and
so the same in all of them; they begin at one absolute time, when all have said that they are ready.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from itertools import zip_longest
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import uvloop

from tuneship.bench.load.drive import Recording, Watcher, connect, drive
from tuneship.bench.load.stream import RequestRecord
from tuneship.bench.load.workload import Request
from tuneship.core.errors import StageError
from tuneship.core.process import describe_exit, die_with_parent

_HEAD_START_S = 0.2
_HEAD_START_PER_REQUEST_S = 1e-4
"""From the word to begin until time 0: longer than it takes to reach every process and to encode its requests."""


class _Share(NamedTuple):
    """What one process does."""

    url: str
    key: str
    requests: Sequence[Request]
    drain_s: float
    concurrency: int
    stop_s: float | None


def run(
    url: str,
    key: str,
    requests: Sequence[Request],
    *,
    drain_s: float,
    processes: int = 1,
    concurrency: int = 0,
    stop_s: float | None = None,
    watch: Watcher | None = None,
) -> Recording:
    """`drive.drive` under uvloop: in this process, or in `processes` of their own; records in schedule order.

    `watch` gets copies of the records without their chunks from other processes, a second old at most.

    Raises:
        StageError: one of the processes died.

    """
    processes = max(1, min(processes, len(requests), concurrency or processes))
    shares = [
        _Share(url, key, requests[k::processes], drain_s, len(range(k, concurrency, processes)), stop_s)
        for k in range(processes)
    ]
    if processes == 1:
        return _run_one(shares[0], watch)
    recordings = _run_all(shares, watch)
    return Recording(
        _merge([recording.records for recording in recordings]),
        [lag for recording in recordings for lag in recording.loop_lag_s],
        sum(recording.cpu_s for recording in recordings),
        processes,
    )


def _run_one(share: _Share, watch: Watcher | None, start: float | None = None) -> Recording:
    """Drive one share under uvloop.

    The recording is not the main task's result: to look at the handler of SIGINT, asyncio's runner makes a `repr` of
    that task, and so of every record, twice (7 us a chunk).
    """
    recordings: list[Recording] = []

    async def keep() -> None:
        recordings.append(await _drive(share, watch, start))

    uvloop.run(keep())
    return recordings[0]


async def _drive(share: _Share, watch: Watcher | None, start: float | None) -> Recording:
    async with connect(share.key) as session:
        return await drive(
            session,
            share.url,
            share.requests,
            drain_s=share.drain_s,
            watch=watch,
            concurrency=share.concurrency,
            stop_s=share.stop_s,
            start=start,
        )


def _merge(dealt: Sequence[Sequence[RequestRecord]]) -> list[RequestRecord]:
    """Back to one list: undo the dealing, then sort by schedule, which keeps the order of what is due at once."""
    records = [record for hand in zip_longest(*dealt) for record in hand if record]
    return sorted(records, key=lambda record: record.scheduled_s)


def _run_all(shares: Sequence[_Share], watch: Watcher | None) -> list[Recording]:
    """One process a share, begun together; all are gone when this returns or raises."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in shares]
    children = [
        context.Process(target=_child, args=(theirs, share, bool(watch), os.getpid()), daemon=True)
        for (_, theirs), share in zip(pipes, shares, strict=True)
    ]
    ours = [pipe for pipe, _ in pipes]
    try:
        for child, (_, theirs) in zip(children, pipes, strict=True):
            child.start()
            theirs.close()  # or its end would not be noticed
        for pipe in ours:
            pipe.recv()  # ready
        start = time.perf_counter() + _HEAD_START_S + _HEAD_START_PER_REQUEST_S * len(shares[0].requests)
        for pipe in ours:
            pipe.send(start)
        return _collect(ours, shares, watch, start)
    except EOFError as error:
        for child in children:
            child.join(1)
        codes = [child.exitcode for child in children if child.exitcode]
        raise StageError(f"a process of the load client died: {describe_exit(codes[0] if codes else 1)}") from error
    finally:
        for child in children:
            if child.pid:
                child.kill()
                child.join()
        for pipe in ours:
            pipe.close()


def _collect(
    pipes: Sequence[Connection], shares: Sequence[_Share], watch: Watcher | None, start: float
) -> list[Recording]:
    """Hear all processes to their end, and tell `watch` about once a second what they said."""
    seen: list[Sequence[RequestRecord]] = [
        [RequestRecord(r.model, math.inf if share.concurrency else r.at_s) for r in share.requests] for share in shares
    ]
    results: dict[int, Recording] = {}
    while len(results) < len(pipes):
        for ready in wait([pipe for index, pipe in enumerate(pipes) if index not in results]):
            index = next(index for index, pipe in enumerate(pipes) if pipe is ready)
            message: Any = pipes[index].recv()
            if isinstance(message, Recording):
                results[index] = message
            else:
                seen[index] = message
                if watch and index == min(set(range(len(pipes))) - set(results)):
                    watch(time.perf_counter() - start, _merge(seen))
    return [results[index] for index in range(len(pipes))]


def _child(pipe: Connection, share: _Share, watched: bool, parent: int) -> None:
    """A process's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the parent, which ends us
    die_with_parent(signal.SIGKILL, parent)()

    def tell(_now_s: float, records: Sequence[RequestRecord]) -> None:
        pipe.send([RequestRecord(r.model, r.scheduled_s, r.sent_s, r.end_s, error=r.error) for r in records])

    pipe.send("ready")
    start: float = pipe.recv()
    pipe.send(_run_one(share, tell if watched else None, start))
