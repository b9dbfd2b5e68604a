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
    monkeypatch.setattr(engine_adapters.unload, "__defaults__", (0.2,))
    version = await world.deployer.load(adapters[0], alias="sql")
    world.engine.faults[UNLOAD] = "hang"
    hanging = asyncio.create_task(world.deployer.unload("sql"))
    await until(lambda: UNLOAD in world.engine.asked)
    async with asyncio.timeout(0.15):
        await world.deployer.load(adapters[1], alias="csv")
    assert not hanging.done()
    with pytest.raises(EngineError, match="said nothing"):
        await hanging
    await until(lambda: world.engine.asked.count(UNLOAD) > 1)
    assert world.states()[version.name] is State.DRAINING
    world.engine.faults.clear()
    await until(lambda: world.states()[version.name] is State.UNLOADED)
    world.agree()


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
