"""What is served, written down: the verbs by example, who may open it, and what its tables refuse."""

from __future__ import annotations

import hashlib
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from tuneship.core.errors import PreflightError, RegistryError
from tuneship.serve.registry import Registry, State, Version, rules

BASE_ID = "b" * 64
HOLDER = """
import sys, time
from pathlib import Path
from tuneship.serve.registry import Registry

with Registry.open(Path(sys.argv[1]), "b" * 64, "some/base"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "registry.sqlite"


@pytest.fixture
def registry(file: Path):
    with reopen(file) as registry:
        yield registry


def reopen(file: Path) -> Registry:
    return Registry.open(file, BASE_ID, "some/base")


def content(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def add(registry: Registry, folder: Path, name: str, alias: str = "sql") -> Version:
    path = folder / f"{alias}-{name}-{len(registry.history())}"
    path.mkdir()
    return registry.add(alias, content(name), path, actor="ci")


def load(registry: Registry, folder: Path, name: str, alias: str = "sql") -> str:
    return registry.loaded(add(registry, folder, name, alias).name, "passed", "ci").name


def states(registry: Registry) -> dict[str, tuple[State, float]]:
    return {version.name: (version.state, version.weight) for version in registry.versions()}


def test_a_version_has_a_public_name_and_one_of_its_own_in_the_engine(registry, tmp_path):
    version = add(registry, tmp_path, "a")
    assert version.name == f"sql@{content('a')[:12]}"
    assert version.selector == f"{version.name}#1"
    assert (version.base_id, version.state, version.verified) == (BASE_ID, State.CHECKED, "")
    registry.failed(version.name, "no room")
    again = add(registry, tmp_path, "a")
    assert again.selector == f"{version.name}#2"
    with pytest.raises(RegistryError, match="is here already: checked") as caught:
        add(registry, tmp_path, "a")
    assert "being loaded" in caught.value.hint


def test_a_canary_takes_its_share_from_the_live_version_and_promote_takes_all(registry, tmp_path):
    a, b, c = (load(registry, tmp_path, name) for name in "abc")
    registry.promote(a)
    registry.weigh(b, 0.05)
    registry.weigh(c, 0.25)
    assert states(registry) == {
        a: (State.LIVE, pytest.approx(0.7)),
        b: (State.CANARY, 0.05),
        c: (State.CANARY, 0.25),
    }
    with pytest.raises(RegistryError, match="nothing is left"):
        registry.weigh(c, 0.95)
    registry.weigh(c, 0.94)  # its own weight before does not count
    registry.promote(b)
    assert states(registry) == {a: (State.LOADED, 0), b: (State.LIVE, 1), c: (State.LOADED, 0)}


def test_rollback_ends_canaries_first_and_then_goes_back_step_by_step(registry, tmp_path):
    a, b, c = (load(registry, tmp_path, name) for name in "abc")
    for name in (a, b, a, b):
        registry.promote(name)
    registry.weigh(c, 0.5)
    assert registry.rollback("sql").name == b
    assert registry.history(limit=1)[0].detail == f"no more weight for {c}"
    assert states(registry)[c] == (State.LOADED, 0)
    assert [registry.rollback("sql", "ops").name for _ in range(3)] == [a, b, a]
    assert registry.history(limit=1)[0][1:] == ("ops", "rollback", "sql", a, f"in place of {b}")
    with pytest.raises(RegistryError, match="no version was live before") as caught:
        registry.rollback("sql")
    assert b in caught.value.hint


def test_what_was_unloaded_is_nothing_to_go_back_to(registry, tmp_path):
    a, b, c = (load(registry, tmp_path, name) for name in "abc")
    for name in (a, b, c, b, a, c):
        registry.promote(name)
    registry.unloaded(registry.drain(b).name)
    assert load(registry, tmp_path, "b") == b
    assert [registry.rollback("sql").name for _ in range(3)] == [a, c, a]
    with pytest.raises(RegistryError, match="cannot be rolled back"):
        registry.rollback("sql")


def test_nobody_goes_back_to_where_they_are(registry, tmp_path):
    a, b = (load(registry, tmp_path, name) for name in "ab")
    for name in (a, b, a):
        registry.promote(name)
    registry.unloaded(registry.drain(b).name)
    with pytest.raises(RegistryError, match="cannot be rolled back"):
        registry.rollback("sql")
    registry.promote(load(registry, tmp_path, "b"))
    registry.drain(b, whole_alias=True)
    registry.promote(a)
    with pytest.raises(RegistryError, match="cannot be rolled back"):
        registry.rollback("sql")


def test_the_way_back_has_an_end(registry, tmp_path):
    a, b = (load(registry, tmp_path, name) for name in "ab")
    for step in range(rules.LONGEST_WAY_BACK + 5):
        registry.promote((a, b)[step % 2])
    for _ in range(rules.LONGEST_WAY_BACK - 1):
        registry.rollback("sql")
    with pytest.raises(RegistryError, match="cannot be rolled back"):
        registry.rollback("sql")


def test_a_live_version_leaves_last_or_with_the_whole_alias(registry, tmp_path):
    a, b = (load(registry, tmp_path, name) for name in "ab")
    registry.promote(a)
    registry.weigh(b, 0.1)
    with pytest.raises(RegistryError, match="is live") as caught:
        registry.drain(a)
    assert b in caught.value.message
    assert registry.drain(a, whole_alias=True).state is State.DRAINING
    assert states(registry)[b] == (State.LOADED, 0)
    events = registry.history()
    assert registry.drain(a).state is State.DRAINING  # it does so already
    assert registry.history() == events
    registry.promote(b)
    assert registry.drain(b).state is State.DRAINING  # the last one


def test_who_failed_the_verification_never_gets_weight(registry, tmp_path):
    a = load(registry, tmp_path, "a")
    registry.promote(a)
    bad = add(registry, tmp_path, "bad").name
    registry.loaded(bad, "failed: the base answered")
    for refused in (lambda: registry.promote(bad), lambda: registry.weigh(bad, 0.1)):
        with pytest.raises(RegistryError, match="the base answered"):
            refused()
    registry.drain(bad)
    registry.unloaded(bad)
    assert load(registry, tmp_path, "bad") == bad
    registry.promote(bad)  # what was loaded again was verified again


@pytest.mark.parametrize("alias", ["", "a b", "a/b", "a:b", "a@b", "a#1", "\u00e4", "a\n"])
def test_an_alias_that_means_more_than_itself_is_refused(registry, tmp_path, alias):
    with pytest.raises(PreflightError):
        registry.add(alias, content("a"), tmp_path)
    assert registry.versions() == []
    assert registry.history() == []


def test_a_version_that_is_not_there_is_refused_by_name(registry, tmp_path):
    a = load(registry, tmp_path, "a")
    assert registry.find("sql@000000000000") is None
    assert registry.find("sql") is None
    with pytest.raises(RegistryError, match="there is no sql@000000000000") as caught:
        registry.promote("sql@000000000000")
    assert a in caught.value.hint
    with pytest.raises(RegistryError, match="no live version") as caught:
        registry.rollback("other")
    assert "load PATH --alias other" in caught.value.hint


def test_two_contents_that_begin_alike_are_not_one_version(registry, tmp_path):
    registry.failed(registry.add("sql", "a" * 64, tmp_path).name, "")
    with pytest.raises(RegistryError, match="begins alike"):
        registry.add("sql", "a" * 12 + "b" * 52, tmp_path)


def test_history_is_the_newest_first_and_by_alias(registry, tmp_path):
    a, other = load(registry, tmp_path, "a"), load(registry, tmp_path, "a", "chat")
    assert [(e.verb, e.version, e.actor) for e in registry.history("sql")] == [("loaded", a, "ci"), ("add", a, "ci")]
    assert [e.version for e in registry.history(limit=3)] == [other, other, a]


def test_what_was_coming_or_going_did_not_outlive_the_server(file, tmp_path):
    with reopen(file) as registry:
        assert registry.recovered == ()
        a, b, c = (load(registry, tmp_path, name) for name in "abc")
        coming = add(registry, tmp_path, "d").name
        registry.promote(a)
        registry.promote(b)
        registry.drain(a)
        registry.weigh(c, 0.2)
        kept = registry.versions()[::]
    with reopen(file) as registry:
        assert {event.version for event in registry.recovered} == {a, coming}
        assert registry.history(limit=2) == list(registry.recovered[::-1])
        assert [v for v in registry.versions() if v.name in {b, c}] == [v for v in kept if v.name in {b, c}]
        assert states(registry)[a] == states(registry)[coming] == (State.UNLOADED, 0)
        assert [registry.was_unloaded(name) for name in (a, b, coming)] == [True, False, False]
        assert load(registry, tmp_path, "a") == a
        assert not registry.was_unloaded(a)


def test_what_was_lost_was_not_unloaded(registry, tmp_path):
    a, b = (load(registry, tmp_path, name) for name in "ab")
    registry.promote(a)
    registry.weigh(b, 0.2)
    registry.find(a).path.rmdir()
    registry.lost(a, "the engine's end")
    assert states(registry) == {a: (State.UNLOADED, 0), b: (State.LOADED, 0)}
    assert not registry.was_unloaded(a)
    with pytest.raises(RegistryError, match="cannot be given up: it is unloaded"):
        registry.lost(a)
    registry.drain(b)
    with pytest.raises(RegistryError, match="cannot be given up: it is draining"):
        registry.lost(b)


def test_a_version_whose_files_are_gone_answers_nobody(file, tmp_path):
    with reopen(file) as registry:
        a, b = (load(registry, tmp_path, name) for name in "ab")
        registry.promote(a)
        registry.weigh(b, 0.2)
        registry.find(a).path.rmdir()
    with reopen(file) as registry:
        (event,) = registry.recovered
        assert (event.version, event.actor) == (a, "recovery")
        assert "its files are gone" in event.detail
        assert states(registry) == {a: (State.UNLOADED, 0), b: (State.LOADED, 0)}
        assert not registry.was_unloaded(a)
    with reopen(file) as registry:
        assert registry.recovered == ()


def test_one_server_has_it_and_says_so_until_it_is_killed(file):
    file.parent.mkdir()
    Path(f"{file}.lock").write_text("4294967296\n")  # the last holder's pid was longer
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(file)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RegistryError, match=rf"process {holder.pid}$") as caught:
            reopen(file)
        assert "--state" in caught.value.hint
    finally:
        holder.kill()
        holder.communicate()
    with reopen(file), pytest.raises(RegistryError, match="is running"):
        reopen(file)
    reopen(file).close()


def test_another_base_is_refused_by_name(file):
    reopen(file).close()
    with pytest.raises(RegistryError, match=r"adapters on some/base \(weights b{12}\), not on other \(weights c{12}\)"):
        Registry.open(file, "c" * 64, "other")
    reopen(file).close()  # who is refused holds nothing


def test_a_newer_schema_is_refused_by_number(file):
    reopen(file).close()
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE registry SET schema = 9")
    connection.close()
    with pytest.raises(RegistryError, match="has schema 9; this tuneship reads up to 2"):
        reopen(file)


@pytest.mark.parametrize("what", ["text", "another", "torn", "folder"])
def test_what_is_no_registry_is_refused_and_left_alone(file, what):
    file.parent.mkdir()
    if what == "text":
        file.write_text("not a database, and long enough to look at " * 5)
    elif what == "folder":
        file.mkdir()
    else:
        with sqlite3.connect(file) as connection:
            connection.execute("CREATE TABLE theirs (x)")
        connection.close()
    if what == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    before = None if file.is_dir() else file.read_bytes()
    with pytest.raises(RegistryError, match=re.escape(str(file))) as caught:
        reopen(file)
    assert caught.value.hint
    assert before is None or file.read_bytes()[:18] + file.read_bytes()[20:24] == before[:18] + before[20:24]


def test_a_folder_that_cannot_be_made_is_an_error_with_a_name(tmp_path):
    (tmp_path / "state").write_text("a file")
    with pytest.raises(RegistryError, match="cannot be opened"):
        reopen(tmp_path / "state" / "registry.sqlite")


def test_what_it_wrote_is_on_the_disk(registry):
    connection = registry._held.connection
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA foreign_keys").fetchone() == (1,)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE versions SET state = 'live' WHERE name = :b",
        "UPDATE versions SET state = 'canary', weight = 1 WHERE name = :b",
        "UPDATE versions SET state = 'canary', weight = 0 WHERE name = :b",
        "UPDATE versions SET state = 'canary', weight = 0.8 WHERE name = :b",
        "UPDATE versions SET state = 'loaded' WHERE name = :a",
        "UPDATE versions SET weight = 0.5 WHERE name = :b",
        "UPDATE versions SET weight = -0.1 WHERE name = :b",
        "UPDATE versions SET path = x'00' WHERE name = :b",
        "UPDATE versions SET verified = 'failed: x' WHERE name = :c",
        "UPDATE versions SET verified = 'failed: x' WHERE name = :a",
        "UPDATE versions SET state = 'gone' WHERE name = :b",
        "UPDATE versions SET state = 'loaded' WHERE name = :old",
        "INSERT INTO versions VALUES ('x@' || :id12, 'x', :id, 'p', 'checked', 0, 0, 0, '', '', '')",
        "UPDATE versions SET generation = 1 WHERE name = :old",
        "UPDATE versions SET path = (SELECT path FROM versions WHERE name = :a) WHERE name = :b",
        "UPDATE versions SET name = 'sql@b' WHERE name = :b",
        "UPDATE versions SET alias = 'a b', name = 'a b@' || substr(content_id, 1, 12) WHERE name = :b",
        "UPDATE versions SET content_id = substr(content_id, 1, 12) || substr(:id, 13) WHERE name = :b",
        "INSERT INTO versions VALUES ('x@abc', 'x', 'abc', 'p', 'checked', 0, 1, 0, '', '', '')",
        "INSERT INTO versions VALUES (upper('x@' || :id12), 'X', upper(:id), 'p', 'checked', 0, 1, 0, '', '', '')",
        "INSERT INTO versions VALUES ('x@' || :id12, 'x', :id, 'p', 'loaded', 0, 1, 0, '', '', '')",
        "INSERT INTO lives VALUES ('sql', 9, 'sql@nobody')",
        "DELETE FROM versions WHERE name = :b",
        "DELETE FROM history",
        "UPDATE history SET actor = 'nobody'",
        "INSERT INTO registry VALUES (2, 1, '', '')",
    ],
)
def test_the_tables_themselves_refuse_what_must_never_be(registry, tmp_path, statement):
    a, b, c, old = (load(registry, tmp_path, name) for name in ("a", "b", "c", "old"))
    registry.promote(a)
    registry.weigh(c, 0.2)
    for _ in range(2):
        registry.unloaded(registry.drain(old).name)
        load(registry, tmp_path, "old")
    registry.unloaded(registry.drain(old).name)
    before = registry.versions()
    with pytest.raises(sqlite3.IntegrityError):
        registry._held.connection.execute(
            statement, {"a": a, "b": b, "c": c, "old": old, "id": content("x"), "id12": content("x")[:12]}
        )
    assert registry.versions() == before


def test_verbs_at_once_are_one_write_and_one_that_is_refused_is_none_of_them(registry, tmp_path):
    statements: list[str] = []
    registry._held.connection.set_trace_callback(statements.append)
    with registry.at_once():
        version = add(registry, tmp_path, "a")
        registry.loaded(version.name, "passed")
        with pytest.raises(RegistryError, match="no live version"):
            registry.weigh(version.name, 0.5)
        assert registry.promote(version.name).state is State.LIVE
    assert statements.count("COMMIT") == 1
    assert [event.verb for event in registry.history()] == ["promote", "loaded", "add"]


def test_verbs_at_once_that_are_broken_off_have_done_nothing(registry, tmp_path):
    version = add(registry, tmp_path, "a")

    def broken_off() -> None:
        with registry.at_once():
            registry.loaded(version.name, "passed")
            registry.promote(version.name)
            raise KeyError

    with pytest.raises(KeyError):
        broken_off()
    assert registry.find(version.name) == version
    assert [event.verb for event in registry.history()] == ["add"]
