"""The engine's life: start it, notice that it died or hangs, start it again with what it served.

    supervisor = Supervisor(configure, log, upstream, Patience())
    await supervisor.start()
    await supervisor.watch()    # raises when the engine fails: what a server does with it before it has proven anything
    await supervisor.keep()     # for ever; raises when it gives up

Three things end an engine: its processes die (out of memory included), it stops answering while requests wait, or we
stop it. Nobody is answered by the base meanwhile: `upstream` is shut, and the door says 503.

A hang is work that waits and nothing that comes: no byte from the engine for `hang_s` while requests are in flight.
A long answer that is not streamed looks the same from outside, so SGLang is asked first (`/health_generate`, which it
answers as long as its scheduler does anything at all), and has `ASKED_S` for it. Nothing else is a sign of life: an
engine that hangs as soon as it is asked has served nobody, however long it took to be noticed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple, NoReturn

from tuneship.core.errors import EngineError
from tuneship.core.progress import say
from tuneship.serve import engine as engines
from tuneship.serve import engine_log
from tuneship.serve.engine import Engine
from tuneship.serve.launch import EngineConfig
from tuneship.serve.upstream import Upstream

_WATCH_S = 0.25
_LAST_WORDS_S = 0.5
"""Its processes die one after the other: who was first, and why, shows when they have."""
_LONGEST_DELAY_S = 30.0
_SERVED_WELL_S = 60.0
"""An engine that served so long did start: the next failure is the first again."""
ASKED_S = 20.0
"""SGLang itself says no after as long (SGLANG_HEALTH_CHECK_TIMEOUT)."""


class Phase(StrEnum):
    """What the engine is doing, for `/ready`, metrics and `tuneship top`."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    STOPPED = "stopped"


class Patience(NamedTuple):
    """How long to wait for what."""

    start_s: float = 600.0
    """The first start on a GPU compiles kernels and captures graphs: 3 minutes were measured."""
    hang_s: float = 60.0
    """Without anything from it, while requests wait; it is noticed after `asked_s` more at most."""
    restarts: int = 5
    """Failures in a row after which the server ends; 0: the first one ends it."""

    @property
    def asked_s(self) -> float:
        """How long the engine may take to say that it works."""
        return min(self.hang_s, ASKED_S)


class _Failure(NamedTuple):
    """Why an engine serves no more, and for how long it did."""

    error: EngineError
    served_s: float


class Supervisor:
    """Keeps one engine alive. Made and used on the main thread: the engine must end with it (core/process.py)."""

    def __init__(
        self, configure: Callable[[], EngineConfig], log: Path, upstream: Upstream, patience: Patience
    ) -> None:
        self.phase = Phase.STARTING
        self.restarts = 0
        self.last_failure = ""
        self.engine: Engine | None = None
        self._configure = configure
        self._log = log
        self._upstream = upstream
        self._patience = patience
        self._started_at = time.monotonic()
        self._in_a_row = 0
        self._ready = asyncio.Event()

    @property
    def up_s(self) -> float:
        """Seconds since the engine began to answer; 0 while it does not."""
        return time.monotonic() - self._started_at if self.phase is Phase.READY else 0.0

    async def start(self) -> None:
        """Return once it has generated a token of every model; another port is tried if somebody took the first.

        Raises:
            EngineError: it did not start. What is left of it is ended.

        """
        for more in (True, True, False):
            try:
                return await self._start()
            except EngineError as error:
                if not (more and engine_log.PORT_TAKEN in error.message):
                    raise
                say("warning: somebody took the engine's port while it started: starting it again on another one")
        raise AssertionError

    async def _start(self) -> None:
        config = self._configure()
        self._log.parent.mkdir(parents=True, exist_ok=True)
        if self._log.exists():  # why the last one ended is worth more than disk
            self._log.replace(self._log.with_name(f"{self._log.name}.before"))
        engine = self.engine = engines.start(config, self._log)
        models = [None, *(name for name, *_ in config.adapters)]
        try:
            await asyncio.to_thread(engine.wait_ready, models, self._patience.start_s)
        except EngineError:
            await asyncio.to_thread(engine.stop)
            raise
        if self.phase is Phase.STOPPED:  # while we waited
            raise EngineError("SGLang was stopped while it started")
        self._started_at = time.monotonic()
        self.phase = Phase.READY
        self._upstream.open(engine.url)
        self._ready.set()

    async def keep(self) -> None:
        """Watch it and start it again, for ever.

        Raises:
            EngineError: why it failed last, after too many failures in a row.

        """
        while True:
            await self._restart(await self._failed())

    async def watch(self) -> NoReturn:
        """Watch it without starting it again.

        Raises:
            EngineError: it died or hangs, and why.

        """
        raise (await self._failed()).error

    async def ready(self, timeout_s: float) -> None:
        """Wait until it answers.

        Raises:
            EngineError: it does not within `timeout_s`.

        """
        try:
            await asyncio.wait_for(self._ready.wait(), timeout_s)
        except TimeoutError:
            raise EngineError(f"the engine is {self.phase}", hint="try again when /ready says so") from None

    def shut(self) -> None:
        """Take no new requests to it."""
        self.phase = Phase.STOPPED
        self._ready.clear()
        self._upstream.shut()

    def stop(self) -> None:
        """End it for good."""
        self.shut()
        if self.engine:
            self.engine.stop()

    async def _failed(self) -> _Failure:
        """Wait until it dies or hangs; say why."""
        assert self.engine
        proved_at = self._started_at
        while True:
            if self.engine.death:
                served_s = time.monotonic() - self._started_at
                await asyncio.sleep(_LAST_WORDS_S)
                return _Failure(self.engine.failure("died while serving"), served_s)
            waiting = self._upstream.waiting
            if waiting and self._quiet_s(proved_at) > self._patience.hang_s:
                if await self._upstream.is_working(self._patience.asked_s):
                    proved_at = time.monotonic()
                elif not self.engine.death and self._quiet_s(proved_at) > self._patience.hang_s:
                    last_sign = max(self._upstream.answered_at, proved_at)
                    error = EngineError(
                        f"SGLang hangs: {waiting} requests wait, and nothing came for {self._quiet_s(proved_at):.0f} s",
                        hint=f"the whole log: {self._log}",
                    )
                    return _Failure(error, last_sign - self._started_at)
            await asyncio.sleep(_WATCH_S)

    def _quiet_s(self, proved_at: float) -> float:
        return time.monotonic() - max(self._upstream.heard_at, proved_at)

    async def _restart(self, failed: _Failure) -> None:
        failure = failed.error
        if failed.served_s > _SERVED_WELL_S:
            self._in_a_row = 0
        self._ready.clear()
        self._upstream.shut()
        self.phase = Phase.RESTARTING
        while True:
            self._in_a_row += 1
            self.last_failure = failure.message
            assert self.engine
            await asyncio.to_thread(self.engine.stop)
            if self._in_a_row > self._patience.restarts:
                raise failure
            self.restarts += 1
            delay_s = min(2.0 ** (self._in_a_row - 2), _LONGEST_DELAY_S) if self._in_a_row > 1 else 0.0
            say(f"{failure.message}; starting it again{f' in {delay_s:g} s' if delay_s else ''}")
            await asyncio.sleep(delay_s)
            began = time.monotonic()
            try:
                await self.start()
            except EngineError as error:
                failure = error
            else:
                say(f"SGLang answers again after {time.monotonic() - began:.0f} s")
                return
