"""How a version leaves the engine: when its last answer is over, however often that has to be asked.

    leaving = Leaving(books, engine, refresh)
    ending = leaving.begin(version, actor)      # a task; what went wrong at the first attempt, or None

An engine that is just being started again may come up with the version, and one that hangs may say nothing: then it is
asked again, in the background, until the version is out; why it is not is in the log. It answers nobody from the first
moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import chain, repeat

from tuneship.core.errors import TuneshipError
from tuneship.core.progress import say
from tuneship.serve import engine_adapters
from tuneship.serve.books import Books, Engine
from tuneship.serve.registry import State, Version

_AGAIN_S = (1.0, 5.0, 30.0)
"""Between the attempts; the last one for ever."""


class Leaving:
    """The versions that are on their way out of one engine; all on the server's event loop."""

    def __init__(self, books: Books, engine: Engine, refresh: Callable[[], object]) -> None:
        self._books, self._engine, self._refresh = books, engine, refresh
        self._endings: dict[str, asyncio.Task[TuneshipError | None]] = {}
        self._again: dict[str, asyncio.Task[None]] = {}

    def begin(self, version: Version, actor: str) -> asyncio.Task[TuneshipError | None]:
        """The ending of a version that is DRAINING, which goes on whoever waits for it; what went wrong at first."""

        async def ending() -> TuneshipError | None:
            try:
                await self._books.routes.drained(version.name, None)
                await self._take_out(version, actor)
            except TuneshipError as error:
                self._books.metrics.adapter_unloaded(failed=True)
                said = _said(version, error)
                self._again[version.selector] = asyncio.create_task(self._until_it_is_out(version, actor, said))
                return error
            else:
                return None
            finally:
                del self._endings[version.selector]

        if again := self._again.pop(version.selector, None):
            again.cancel()
        if version.selector not in self._endings:  # an earlier load of it may still be ending
            self._endings[version.selector] = asyncio.create_task(ending())
        return self._endings[version.selector]

    def gone(self, version: Version, actor: str) -> None:
        """It is out of the engine, or that engine is no more.

        Raises:
            RegistryError: that cannot be written.

        """
        if not self._is_leaving(version):
            return
        self._books.registry.unloaded(version.name, actor)
        self._books.metrics.adapter_unloaded()
        self._refresh()
        self._books.store.drop(version.path)

    async def _take_out(self, version: Version, actor: str) -> None:
        await engine_adapters.unload(self._engine.upstream, version.selector)
        self.gone(version, actor)

    async def _until_it_is_out(self, version: Version, actor: str, said: str) -> None:
        """`said` is why it is not; another reason is said, too."""
        try:
            for wait_s in chain(_AGAIN_S, repeat(_AGAIN_S[-1])):
                await asyncio.sleep(wait_s)
                if not self._is_leaving(version):
                    break
                try:
                    await self._engine.supervisor.ready(_AGAIN_S[-1])
                    await self._take_out(version, actor)
                except TuneshipError as error:
                    if error.message != said:
                        said = _said(version, error)
        finally:
            if self._again.get(version.selector) is asyncio.current_task():
                del self._again[version.selector]

    def _is_leaving(self, version: Version) -> bool:
        now = self._books.registry.find(version.name)
        return now is not None and now.state is State.DRAINING and now.generation == version.generation


def _said(version: Version, error: TuneshipError) -> str:
    say(f"warning: {version.name} is not out of the engine, and it is tried again until it is: {error.message}")
    return error.message
