"""What the door looks names up in: which version answers this request, and who is being answered by it.

    routes = Routes(base, registry.versions())
    lease = routes.lease("sql")            # drawn by weight among live and canaries; None: no such model
    lease.entry.version                    # sql@3fa9c1d20b77, until the answer is over
    lease.release()
    routes.update(registry.versions())     # the next lease follows it; leases that are out stay as they are
    await routes.drained("sql@3fa9c1d20b77", timeout_s=60)

All of it on one event loop. Nothing in here waits but `drained`, and that for an event, so a request never meets a
table that is half changed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from random import Random
from typing import NamedTuple

from tuneship.serve.catalog import Entry
from tuneship.serve.registry import SERVED, State, Version

LEASE = "tuneship.lease"
"""Where an ASGI scope keeps its request's lease; `observe.py` releases it when the answer is over."""
_ANSWERING = frozenset({State.LIVE, State.CANARY})


class Lease:
    """The right to be answered by one version, until it is released."""

    __slots__ = ("_routes", "entry")

    def __init__(self, entry: Entry, routes: Routes) -> None:
        self.entry = entry
        self._routes: Routes | None = routes

    def release(self) -> None:
        """The answer is over, however it went. A second time does nothing."""
        routes, self._routes = self._routes, None
        if routes:
            routes._released(self.entry.version)


class _Choice(NamedTuple):
    """The versions that answer to one name, and up to which draw (0..1) each of them does."""

    entries: tuple[Entry, ...]
    up_to: tuple[float, ...]


class Routes:
    """The table of one server, and its requests in flight by version."""

    def __init__(
        self,
        base: Entry,
        versions: Iterable[Version] = (),
        seed: int | None = None,
        watch: Callable[[Entry], object] = lambda _: None,
    ) -> None:
        """Answer `base` to its name, and `versions` to theirs; `seed` makes the draws repeatable.

        `watch` is told of each lease that is given out.
        """
        self._base = base
        self._watch = watch
        self._random = Random(seed)
        self._in_flight: Counter[str] = Counter()
        self._idle: dict[str, asyncio.Event] = {}
        self.update(versions)

    def update(self, versions: Iterable[Version]) -> None:
        """From now on these are the versions, in the states and with the weights that they have."""
        served = sorted((version for version in versions if version.state in SERVED), key=lambda version: version.name)
        live = {version.alias: version for version in served if version.state is State.LIVE}
        named = {version.name: _Choice((self._entry(version.name, version),), (1.0,)) for version in served}
        drawn = {alias: self._choice(alias, served) for alias in live}
        own = {self._base.name: _Choice((self._base,), (1.0,))}
        self._table: Mapping[str, _Choice] = {**drawn, **named, **own}
        self._entries = (self._base, *(self._entry(alias, version) for alias, version in live.items()))

    @property
    def base(self) -> Entry:
        """The model that the engine was started with."""
        return self._base

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What `/v1/models` lists: the base, and each alias with its live version."""
        return self._entries

    def lease(self, name: str) -> Lease | None:
        """A version that answers to `name`, counted as in flight until it is released; None if there is none.

        `name` is an alias, a version (`alias@id12`) that is loaded, or the base's name.
        """
        choice = self._table.get(name)
        if choice is None:
            return None
        entry = choice.entries[0]
        if len(choice.entries) > 1:
            (entry,) = self._random.choices(choice.entries, cum_weights=choice.up_to)
        self._in_flight[entry.version] += 1
        self._watch(entry)
        return Lease(entry, self)

    def in_flight(self, version_name: str) -> int:
        """How many leases of that version are out."""
        return self._in_flight[version_name]

    def all_in_flight(self) -> dict[str, int]:
        """{version: leases that are out} of those that have any."""
        return dict(self._in_flight)

    async def drained(self, version_name: str, timeout_s: float | None = None) -> bool:
        """Wait until no lease of that version is out; False if there still is one after `timeout_s` (None: ever)."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._in_flight[version_name]:
                    await self._idle.setdefault(version_name, asyncio.Event()).wait()
        except TimeoutError:
            return False
        return True

    def _released(self, version_name: str) -> None:
        self._in_flight[version_name] -= 1
        if not self._in_flight[version_name]:
            del self._in_flight[version_name]
            if idle := self._idle.pop(version_name, None):
                idle.set()

    def _choice(self, alias: str, served: Iterable[Version]) -> _Choice:
        answering = [version for version in served if version.alias == alias and version.state in _ANSWERING]
        entries = tuple(self._entry(alias, version) for version in answering)
        return _Choice(entries, tuple(accumulate(version.weight for version in answering)))

    def _entry(self, name: str, version: Version) -> Entry:
        return Entry(name, version.name, version.selector, version.path, version.content_id, self._base.base_id)
