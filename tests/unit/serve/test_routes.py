"""Which version answers: by name, by weight, and who is still being answered."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.serve.catalog import Entry
from tuneship.serve.registry import State, Version
from tuneship.serve.routes import Lease, Routes

BASE = Entry("base", "base@b0b0b0b0b0b0", None, Path("base"), "", "some/base")
CHI_SQUARE_2 = 13.8
"""Two degrees of freedom: a fair draw is above it once in a thousand times."""


def version(letter: str, state: State, weight: float = 0.0, alias: str = "sql", generation: int = 1) -> Version:
    return Version(alias, letter * 64, "b" * 64, Path(letter), state, weight, generation, False, "passed", "")


def name(letter: str, alias: str = "sql") -> str:
    return f"{alias}@{letter * 12}"


A, B, C = (
    version("a", State.LIVE, 0.65),
    version("b", State.CANARY, 0.05),
    version("c", State.CANARY, 0.3),
)


def taken(routes: Routes, asked: str) -> Lease:
    lease = routes.lease(asked)
    assert lease is not None
    return lease


def test_requests_are_drawn_by_weight():
    routes = Routes(BASE, [A, B, C], seed=1)
    drawn = Counter(taken(routes, "sql").entry.version for _ in range(20_000))
    expected = {v.name: v.weight * 20_000 for v in (A, B, C)}
    assert drawn.keys() == expected.keys()
    assert sum((drawn[v] - expected[v]) ** 2 / expected[v] for v in expected) < CHI_SQUARE_2


def test_a_seed_repeats_the_draws():
    draws = [
        [taken(routes, "sql").entry.version for _ in range(50)]
        for routes in (Routes(BASE, [A, B, C], seed=s) for s in (5, 5, 6))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_a_name_means_its_version_and_an_alias_what_has_weight():
    d = version("d", State.LOADED, generation=3)
    routes = Routes(BASE, [A, B, C, d])
    for _ in range(50):
        assert taken(routes, "sql").entry.version != d.name
        entry = taken(routes, d.name).entry
        assert (entry.name, entry.version, entry.selector) == (d.name, d.name, f"{d.name}#3")
    assert entry == Entry(d.name, d.name, f"{d.name}#3", Path("d"), "d" * 64, "some/base")
    assert taken(routes, "sql").entry.name == "sql"
    assert taken(routes, "base").entry == BASE


@pytest.mark.parametrize("state", [State.CHECKED, State.DRAINING, State.UNLOADED])
def test_what_is_not_in_the_engine_is_not_found(state):
    routes = Routes(BASE, [A._replace(state=state, weight=0.0), version("b", State.LOADED)])
    assert routes.lease(A.name) is None
    assert routes.lease("sql") is None  # a loaded version does not answer for its alias
    assert routes.lease(name("b")) is not None
    assert [entry.name for entry in routes.entries] == ["base"]


@pytest.mark.parametrize("asked", ["", "SQL", "sql@", "sql@aaaa", f"{name('a')}#1", name("a", "chat"), BASE.version])
def test_nothing_else_is_a_name(asked):
    assert Routes(BASE, [A, B, C]).lease(asked) is None


def test_the_base_keeps_its_name():
    routes = Routes(BASE, [version("a", State.LIVE, 1.0, alias="base")])
    assert taken(routes, "base").entry == BASE
    assert taken(routes, name("a", "base")).entry.selector


def test_who_watches_is_told_of_each_lease():
    told = []
    routes = Routes(BASE, [A, B, C], seed=0, watch=told.append)
    leases = [taken(routes, asked) for asked in ("sql", "sql", A.name, "base")]
    assert routes.lease("nobody") is None
    assert told == [lease.entry for lease in leases]


def test_listed_are_the_base_and_each_alias_once():
    chat = version("e", State.LIVE, 1.0, alias="chat")
    routes = Routes(BASE, [A, B, C, chat])
    assert [(entry.name, entry.version) for entry in routes.entries] == [
        ("base", BASE.version),
        ("chat", chat.name),
        ("sql", A.name),
    ]


def test_a_lease_outlives_the_table_that_gave_it():
    routes = Routes(BASE, [A._replace(weight=1.0)])
    before = taken(routes, "sql")
    routes.update([version("a", State.LOADED), version("b", State.LIVE, 1.0)])
    after = taken(routes, "sql")
    assert (before.entry.version, after.entry.version) == (A.name, B.name)
    assert (routes.in_flight(A.name), routes.in_flight(B.name)) == (1, 1)
    before.release()
    assert (routes.in_flight(A.name), routes.in_flight(B.name)) == (0, 1)


def test_a_lease_ends_once():
    routes = Routes(BASE, [A, B, C])
    first, second = taken(routes, A.name), taken(routes, A.name)
    assert routes.in_flight(A.name) == 2
    first.release()
    first.release()
    assert routes.in_flight(A.name) == 1
    second.release()
    assert routes.in_flight(A.name) == 0


@given(st.lists(st.tuples(st.sampled_from("abcx"), st.booleans()), max_size=60))
def test_in_flight_is_what_was_taken_and_not_given_back(steps):
    routes, out = Routes(BASE, [A, B, C], seed=0), []
    for letter, take in steps:
        if take:
            asked = "sql" if letter == "x" else name(letter)
            out.append(taken(routes, asked))
        elif out:
            out.pop("abcx".index(letter) % len(out)).release()
        counts = Counter(lease.entry.version for lease in out)
        assert all(routes.in_flight(v.name) == counts[v.name] for v in (A, B, C))


async def test_drained_when_the_last_answer_is_over():
    routes = Routes(BASE, [A])
    leases = [taken(routes, A.name) for _ in range(3)]
    other = taken(routes, "base")
    waiting = [asyncio.create_task(routes.drained(A.name, wait_s)) for wait_s in (None, 30)]
    for lease in leases:
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        lease.release()
    assert await asyncio.wait_for(asyncio.gather(*waiting), 5) == [True, True]
    assert routes.in_flight(BASE.version) == 1
    other.release()


async def test_nothing_in_flight_is_drained_at_once():
    routes = Routes(BASE, [A])
    assert await routes.drained(A.name, 0) is True
    assert await routes.drained("sql@never-heard-of", 0) is True


async def test_who_does_not_end_in_time_is_not_drained_and_may_be_waited_for_again():
    routes = Routes(BASE, [A])
    lease = taken(routes, A.name)
    began = time.monotonic()
    assert await routes.drained(A.name, 0.05) is False
    assert 0.04 < time.monotonic() - began < 5
    waiting = asyncio.create_task(routes.drained(A.name))
    await asyncio.sleep(0)
    lease.release()
    assert await asyncio.wait_for(waiting, 5) is True


async def test_a_lease_between_the_last_and_the_waiter_is_waited_for_too():
    routes = Routes(BASE, [A])
    first = taken(routes, A.name)
    waiting = asyncio.create_task(routes.drained(A.name))
    await asyncio.sleep(0)
    first.release()
    second = taken(routes, A.name)
    await asyncio.sleep(0.01)
    assert not waiting.done()
    second.release()
    assert await asyncio.wait_for(waiting, 5) is True


async def test_waiting_does_not_look_again_and_again():
    routes = Routes(BASE, [A])
    lease = taken(routes, A.name)
    loop = asyncio.get_running_loop()
    waiting = asyncio.create_task(routes.drained(A.name))
    await asyncio.sleep(0.01)
    assert not loop._ready  # nothing wants to run, and
    assert not loop._scheduled  # nothing will by itself
    lease.release()
    assert await waiting
