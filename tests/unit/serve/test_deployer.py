"""What comes and goes while a server runs, with an engine that refuses, hangs and breaks off; the books agree after."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tuneship.core.errors import ArtifactError, EngineError, ParityError, PreflightError, RegistryError
from tuneship.serve import deploy, engine_adapters
from tuneship.serve.catalog import Entry
from tuneship.serve.registry import Registry, State
from tuneship.serve.store import AdapterStore
from tuneship.serve.supervisor import Phase

LOAD, UNLOAD, GENERATE = "/load_lora_adapter", "/unload_lora_adapter", "/generate"


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


def held_up(world: Any, monkeypatch: pytest.MonkeyPatch, phase: str) -> asyncio.Event:
    """A phase of the check that goes on when the event is set."""
    goes_on, goes = asyncio.Event(), getattr(world, phase)

    async def goes_later(*given: Any) -> Any:
        await goes_on.wait()
        return await goes(*given)

    monkeypatch.setattr(world, phase, goes_later)
    return goes_on


async def test_nobody_is_asked_before_the_copy_is_sound(world, adapters, monkeypatch):
    sound = held_up(world, monkeypatch, "sound")
    loading = asyncio.create_task(world.deployer.load(adapters[0], alias="sql"))
    await until(lambda: world.engine.adapters)
    await asyncio.sleep(0.05)
    assert world.engine.asked == [LOAD]
    sound.set()
    assert (await loading).state is State.LIVE
    world.agree()


async def test_nobody_else_asks_before_the_copy_is_proven(world, adapters, monkeypatch):
    proven = held_up(world, monkeypatch, "prove")
    loading = asyncio.create_task(world.deployer.load(adapters[0], alias="sql"))
    await until(lambda: GENERATE in world.engine.asked)
    await asyncio.sleep(0.05)
    (name,) = world.states()
    assert world.states() == {name: State.CHECKED}
    assert world.routes.lease("sql") is world.routes.lease(name) is None
    proven.set()
    assert (await loading).state is State.LIVE
    world.agree()


def not_a_number(tensors: dict[str, np.ndarray]) -> None:
    next(iter(tensors.values()))[0, 0] = np.nan


async def test_values_that_are_none_are_found_while_it_is_loaded_and_nobody_is_asked(world, make_adapter, check):
    path = make_adapter("sql", change=not_a_number)
    with pytest.raises(PreflightError) as wanted:
        check(path)
    with pytest.raises(PreflightError) as refused:
        await world.deployer.load(path)
    assert (refused.value.message, refused.value.hint) == (wanted.value.message, wanted.value.hint)
    assert world.engine.asked == [LOAD, UNLOAD]
    assert list(world.states().values()) == [State.UNLOADED]
    assert wanted.value.message in world.registry.history()[0].detail
    world.agree()


async def test_an_artifact_that_is_damaged_is_found_while_it_is_loaded(world, seal_adapter):
    sealed = seal_adapter("sql")
    file = sealed.path / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="was changed after it was written"):
        await world.deployer.load(sealed.path)
    assert world.engine.asked == [LOAD, GENERATE, UNLOAD], "values like any other"
    world.agree()
    file.write_bytes(content)
    assert (await world.deployer.load(sealed.path)).state is State.LIVE
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match="was changed after it was written"):  # though that version is served
        await world.deployer.load(sealed.path)
    world.agree()


@pytest.mark.parametrize(
    ("fault", "error", "said"),
    [(None, PreflightError, "as it was told"), (ArtifactError("it was changed"), ArtifactError, "it was changed")],
)
@pytest.mark.parametrize(("phase", "path"), [("sound", LOAD), ("prove", GENERATE)])
async def test_an_engine_that_refuses_waits_for_the_check(
    world, adapters, monkeypatch, phase, path, fault, error, said
):
    goes_on = asyncio.Event()

    async def goes_late(*_: Any) -> tuple[str, ...]:
        await goes_on.wait()
        if fault:
            raise fault
        return ()

    monkeypatch.setattr(world, phase, goes_late)
    world.engine.faults[path] = 400
    loading = asyncio.create_task(world.deployer.load(adapters[0], alias="sql"))
    await until(lambda: path in world.engine.asked)
    await asyncio.sleep(0.05)
    assert not loading.done()
    goes_on.set()
    with pytest.raises(error, match=said):
        await loading
    world.agree()


async def test_that_it_is_something_else_is_said_before_what_it_answers(world, adapters, monkeypatch):
    async def finds_out(*_: Any) -> None:
        raise ArtifactError("it was changed")

    monkeypatch.setattr(world, "prove", finds_out)
    world.verdict = ParityError("another model")
    with pytest.raises(ArtifactError, match="it was changed"):
        await world.deployer.load(adapters[0], alias="sql")
    assert list(world.states().values()) == [State.UNLOADED]
    world.agree()


@pytest.mark.parametrize("phase", ["check", "copy", "sound", "prove", "flush", "load", "verify"])
async def test_a_load_that_is_broken_off_in_any_phase_leaves_nothing(world, adapters, monkeypatch, phase):
    reached, goes_on = threading.Event(), threading.Event()

    async def stays(*_: Any) -> Any:
        reached.set()
        await asyncio.Event().wait()

    with monkeypatch.context() as patch:
        if phase in {"check", "sound", "prove"}:
            patch.setattr(world, phase, stays)
        elif phase == "load":
            world.engine.faults[LOAD] = "hang"
        elif phase == "verify":
            world.verdict = asyncio.get_running_loop().create_future()
        else:
            slow = getattr(AdapterStore, phase)
            patch.setattr(AdapterStore, phase, lambda *given: (reached.set(), goes_on.wait(5), slow(*given))[2])
        loading = asyncio.create_task(world.deployer.load(adapters[0], alias="sql"))
        path = {"load": LOAD, "verify": GENERATE}.get(phase)
        await until((lambda: path in world.engine.asked) if path else reached.is_set)
        loading.cancel()
        await asyncio.sleep(0.02)
        goes_on.set()
        with pytest.raises(asyncio.CancelledError):
            await loading
    world.engine.faults.clear()
    world.verdict = "passed"
    assert State.CHECKED not in world.states().values()
    assert await world.deployer.load(adapters[0], alias="sql")
    world.agree()


async def test_what_is_not_proven_when_the_server_ends_is_gone_with_it(world, adapters, monkeypatch, tmp_path):
    async def stays(*_: Any) -> Any:
        await asyncio.Event().wait()

    await world.deployer.load(adapters[0], alias="sql")
    with monkeypatch.context() as patch:
        patch.setattr(world, "prove", stays)
        loading = asyncio.create_task(world.deployer.load(adapters[1], alias="sql"))
        await until(lambda: world.engine.asked.count(GENERATE) == 2)
        left = tmp_path / "left"
        left.mkdir()
        for file in tmp_path.glob("registry.sqlite*"):  # as a crash leaves it
            shutil.copy(file, left)
        loading.cancel()
        await asyncio.gather(loading, return_exceptions=True)
    with Registry.open(left / "registry.sqlite", "b", "the-base") as found:
        assert {version.state for version in found.versions()} == {State.LIVE, State.UNLOADED}
        assert [event.verb for event in found.recovered] == ["recovered"]


async def test_what_verification_needs_no_adapter_for_is_done_while_that_is_loaded(world, adapters, monkeypatch):
    begun, asked = asyncio.Event(), asyncio.Event()

    async def verifies(_: Any, __: Any, loaded: asyncio.Event) -> str:
        begun.set()
        await loaded.wait()
        asked.set()
        return "passed"

    sound = held_up(world, monkeypatch, "sound")
    monkeypatch.setattr(world.deployer, "_verify", verifies)
    loading = asyncio.create_task(world.deployer.load(adapters[0], alias="sql"))
    await begun.wait()
    await until(lambda: world.engine.adapters)
    await asyncio.sleep(0.02)
    assert not asked.is_set(), "it was asked before it was sound"
    sound.set()
    assert (await loading).verified == "passed"


async def test_what_it_answers_is_written_once(world, adapters):
    writes: list[str] = []
    world.registry._held.connection.set_trace_callback(writes.append)
    await world.deployer.load(adapters[0], alias="sql")
    assert writes.count("COMMIT") == 2, "added, and then all the rest"
    assert [event.verb for event in world.registry.history()] == ["promote", "loaded", "add"]
    world.agree()


async def test_a_share_that_is_refused_leaves_it_loaded(world, adapters):
    await world.deployer.load(adapters[0], alias="sql")
    await world.deployer.load(adapters[1], alias="sql", weight=0.7)
    with pytest.raises(RegistryError, match="nothing is left for the live version"):
        await world.deployer.load(adapters[2], alias="sql", weight=0.4)
    assert sorted(world.states().values()) == sorted([State.LIVE, State.CANARY, State.LOADED])
    world.agree()


@pytest.mark.parametrize("disk", [None, RegistryError("the disk is full")])
async def test_nothing_is_written_down_as_served_before_it_is_on_the_disk(world, adapters, monkeypatch, disk):
    flushed, flushes = threading.Event(), AdapterStore.flush

    def flushes_late(*given: Any) -> None:
        flushed.wait(5)
        if disk:
            raise disk
        flushes(*given)

    monkeypatch.setattr(AdapterStore, "flush", flushes_late)
    loading = asyncio.create_task(world.deployer.load(adapters[0], alias="sql"))
    await until(lambda: GENERATE in world.engine.asked)
    await asyncio.sleep(0.05)
    assert list(world.states().values()) == [State.CHECKED]
    flushed.set()
    if disk:
        with pytest.raises(RegistryError, match="the disk is full"):
            await loading
    else:
        assert (await loading).state is State.LIVE
    world.agree()


@pytest.mark.parametrize("fault", [None, 400])
async def test_a_copy_of_something_else_is_unloaded_unasked(world, adapters, monkeypatch, fault):
    check = world.check

    async def checked_and_changed(path: Path) -> Any:
        found = await check(path)
        (path / "adapter_config.json").write_text("{}")
        return found

    monkeypatch.setattr(world, "check", checked_and_changed)
    if fault:  # the engine does not take it either, for what it is
        world.engine.faults[LOAD] = fault
    with pytest.raises(ArtifactError, match="was changed while it was being loaded"):
        await world.deployer.load(adapters[0], alias="sql")
    assert world.engine.asked == [LOAD, UNLOAD]
    assert list(world.states().values()) == [State.UNLOADED]
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
    with pytest.raises(RegistryError, match="there is no csv here"):
        await world.deployer.unload("csv")
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

    fresh = world.deployer.seed([entry(adapters[1])])
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


async def test_what_has_lost_its_files_is_given_up(world, adapters):
    version = await world.deployer.load(adapters[0], alias="sql")
    version.path.rename(version.path.parent.parent / "elsewhere")
    assert world.deployer.restored() == []
    world.engine.adapters.clear()
    world.agree()


async def until(done: Any) -> None:
    async with asyncio.timeout(5):
        while not done():  # noqa: ASYNC110 - it is another's state
            await asyncio.sleep(0.01)


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
