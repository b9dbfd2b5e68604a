"""A write that fails, wherever it fails, leaves the registry as it was, and the next one finds nothing in its way."""

from __future__ import annotations

import hashlib
import resource
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tuneship.core.errors import RegistryError
from tuneship.serve.registry import Registry, tables

A, B, C, D = (hashlib.sha256(name.encode()).hexdigest() for name in "abcd")


def named(content_id: str) -> str:
    return f"sql@{content_id[:12]}"


VERBS: dict[str, Callable[[Registry], Any]] = {
    "add": lambda registry: registry.add("sql", D, folder_of(registry, D)),
    "loaded": lambda registry: registry.loaded(named(D), "passed"),
    "weigh": lambda registry: registry.weigh(named(C), 0.25),
    "promote": lambda registry: registry.promote(named(B)),
    "rollback": lambda registry: registry.rollback("sql"),
    "drain": lambda registry: registry.drain(named(A), whole_alias=True),
    "unloaded": lambda registry: registry.unloaded(named(A)),
    "lost": lambda registry: registry.lost(named(B)),
}


class Failing(sqlite3.Connection):
    """A connection whose statement number `fails_at` is never executed."""

    fails_at = 0
    count = 0

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        self.count += 1
        if self.count == self.fails_at:
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        self.execute("SELECT 1")
        return super().executemany(*arguments)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> type[Failing]:
    """All connections fail at `fails_at`, counted from when it was set."""
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **options: connect(*a, **options, factory=Failing))
    return Failing


@pytest.fixture
def registry(tmp_path: Path, failing: type[Failing]):
    """A is live after B and C were, B and C are canaries."""
    with opened(tmp_path) as registry:
        for content_id in (A, B, C):
            registry.loaded(registry.add("sql", content_id, folder_of(registry, content_id)).name, "passed")
            registry.promote(named(content_id))
        registry.promote(named(A))
        registry.weigh(named(B), 0.1)
        registry.weigh(named(C), 0.2)
        yield registry


def opened(folder: Path) -> Registry:
    return Registry.open(folder / "registry.sqlite", "b" * 64, "some/base")


def folder_of(registry: Registry, content_id: str) -> Path:
    path = registry._held._path.parent / content_id[:12]
    path.mkdir(exist_ok=True)
    return path


def dump(registry: Registry) -> list[str]:
    return list(registry._held.connection.iterdump())


def after_the_verbs_before(registry: Registry, verb: str) -> list[str]:
    """Do what comes before `verb` in the tale of VERBS; everything that is written then."""
    for earlier in list(VERBS)[: list(VERBS).index(verb)]:
        VERBS[earlier](registry)
    return dump(registry)


@pytest.mark.parametrize("verb", VERBS)
def test_whichever_statement_fails_nothing_has_changed(registry, verb):
    before = after_the_verbs_before(registry, verb)
    connection = registry._held.connection
    failures = 0
    for number in range(1, 100):
        connection.count, connection.fails_at = 0, number
        try:
            VERBS[verb](registry)
        except (RegistryError, sqlite3.OperationalError):
            failures += 1
            connection.fails_at = 0
            assert dump(registry) == before
        else:
            break
    assert failures >= 6  # it reads, begins, writes versions and history, and commits
    assert dump(registry) != before


@pytest.mark.parametrize("verb", VERBS)
def test_broken_off_at_any_instruction_nothing_has_changed(registry, verb):
    before = after_the_verbs_before(registry, verb)
    connection = registry._held.connection
    failures = 0
    for number in range(1, 10_000, 9):
        left = [number]

        def step(left: list[int] = left) -> int:
            left[0] -= 1
            return left[0] == 0

        connection.set_progress_handler(step, 1)
        try:
            VERBS[verb](registry)
        except (RegistryError, sqlite3.OperationalError):
            failures += 1
            connection.set_progress_handler(None, 1)
            assert not connection.in_transaction
            assert dump(registry) == before
        else:
            break
    connection.set_progress_handler(None, 1)
    assert failures > 20
    assert dump(registry) != before


def test_a_disk_that_is_full_is_said_so_and_nothing_has_changed(registry, tmp_path):
    before = dump(registry)
    written = (tmp_path / "registry.sqlite-wal").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (written + 100, hard))
    try:
        with pytest.raises(RegistryError, match="cannot be written, and is as it was") as caught:
            registry.promote(named(B))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "disk full" in caught.value.hint
    assert dump(registry) == before
    assert registry.promote(named(B)).weight == 1


def test_a_database_that_may_grow_no_more_is_as_it_was(registry):
    connection = registry._held.connection
    connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0]}")
    before = states = None
    with pytest.raises(RegistryError, match="full"):  # noqa: PT012 - which of them is the last one is not known
        while True:
            before, states = len(registry.history(limit=10_000)), registry.versions()
            registry.weigh(named(B), 0.1 + before / 10_000, "a name that fills a page soon " * 40)
    assert before > 12
    assert len(registry.history(limit=10_000)) == before
    assert registry.versions() == states


def test_opening_that_fails_anywhere_can_be_tried_again(tmp_path, failing):
    for number in range(1, 60):
        failing.fails_at = number
        try:
            opened(tmp_path).close()
        except (RegistryError, sqlite3.OperationalError):
            continue
        finally:
            failing.fails_at = 0
        break
    assert number > len(tables._TABLES)
    opened(tmp_path).close()


def test_a_recovery_that_fails_anywhere_can_be_tried_again(registry, tmp_path, failing):
    registry.drain(named(C))
    registry.add("sql", D, folder_of(registry, D))
    before = dump(registry)
    registry.close()
    failures = 0
    for number in range(1, 100):
        failing.fails_at = number
        try:
            after = opened(tmp_path)
        except (RegistryError, sqlite3.OperationalError):
            failures += 1
            failing.fails_at = 0
            with sqlite3.connect(tmp_path / "registry.sqlite") as connection:
                assert list(connection.iterdump()) == before
            connection.close()
        else:
            break
    failing.fails_at = 0
    with after:
        assert {event.version for event in after.recovered} == {named(C), named(D)}
    assert failures > 10
