"""What each verb does to an alias, as pure functions: from what is, to what shall be, or a refusal.

Nothing here reads or writes. `Alias` in, `Change` out; the registry writes the whole of a change, or nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from tuneship.core.errors import RegistryError
from tuneship.serve.registry.records import SERVED, State, Version, version_name

LONGEST_WAY_BACK = 50
"""Promotes that can be rolled back, one after the other."""


class Alias(NamedTuple):
    """All that is known of one alias."""

    name: str
    versions: tuple[Version, ...] = ()
    lives: tuple[str, ...] = ()
    """Names of the versions that were live, the one that is live now last. Only what is in the engine is in it."""

    @property
    def live(self) -> Version | None:
        """The version that answers what the canaries leave."""
        return next((version for version in self.versions if version.state is State.LIVE), None)

    @property
    def canaries(self) -> list[Version]:
        """The versions that answer a share."""
        return [version for version in self.versions if version.state is State.CANARY]

    def find(self, name: str) -> Version | None:
        """The version of that name."""
        return next((version for version in self.versions if version.name == name), None)

    def put(self, *changed: Version) -> Alias:
        """The same, with these versions as they are now, and the live one's weight to match."""
        kept = {version.name: version for version in self.versions}
        kept.update((version.name, version) for version in changed)
        given = sum(version.weight for version in kept.values() if version.state is State.CANARY)
        return self._replace(
            versions=tuple(
                version._replace(weight=1.0 - given) if version.state is State.LIVE else version
                for _, version in sorted(kept.items())
            )
        )


class Change(NamedTuple):
    """What one verb does: the alias afterwards, and what the history says of it."""

    alias: Alias
    verb: str
    version: str
    detail: str = ""


def add(alias: Alias, content_id: str, path: Path, base_id: str, *, pinned: bool) -> Change:
    """A version that was checked, on its way into the engine; another time if it was unloaded."""
    name = version_name(alias.name, content_id)
    before = alias.find(name)
    if before and before.content_id != content_id:
        raise RegistryError(f"{name} is another adapter whose id begins alike", hint="load it under another alias")
    if before and before.state is not State.UNLOADED:
        raise RegistryError(f"{name} is here already: {before.state}", hint=_next(before))
    generation = before.generation + 1 if before else 1
    version = Version(alias.name, content_id, base_id, path, State.CHECKED, 0.0, generation, pinned, "", "")
    return Change(alias.put(version), "add", name, f"generation {generation}")


def loaded(alias: Alias, name: str, verified: str, under: str, remarks: Sequence[str] = ()) -> Change:
    """It is in the engine, and was compared with what was trained."""
    version = _in_state(alias, name, "loaded", State.CHECKED)
    now = version._replace(state=State.LOADED, verified=verified, verified_under=under)
    return Change(alias.put(now), "loaded", name, "; ".join((verified, *remarks)))


def verified(alias: Alias, name: str, found: str, under: str) -> Change:
    """It was compared again, in a server that is another than it was."""
    version = _in_state(alias, name, "verified", *SERVED)
    now = version._replace(verified=found, verified_under=under)
    return Change(alias.put(now), "verified", name, f"{found} ({under})" if under else found)


def failed(alias: Alias, name: str, reason: str) -> Change:
    """It did not get into the engine."""
    version = _in_state(alias, name, "given up", State.CHECKED)
    return Change(alias.put(version._replace(state=State.UNLOADED)), "failed", name, reason)


def weigh(alias: Alias, name: str, weight: float) -> Change:
    """Let it answer a share of the alias's requests, beside the live version."""
    if not 0 <= weight < 1:
        raise RegistryError(
            f"a weight is at least 0 and less than 1, not {weight:g}",
            hint=f"tuneship adapters promote {name} gives it all requests",
        )
    version = _may_answer(_in_state(alias, name, "given a weight", State.LOADED, State.CANARY))
    if weight and not alias.live:
        raise RegistryError(
            f"{alias.name} has no live version beside which {name} could answer a share",
            hint=f"tuneship adapters promote {name}",
        )
    others = sum(canary.weight for canary in alias.canaries if canary.name != name)
    if others + weight >= 1:
        raise RegistryError(
            f"the other canaries of {alias.name} have {others:g}: with {weight:g} nothing is left for the live version",
            hint=f"less weight, or tuneship adapters promote {name}",
        )
    state = State.CANARY if weight else State.LOADED
    return Change(alias.put(version._replace(state=state, weight=weight)), "weigh", name, f"weight {weight!r}")


def promote(alias: Alias, name: str) -> Change:
    """Let it answer all of the alias's requests. What was live stays loaded, so that going back takes no time."""
    version = _may_answer(_in_state(alias, name, "promoted", State.LOADED, State.CANARY))
    before = alias.live
    changed = [*_rested(alias), *([_rest(before)] if before else []), version._replace(state=State.LIVE, weight=0.0)]
    lives = (*alias.lives, name)[-LONGEST_WAY_BACK:]
    detail = f"in place of {before.name}" if before else "the first"
    return Change(alias._replace(lives=lives).put(*changed), "promote", name, detail)


def rollback(alias: Alias) -> Change:
    """End the canaries; where there are none, let the version that was live before answer again."""
    live, canaries = alias.live, alias.canaries
    if live and canaries:
        ended = ", ".join(canary.name for canary in canaries)
        return Change(alias.put(*_rested(alias)), "rollback", live.name, f"no more weight for {ended}")
    earlier = alias.find(alias.lives[-2]) if len(alias.lives) > 1 else None
    if not live or not earlier:
        what = f"no version was live before {live.name}, or it was unloaded" if live else "it has no live version"
        raise RegistryError(f"{alias.name} cannot be rolled back: {what}", hint=_choice(alias))
    back = alias._replace(lives=alias.lives[:-1]).put(_rest(live), earlier._replace(state=State.LIVE, weight=0.0))
    return Change(back, "rollback", earlier.name, f"in place of {live.name}")


def drain(alias: Alias, name: str, *, whole_alias: bool) -> Change:
    """Let it answer nobody new; the same again if it does so already."""
    version = _in_state(alias, name, "unloaded", *SERVED, State.DRAINING)
    if version.state is State.DRAINING:
        return Change(alias, "drain", name)
    others = [other.name for other in alias.versions if other.state in SERVED and other.name != name]
    if version.state is State.LIVE and others and not whole_alias:
        raise RegistryError(
            f"{name} is live, and {alias.name} has others that are loaded: {', '.join(others)}",
            hint=f"promote one of them, or roll back; or tuneship adapters unload {alias.name}, with all its versions",
        )
    return Change(_without(alias, version, State.DRAINING), "drain", name)


def unloaded(alias: Alias, name: str) -> Change:
    """It is out of the engine."""
    version = _in_state(alias, name, "taken out", State.DRAINING)
    return Change(_without(alias, version, State.UNLOADED), "unloaded", name)


def lost(alias: Alias, name: str) -> Change:
    """Its files are gone while the server runs: the next engine cannot be started with it."""
    version = _in_state(alias, name, "given up", *SERVED)
    gone = _without(alias, version, State.UNLOADED)
    return Change(gone, "lost", name, f"it was {version.state}, and its files are gone: {version.path}")


def ended(alias: Alias, version: Version, why: str) -> Change:
    """It did not outlive the server."""
    return Change(_without(alias, version, State.UNLOADED), "recovered", version.name, why)


def did_not_outlive(version: Version) -> str:
    """Why `version` cannot be served by a new server; empty if it can."""
    if version.state in {State.CHECKED, State.DRAINING}:
        return f"it was {version.state} when the server ended"
    if version.state in SERVED and not version.path.is_dir():
        return f"it was {version.state}, and its files are gone: {version.path}"
    return ""


def _without(alias: Alias, version: Version, state: State) -> Alias:
    """`version` in a state in which it answers nobody, and with no part in what was live."""
    gone = version._replace(state=state, weight=0.0)
    if version.state is State.LIVE:
        return alias._replace(lives=()).put(*_rested(alias), gone)
    kept = (name for name in alias.lives if name != version.name)
    return alias._replace(lives=tuple(name for name, _ in groupby(kept))).put(gone)


def _rested(alias: Alias) -> list[Version]:
    """The alias's canaries, without weight."""
    return [_rest(canary) for canary in alias.canaries]


def _rest(version: Version) -> Version:
    return version._replace(state=State.LOADED, weight=0.0)


def _in_state(alias: Alias, name: str, wish: str, *states: State) -> Version:
    version = alias.find(name)
    if version is None:
        raise RegistryError(f"there is no {name}", hint=_choice(alias))
    if version.state not in states:
        wanted = " or ".join(state for state in State if state in states)
        raise RegistryError(f"{name} cannot be {wish}: it is {version.state}, not {wanted}", hint=_next(version))
    return version


def _may_answer(version: Version) -> Version:
    if version.failed:
        raise RegistryError(
            f"{version.name} gets no requests: its verification {version.verified}",
            hint=f"tuneship adapters unload {version.name}, export it again, and load that",
        )
    return version


def _choice(alias: Alias) -> str:
    listed = ", ".join(f"{v.name} ({v.state})" for v in alias.versions if v.state is not State.UNLOADED)
    return f"there is {listed}" if listed else f"tuneship adapters load PATH --alias {alias.name}"


def _next(version: Version) -> str:
    """What to do about a version that is in the wrong state."""
    return {
        State.CHECKED: "it is being loaded; try again in a moment",
        State.DRAINING: "it is being unloaded; load it again afterwards",
        State.UNLOADED: f"tuneship adapters load PATH --alias {version.alias}",
        State.LIVE: f"tuneship adapters rollback {version.alias} ends its canaries, or takes it back",
    }.get(version.state, f"tuneship adapters promote {version.name} lets it answer")
