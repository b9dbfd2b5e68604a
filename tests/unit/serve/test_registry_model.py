"""The registry against a model of it that holds nothing but dictionaries: verb by verb, and killed between any two.

Run as a program, this file does random verbs until it is killed: `python test_registry_model.py FOLDER SEED ROUNDS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tuneship.core.errors import RegistryError
from tuneship.serve.catalog import Entry
from tuneship.serve.registry import Event, Registry, State, Version
from tuneship.serve.routes import Routes

ALIASES = ("sql", "chat")
IDS = tuple(hashlib.sha256(str(number).encode()).hexdigest() for number in range(3))
BASE = Entry("base", "base@000000000000", None, Path("base"), "", "some/base")
ANSWERS = ("loaded", "canary", "live")


class Known(NamedTuple):
    state: str
    weight: float = 0.0
    generation: int = 1
    verified: str = ""


class Model:
    """What the brief says that each verb does, with no thought of how it is kept."""

    def __init__(self) -> None:
        self.versions: dict[str, Known] = {}
        self.lives: dict[str, list[str]] = {alias: [] for alias in ALIASES}

    def state(self, name: str) -> str:
        return self.versions[name].state if name in self.versions else "unloaded"

    def of(self, alias: str, *states: str) -> dict[str, Known]:
        return {n: v for n, v in self.versions.items() if n.startswith(f"{alias}@") and v.state in states}

    def takes(self, verb: str, name: str, weight: float = 0.0, whole: bool = False) -> bool:
        alias, state = name.partition("@")[0], self.state(name)
        failed = name in self.versions and self.versions[name].verified.startswith("failed")
        if verb == "rollback":
            return bool(self.of(alias, "live")) and (bool(self.of(alias, "canary")) or len(self.lives[alias]) > 1)
        if verb == "weigh":
            others = sum(v.weight for n, v in self.of(alias, "canary").items() if n != name)
            fits = weight == 0 or (bool(self.of(alias, "live")) and others + weight < 1)
            return state in {"loaded", "canary"} and not failed and 0 <= weight < 1 and fits
        if verb == "drain":
            alone = not self.of(alias, *ANSWERS).keys() - {name}
            return state in {"loaded", "canary"} or (state == "live" and (alone or whole))
        if verb == "lost":
            return state in ANSWERS
        wanted = {"add": "unloaded", "loaded": "checked", "failed": "checked", "unloaded": "draining"}
        return state in {"loaded", "canary"} and not failed if verb == "promote" else state == wanted[verb]

    def do(self, verb: str, name: str, weight: float = 0.0, verified: str = "") -> None:
        """A verb that was taken; for a rollback, `name` is what it made or left live."""
        alias, now = name.partition("@")[0], self.versions.get(name)
        if verb == "add":
            self.versions[name] = Known("checked", generation=now.generation + 1 if now else 1)
        elif verb == "loaded":
            self.set(name, "loaded", verified=verified)
        elif verb == "weigh":
            self.set(name, "canary" if weight else "loaded", weight)
        elif verb in {"promote", "rollback"}:
            lives, canaries = self.lives[alias], self.of(alias, "canary")
            if verb == "promote":
                self.lives[alias] = [*lives, name][-50:]
            elif not canaries:
                self.lives[alias] = lives[:-1]
            for other in self.of(alias, "canary", "live"):
                self.set(other, "loaded")
            self.set(name, "live")
        elif verb == "drain":
            self.leave(name, "draining")
        else:  # failed, unloaded, lost, recovered
            self.leave(name, "unloaded")

    def leave(self, name: str, state: str) -> None:
        alias = name.partition("@")[0]
        if self.state(name) == "live":
            for canary in self.of(alias, "canary"):
                self.set(canary, "loaded")
            self.lives[alias] = []
        left = [live for live in self.lives[alias] if live != name]
        self.lives[alias] = [n for i, n in enumerate(left) if i == 0 or left[i - 1] != n]
        self.set(name, state)

    def set(self, name: str, state: str, weight: float = 0.0, **more: str) -> None:
        self.versions[name] = self.versions[name]._replace(state=state, weight=weight, **more)

    def restart(self) -> None:
        for name in [n for n, v in self.versions.items() if v.state in {"checked", "draining"}]:
            self.leave(name, "unloaded")


def check(registry: Registry, model: Model) -> None:
    """That it is as the model is, and that whatever must always hold does."""
    found = {v.name: v for v in registry.versions()}
    assert registry.present() == [v for v in found.values() if v.state is not State.UNLOADED]
    assert {alias: list(registry._alias(alias).lives) for alias in ALIASES} == model.lives
    assert {n: (v.state, v.generation, v.verified) for n, v in found.items()} == {
        n: (v.state, v.generation, v.verified) for n, v in model.versions.items()
    }
    for alias in ALIASES:
        mine = [v for v in found.values() if v.alias == alias]
        live = [v for v in mine if v.state is State.LIVE]
        weights = {v.name: v.weight for v in mine}
        assert len(live) <= 1
        if live:
            assert math.isclose(sum(weights.values()), 1)
            assert all(v.weight > 0 for v in mine if v.state in {State.LIVE, State.CANARY})
            del weights[live[0].name]
        assert weights == {n: model.versions[n].weight for n in weights}
        assert not any(v.failed and v.weight for v in mine)
    routes = Routes(BASE, found.values())
    for name, version in found.items():
        assert (routes.lease(name) is not None) == (version.state in {State.LOADED, State.CANARY, State.LIVE})
    assert {entry.name for entry in routes.entries} == {"base"} | {v.alias for v in found.values() if v.weight}


def replayed(history: list[Event]) -> Model:
    """The model after all that a registry's history, newest first, says to have happened."""
    model = Model()
    for event in reversed(history):
        weight = re.fullmatch(r"weight (\S+)", event.detail)
        model.do(event.verb, event.version, float(weight[1]) if weight else 0.0, event.detail)
    return model


names = st.builds(
    lambda alias, content_id: f"{alias}@{content_id[:12]}", st.sampled_from(ALIASES), st.sampled_from(IDS)
)


class RegistryMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.model, self.selectors, self.events = Model(), set(), 0
        self.registry = opened(self.folder)

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.folder)

    @rule(name=names)
    def add(self, name: str) -> None:
        self.say("add", name)

    @rule(name=names, verified=st.sampled_from(["passed", "no evidence", "failed: another adapter answers"]))
    def loaded(self, name: str, verified: str) -> None:
        self.say("loaded", name, verified=verified)

    @rule(data=st.data(), weight=st.sampled_from([0.0, 0.05, 0.3]))
    def one_that_is_taken(self, data: st.DataObject, weight: float) -> None:
        """So that what is rare after any verbs at all is not."""
        named = [f"sql@{content_id[:12]}" for content_id in IDS]
        verbs = ("add", "loaded", "weigh", "promote", "promote", "promote", "rollback", "drain", "unloaded", "lost")
        options = [(verb, name) for verb in verbs for name in named if self.model.takes(verb, name, weight, True)]
        verb, name = data.draw(st.sampled_from(options))
        self.say(verb, name, weight, "passed", True)

    @rule(name=names, weight=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.7, 1 / 3, 1.0, -0.1, math.nan]) | st.floats(0, 1))
    def weigh(self, name: str, weight: float) -> None:
        self.say("weigh", name, weight=weight)

    @rule(
        name=names, verb=st.sampled_from(["promote", "promote", "rollback", "rollback", "failed", "unloaded", "lost"])
    )
    def other(self, name: str, verb: str) -> None:
        self.say(verb, name)

    @rule(name=names, whole=st.booleans())
    def drain(self, name: str, whole: bool) -> None:
        if self.model.state(name) == "draining":
            assert self.registry.drain(name, "me", whole_alias=whole).state is State.DRAINING
            return
        self.say("drain", name, whole=whole)

    @precondition(lambda self: self.events % 7 == 6)
    @rule()
    def restart(self) -> None:
        self.registry.close()
        self.registry = opened(self.folder)
        coming_or_going = sum(v.state in {"checked", "draining"} for v in self.model.versions.values())
        assert len(self.registry.recovered) == coming_or_going
        self.events += coming_or_going
        self.model.restart()

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "registry"):
            return
        check(self.registry, self.model)
        assert len(self.registry.history(limit=10_000)) == self.events

    def say(self, verb: str, name: str, weight: float = 0.0, verified: str = "", whole: bool = False) -> Version | None:
        takes = self.model.takes(verb, name, weight, whole)
        live = list(self.model.of(name.partition("@")[0], "live"))
        if not takes:
            with pytest.raises(RegistryError) as caught:
                said(self.registry, verb, name, weight, verified, whole)
            assert caught.value.hint
            return None
        version = said(self.registry, verb, name, weight, verified, whole)
        if verb == "rollback":
            alias, lives = version.alias, self.model.lives[version.alias]
            assert version.name == (live[0] if self.model.of(alias, "canary") else lives[-2])
            assert version.state is State.LIVE
        else:
            assert version.name == name
        assert self.registry.find(version.name) == version
        if verb == "add":
            assert version.selector not in self.selectors
            self.selectors.add(version.selector)
        before = dict(self.model.versions)
        self.model.do(verb, version.name, weight, verified)
        self.events += self.model.versions != before  # the same weight again is no event
        return version


def opened(folder: Path) -> Registry:
    return Registry.open(folder / "registry.sqlite", "b" * 64, "some/base")


def said(registry: Registry, verb: str, name: str, weight: float, verified: str, whole: bool) -> Version:
    """Say any verb to a registry."""
    alias, _, short = name.partition("@")
    if verb == "add":
        path = registry._held._path.parent / f"{name}-{len(registry.history(limit=100_000))}"
        path.mkdir(exist_ok=True)
        return registry.add(alias, next(i for i in IDS if i.startswith(short)), path, pinned=False, actor="me")
    if verb == "rollback":
        return registry.rollback(alias, "me")
    if verb == "weigh":
        return registry.weigh(name, weight, "me")
    if verb == "drain":
        return registry.drain(name, "me", whole_alias=whole)
    if verb in {"loaded", "failed"}:
        return getattr(registry, verb)(name, verified or "a reason", "me")
    return getattr(registry, verb)(name, "me")


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(
    max_examples=50, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_killed_at_any_moment_it_is_as_before_a_verb_or_as_after_it(tmp_path):
    argv = [sys.executable, "-W", "error", __file__, str(tmp_path), "7", "30"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    rounds, verbs = map(int, done.stdout.split())
    assert rounds == 30
    assert verbs > 100  # else it was killed before it did anything


def kill_again_and_again(folder: Path, seed: int, rounds: int) -> int:
    """Kill `rounds` servers at random moments and check what each leaves; how many verbs outlived them all."""
    moments = random.Random(seed)
    written = 0
    for number in range(rounds):
        ours, theirs = os.pipe()
        server = os.fork()
        if not server:
            os.close(ours)
            serve_until_killed(folder, seed + number, theirs)
        os.close(theirs)
        if number % 3:
            os.read(ours, 1)  # it has opened the registry; else it may be killed at that
        time.sleep(moments.uniform(0, 0.2 if number % 3 else 0.02))
        os.kill(server, signal.SIGKILL)
        os.waitpid(server, 0)
        with os.fdopen(ours, "rb") as pipe:
            acknowledged = pipe.read().count(b".")
        with opened(folder) as registry:
            history = registry.history(limit=1_000_000)
            check(registry, replayed(history))
            survived = sum(event.actor == "me" for event in history)
        assert written + acknowledged <= survived <= written + acknowledged + 1, "a verb that was done is lost"
        written = survived
    return written


def serve_until_killed(folder: Path, seed: int, pipe: int) -> None:
    """Random verbs, each acknowledged by a byte as soon as it is done; never returns."""
    chance = random.Random(seed)
    with opened(folder) as registry:
        os.write(pipe, b"+")
        verbs = ("add", "loaded", "loaded", "weigh", "promote", "rollback", "drain", "unloaded", "failed", "lost")
        while True:
            name = f"{chance.choice(ALIASES)}@{chance.choice(IDS)[:12]}"
            drawn = (
                chance.choice(verbs),
                name,
                chance.random() / 2,
                chance.choice(["passed", ""]),
                chance.random() < 0.3,
            )
            before = registry.find(name)
            with contextlib.suppress(RegistryError):
                after = said(registry, *drawn)
                if drawn[0] != "drain" or after != before:  # a second drain does nothing
                    os.write(pipe, b".")


if __name__ == "__main__":
    print(sys.argv[3], kill_again_and_again(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
