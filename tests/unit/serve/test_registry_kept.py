"""A registry between two servers: moved, copied, of an older schema, and what its verifications were made under."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.unit.serve.test_registry import BASE_ID, content, load, reopen
from tuneship.core.errors import RegistryError
from tuneship.serve.registry import Registry, State
from tuneship.serve.registry.records import COPIES


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "state" / "registry.sqlite"


def in_its_folder(file: Path) -> dict[str, Path]:
    """Versions of each kind with copies beside the registry, as a server leaves them: {name: its copy}."""
    copies = file.parent / COPIES
    with reopen(file) as registry:
        for name in "ab":
            (copies / f"{content(name)[:12]}-1").mkdir(parents=True)
            registry.loaded(registry.add("sql", content(name), copies / f"{content(name)[:12]}-1").name, "passed")
            registry.promote(f"sql@{content(name)[:12]}")
        return {version.name: version.path for version in registry.versions()}


def as_schema_1(file: Path) -> None:
    """Paths were absolute, and it was not on record what a verification was made under."""
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE versions SET path = ? || path", (f"{file.parent}/",))
        connection.execute("ALTER TABLE versions DROP COLUMN verified_under")
        connection.execute("UPDATE registry SET schema = 1")
    connection.close()


@pytest.mark.parametrize("how", ["moved", "copied", "where it was"])
@pytest.mark.parametrize("schema", [1, 2])
def test_a_registry_goes_where_its_folder_goes(file, tmp_path, how, schema):
    copies = in_its_folder(file)
    if schema == 1:
        as_schema_1(file)
    there = file.parent if how == "where it was" else tmp_path / "elsewhere"
    if how == "moved":
        file.parent.rename(there)
    elif how == "copied":
        shutil.copytree(file.parent, there)
    for _ in range(2):
        with reopen(there / file.name) as registry:
            assert registry.recovered == ()
            assert {v.name: v.path for v in registry.present()} == {
                name: there / COPIES / copy.name for name, copy in copies.items()
            }
            assert registry.rollback("sql") in registry.versions()
            registry.promote(f"sql@{content('b')[:12]}")


def test_a_registry_is_found_from_another_working_directory(file, monkeypatch):
    in_its_folder(file)
    monkeypatch.chdir(file.parent.parent)
    with reopen(Path(file.parent.name) / file.name) as registry:
        assert registry.recovered == ()
        assert all(version.path.is_absolute() for version in registry.present())


def test_a_registry_is_changed_as_it_was_left_without_its_server(file, tmp_path):
    with pytest.raises(RegistryError, match=f"there is no registry in {file.parent}"):
        Registry.reopen(file)
    assert not file.parent.exists()
    in_its_folder(file)
    with Registry.reopen(file) as registry:
        assert registry.present()[0].base_id == BASE_ID
        with pytest.raises(RegistryError, match="belongs to a server that is running"):
            reopen(file)
    reopen(file).close()


def test_what_a_verification_was_made_under_is_on_record(file, tmp_path):
    with Registry.open(file, BASE_ID, "some/base", "bfloat16") as registry:
        a, b = (load(registry, tmp_path, name) for name in "ab")
        registry.promote(a)
        assert registry.verified_otherwise() == []
    with Registry.open(file, BASE_ID, "some/base", "float32") as registry:
        assert {v.name: v.verified_under for v in registry.verified_otherwise()} == {a: "bfloat16", b: "bfloat16"}
        now = registry.verified(a, "passed", "start")
        assert (now.state, now.verified, now.verified_under) == (State.LIVE, "passed", "float32")
        assert [v.name for v in registry.verified_otherwise()] == [b]
        assert registry.history(limit=1)[0][1:] == ("start", "verified", "sql", a, "passed (float32)")
        with pytest.raises(RegistryError):  # it answers: the tables refuse
            registry.verified(a, "failed: another model")
        registry.unloaded(registry.drain(b).name)
        assert registry.verified_otherwise() == []  # what answers nobody is verified when it comes back


def test_what_was_verified_before_that_was_on_record_is_verified_again(file):
    names = list(in_its_folder(file))
    as_schema_1(file)
    with Registry.open(file, BASE_ID, "some/base", "bfloat16") as registry:
        assert {version.name for version in registry.verified_otherwise()} == {*names}
