"""What comes and goes while a server runs, with an engine that refuses, hangs and breaks off; the books agree after."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.unit.serve.scripted import GENERATE, LOAD, UNLOAD, until
from tuneship.core.errors import EngineError, ParityError, PreflightError, RegistryError
from tuneship.serve import deploy, engine_adapters
from tuneship.serve.catalog import Entry
from tuneship.serve.registry import State
from tuneship.serve.supervisor import Phase


async def test_the_first_answers_and_the_next_waits(world, adapters):
    first = await world.deployer.load(adapters[0], alias="sql", pinned=True)
    second = await world.deployer.load(adapters[1], alias="sql")
    assert (first.state, first.pinned, second.state) == (State.LIVE, True, State.LOADED)
    assert (await world.deployer.load(adapters[1], alias="sql", weight=0.25)).state is State.CANARY
    world.agree()
    assert world.deployer.promote("sql").name == second.name
    assert world.deployer.rollback("sql").name == first.name
    assert world.deployer.weigh(second.name, 1).state is State.LIVE
    assert world.engine.asked.count(LOAD) == 2
    world.agree()


@pytest.mark.parametrize(
    ("path", "fault", "error"),
    [
        (LOAD, 400, PreflightError),
        (LOAD, 500, EngineError),
        (LOAD, "hang", EngineError),
        (LOAD, "drop", EngineError),
        (GENERATE, 400, PreflightError),
        (GENERATE, "drop", EngineError),
    ],
)
async def test_what_the_engine_does_not_load_leaves_nothing(world, adapters, monkeypatch, path, fault, error):
    monkeypatch.setattr(engine_adapters, "LOAD_S", 0.3)
    await world.deployer.load(adapters[0], alias="sql")
    world.engine.faults[path] = fault
    with pytest.raises(error):
        await world.deployer.load(adapters[1], alias="sql")
    world.agree()
    world.engine.faults.clear()
    assert (await world.deployer.load(adapters[1], alias="sql")).generation == 2
    world.agree()


async def test_what_is_refused_before_leaves_nothing(world, adapters, make_adapter, monkeypatch):
    with pytest.raises(PreflightError):
        await world.deployer.load(make_adapter("odd", config={"use_dora": True}))
    with pytest.raises(PreflightError, match="the base is called the-base"):
        await world.deployer.load(adapters[0], alias="the-base")
    world.phase(Phase.RESTARTING)
    monkeypatch.setattr(deploy, "_READY_S", 0.1)
    with pytest.raises(EngineError, match="the engine is restarting"):
        await world.deployer.load(adapters[0])
    assert not world.states()
    world.agree()


async def test_what_is_not_what_was_trained_is_unloaded(world, adapters):
    world.verdict = ParityError("another model")
    with pytest.raises(ParityError):
        await world.deployer.load(adapters[0], alias="sql")
    assert list(world.states().values()) == [State.UNLOADED]
    world.agree()


async def test_that_it_does_not_answer_is_said_before_what_it_is(world, adapters):
    world.engine.faults[GENERATE] = 400
    world.verdict = ParityError("another model")
    with pytest.raises(PreflightError, match="it does not answer: as it was told"):
        await world.deployer.load(adapters[0], alias="sql")
    world.agree()


async def test_a_load_that_is_broken_off_is_undone(world, adapters):
    world.verdict = asyncio.get_running_loop().create_future()
    loading = asyncio.create_task(world.deployer.load(adapters[0], alias="sql"))
    await until(lambda: GENERATE in world.engine.asked)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    world.agree()


async def test_one_that_comes_or_goes_is_not_loaded_again(world, adapters):
    await world.deployer.load(adapters[0], alias="sql")
    verdict = world.verdict = asyncio.get_running_loop().create_future()
    loading = asyncio.create_task(world.deployer.load(adapters[1], alias="sql"))
    await until(lambda: world.engine.asked.count(GENERATE) == 2)
    with pytest.raises(RegistryError):  # it may yet fail
        await world.deployer.load(adapters[1], alias="sql")
    before = world.states()
    with pytest.raises(RegistryError):  # neither of the two, or a drained one would never end
        await world.deployer.unload("sql")
    assert world.states() == before
    verdict.set_result("passed")
    version = await loading
    world.agree()
    lease = world.routes.lease(version.name)
    with pytest.raises(EngineError, match="1 requests in flight"):
        await world.deployer.unload(version.name, timeout_s=0.05)
    assert world.routes.lease(version.name) is None
    with pytest.raises(RegistryError):
        await world.deployer.load(adapters[1], alias="sql")
    lease.release()
    await until(lambda: world.states()[version.name] is State.UNLOADED)
    world.agree()


async def test_a_live_version_leaves_last_or_with_all(world, adapters):
    first = await world.deployer.load(adapters[0], alias="sql")
    await world.deployer.load(adapters[1], alias="sql", weight=0.5)
    with pytest.raises(RegistryError):
        await world.deployer.unload(first.name)
    with pytest.raises(RegistryError, match="there is no csv here") as caught:
        await world.deployer.unload("csv")
    assert first.name in caught.value.hint
    assert {version.state for version in await world.deployer.unload("sql")} == {State.UNLOADED}
    world.agree()


@pytest.mark.parametrize("fault", ["hang", "drop", 500])
async def test_an_engine_that_does_not_unload_keeps_it_from_answering(world, adapters, monkeypatch, fault):
    monkeypatch.setattr(engine_adapters.unload, "__defaults__", (0.2,))
    version = await world.deployer.load(adapters[0], alias="sql")
    world.engine.faults[UNLOAD] = fault
    with pytest.raises(EngineError):
        await world.deployer.unload("sql")
    assert world.states() == {version.name: State.DRAINING}
    assert world.routes.lease("sql") is None
    world.engine.faults.clear()
    assert [gone.state for gone in await world.deployer.unload("sql")] == [State.UNLOADED]
    world.agree()


async def test_an_ending_of_the_last_engine_does_not_stand_for_this_ones(world, adapters):
    version = await world.deployer.load(adapters[0], alias="sql")
    lease = world.routes.lease("sql")  # of a client that reads slowly, and of an engine that is gone
    with pytest.raises(EngineError):
        await world.deployer.unload("sql", timeout_s=0.05)
    world.engine.adapters.clear()
    assert world.deployer.restored() == []
    again = await world.deployer.load(adapters[0], alias="sql")
    assert again.generation == version.generation + 1
    unloading = asyncio.create_task(world.deployer.unload("sql"))
    await asyncio.sleep(0.05)
    lease.release()
    assert [gone.state for gone in await unloading] == [State.UNLOADED]
    world.agree()


async def test_a_name_means_the_only_candidate(world, adapters):
    with pytest.raises(RegistryError, match="there is no sql here"):
        world.deployer.promote("sql")
    await world.deployer.load(adapters[0], alias="sql")
    with pytest.raises(RegistryError, match="no version beside the live one"):
        world.deployer.promote("sql")
    second = await world.deployer.load(adapters[1], alias="sql")
    await world.deployer.load(adapters[2], alias="sql")
    with pytest.raises(RegistryError, match="2 candidates"):
        world.deployer.promote("sql")
    world.deployer.weigh(second.name, 0.1)
    assert world.deployer.promote("sql").name == second.name


async def test_the_adapters_of_a_start(world, adapters, check, capsys):
    def entry(path: Path) -> Entry:
        made = check(path)
        return Entry("sql", f"sql@{made.content_id[:12]}", "s", path, made.content_id, "b")

    fresh = world.deployer.seed([entry(adapters[0])])
    world.engine.adapters = {version.selector for version, _ in fresh}
    assert [version.state for version in world.deployer.restored()] == [State.CHECKED]
    await world.deployer.settle(fresh)
    first = fresh[0][0].name
    assert world.states() == {first: State.LIVE}
    assert world.deployer.seed([entry(adapters[0])]) == []
    assert "served before" not in capsys.readouterr().err

    fresh = world.deployer.seed([entry(adapters[1])])
    assert f"served before, and again: {first} " in capsys.readouterr().err
    world.engine.adapters |= {version.selector for version, _ in fresh}
    await world.deployer.settle(fresh)
    assert f"it answers in place of {first}" in capsys.readouterr().err
    world.agree()
    await world.deployer.unload(first)
    assert world.deployer.seed([entry(adapters[0])]) == []
    assert "was unloaded and stays so" in capsys.readouterr().err

    world.verdict = ParityError("another model")
    fresh = world.deployer.seed([entry(adapters[2])])
    with pytest.raises(ParityError):
        await world.deployer.settle(fresh)
    assert world.states()[fresh[0][0].name] is State.CHECKED


async def test_a_start_that_ends_between_two_writes_is_made_good_by_the_next(world, adapters, check, monkeypatch):
    made = check(adapters[0])
    entry = Entry("sql", f"sql@{made.content_id[:12]}", "s", adapters[0], made.content_id, "b")
    fresh = world.deployer.seed([entry])
    world.engine.adapters = {version.selector for version, _ in fresh}

    def full(*_: str) -> None:
        raise RegistryError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "promote", full)
        with pytest.raises(RegistryError):
            await world.deployer.settle(fresh)
    assert world.states() == {fresh[0][0].name: State.CHECKED}
    await world.deployer.settle(fresh)
    world.agree()


async def test_what_has_lost_its_files_is_given_up_and_comes_back_with_them(world, adapters, check, capsys):
    version = await world.deployer.load(adapters[0], alias="sql")
    other = await world.deployer.load(adapters[1], alias="sql", weight=0.25)
    version.path.rename(version.path.parent.parent / "elsewhere")
    assert [left.name for left in world.deployer.restored()] == [other.name]
    assert "cannot be served any more" in capsys.readouterr().err
    world.engine.adapters = {other.selector}
    world.agree()
    (event,) = world.registry.history(limit=1)
    assert (event.verb, event.version, event.actor) == ("lost", version.name, "the engine's end")
    assert f"its files are gone: {version.path}" in event.detail
    assert world.metrics._unloads["unloaded"] == 0
    checked = check(adapters[0])  # nobody unloaded it: the next start has it in --adapters
    entry = Entry("sql", version.name, "s", adapters[0], checked.content_id, "b")
    ((again, _),) = world.deployer.seed([entry])
    assert (again.name, again.generation) == (version.name, 2)


async def test_a_share_beside_nobody_is_refused_before_anything_is_loaded(world, adapters):
    with pytest.raises(RegistryError, match="no live version beside which this one could answer 5%"):
        await world.deployer.load(adapters[0], alias="sql", weight=0.05)
    assert not world.engine.asked
    assert not world.states()


async def test_what_ended_the_engine_does_not_end_the_next_one(world, adapters):
    """It was on its way in when the engine died: the next engine is not started with it."""
    await world.deployer.load(adapters[0], alias="sql")
    world.verdict = asyncio.get_running_loop().create_future()
    loading = asyncio.create_task(world.deployer.load(adapters[1], alias="sql"))
    while State.CHECKED not in world.states().values():  # noqa: ASYNC110 - a moment, and no event
        await asyncio.sleep(0.01)
    assert [version.state for version in world.deployer.restored()] == [State.LIVE]
    world.verdict.set_exception(EngineError("it died"))
    with pytest.raises(EngineError):
        await loading
    world.agree()
