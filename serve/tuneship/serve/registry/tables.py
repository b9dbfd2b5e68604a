"""The registry's tables, and the statements that read and write them.

What must never be is forbidden by the tables themselves, so that no fault of the code above can write it: two live
versions of an alias, a share without a live version, shares that leave it nothing, an engine's name used twice, weight
for a version that failed its verification, a history that is changed.

Files lie beside the registry and are written down as seen from there, so that it can be moved with them.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from tuneship.core.errors import RegistryError
from tuneship.serve.registry.records import COPIES, Event, State, Version
from tuneship.serve.registry.rules import Alias

SCHEMA = 2
_BUSY_S = 1.0
"""How long a stranger who writes to the file may keep us, and the door with us."""

_TABLES = (
    """CREATE TABLE registry (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        schema INTEGER NOT NULL,
        base_id TEXT NOT NULL,
        base_name TEXT NOT NULL
    ) STRICT""",
    # `weight` is a canary's. The live version has what they leave, which is computed: it cannot fail to add up.
    """CREATE TABLE versions (
        name TEXT PRIMARY KEY CHECK (name = alias || '@' || substr(content_id, 1, 12)),
        alias TEXT NOT NULL CHECK (alias != '' AND alias NOT GLOB '*[^A-Za-z0-9._-]*'),
        content_id TEXT NOT NULL CHECK (length(content_id) = 64 AND content_id NOT GLOB '*[^0-9a-f]*'),
        path TEXT NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('checked', 'loaded', 'canary', 'live', 'draining', 'unloaded')),
        weight REAL NOT NULL CHECK (weight >= 0 AND weight < 1 AND (weight > 0) = (state = 'canary')),
        generation INTEGER NOT NULL CHECK (generation >= 1),
        pinned INTEGER NOT NULL CHECK (pinned IN (0, 1)),
        verified TEXT NOT NULL CHECK (state NOT IN ('canary', 'live') OR substr(verified, 1, 6) != 'failed'),
        changed_at TEXT NOT NULL,
        verified_under TEXT NOT NULL DEFAULT ''
    ) STRICT""",
    "CREATE UNIQUE INDEX one_live_version ON versions (alias) WHERE state = 'live'",
    "CREATE UNIQUE INDEX one_version_of_a_folder ON versions (path) WHERE state != 'unloaded'",
    """CREATE TABLE lives (
        alias TEXT NOT NULL,
        position INTEGER NOT NULL,
        name TEXT NOT NULL REFERENCES versions (name),
        PRIMARY KEY (alias, position)
    ) STRICT""",
    """CREATE TABLE history (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at TEXT NOT NULL,
        actor TEXT NOT NULL,
        verb TEXT NOT NULL,
        alias TEXT NOT NULL,
        version TEXT NOT NULL,
        detail TEXT NOT NULL
    ) STRICT""",
    "CREATE INDEX history_of_an_alias ON history (alias, id)",
    """CREATE TRIGGER begins_checked BEFORE INSERT ON versions WHEN NEW.state != 'checked'
        BEGIN SELECT RAISE(ABORT, 'a version begins as checked'); END""",
    """CREATE TRIGGER no_name_twice BEFORE UPDATE ON versions
        WHEN NEW.generation < OLD.generation OR NEW.content_id != OLD.content_id
            OR (OLD.state = 'unloaded' AND NEW.state != 'unloaded' AND NEW.generation = OLD.generation)
        BEGIN SELECT RAISE(ABORT, 'a name in the engine is never used again'); END""",
    """CREATE TRIGGER canary_beside_live AFTER UPDATE ON versions
        WHEN (SELECT total(weight) FROM versions WHERE alias = NEW.alias) > 0
            AND NOT EXISTS (SELECT 1 FROM versions WHERE alias = NEW.alias AND state = 'live')
        BEGIN SELECT RAISE(ABORT, 'a canary without a live version'); END""",
    """CREATE TRIGGER live_keeps_a_share AFTER UPDATE ON versions
        WHEN (SELECT total(weight) FROM versions WHERE alias = NEW.alias) >= 1
        BEGIN SELECT RAISE(ABORT, 'canaries leave the live version nothing'); END""",
    "CREATE TRIGGER versions_stay BEFORE DELETE ON versions BEGIN SELECT RAISE(ABORT, 'versions are kept'); END",
    "CREATE TRIGGER history_stays BEFORE DELETE ON history BEGIN SELECT RAISE(ABORT, 'history is kept'); END",
    "CREATE TRIGGER history_is_true BEFORE UPDATE ON history BEGIN SELECT RAISE(ABORT, 'history is kept'); END",
)

_OUTERMOST = ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK")
_NESTED = ("SAVEPOINT verb", "RELEASE verb", "ROLLBACK TO verb")
_COLUMNS = "alias, content_id, path, state, weight, generation, pinned, verified, changed_at, verified_under"


class Base(NamedTuple):
    """The model that all adapters of a registry sit on."""

    id: str
    name: str


class Place(NamedTuple):
    """What all versions of a registry have in common: the base, and the folder in which the registry lies."""

    base_id: str
    folder: Path


def connect(path: Path) -> sqlite3.Connection:
    """The registry's one connection; nothing is committed but by `transaction`, and what is outlives a power cut."""
    connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    return connection


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All that is written within, or nothing of it; within another one it is on the disk when that is.

    Raises:
        RegistryError: it cannot be written; all is as it was.

    """
    begin, end, undo = _NESTED if connection.in_transaction else _OUTERMOST
    try:
        connection.execute(begin)
        yield
        connection.execute(end)
    except BaseException as error:
        if connection.in_transaction:  # a full disk has ended it already
            connection.execute(undo)
        if isinstance(error, sqlite3.Error):
            raise RegistryError(
                f"the registry cannot be written, and is as it was: {error}", hint="is its disk full, or read-only?"
            ) from error
        raise


def create(connection: sqlite3.Connection, base: Base) -> None:
    """Make the tables of a new registry, in the transaction that is open."""
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute("INSERT INTO registry VALUES (1, ?, ?, ?)", (SCHEMA, *base))


def is_empty(connection: sqlite3.Connection) -> bool:
    """Whether the file holds no tables at all."""
    return connection.execute("SELECT 1 FROM sqlite_schema").fetchone() is None


def identity(connection: sqlite3.Connection) -> tuple[int, Base]:
    """(schema, base) of a registry.

    Raises:
        sqlite3.Error: it is none.

    """
    schema, *base = connection.execute("SELECT schema, base_id, base_name FROM registry").fetchone()
    return schema, Base(*base)


def migrate(connection: sqlite3.Connection, schema: int, folder: Path) -> None:
    """Make a registry of `schema` that lies in `folder` one of this schema, in the transaction that is open."""
    if schema == 1:  # paths were absolute, and are another folder's where the registry was moved or copied
        connection.execute("ALTER TABLE versions ADD COLUMN verified_under TEXT NOT NULL DEFAULT ''")
        for name, path in connection.execute("SELECT name, path FROM versions").fetchall():
            own = folder / COPIES / Path(path).name
            seen_from_here = _seen_from(folder, own if own.is_dir() else Path(path))
            connection.execute("UPDATE versions SET path = ? WHERE name = ?", (seen_from_here, name))
    connection.execute("UPDATE registry SET schema = ?", (SCHEMA,))


def aliases(connection: sqlite3.Connection) -> list[str]:
    """The names of all aliases."""
    return [name for (name,) in connection.execute("SELECT DISTINCT alias FROM versions ORDER BY alias")]


def read(connection: sqlite3.Connection, alias: str, place: Place) -> Alias:
    """All that is known of `alias`."""
    rows = connection.execute(f"SELECT {_COLUMNS} FROM versions WHERE alias = ?", (alias,))  # noqa: S608
    lives = connection.execute("SELECT name FROM lives WHERE alias = ? ORDER BY position", (alias,))
    return Alias(alias, lives=tuple(name for (name,) in lives)).put(*(_version(row, place) for row in rows))


def present(connection: sqlite3.Connection, place: Place) -> list[Version]:
    """The versions of all aliases that are not unloaded: an index finds them, however many there ever were."""
    rows = connection.execute(f"SELECT {_COLUMNS} FROM versions WHERE state != 'unloaded' ORDER BY alias")  # noqa: S608
    aliases = groupby((_version(row, place) for row in rows), key=lambda version: version.alias)
    return [version for alias, versions in aliases for version in Alias(alias).put(*versions).versions]


def _version(row: Sequence[Any], place: Place) -> Version:
    alias, content_id, path, state, weight, generation, pinned, *rest = row
    path = place.folder / path  # one that is absolute stays so
    return Version(alias, content_id, place.base_id, path, State(state), weight, generation, bool(pinned), *rest)


def write(connection: sqlite3.Connection, before: Alias, after: Alias, folder: Path) -> None:
    """Bring the tables from `before` to `after`, in the transaction that is open.

    All weight is taken back, then given anew, the live version first: each statement leaves a valid table.
    """
    weighted = {version.name for version in before.versions if version.weight}
    for state in (State.CANARY, State.LIVE):
        connection.execute(
            "UPDATE versions SET state = 'loaded', weight = 0 WHERE alias = ? AND state = ?", (after.name, state)
        )
    for version in sorted(after.versions, key=lambda version: version.state is State.CANARY):
        known = before.find(version.name)
        if version != known or version.name in weighted:
            _put(connection, version, folder, new=known is None)
    if before.lives != after.lives:
        connection.execute("DELETE FROM lives WHERE alias = ?", (after.name,))
        rows = ((after.name, position, name) for position, name in enumerate(after.lives))
        connection.executemany("INSERT INTO lives VALUES (?, ?, ?)", rows)


def note(connection: sqlite3.Connection, event: Event) -> None:
    """Add a line to the history, in the transaction that is open."""
    connection.execute("INSERT INTO history (at, actor, verb, alias, version, detail) VALUES (?, ?, ?, ?, ?, ?)", event)


def history(connection: sqlite3.Connection, alias: str | None, limit: int) -> list[Event]:
    """The last `limit` lines, the newest first."""
    rows = connection.execute(
        "SELECT at, actor, verb, alias, version, detail FROM history WHERE :alias IS NULL OR alias = :alias "
        "ORDER BY id DESC LIMIT :limit",
        {"alias": alias, "limit": limit},
    )
    return [Event(*row) for row in rows]


def last_verb(connection: sqlite3.Connection, name: str, verbs: Iterable[str]) -> str:
    """The last of `verbs` that was said of the version `name`; empty if none was."""
    among = tuple(verbs)
    row = connection.execute(
        f"SELECT verb FROM history WHERE version = ? AND verb IN ({', '.join('?' * len(among))}) "  # noqa: S608
        "ORDER BY id DESC LIMIT 1",
        (name, *among),
    ).fetchone()
    return row[0] if row else ""


def _seen_from(folder: Path, path: Path) -> str:
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _put(connection: sqlite3.Connection, version: Version, folder: Path, *, new: bool) -> None:
    row = version._asdict() | {
        "name": version.name,
        "path": _seen_from(folder, version.path),
        "weight": version.weight if version.state is State.CANARY else 0.0,
    }
    columns = [column for column in row if column != "base_id"]
    if new:
        statement = f"INSERT INTO versions ({', '.join(columns)}) VALUES ({', '.join(f':{c}' for c in columns)})"  # noqa: S608
    else:
        statement = f"UPDATE versions SET {', '.join(f'{c} = :{c}' for c in columns)} WHERE name = :name"  # noqa: S608
    connection.execute(statement, row)
