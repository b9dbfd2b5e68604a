"""A server in the foreground: check the port, start the engine, open the door, and end both together.

SIGTERM and Ctrl-C close the door to new requests, give those in flight `DRAIN_S`, then end the engine; what is still
being answered then ends with an error, never silently. A second Ctrl-C skips the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from ipaddress import ip_address
from pathlib import Path
from typing import NamedTuple

import uvicorn
import uvloop
from starlette.applications import Starlette

from tuneship.core import hardware
from tuneship.core.endpoint import Endpoint, EngineInfo, ServedModel, curl, write_endpoint
from tuneship.core.errors import EndpointError
from tuneship.core.progress import say
from tuneship.core.recipe import Serve
from tuneship.serve import engine as engines
from tuneship.serve.catalog import Catalog
from tuneship.serve.engine import Engine
from tuneship.serve.gateway import build_door
from tuneship.serve.launch import configure, flags

START_TIMEOUT_S = 600.0
"""The first start on a GPU compiles kernels and captures graphs: 3 minutes were measured."""
DRAIN_S = 8.0
_CLOSE_S = 30
"""Longer than draining and stopping the engine together: a client that reads nothing cannot keep the door open."""
_WATCH_S = 0.25
_LAST_WORDS_S = 0.5
"""Its processes die one after the other: who was first, and why, shows when they have."""


class Files(NamedTuple):
    """Where a server leaves its traces: the engine's log, and `endpoint.json` while it runs (None: nowhere)."""

    log: Path
    endpoint: Path | None = None


def run(catalog: Catalog, serve: Serve, files: Files) -> None:
    """Serve `catalog` until SIGTERM (returns) or Ctrl-C.

    Raises:
        EndpointError: the port is taken, or the address is not ours.
        EngineError: the engine did not start, or died while serving.
        KeyboardInterrupt: after everything is ended.

    """
    with _bound(serve.host, serve.port) as listener, _sigterm_exits_with(0):
        config = configure(serve, catalog, hardware.detect(), engines.free_port())
        _warn_beyond_loopback(serve.host)
        began = time.monotonic()
        engine = engines.start(config, files.log)
        try:
            say(f"starting SGLang with {catalog.model_path} (log: {files.log})")
            engine.wait_ready([entry.selector for entry in catalog.entries], START_TIMEOUT_S)
            say(f"SGLang answers after {time.monotonic() - began:.0f} s")
            door = build_door(catalog, engine.url, alive=lambda: not engine.death)
            interrupted = uvloop.run(_serve(door, listener, engine, catalog, files))
        finally:
            engine.stop()
    if interrupted:
        raise KeyboardInterrupt


async def _serve(app: Starlette, listener: socket.socket, engine: Engine, catalog: Catalog, files: Files) -> bool:
    """Keep the door open until a signal or the engine's death; whether it was Ctrl-C."""
    signals = _signals()
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=_CLOSE_S)
    server = _Door(config)
    door = asyncio.create_task(server.serve(sockets=[listener]))
    death = asyncio.create_task(_death(engine))
    stop = asyncio.create_task(signals.get())
    await _opened(server, door)
    with _published(engine, listener, catalog, files.endpoint) as endpoint:
        _say_hello(endpoint)
        await asyncio.wait({door, death, stop}, return_when=asyncio.FIRST_COMPLETED)
    # Said now: once we have ended the rest of it, it looks as if we had killed it.
    failure = engine.failure("died while serving") if death.done() else None
    death.cancel()
    server.should_exit = True
    grace_s = 0.0 if failure else await _drain(door, signals)
    # What is still being answered loses the engine here, and the door tells its client so.
    await asyncio.to_thread(engine.stop, grace_s)
    await door
    if failure:
        raise failure
    return stop.done() and stop.result() is signal.SIGINT


def _signals() -> asyncio.Queue[signal.Signals]:
    """SIGTERM and SIGINT as they arrive."""
    arrived: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, arrived.put_nowait, number)
    return arrived


class _Door(uvicorn.Server):
    """uvicorn without its own idea of signals: what they mean is decided above."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Leave them alone."""
        return contextlib.nullcontext()


async def _opened(server: uvicorn.Server, door: asyncio.Task[None]) -> None:
    """Return when the door listens."""
    while not server.started:
        if door.done():
            raise EndpointError("the door did not open")
        await asyncio.sleep(0.01)


async def _death(engine: Engine) -> None:
    """Return when the engine no longer serves."""
    while not engine.death:  # noqa: ASYNC110 - another process's death is no asyncio.Event
        await asyncio.sleep(_WATCH_S)
    await asyncio.sleep(_LAST_WORDS_S)


async def _drain(door: asyncio.Task[None], signals: asyncio.Queue[signal.Signals]) -> float:
    """Wait for the requests in flight, `DRAIN_S` at most, or until a second signal; how long the engine may take."""
    say("closing: no new requests, finishing those in flight")
    again = asyncio.create_task(signals.get())
    await asyncio.wait({door, again}, timeout=DRAIN_S, return_when=asyncio.FIRST_COMPLETED)
    if again.done():
        return 0.0
    again.cancel()
    return engines.STOP_GRACE_S


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """The door's address, taken before anything slow begins; it does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            what = "is in use" if error.errno == 98 else f"cannot be used: {error.strerror}"
            raise EndpointError(
                f"port {port} on {host} {what}", hint="choose another with --port; --port 0 takes a free one"
            ) from None
        yield listener


@contextmanager
def _sigterm_exits_with(code: int) -> Iterator[None]:
    """Until the door handles signals itself, SIGTERM leaves through the `finally` clauses."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(code))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _published(engine: Engine, listener: socket.socket, catalog: Catalog, path: Path | None) -> Iterator[Endpoint]:
    """`endpoint.json`, there while clients can come."""
    endpoint = _describe(engine, listener, catalog)
    if path is None:
        yield endpoint
        return
    write_endpoint(endpoint, path)
    try:
        yield endpoint
    finally:
        path.unlink(missing_ok=True)


def _describe(engine: Engine, listener: socket.socket, catalog: Catalog) -> Endpoint:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - read
    return Endpoint(
        url=f"http://{host}:{port}",
        mode=catalog.mode,
        pid=os.getpid(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        engine=EngineInfo(version=metadata.version("sglang"), flags=flags(engine.config)),
        models=[
            ServedModel(name=entry.name, version=entry.version, artifact_id=entry.artifact_id, base_id=entry.base_id)
            for entry in catalog.entries
        ],
    )


def _say_hello(endpoint: Endpoint) -> None:
    say(f"serving {', '.join(model.version for model in endpoint.models)} at {endpoint.url}")
    say(curl(endpoint.url, endpoint.models[-1].name))


def _warn_beyond_loopback(host: str) -> None:
    with contextlib.suppress(ValueError):
        if host != "localhost" and not ip_address(host).is_loopback:
            say(f"warning: {host} can be reached from other machines, and there are no API keys yet")
