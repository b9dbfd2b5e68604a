"""A version on its way out, with an engine that ends, hangs or starts meanwhile, and a registry that is not written."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.serve.scripted import UNLOAD, until
from tuneship.core.errors import EngineError, RegistryError
from tuneship.serve import engine_adapters, leaving
from tuneship.serve.registry import State
from tuneship.serve.supervisor import Phase

FULL = RegistryError("the disk is full")


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(leaving, "_AGAIN_S", (0.05,))


async def test_what_an_engine_was_just_started_with_leaves_that_engine(world, adapters):
    await world.deployer.load(adapters[0], alias="sql")
    version = await world.deployer.load(adapters[1], alias="sql")
    upstream = world.deployer._engine.upstream
    url = upstream._url
    world.phase(Phase.RESTARTING)
    upstream.shut()
    world.engine.adapters = {found.selector for found in world.deployer.restored()}
    with pytest.raises(EngineError) as caught:
        await world.deployer.unload(version.name)
    assert "tried again until it is out" in caught.value.hint
    assert world.states()[version.name] is State.DRAINING
    upstream.open(url)
    world.phase(Phase.READY)
    await until(lambda: world.states()[version.name] is State.UNLOADED)
    world.agree()
    assert (await world.deployer.load(adapters[1], alias="sql")).generation == 2
    world.agree()


async def test_an_unload_that_hangs_is_tried_again_and_holds_up_nobody(world, adapters, monkeypatch):
    monkeypatch.setattr(engine_adapters.unload, "__defaults__", (5.0,))
    await world.deployer.load(adapters[0], alias="sql")
    world.engine.faults[UNLOAD] = "hang"
    hanging = asyncio.create_task(world.deployer.unload("sql"))
    await until(lambda: UNLOAD in world.engine.asked)
    version = await world.deployer.load(adapters[1], alias="csv")
    assert not hanging.done()
    world.engine.released.set()
    assert [gone.state for gone in await hanging] == [State.UNLOADED]
    world.agree()

    world.engine.released.clear()
    monkeypatch.setattr(engine_adapters.unload, "__defaults__", (0.1,))
    with pytest.raises(EngineError, match="said nothing"):
        await world.deployer.unload("csv")
    await until(lambda: world.engine.asked.count(UNLOAD) > 2)
    assert world.states()[version.name] is State.DRAINING
    world.engine.faults.clear()
    await until(lambda: world.states()[version.name] is State.UNLOADED)
    world.agree()


async def test_who_does_not_wait_for_an_engine_that_hangs_is_told_of_no_requests(world, adapters):
    await world.deployer.load(adapters[0], alias="sql")
    world.engine.faults[UNLOAD] = "hang"
    with pytest.raises(EngineError, match=r"the engine has not said after 0\.05 s that sql is out of it") as caught:
        await world.deployer.unload("sql", timeout_s=0.05)
    assert caught.value.hint == "it is tried again until it is out"
    world.engine.released.set()
    await until(lambda: State.DRAINING not in world.states().values())
    world.agree()


async def test_why_it_is_not_out_is_said_once_until_it_is_another_reason(world, adapters, capsys):
    version = await world.deployer.load(adapters[0], alias="sql")
    said: list[str] = []

    def warnings() -> list[str]:
        said.extend(line for line in capsys.readouterr().err.splitlines() if "not out of the engine" in line)
        return said

    world.engine.faults[UNLOAD] = 500
    with pytest.raises(EngineError, match="as it was told"):
        await world.deployer.unload("sql")
    await until(lambda: world.engine.asked.count(UNLOAD) > 3)
    assert len(warnings()) == 1
    assert said[0].startswith(f"warning: {version.name} is not out of the engine")
    assert said[0].endswith("as it was told")
    world.engine.faults[UNLOAD] = "drop"
    await until(lambda: len(warnings()) == 2)
    assert "broke off" in said[1]
    world.engine.faults.clear()
    await until(lambda: world.states()[version.name] is State.UNLOADED)
    assert len(warnings()) == 2


@pytest.mark.parametrize("at", ["the first attempt", "another attempt"])
async def test_a_copy_that_cannot_be_removed_keeps_nobody_from_being_out(world, adapters, capsys, at):
    version = await world.deployer.load(adapters[0], alias="sql")
    version.path.with_name(f".gone-{version.path.name}").touch()  # where it is renamed to
    if at == "another attempt":
        world.engine.faults[UNLOAD] = 500
        with pytest.raises(EngineError):
            await world.deployer.unload("sql")
        world.engine.faults.clear()
        await until(lambda: not world.deployer._leaving._again)
    else:
        await world.deployer.unload("sql")
    assert world.states() == {version.name: State.UNLOADED}
    assert f"{version.path}, which nobody reads any more, cannot be removed" in capsys.readouterr().err
    assert world.metrics._unloads["unloaded"] == 1
    assert version.name not in world.metrics.snapshot()


async def test_a_copy_that_lies_elsewhere_is_left_there(world, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    version = world.registry.add("sql", "a" * 64, elsewhere)
    world.registry.loaded(version.name, "passed")
    world.engine.adapters = {version.selector}
    assert [gone.state for gone in await world.deployer.unload("sql")] == [State.UNLOADED]
    assert not world.engine.adapters
    assert elsewhere.is_dir()


async def test_that_it_is_out_is_written_when_it_can_be(world, adapters, monkeypatch):
    version = await world.deployer.load(adapters[0], alias="sql")
    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "unloaded", _raises)
        with pytest.raises(EngineError, match="the disk is full"):
            await world.deployer.unload("sql")
        assert not world.engine.adapters
        assert world.states()[version.name] is State.DRAINING
    await until(lambda: world.states()[version.name] is State.UNLOADED)
    world.agree()


async def test_an_alias_leaves_whole_or_not_at_all(world, adapters, monkeypatch):
    await world.deployer.load(adapters[0], alias="sql")
    await world.deployer.load(adapters[1], alias="sql")
    before, drain, asked = world.states(), world.registry.drain, []

    def second_fails(name: str, *given, **options):
        asked.append(name)
        return _raises() if len(asked) == 2 else drain(name, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "drain", second_fails)
        with pytest.raises(RegistryError):
            await world.deployer.unload("sql")
    assert world.states() == before
    world.agree()


def _raises(*_, **__):
    raise FULL
