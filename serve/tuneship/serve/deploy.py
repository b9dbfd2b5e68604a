"""Which versions answer, changed while the server runs: load, give weight, promote, roll back, unload.

    deployer.load(path, alias="sql", weight=0.05)   # checked, copied, loaded, proven, verified; then a canary
    deployer.promote("sql")                         # one write: the next request is the new version's
    deployer.rollback("sql")
    deployer.unload("sql@3fa9c1d20b77")             # answers nobody new at once, and is gone when its last answer is

The registry is written first and the door's table follows from it, so that after a crash the server comes back as it
was. A request keeps the version that it began with. Nothing here waits for another adapter's requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar, cast

from tuneship.core.errors import EngineError, PreflightError, RegistryError, TuneshipError
from tuneship.core.progress import say
from tuneship.serve import engine_adapters, quantized
from tuneship.serve.books import Books, Engine
from tuneship.serve.catalog import Entry, checked_alias
from tuneship.serve.leaving import Leaving
from tuneship.serve.preflight import CheckedAdapter
from tuneship.serve.preflight.apart import Checker
from tuneship.serve.registry import SERVED, State, Version
from tuneship.serve.store import Begun
from tuneship.serve.supervisor import Phase

DRAIN_S = 60.0
_READY_S = 5.0

_First = TypeVar("_First")
_Second = TypeVar("_Second")
Verify = Callable[[Version, Path, asyncio.Event], Awaitable[str]]
"""(a version, the directory that it came from, set once it is loaded and may be asked) -> what to note.

ParityError where it is another model. What it can find out without the adapter, it finds out before."""


class Deployer:
    """Changes what a server serves; all on the server's event loop."""

    def __init__(self, books: Books, engine: Engine, checker: Checker, verify: Verify) -> None:
        self._registry, self._store, self._routes, self._metrics, self._slots = books
        self._engine = engine
        self._checker = checker
        self._verify = verify
        self._leaving = Leaving(books, engine, self._refresh)
        self._arriving: set[str] = set()
        self._seeded: frozenset[str] = frozenset()

    async def load(
        self,
        path: Path,
        *,
        alias: str = "",
        weight: float | None = None,
        pinned: bool = False,
        actor: str = "",
        remark: Callable[[str], object] = lambda _: None,
    ) -> Version:
        """Bring the adapter at `path` into the engine and give it `weight` of the requests to `alias`.

        Without `weight` the first version of an alias takes all of them, and a later one none until it is promoted.
        A version that is loaded already only gets the weight; it cannot be pinned any more. `remark` hears what is no
        reason to refuse it, and good to know; the log and the history have it too.

        Raises:
            ArtifactError, PreflightError: it cannot be served here; nothing has changed.
            ParityError: what answers is not what was trained; it is unloaded again.
            EngineError: the engine is not there, or said nothing in time.
            RegistryError: it is just coming or going, it is here without being pinned, or the weight makes no sense.

        """
        async with self._copying(path) as begun:
            checked = await self._checker.check(path)
            alias = checked_alias(alias or checked.name)
            if alias == self._routes.base.name:
                raise PreflightError(f"the base is called {alias}", hint="--alias NAME gives the adapter another name")
            if weight and weight < 1 and not self._live(alias):
                raise RegistryError(
                    f"{alias} has no live version beside which this one could answer {weight:.0%}",
                    hint="leave the weight out: the first version of an alias answers all requests",
                )
            known = self._registry.find(f"{alias}@{checked.content_id[:12]}")
            if known and known.state in SERVED:
                if pinned and not known.pinned:
                    raise RegistryError(
                        f"{known.name} is loaded, and was not pinned then",
                        hint=f"tuneship adapters unload {known.name}, then load it with --pin",
                    )
                await self._checker.prove(checked, checked.path)
                return self._give(known, weight, actor)
            return await self._bring_in(checked, alias, path, begun, weight, remark, pinned=pinned, actor=actor)

    def promote(self, name: str, *, actor: str = "") -> Version:
        """Let a version (`alias@id`, or an alias's only candidate) answer all requests to its alias.

        Raises:
            RegistryError: there is no such version, it failed its verification, or an alias has several candidates.

        """
        return self._changed(self._registry.promote(self._candidate(name).name, actor))

    def weigh(self, name: str, weight: float, *, actor: str = "") -> Version:
        """Let a version answer `weight` (0..1) of its alias's requests; 1 is `promote`.

        Raises:
            RegistryError: as `promote`, or the weights of an alias's canaries come to 1.

        """
        return self._give(self._candidate(name), weight, actor)

    def rollback(self, alias: str, *, actor: str = "") -> Version:
        """End the canaries of `alias`; where there are none, let the version before this one answer again.

        Raises:
            RegistryError: there is nothing to go back to.

        """
        return self._changed(self._registry.rollback(alias, actor))

    async def unload(self, name: str, *, timeout_s: float = DRAIN_S, actor: str = "") -> list[Version]:
        """Take a version (`alias@id`), or an alias with all its versions, out of the server.

        Raises:
            RegistryError: there is no such thing, or it is the live version of an alias that has others.
            EngineError: requests are still in flight after `timeout_s`, or the engine said nothing; it answers nobody
                new, and is unloaded when they end.

        """
        self._give_up_left(actor)
        with self._registry.at_once():
            leaving = [self._registry.drain(v.name, actor, whole_alias="@" not in name) for v in self._of(name)]
        self._refresh()
        endings = [self._leaving.begin(version, actor) for version in leaving]
        done, waiting = await asyncio.wait(endings, timeout=timeout_s)
        for ending in done:
            if failure := ending.result():
                raise EngineError(failure.message, hint=f"{name} answers nobody new; it is tried again until it is out")
        if waiting:
            if count := sum(self._routes.in_flight(version.name) for version in leaving):
                raise EngineError(
                    f"{name} still has {count} requests in flight after {timeout_s:g} s: it answers nobody new",
                    hint="it is unloaded when they end",
                )
            raise EngineError(
                f"the engine has not said after {timeout_s:g} s that {name} is out of it: it answers nobody new",
                hint="it is tried again until it is out",
            )
        return [found for version in leaving if (found := self._registry.find(version.name))]

    def restored(self) -> list[Version]:
        """What a new engine starts with: all that was loaded when the last one ended, and what was just seeded.

        Not what was on its way into the last one: that may be what ended it.
        """
        actor = "the engine's end"
        for version in self._registry.versions():
            if version.state in SERVED and not version.path.is_dir():  # SGLang would look for it on the hub
                say(f"warning: {version.name} cannot be served any more: {version.path} is gone")
                self._changed(self._registry.lost(version.name, actor))
            elif version.state is State.DRAINING:  # its requests died with the engine
                self._leaving.gone(version, actor)
        self._slots.restarted()
        return [v for v in self._registry.versions() if v.state in SERVED or v.name in self._seeded]

    def seed(self, entries: Iterable[Entry]) -> list[tuple[Version, Path]]:
        """Write down the adapters of the command line, before the engine starts; those that `settle` has to judge.

        One that the registry knows as served stays as it is, and one that an operator unloaded stays unloaded.
        """
        fresh, entries = [], list(entries)
        named = {entry.version for entry in entries}
        if kept := [v.name for v in self._registry.versions() if v.state in SERVED and v.name not in named]:
            say(f"served before, and again: {', '.join(kept)} (`tuneship adapters unload` takes one out)")
        for entry in entries:
            known = self._registry.find(entry.version)
            if known and known.state in SERVED:
                continue
            if known and self._registry.was_unloaded(entry.version):
                say(f"{entry.version} was unloaded and stays so; `tuneship adapters load` brings it back")
                continue
            checked = CheckedAdapter(entry.name, entry.artifact_id, entry.path)
            version = self._registry.add(
                entry.name, entry.artifact_id, self._store.keep(checked), pinned=False, actor="start"
            )
            fresh.append((version, entry.source or entry.path))
        self._seeded = frozenset(version.name for version, _ in fresh)
        return fresh

    async def settle(self, fresh: Iterable[tuple[Version, Path]]) -> None:
        """Judge what the engine was started with for the first time, and let it answer; be ready for more.

        Raises:
            ParityError: one of them is not what was trained.

        """
        loaded = asyncio.Event()
        loaded.set()
        for version, source in fresh:
            verified = await self._verify(version, source, loaded)
            if before := self._live(version.alias):
                say(f"{version.name} is new in --adapters: it answers in place of {before.name}")
            with self._registry.at_once():
                self._registry.loaded(version.name, verified, "start")
                self._registry.promote(version.name, "start")
        self._seeded = frozenset()
        self._refresh()
        self._checker.start()  # now, when the engine's own start no longer needs the processor

    @asynccontextmanager
    async def _copying(self, path: Path) -> AsyncIterator[asyncio.Task[Begun | None]]:
        """The copy of what lies at `path`, on its way while that is being checked; gone if nobody takes it."""
        begun = asyncio.create_task(asyncio.to_thread(self._store.begin, path))
        try:
            yield begun
        finally:
            self._store.forget(await begun)

    async def _bring_in(
        self,
        checked: CheckedAdapter,
        alias: str,
        source: Path,
        begun: asyncio.Task[Begun | None],
        weight: float | None,
        remark: Callable[[str], object],
        *,
        pinned: bool,
        actor: str,
    ) -> Version:
        """The checked adapter, loaded, proven and judged, with its weight; one that comes or goes is refused."""
        await self._engine.supervisor.ready(_READY_S)
        restarts = self._engine.supervisor.restarts
        self._give_up_left(actor)
        kept = await asyncio.to_thread(self._store.copy, checked, await asyncio.shield(begun))
        try:
            version = self._registry.add(alias, checked.content_id, kept, pinned=pinned, actor=actor)
        except TuneshipError:
            self._store.drop(kept)
            raise
        self._arriving.add(version.name)
        try:
            flushing = asyncio.to_thread(self._store.flush, kept)
            remarking = asyncio.to_thread(quantized.remarks, source, self._routes.base.path)
            beside, judging = _together(flushing, remarking), self._judged(version, checked, source)
            (_, of_bits), (remarks, verified) = await _together(beside, judging)
            remarks = (*remarks, *of_bits)
            if self._engine.supervisor.restarts != restarts or self._engine.supervisor.phase is not Phase.READY:
                raise EngineError(f"the engine ended while {version.name} was loaded", hint="load it again")
            now, refused = self._arrived(version, verified, remarks, weight, actor)
        except BaseException as error:
            await asyncio.shield(self._undo(version, str(error) or type(error).__name__, actor))
            raise
        finally:
            self._arriving.discard(version.name)
        for each in remarks:
            say(f"warning: {each}")
            remark(each)
        self._refresh()
        if refused:
            raise refused
        return now

    async def _judged(self, version: Version, checked: CheckedAdapter, source: Path) -> tuple[tuple[str, ...], str]:
        """(remarks, what verification says of it), once it is in the engine."""
        upstream, began, loaded = self._engine.upstream, time.monotonic(), asyncio.Event()
        loading = engine_adapters.load(upstream, version.selector, version.path, pinned=version.pinned)
        verifying = asyncio.ensure_future(self._verify(version, source, loaded))
        try:
            # A wrong shape ends the engine at the first question: we ask when there is none, others when all is proven.
            remarks, _ = await _together(self._checker.sound(checked, version.path), loading)
            load_s = time.monotonic() - began
            loaded.set()
            asking = _together(engine_adapters.answer_once(upstream, version.selector), verifying)
            _, (_, verified) = await _together(self._checker.prove(checked, version.path), asking)
        finally:
            verifying.cancel()
            await asyncio.gather(verifying, return_exceptions=True)
        self._metrics.adapter_loaded(load_s)
        return remarks, verified

    async def _undo(self, version: Version, reason: str, actor: str) -> None:
        """A version that did not make it leaves no trace but its history."""
        if self._engine.supervisor.phase is Phase.READY:
            try:
                await engine_adapters.unload(self._engine.upstream, version.selector)
            except EngineError as error:
                say(f"warning: {version.name} may still lie in the engine, unreachable: {error.message}")
        self._metrics.adapter_load_failed()
        try:
            self._give_up(version, reason, actor)
        except RegistryError as error:
            say(f"warning: {version.name} was not loaded, which cannot be written down yet: {error.message}")

    def _give_up_left(self, actor: str) -> None:
        """What did not make it, and could not be written down then."""
        for version in self._registry.versions():
            if version.state is State.CHECKED and version.name not in self._arriving | self._seeded:
                self._give_up(version, "its load had failed before", actor)

    def _give_up(self, version: Version, reason: str, actor: str) -> None:
        self._registry.failed(version.name, reason, actor)
        self._store.drop(version.path)

    def _arrived(
        self, version: Version, verified: str, remarks: Sequence[str], weight: float | None, actor: str
    ) -> tuple[Version, RegistryError | None]:
        """Loaded and with its weight, in one write; where that is refused it is loaded all the same, and why."""
        with self._registry.at_once():
            now = self._registry.loaded(version.name, verified, actor, remarks)
            try:
                return self._weighed(now, weight, actor), None
            except RegistryError as refused:
                return now, refused

    def _give(self, version: Version, weight: float | None, actor: str) -> Version:
        return self._changed(self._weighed(version, weight, actor))

    def _weighed(self, version: Version, weight: float | None, actor: str) -> Version:
        if weight is None:
            if self._live(version.alias):
                return version
            weight = 1.0
        if weight >= 1:
            return self._registry.promote(version.name, actor)
        return self._registry.weigh(version.name, weight, actor)

    def _changed(self, version: Version) -> Version:
        self._refresh()
        return version

    def _refresh(self) -> None:
        """Let the door and its figures follow the registry."""
        versions = self._registry.present()
        here = {version.name: version.pinned for version in versions}
        self._routes.update(versions)
        self._metrics.serving([self._routes.base.version, *here])
        self._slots.serving(here)

    def _live(self, alias: str) -> Version | None:
        return next((v for v in self._registry.versions(alias) if v.state is State.LIVE), None)

    def _candidate(self, name: str) -> Version:
        """The version that `name` means to something that is about to get weight."""
        if "@" in name:
            return self._of(name)[0]
        versions = self._of(name)
        for states in ((State.CANARY,), (State.LOADED,)):
            found = [version for version in versions if version.state in states]
            if len(found) == 1:
                return found[0]
            if found:
                listed = ", ".join(version.name for version in found)
                raise RegistryError(f"{name} has {len(found)} candidates: {listed}", hint="name one of them")
        raise RegistryError(
            f"{name} has no version beside the live one", hint=f"tuneship adapters load PATH --alias {name}"
        )

    def _of(self, name: str) -> list[Version]:
        """The versions in the engine that `name` means."""
        alias = name.partition("@")[0]
        present = [v for v in self._registry.versions(alias) if v.state is not State.UNLOADED]
        found = [v for v in present if name in {v.name, v.alias}]
        if not found:
            others = present or [v for v in self._registry.versions() if v.state is not State.UNLOADED]
            known = ", ".join(sorted({v.name for v in others})) or "nothing"
            raise RegistryError(f"there is no {name} here", hint=f"loaded: {known}")
        return found


async def _together(first: Awaitable[_First], second: Awaitable[_Second]) -> tuple[_First, _Second]:
    """What both find, when both are over; what went wrong with `first` is said before what did with `second`."""
    found = await asyncio.gather(first, second, return_exceptions=True)
    for error in found:
        if isinstance(error, BaseException):
            raise error
    return cast("tuple[_First, _Second]", tuple(found))


def refuse_adapters(mode: str) -> PreflightError:
    """What a server of one model says to adapter verbs."""
    return PreflightError(
        f"this server serves one model ({mode}) and no adapters",
        hint="tuneship serve BASE --adapters DIRECTORY, or --state DIRECTORY to begin with none",
    )
