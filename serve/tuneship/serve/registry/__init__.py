"""What is served, written down: versions by content id, aliases, weights, states, and how it came to be so.

    with Registry.open(folder / "registry.sqlite", base_id, base_name) as registry:
        version = registry.add("sql", content_id, store.keep(checked), pinned=False, actor="ci")
        registry.loaded(version.name, "passed", "ci")      # it is in the engine
        registry.promote(version.name, "ci")               # it answers to "sql"
        registry.rollback("sql", "ops")                    # what answered before does so again

A version is immutable, its name is `alias@` and the first digits of its content id. Each verb is one transaction that
writes the new state and a line of history, and so are several of them within `at_once`; after a crash at any write the
registry is as it was before the verb, or as it is after it. A registry belongs to one base, and to one server at a
time; between two servers it can be moved and copied, with the folder that it lies in. It knows neither engine nor
door: they follow it. All of it on one thread; a verb takes a write to the disk.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from tuneship.core.errors import RegistryError
from tuneship.core.files import sync_directory
from tuneship.serve.catalog import checked_alias
from tuneship.serve.registry import lock, rules, tables
from tuneship.serve.registry.records import SERVED, Event, State, Version
from tuneship.serve.registry.rules import Alias, Change
from tuneship.serve.registry.tables import Base, Place

__all__ = ["SERVED", "Event", "Registry", "State", "Version"]


class Registry:
    """The versions of one server; `open` makes it.

    Every verb raises `RegistryError` where it is refused or cannot be written, and nothing has changed then.
    """

    def __init__(self, held: _Held, base: Base, under: str = "") -> None:
        self._held = held
        self._place = Place(base.id, held.folder)
        self._under = under
        self.recovered = self._recover()
        """What did not outlive the last server: lines of the history that opening it wrote."""

    @classmethod
    def open(cls, path: Path, base_id: str, base_name: str, under: str = "") -> Registry:
        """The registry at `path`, made if it is not there, with all that was coming or going brought to an end.

        `base_id` is the SHA-256 of the base's weights, `base_name` what people call it, and `under` what else of this
        server a verification depends on: what is verified from now on is so under that.

        Raises:
            RegistryError: another server holds it, it is of another base or a newer tuneship, or no registry at all.

        """
        return cls._open(path, Base(base_id, base_name), under)

    @classmethod
    def reopen(cls, path: Path) -> Registry:
        """The registry at `path` as the last server left it, to be changed while none runs.

        What was coming or going is brought to an end, as by `open`.

        Raises:
            RegistryError: there is none; and as `open`.

        """
        folder = path.parent
        if not path.is_file():
            raise RegistryError(f"there is no registry in {folder}", hint="--state FOLDER is what the server was given")
        return cls._open(path, None, "")

    @classmethod
    def _open(cls, path: Path, base: Base | None, under: str) -> Registry:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            held = _Held(lock.hold(path, serves=base is not None), path)
        except OSError as error:
            raise RegistryError(f"{path} cannot be opened: {error.strerror}") from error
        try:
            return cls(held, held.connect(base), under)
        except BaseException:
            held.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another server have it."""
        self._held.close()

    def at_once(self) -> AbstractContextManager[None]:
        """All verbs within are one write to the disk; one that is refused has done nothing, and the others have.

        Raises:
            RegistryError: they cannot be written; all is as it was before the first.

        """
        return tables.transaction(self._held.connection)

    def add(self, alias: str, content_id: str, path: Path, *, pinned: bool = False, actor: str = "") -> Version:
        """Write down an adapter that was checked and lies at `path`: CHECKED. Another time once it is UNLOADED.

        Raises:
            RegistryError: it is there already.
            PreflightError: no alias can be called so.

        """
        return self._change(
            checked_alias(alias), lambda at: rules.add(at, content_id, path, self._place.base_id, pinned=pinned), actor
        )

    def loaded(self, name: str, verified: str, actor: str = "", remarks: Sequence[str] = ()) -> Version:
        """It is in the engine, and its verification said `verified`: CHECKED -> LOADED. The history keeps `remarks`."""
        return self._change(name, lambda at: rules.loaded(at, name, verified, self._under, remarks), actor)

    def verified(self, name: str, verified: str, actor: str = "") -> Version:
        """It was verified again, under what this server is: LOADED | CANARY | LIVE stay so."""
        return self._change(name, lambda at: rules.verified(at, name, verified, self._under), actor)

    def verified_otherwise(self) -> list[Version]:
        """The versions that may answer, and were verified under something else than this server is."""
        return [v for v in self.present() if v.state in SERVED and v.verified_under != self._under]

    def failed(self, name: str, reason: str, actor: str = "") -> Version:
        """It did not get into the engine, or not past its verification: CHECKED -> UNLOADED."""
        return self._change(name, lambda at: rules.failed(at, name, reason), actor)

    def weigh(self, name: str, weight: float, actor: str = "") -> Version:
        """Let it answer `weight` of its alias's requests beside the live version: LOADED | CANARY -> CANARY.

        Weight 0 makes it LOADED again. Refused without a live version, for one that failed its verification, and
        where the canaries would leave nothing.
        """
        return self._change(name, lambda at: rules.weigh(at, name, weight), actor)

    def promote(self, name: str, actor: str = "") -> Version:
        """Let it answer all requests to its alias: LOADED | CANARY -> LIVE. The one before stays LOADED."""
        return self._change(name, lambda at: rules.promote(at, name), actor)

    def rollback(self, alias: str, actor: str = "") -> Version:
        """End the canaries of `alias`; where there are none, the version before is LIVE again. What is live then.

        The history says which of the two it did.
        """
        return self._change(alias, rules.rollback, actor)

    def drain(self, name: str, actor: str = "", *, whole_alias: bool = False) -> Version:
        """Let it answer nobody new: LOADED | CANARY | LIVE -> DRAINING. Nothing changes if it does so already.

        A live version leaves only as the last one that is loaded, or with all the others (`whole_alias`).
        """
        return self._change(name, lambda at: rules.drain(at, name, whole_alias=whole_alias), actor)

    def unloaded(self, name: str, actor: str = "") -> Version:
        """It is out of the engine: DRAINING -> UNLOADED."""
        return self._change(name, lambda at: rules.unloaded(at, name), actor)

    def lost(self, name: str, actor: str = "") -> Version:
        """Its files are gone, and so is the engine that had read them: LOADED | CANARY | LIVE -> UNLOADED."""
        return self._change(name, lambda at: rules.lost(at, name), actor)

    def versions(self, alias: str | None = None) -> list[Version]:
        """All versions there ever were, sorted by name; of `alias`, if one is given."""
        connection = self._held.connection
        wanted = tables.aliases(connection) if alias is None else [alias]
        return [version for name in wanted for version in self._alias(name).versions]

    def present(self) -> list[Version]:
        """Those of all aliases that are not UNLOADED, sorted by name: what the door follows."""
        return tables.present(self._held.connection, self._place)

    def find(self, name: str) -> Version | None:
        """The version of that name, `alias@id12`."""
        return self._alias_of(name).find(name)

    def was_unloaded(self, name: str) -> bool:
        """Whether somebody took the version out on purpose, since it was last added."""
        return tables.last_verb(self._held.connection, name, ("add", "drain")) == "drain"

    def history(self, alias: str | None = None, limit: int = 100) -> list[Event]:
        """The last `limit` events, the newest first; of `alias`, if one is given."""
        return tables.history(self._held.connection, alias, limit)

    def _alias(self, name: str) -> Alias:
        return tables.read(self._held.connection, name, self._place)

    def _alias_of(self, name: str) -> Alias:
        return self._alias(name.partition("@")[0])

    def _change(self, name: str, rule: Callable[[Alias], Change], actor: str) -> Version:
        """Apply `rule` to the alias of `name`; the version that it was about.

        It is read before the commit, after which nothing can fail: a verb that raises has done nothing. What is so
        already is no event.
        """
        with tables.transaction(self._held.connection):
            before = self._alias_of(name)
            change = rule(before)
            if change.alias != before:
                self._apply(before, change, actor)
            return _found(self._alias(before.name), change.version)

    def _apply(self, before: Alias, change: Change, actor: str) -> Event:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        changed = (v._replace(changed_at=now) for v in change.alias.versions if v != before.find(v.name))
        tables.write(self._held.connection, before, change.alias.put(*changed), self._place.folder)
        event = Event(now, actor, change.verb, before.name, change.version, change.detail)
        tables.note(self._held.connection, event)
        return event

    def _recover(self) -> tuple[Event, ...]:
        events = []
        with tables.transaction(self._held.connection):
            for version in self.versions():
                if why := rules.did_not_outlive(version):
                    before = self._alias(version.alias)
                    change = rules.ended(before, _found(before, version.name), why)
                    events.append(self._apply(before, change, "recovery"))
        return tuple(events)


class _Held:
    """The lock and the connection, which come and go together."""

    connection: sqlite3.Connection

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self._path = path
        self.folder = path.parent.absolute()

    def connect(self, base: Base | None) -> Base:
        """Open the file, and make sure that it is a registry of `base`, of any if that is None; of which it is."""
        try:
            self.connection = tables.connect(self._path)
            if base and tables.is_empty(self.connection):
                with tables.transaction(self.connection):
                    tables.create(self.connection, base)
                sync_directory(self._path.parent)
            schema, written = tables.identity(self.connection)
        except (sqlite3.Error, TypeError) as error:
            raise RegistryError(
                f"{self._path} is no registry: {error}", hint="move it away; a server without one begins anew"
            ) from error
        if schema > tables.SCHEMA:
            raise RegistryError(
                f"{self._path} has schema {schema}; this tuneship reads up to {tables.SCHEMA}", hint="upgrade tuneship"
            )
        if base and written.id != base.id:
            raise RegistryError(
                f"{self._path} is of adapters on {written.name} (weights {written.id[:12]}), "
                f"not on {base.name} (weights {base.id[:12]})",
                hint=f"serve {written.name}, or give this server another --state directory",
            )
        if schema < tables.SCHEMA:
            with tables.transaction(self.connection):
                tables.migrate(self.connection, schema, self.folder)
        return written

    def close(self) -> None:
        """Both, in the order in which nobody else can come between."""
        if hasattr(self, "connection"):
            self.connection.close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _found(alias: Alias, name: str) -> Version:
    version = alias.find(name)
    assert version, f"{name} was just written"
    return version
