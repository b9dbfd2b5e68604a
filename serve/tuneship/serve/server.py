"""A server in the foreground: take the ports, start the engine behind the door, keep it alive, end it all together.

The door is open while the engine starts and while it is started again: it says 503 then, and `/ready` says so too.
SIGTERM and Ctrl-C close it to new requests, give those in flight `drain_s`, then end the engine; what is still being
answered then ends with an error, never silently. A second Ctrl-C skips the wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import uvicorn
import uvloop
from starlette.types import ASGIApp

from tuneship.core import hardware
from tuneship.core.endpoint import Endpoint, EngineInfo, ServedModel, curl, write_endpoint
from tuneship.core.errors import EndpointError, EngineError, TuneshipError
from tuneship.core.files import short
from tuneship.core.progress import say
from tuneship.core.recipe import Serve
from tuneship.serve.admin import build_admin
from tuneship.serve.assembly import Parts, assembled
from tuneship.serve.catalog import Catalog
from tuneship.serve.gateway import build_door
from tuneship.serve.guard import Guard, check_listen
from tuneship.serve.judging import prove_merged
from tuneship.serve.keys import API_KEY_VARIABLE, Keyring
from tuneship.serve.launch import LOOPBACK, configure, flags
from tuneship.serve.observe import Observed
from tuneship.serve.protocol import KEEP_ALIVE_S, DoorProtocol
from tuneship.serve.registry import Version
from tuneship.serve.running import Running, announced
from tuneship.serve.supervisor import Phase

_CLOSE_S = 22.0
"""Beyond draining: a client that reads nothing cannot keep the door open."""

_LAST_WORDS_S = 2.0
"""In which the supervisor notices that an engine died which broke off, and why."""


class Files(NamedTuple):
    """Where a server leaves its traces.

    The engine's log; `endpoint.json` while it runs; the directory of its registry. None: nowhere, nothing outlives it.
    """

    log: Path
    endpoint: Path | None = None
    state: Path | None = None


class Access(NamedTuple):
    """Who may come in, and where the admin side listens (0: on a free port)."""

    keys: Keyring
    admin_port: int = 0
    invite: bool = True
    """Whether to print how the server can be asked."""


def run(catalog: Catalog, serve: Serve, files: Files, access: Access) -> None:
    """Serve `catalog` until SIGTERM (returns) or Ctrl-C.

    Raises:
        EndpointError: a port is taken, or the address is not ours.
        PreflightError: the engine cannot serve it so, nor what `files.state` holds, or the door would be open to other
            machines without a key.
        RegistryError: the registry in `files.state` is another's.
        EngineError: the engine did not start, or failed again and again while serving.
        ParityError: an adapter is not what was trained.
        KeyboardInterrupt: after everything is ended.

    """
    machine = hardware.detect()
    check_listen(serve.host, access.keys)
    configure(serve, catalog, machine, 0)
    with (
        _bound(serve.host, serve.port) as listener,
        _bound(LOOPBACK, access.admin_port) as admin_listener,
        _sigterm_exits_with(0),
        assembled(catalog, serve, machine, files.log, files.state) as parts,
    ):
        server = _Server(catalog, serve, files, access, parts)
        try:
            interrupted = uvloop.run(server.serve(listener, admin_listener))
        finally:
            parts.supervisor.stop()
    if interrupted:
        raise KeyboardInterrupt


class _Server:
    """One run of the door, the admin side and the engine between them."""

    def __init__(self, catalog: Catalog, serve: Serve, files: Files, access: Access, parts: Parts) -> None:
        self._catalog, self._serve, self._files, self._access, self._parts = catalog, serve, files, access, parts
        self._settled = False

    @property
    def ready(self) -> bool:
        """Whether requests are answered."""
        return self._settled and self._parts.supervisor.phase is Phase.READY

    async def serve(self, listener: socket.socket, admin_listener: socket.socket) -> bool:
        """Keep the door open until a signal, or until the engine is given up; whether it was Ctrl-C."""
        signals = _signals()
        stop = asyncio.create_task(signals.get())
        admin_key = secrets.token_urlsafe(32)
        failure: Exception | None = None
        async with self._parts.upstream:
            door = await _opened(self._door(), listener)
            admin = await _opened(self._admin(admin_key), admin_listener)
            ends = (stop, door.task, admin.task)
            try:
                if await _until(ends, self._begin()):
                    with self._published(listener, admin_listener, admin_key):
                        await _until(ends, self._parts.supervisor.keep())
            except TuneshipError as error:
                failure = self._parts.explained(error)
            for each in (door, admin):
                each.server.should_exit = True
            if self._settled and not failure:
                await self._drain(door.task, signals)
            # What is still being answered loses the engine here, and the door tells its client so.
            await asyncio.to_thread(self._parts.supervisor.stop)
            await asyncio.gather(door.task, admin.task)
        if failure:
            raise failure
        return stop.done() and stop.result() is signal.SIGINT

    def _door(self) -> uvicorn.Config:
        parts = self._parts
        app = build_door(parts.routes, parts.upstream, parts.metrics, lambda: self.ready)
        return self._config(Observed(Guard(app, self._access.keys), parts.metrics))

    def _admin(self, key: str) -> uvicorn.Config:
        def who(token: str) -> str | None:
            return "local" if hmac.compare_digest(token.encode(), key.encode()) else self._access.keys.admin(token)

        return self._config(build_admin(self._parts, who, self._catalog.mode))

    def _config(self, app: ASGIApp) -> uvicorn.Config:
        return uvicorn.Config(
            app,
            http=DoorProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(self._serve.drain_s + _CLOSE_S),
        )

    async def _begin(self) -> None:
        """Start the engine; let what is new in it answer once it is proven."""
        began = time.monotonic()
        say(f"starting SGLang with {short(self._catalog.model_path)} (log: {short(self._files.log)})")
        deployer = self._parts.deployer
        fresh = deployer.seed(self._catalog.entries[1:]) if deployer else []
        await self._parts.supervisor.start()
        say(f"SGLang answers after {time.monotonic() - began:.0f} s")
        await _beside(self._parts.supervisor.watch(), self._proven(fresh))
        self._settled = True

    async def _proven(self, fresh: Sequence[tuple[Version, Path]]) -> None:
        """Whatever shall answer is what was trained.

        An engine that fails meanwhile ends the start, as one that does not start does: nothing says that the next one
        would get further, and nobody is served by it yet.
        """
        if self._parts.verify_again:
            await self._parts.verify_again()
        if self._parts.deployer:
            await self._parts.deployer.settle(fresh)
        await prove_merged(self._parts.upstream, self._catalog, self._serve)

    async def _drain(self, door: asyncio.Task[None], signals: asyncio.Queue[signal.Signals]) -> None:
        """Wait for the requests in flight, or until a second signal."""
        say("closing: no new requests, finishing those in flight")
        again = asyncio.create_task(signals.get())
        await asyncio.wait({door, again}, timeout=self._serve.drain_s, return_when=asyncio.FIRST_COMPLETED)
        again.cancel()

    @contextmanager
    def _published(self, listener: socket.socket, admin_listener: socket.socket, admin_key: str) -> Iterator[None]:
        """Let clients and verbs find the server, while it answers."""
        endpoint = self._describe(listener)
        admin = Running(url=endpoint.url, admin_url=_url(admin_listener), admin_key=admin_key, mode=endpoint.mode)
        with announced(admin), _written(endpoint, self._files.endpoint):
            say(f"serving {', '.join(model.version for model in endpoint.models)} at {endpoint.url}")
            if self._access.invite:
                say(curl(endpoint.url, endpoint.models[-1].name, endpoint.key_env))
            yield

    def _describe(self, listener: socket.socket) -> Endpoint:
        engine = self._parts.supervisor.engine
        assert engine
        return Endpoint(
            url=_url(listener),
            key_env=API_KEY_VARIABLE if self._access.keys.asks else "",
            mode=self._catalog.mode,
            pid=os.getpid(),
            started_at=datetime.now(UTC).isoformat(timespec="seconds"),
            engine=EngineInfo(version=metadata.version("sglang"), flags=flags(engine.config)),
            models=[
                ServedModel(name=e.name, version=e.version, artifact_id=e.artifact_id, base_id=e.base_id)
                for e in self._parts.routes.entries
            ],
        )


class _Open(NamedTuple):
    """A server that listens."""

    server: uvicorn.Server
    task: asyncio.Task[None]


class _Quiet(uvicorn.Server):
    """uvicorn without its own idea of signals: what they mean is decided above."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        """Leave them alone."""
        return contextlib.nullcontext()


async def _opened(config: uvicorn.Config, listener: socket.socket) -> _Open:
    """Return when it listens."""
    server = _Quiet(config)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        if task.done():
            raise EndpointError("the door did not open")
        await asyncio.sleep(0.01)
    return _Open(server, task)


async def _until(ends: Iterable[asyncio.Task[Any]], work: Coroutine[Any, Any, None]) -> bool:
    """Do `work` until one of `ends` comes first; whether it was done."""
    doing = asyncio.create_task(work)
    await asyncio.wait({doing, *ends}, return_when=asyncio.FIRST_COMPLETED)
    if doing.done():
        doing.result()
        return True
    doing.cancel()
    with contextlib.suppress(asyncio.CancelledError, TuneshipError):
        await doing
    return False


async def _beside(watch: Coroutine[Any, Any, NoReturn], work: Coroutine[Any, Any, None]) -> None:
    """Do `work` while `watch` raises nothing; of an engine that broke off, what `watch` finds out is said."""
    watching, doing = asyncio.create_task(watch), asyncio.create_task(work)
    try:
        await asyncio.wait({watching, doing}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done() and isinstance(doing.exception(), EngineError):
            await asyncio.wait({watching}, timeout=_LAST_WORDS_S)
        await (watching if watching.done() else doing)
    finally:
        for task in (watching, doing):
            task.cancel()
        await asyncio.gather(watching, doing, return_exceptions=True)


def _signals() -> asyncio.Queue[signal.Signals]:
    """SIGTERM and SIGINT as they arrive."""
    arrived: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, arrived.put_nowait, number)
    return arrived


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """An address, taken before anything slow begins; it does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            what = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used: {error.strerror}"
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
def _written(endpoint: Endpoint, path: Path | None) -> Iterator[None]:
    """`endpoint.json`, there while clients can come."""
    if path is None:
        yield
        return
    write_endpoint(endpoint, path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104 - read
    return f"http://{host}:{port}"
