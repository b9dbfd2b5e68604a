"""What one server leaves to the next: held against how that one is started, and changed while none runs.

    require(registry, Limits(max_rank), max_loras, folder)     # before an engine is started with it
    blamed(error, log, registry, folder)                       # the engine did not start: whose fault was it?
    take_out(folder, "sql")                                    # tuneship adapters unload sql --state FOLDER

SGLang ends at its start for one adapter that it cannot take, and all aliases with it. So that is found out first, and
said by name, with both ways out: the limits of before, or without that version.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from tuneship.core.errors import ArtifactError, EngineError, PreflightError, RegistryError
from tuneship.core.files import short
from tuneship.core.process import tail
from tuneship.core.progress import say
from tuneship.core.quoting import on_one_line
from tuneship.core.servable import Reason
from tuneship.serve import tensors
from tuneship.serve.preflight import Limits, settings
from tuneship.serve.preflight.files import CONFIG, WEIGHTS
from tuneship.serve.registry import SERVED, Registry, State, Version
from tuneship.serve.registry.records import COPIES
from tuneship.serve.store import AdapterStore

REGISTRY = "registry.sqlite"
_LOG_LINES = 400
_OFFLINE = "offline"
"""Who it was, in the history, that took a version out while no server ran."""
_REFUSED = "Failed to load LoRA adapter"
"""SGLang's words, before its name for the adapter."""


def require(registry: Registry, limits: Limits, max_loras: int, folder: Path) -> None:
    """Refuse a state in `folder` whose versions an engine of these limits would not start with.

    Raises:
        PreflightError: the versions, and what is wrong with each.

    """
    kept = [version for version in registry.present() if version.state in SERVED]
    reasons = {version.name: found for version in kept if (found := list(_beyond(version, limits)))}
    pinned = [version.name for version in kept if version.pinned]
    if len(pinned) > max_loras:
        fact = f"is one of {len(pinned)} that are pinned, the server has slots for {max_loras}"
        for name in pinned:
            reasons.setdefault(name, []).append(Reason(fact, f"--max-loras {len(pinned)}"))
    if not reasons:
        return
    said = [f"{name} {reason.fact}" for name, found in reasons.items() for reason in found]
    fixes = dict.fromkeys(reason.fix for found in reasons.values() for reason in found)
    listed = said[0] if len(said) == 1 else "".join(f"\n  - {each}" for each in said)
    where, outs = short(folder), "\n      ".join(way_out(name, folder) for name in reasons)
    raise PreflightError(
        f"the state in {where} cannot be served so: {listed}",
        hint=f"{', '.join(fixes)}, or take it out: {outs}",
    )


def way_out(name: str, folder: Path) -> str:
    """The command that takes a version out of the state in `folder` while no server runs."""
    return f"tuneship adapters unload {name} --state {short(folder)}"


def blamed(error: EngineError, log: Path, registry: Registry, folder: Path) -> EngineError:
    """`error` of an engine that did not start, with the version in `folder` that was its reason, if one was.

    That is said by the error, or else by the end of the engine's `log`.
    """
    where = short(folder)
    refusals = [line for line in tail(log, _LOG_LINES).splitlines() if _REFUSED in line] if log.is_file() else []
    for text in (error.message, *refusals):
        for version in registry.present():
            if version.state in SERVED and _names(text, version.selector):
                why = error.message if text is error.message else f"{error.message}: {text[text.index(_REFUSED) :]}"
                return EngineError(
                    f"{version.name}, which the state in {where} holds, keeps the engine from starting: {why}",
                    hint=f"take it out: {way_out(version.name, folder)}\n      {error.hint}",
                )
    return error


def take_out(folder: Path, name: str) -> list[Version]:
    """Take a version (`alias@id`), or an alias with all its versions, out of `folder` while no server runs.

    Raises:
        RegistryError: there is no such thing, or a server is running with it.

    """
    where = short(folder)
    with Registry.reopen(folder / REGISTRY) as registry:
        present = registry.present()
        leaving = [version for version in present if name in {version.name, version.alias}]
        if not leaving:
            there = ", ".join(version.name for version in present) or "nothing"
            raise RegistryError(f"there is no {name} in {where}", hint=f"there is: {there}")
        with registry.at_once():
            for version in leaving:
                registry.drain(version.name, _OFFLINE, whole_alias=True)
                registry.unloaded(version.name, _OFFLINE)
        store = AdapterStore(folder / COPIES)
        for version in leaving:
            store.drop(version.path)
        after = registry.versions(leaving[0].alias)
        rest = [version.name for version in after if version.state in SERVED]
        if rest and not any(version.state is State.LIVE for version in after):
            say(f"{leaving[0].alias} has no live version now: promote {' or '.join(rest)} when the server runs")
        return [version for version in after if version.name in {left.name for left in leaving}]


def _names(text: str, selector: str) -> bool:
    """Whether `text` has it by itself: `sql@3fa9c1d20b77#1` is a part of `my-sql@3fa9c1d20b77#12`."""
    return bool(re.search(rf"(?<![A-Za-z0-9._-]){re.escape(selector)}(?![0-9])", text))


def _beyond(version: Version, limits: Limits) -> Iterator[Reason]:
    """Why an engine of these limits does not take the copy of `version`."""
    try:
        rank = int(settings.read(version.path / CONFIG)["r"])
        shapes = {key: tensor.shape for key, tensor in tensors.headers(version.path / WEIGHTS).items()}
    except (ArtifactError, PreflightError, OSError, KeyError) as error:
        yield Reason(f"cannot be read any more: {error}", "restore the folder from a copy")
        return
    rank = max([rank, *(shape[0] for key, shape in shapes.items() if ".lora_A." in key)])
    if rank > limits.max_rank:
        yield Reason(f"has rank {rank}, the server takes at most {limits.max_rank}", f"--max-rank {rank}")
    modules = {key.partition(".lora_")[0].rpartition(".")[2] for key in shapes}
    if other := sorted(modules - {*limits.target_modules}):
        yield Reason(
            f"changes {on_one_line(', '.join(other))}, which the server does not", "serve it with what loaded it"
        )
