"""An adapter on its way in: what is proven before the engine has it, while it loads, and before anybody asks."""

from __future__ import annotations

import asyncio
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.serve.scripted import GENERATE, LOAD, UNLOAD, until
from tuneship.core.errors import ArtifactError, EngineError, ParityError, PreflightError, RegistryError
from tuneship.serve import quantized
from tuneship.serve.registry import Registry, State
from tuneship.serve.store import AdapterStore
from tuneship.serve.supervisor import Phase


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
        shutil.copytree(world.copies, left / world.copies.name)
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


async def test_what_goes_wrong_after_the_verdict_is_undone_too(world, adapters, monkeypatch):
    def unreadable(*_: Path) -> list[str]:
        raise ArtifactError("artifact.json cannot be read")

    monkeypatch.setattr(quantized, "remarks", unreadable)
    with pytest.raises(ArtifactError):
        await world.deployer.load(adapters[0], alias="sql")
    assert list(world.states().values()) == [State.UNLOADED]
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


@pytest.mark.parametrize("phase", [Phase.RESTARTING, Phase.READY])
async def test_what_the_next_engine_was_not_started_with_does_not_answer(world, adapters, monkeypatch, phase):
    goes_on = held_up(world, monkeypatch, "prove")
    loading = asyncio.create_task(world.deployer.load(adapters[0], alias="sql"))
    await until(lambda: GENERATE in world.engine.asked)
    world.supervisor.restarts += 1
    world.phase(Phase.RESTARTING)
    world.engine.adapters = {version.selector for version in world.deployer.restored()}
    world.phase(phase)
    goes_on.set()
    with pytest.raises(EngineError, match="the engine ended while"):
        await loading
    assert list(world.states().values()) == [State.UNLOADED]
    world.agree()


@pytest.mark.parametrize("still_full", [False, True])
async def test_a_registry_that_cannot_be_written_leaves_nothing_in_the_engine(
    world, adapters, monkeypatch, still_full, capsys
):
    def full(*_: Any) -> Any:
        raise RegistryError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "loaded", full)
        if still_full:
            patch.setattr(world.registry, "failed", full)
        with pytest.raises(RegistryError, match="the disk is full"):
            await world.deployer.load(adapters[0], alias="sql")
        assert not world.engine.adapters
    assert list(world.states().values()) == [State.CHECKED if still_full else State.UNLOADED]
    assert ("cannot be written down yet" in capsys.readouterr().err) is still_full
    assert (await world.deployer.load(adapters[0], alias="sql")).generation == 2
    world.agree()


async def test_what_could_not_be_written_holds_up_no_unload(world, adapters, monkeypatch):
    def full(*_: Any) -> Any:
        raise RegistryError("the disk is full")

    await world.deployer.load(adapters[0], alias="sql")
    with monkeypatch.context() as patch:
        patch.setattr(world.registry, "loaded", full)
        patch.setattr(world.registry, "failed", full)
        with pytest.raises(RegistryError):
            await world.deployer.load(adapters[1], alias="sql")
    await world.deployer.unload("sql")
    world.agree()


async def test_a_version_that_is_there_cannot_be_pinned_any_more(world, adapters):
    version = await world.deployer.load(adapters[0], alias="sql")
    with pytest.raises(RegistryError, match="was not pinned then") as caught:
        await world.deployer.load(adapters[0], alias="sql", pinned=True)
    assert f"unload {version.name}" in caught.value.hint
    world.agree()
    await world.deployer.unload("sql")
    assert (await world.deployer.load(adapters[0], alias="sql", pinned=True)).pinned
    assert (await world.deployer.load(adapters[0], alias="sql")).pinned
