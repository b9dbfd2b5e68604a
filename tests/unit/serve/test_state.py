"""What one server leaves to the next: refused by name before an engine starts, and taken out while none runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tuneship.core import hardware
from tuneship.core.errors import EngineError, PreflightError, RegistryError
from tuneship.core.files import short
from tuneship.core.recipe import Serve
from tuneship.serve import adapters_commands, catalog
from tuneship.serve import state as states
from tuneship.serve.assembly import assembled
from tuneship.serve.preflight import Limits
from tuneship.serve.registry import Registry, State
from tuneship.serve.registry.records import COPIES
from tuneship.serve.store import AdapterStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def left(folder: Path, make_adapter, check):
    """Factory (alias, rank=..., pinned=...) -> the name of a live version that a server left in `folder`."""

    def leave(alias: str, *, rank: int = 4, pinned: bool = False) -> str:
        checked = check(make_adapter(f"{alias}-{rank}", rank=rank))
        with opened(folder) as registry:
            kept = AdapterStore(folder / COPIES).keep(checked)
            version = registry.add(alias, checked.content_id, kept, pinned=pinned)
            registry.loaded(version.name, "passed")
            return registry.promote(version.name).name

    return leave


def opened(folder: Path) -> Registry:
    return Registry.open(folder / states.REGISTRY, "b", "the-base")


def require(folder: Path, max_rank: int = 64, max_loras: int = 8, **limits: tuple[str, ...]) -> None:
    with opened(folder) as registry:
        states.require(registry, Limits(max_rank, **limits), max_loras, folder)


def refused(folder: Path, **limits) -> PreflightError:
    with pytest.raises(PreflightError) as caught:
        require(folder, **limits)
    return caught.value


def test_a_rank_of_before_is_refused_by_name_with_both_ways_out(folder, left):
    small, large = left("sum", rank=4), left("sql", rank=16)
    require(folder, max_rank=16)
    error = refused(folder, max_rank=8)
    assert f"{large} has rank 16, the server takes at most 8" in error.message
    assert small not in error.message + error.hint
    assert error.hint.startswith("--max-rank 16, or take it out: tuneship adapters unload")
    assert f"unload {large} --state {short(folder)}" in error.hint


def test_all_that_is_wrong_is_said_at_once(folder, left):
    names = [left("sum", pinned=True), left("sql", rank=16, pinned=True)]
    error = refused(folder, max_rank=8, max_loras=1)
    assert error.message.count("is one of 2 that are pinned, the server has slots for 1") == 2
    assert all(name in error.message for name in names)
    assert error.hint.startswith("--max-rank 16, --max-loras 2, or take it out: ")
    assert error.hint.count("tuneship adapters unload ") == 2
    require(folder, max_loras=2)


def test_modules_that_are_not_wrapped_any_more(folder, left):
    name = left("sql")
    assert f"{name} changes v_proj" in refused(folder, target_modules=("q_proj",)).message


@pytest.mark.parametrize("damage", ["cut", "no configuration", "a larger rank inside"])
def test_a_copy_that_was_damaged_since(folder, left, damage):
    name = left("sql")
    (copy,) = (folder / COPIES).iterdir()
    weights = copy / "adapter_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "no configuration":
        (copy / "adapter_config.json").unlink()
    else:
        tensors = load_file(weights)
        save_file({key: tensor.repeat(20, 0) for key, tensor in tensors.items()}, weights)
    error = refused(folder, max_rank=32)
    assert name in error.message
    assert f"unload {name} --state" in error.hint


def test_a_server_with_other_limits_is_refused_before_anything_starts(base, folder, tmp_path, make_adapter, check):
    found = catalog.read(str(base), to_come=True)
    machine = hardware.detect()
    log = tmp_path / "engine.log"
    with assembled(found, Serve(mode="adapters", max_rank=64), machine, log, folder) as parts:
        checked = check(make_adapter("sql", rank=6))
        kept = AdapterStore(folder / COPIES).keep(checked)
        name = parts.registry.add("sql", checked.content_id, kept).name
        parts.registry.loaded(name, "passed")
        parts.registry.promote(name)
    narrow = Serve(mode="adapters", max_rank=4)
    with pytest.raises(PreflightError, match=f"{name} has rank 6"), assembled(found, narrow, machine, log, folder):
        pass
    adapters_commands.unload(name, state=folder)
    with assembled(found, narrow, machine, log, folder) as parts:
        assert parts.registry.present() == []
        assert list((folder / COPIES).iterdir()) == []


def test_a_state_that_cannot_be_made_is_refused_in_words(base, tmp_path):
    (tmp_path / "file").touch()
    found, machine = catalog.read(str(base), to_come=True), hardware.detect()
    for folder, why in ((tmp_path / "file", "File exists"), (tmp_path / "file" / "state", "Not a directory")):
        with (
            pytest.raises(RegistryError, match=rf"{folder}/registry\.sqlite cannot be opened: {why}"),
            assembled(found, Serve(mode="adapters"), machine, tmp_path / "engine.log", folder),
        ):
            pass


def test_a_version_is_taken_out_while_no_server_runs(folder, left, capsys):
    first, second, other = left("sql"), left("sql", rank=6), left("sum")
    with pytest.raises(RegistryError, match="there is no nothing in") as nothing:
        states.take_out(folder, "nothing")
    assert second in nothing.value.hint
    adapters_commands.unload(second, state=folder)
    said = capsys.readouterr()
    assert second in said.out
    assert "unloaded" in said.out
    assert f"sql has no live version now: promote {first}" in said.err
    with opened(folder) as registry:
        assert {v.name: v.state for v in registry.present()} == {first: State.LOADED, other: State.LIVE}
        assert registry.was_unloaded(second)  # --adapters does not bring it back
        assert [path.name for path in sorted((folder / COPIES).iterdir())] == sorted(
            version.path.name for version in registry.present()
        )
    assert [version.name for version in states.take_out(folder, "sum")] == [other]


def test_not_beside_a_server_that_runs(folder, left):
    name = left("sql")
    with opened(folder), pytest.raises(RegistryError, match="belongs to a server that is running") as running:
        adapters_commands.unload(name, state=folder)
    assert "leave --state out" in running.value.hint
    with opened(folder) as registry:
        assert registry.find(name).state is State.LIVE


def test_a_folder_without_a_state_is_left_as_it_is(tmp_path):
    with pytest.raises(RegistryError, match="there is no registry"):
        adapters_commands.unload("sql", state=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["error", "log"])
def test_the_version_that_keeps_an_engine_from_starting_is_named(folder, left, tmp_path, where):
    names, log = [left("sum"), left("sql")], tmp_path / "engine.log"
    said = f"RuntimeError: Failed to load LoRA adapter {names[1]}#1: it is odd"
    log.write_text("" if where == "error" else f"starting\n{said}\n")
    error = EngineError("SGLang did not start: " + (said if where == "error" else "it ended"), hint="the whole log")
    with opened(folder) as registry:
        found = states.blamed(error, log, registry, folder)
        assert found.message.startswith(f"{names[1]}, which the state in")
        assert "it is odd" in found.message
        assert found.hint.startswith(f"take it out: tuneship adapters unload {names[1]} --state ")
        assert found.hint.endswith("the whole log")
        other = EngineError("SGLang did not start: CUDA out of memory")
        log.write_text("CUDA out of memory")
        assert states.blamed(other, log, registry, folder) is other


@pytest.mark.parametrize("where", ["error", "log"])
def test_a_version_whose_name_is_a_part_of_anothers_is_not_blamed(folder, left, tmp_path, where):
    """The same adapter under two names, or loaded a tenth time."""
    left("sql")
    long, log = left("z.sql", rank=6), tmp_path / "engine.log"
    (tmp_path / "other").mkdir()
    with opened(folder) as registry:
        (sql, z_sql) = registry.present()
        registry.loaded(registry.add("z.sql", sql.content_id, tmp_path / "other").name, "passed")
        same = registry.promote(f"z.sql@{sql.content_id[:12]}")
        for selector, name in ((same.selector, same.name), (z_sql.selector, long)):
            said = f"Failed to load LoRA adapter {selector}: it is odd"
            log.write_text("" if where == "error" else said)
            error = EngineError(said if where == "error" else "SGLang ended")
            assert states.blamed(error, log, registry, folder).message.startswith(f"{name}, which ")
        said = f"Failed to load LoRA adapter {sql.selector}0: it is odd"  # a version of another state
        log.write_text("" if where == "error" else said)
        error = EngineError(said if where == "error" else "SGLang ended")
        assert states.blamed(error, log, registry, folder) is error


def test_the_words_by_which_sglang_names_an_adapter_that_it_refuses():
    """They are looked for in its log."""
    (sglang,) = importlib.util.find_spec("sglang").submodule_search_locations
    assert states._REFUSED in Path(sglang, "srt/lora/lora_manager.py").read_text(encoding="utf-8")


def test_settings_of_a_copy_are_those_that_sglang_reads(folder, left):
    """A rank that only the configuration names counts: SGLang goes by it."""
    name = left("sql")
    (copy,) = (folder / COPIES).iterdir()
    config = copy / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"r": 40}))
    assert f"{name} has rank 40" in refused(folder, max_rank=32).message
