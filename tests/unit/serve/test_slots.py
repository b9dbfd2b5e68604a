"""Our picture of SGLang's slots, against SGLang's own lines and by what it says."""

from __future__ import annotations

import ast
import importlib.util
import random
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuneship.serve.slots import Hot, Slots


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class SGLangPool:
    """SGLang's `prepare_lora_batch` and its eviction policy, with the copying of weights replaced by a count.

    Taken out of the installed files: importing the package takes 16 s. A release that does it otherwise fails here.
    """

    def __init__(self, total: int) -> None:
        self.max_loras_per_batch = total
        self.uid_to_buffer_id: dict = {}
        self.buffer_id_to_uid: list = [_EMPTY] * total
        self.eviction_policy = _POLICY.get_eviction_policy("lru")
        self.loaded: list = []
        self.refs: dict = {}
        self.batch({None})  # as LoRAManager does when it is made

    def load_lora_weight_to_buffer(self, uid, *_) -> None:
        self.loaded.append(uid)

    def batch(self, uids: set) -> list:
        """The models whose weights are copied for this batch."""
        self.loaded = []
        _PREPARE(self, uids, {}, [], self.refs, None, None)
        return self.loaded

    def unload(self, uid: str) -> None:
        buffer_id = self.uid_to_buffer_id.pop(uid, None)
        if buffer_id is not None:
            self.buffer_id_to_uid[buffer_id] = _EMPTY
            self.eviction_policy.remove(uid)


def _lora_folder() -> Path:
    spec = importlib.util.find_spec("sglang")
    assert spec
    assert spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / "srt" / "lora"


def _policy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_sglang_eviction", _lora_folder() / "eviction_policy.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _prepare_lora_batch():
    tree = ast.parse((_lora_folder() / "mem_pool.py").read_text())
    pool = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "LoRAMemoryPool")
    names = {"prepare_lora_batch"}
    wanted = [node for node in pool.body if isinstance(node, ast.FunctionDef) and node.name in names]
    future = ast.parse("from __future__ import annotations").body
    module = ast.fix_missing_locations(ast.Module([*future, *wanted], []))
    space: dict = {"EMPTY_SLOT": _EMPTY, "logger": SimpleNamespace(debug=lambda _: None)}
    exec(compile(module, "mem_pool.py", "exec"), space)
    return space["prepare_lora_batch"]


_EMPTY = object()
_POLICY = _policy()
_PREPARE = _prepare_lora_batch()
ADAPTERS = [f"a{n}@1" for n in range(7)]


@given(st.integers(0, 2**32), st.integers(2, 6), st.integers(0, 5), st.integers(2, len(ADAPTERS)))
def test_the_same_requests_wait_as_in_sglang(seed: int, total: int, pins: int, adapters: int):
    draw = random.Random(seed)
    loaded = ADAPTERS[:adapters]
    pinned = dict.fromkeys(loaded, False) | dict.fromkeys(loaded[: min(pins, total - 1)], True)
    slots, pool = Slots(total), started_pool(total, pinned)
    slots.serving(pinned)
    for _ in range(60):
        step = draw.choices(("ask", "restart", "unload", "load"), weights=(40, 1, 1, 1))[0]
        if step == "ask":
            model = draw.choice([None, *pinned])
            assert slots.asked(model) == (model in pool.batch({model}))
        elif step == "restart":
            pool = started_pool(total, pinned)
            slots.restarted()
        elif step == "unload" and pinned:
            gone = draw.choice([*pinned])
            del pinned[gone], pool.refs[gone]
            pool.unload(gone)
            slots.serving(pinned)
        elif step == "load" and (new := [adapter for adapter in ADAPTERS if adapter not in pinned]):
            pinned[new[0]] = False
            pool.refs[new[0]] = SimpleNamespace(pinned=False)
            pool.batch({new[0]})
            slots.serving(pinned)


def started_pool(total: int, pinned: dict[str, bool]) -> SGLangPool:
    pool = SGLangPool(total)
    pool.refs = {version: SimpleNamespace(pinned=pin) for version, pin in pinned.items()}
    for version in pinned:
        pool.batch({version})
    return pool


@pytest.fixture
def clock() -> Clock:
    return Clock()


def drive(slots: Slots, clock: Clock, versions, every_s: float = 0.1) -> None:
    for version in versions:
        clock.now += every_s
        slots.asked(version)


def test_what_fits_does_not_thrash(clock):
    slots = Slots(5, clock)
    slots.serving(dict.fromkeys(ADAPTERS, False))
    drive(slots, clock, [None, *ADAPTERS[:4]] * 50)
    pressure = slots.pressure()
    assert (pressure.wanted, pressure.thrashing) == (5, False)
    assert pressure.requests_per_minute == 250
    assert pressure.misses_per_minute < 5


def test_one_too_many_in_turns_is_the_worst_case(clock, capsys):
    slots = Slots(5, clock)
    slots.serving(dict.fromkeys(ADAPTERS[:5], False))
    drive(slots, clock, ADAPTERS[:5] * 60)
    pressure = slots.pressure()
    assert pressure.wanted == 6
    assert pressure.misses_per_minute == pressure.requests_per_minute == 300
    assert pressure.thrashing
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "restart with --max-loras 5, or pin a0@1" in said[0]
    assert "5 adapters take turns in 4 slots" in said[0]


def test_a_rare_one_too_many_is_no_trouble(clock, capsys):
    slots = Slots(5, clock)
    slots.serving(dict.fromkeys(ADAPTERS[:5], False))
    often = random.Random(0).choices(ADAPTERS[:4], k=50)
    drive(slots, clock, [*often, ADAPTERS[4]] * 10)
    pressure = slots.pressure()
    assert pressure.wanted == 6
    assert 0 < pressure.misses_per_minute < 0.1 * pressure.requests_per_minute
    assert not pressure.thrashing
    assert capsys.readouterr().err == ""


def test_asking_everybody_once_is_no_thrashing(clock):
    """No number of slots would have saved these copies: a minute ago nobody wanted them."""
    slots = Slots(3, clock)
    slots.serving(dict.fromkeys(ADAPTERS, False))
    drive(slots, clock, ADAPTERS)
    pressure = slots.pressure()
    assert (pressure.wanted, pressure.misses_per_minute, pressure.thrashing) == (8, 7, False)


def test_a_few_requests_are_no_thrashing(clock):
    slots = Slots(2, clock)
    slots.serving(dict.fromkeys(ADAPTERS[:2], False))
    drive(slots, clock, ADAPTERS[:2] * 3 + ADAPTERS[:1])
    assert (slots.pressure().wanted, slots.pressure().misses_per_minute) == (3, 7)
    assert not slots.pressure().thrashing  # five came back
    drive(slots, clock, [ADAPTERS[1]])
    assert slots.pressure().thrashing


def test_a_minute_is_forgotten_and_the_warning_comes_again_after_five(clock, capsys):
    slots = Slots(5, clock)
    slots.serving(dict.fromkeys(ADAPTERS[:5], False))
    warned = []
    for _ in range(int(610 / 0.5)):
        drive(slots, clock, [ADAPTERS[int(clock.now / 0.5) % 5]], every_s=0.5)
        if capsys.readouterr().err:
            warned.append(clock.now)
    assert len(warned) == 3
    assert [later - earlier for earlier, later in pairwise(warned)] == [300, 300]
    clock.now += 60
    assert slots.pressure()[1:] == (1, 0, 0, False)


def test_what_is_pinned_wants_its_place_though_nobody_asks(clock):
    slots = Slots(5, clock)
    slots.serving({ADAPTERS[0]: True, ADAPTERS[1]: False})
    assert slots.pressure().wanted == 2
    slots.asked(ADAPTERS[1])
    assert slots.pressure().wanted == 3


def test_the_hot_ones_are_the_most_asked_and_leave_room_for_the_others(clock):
    slots = Slots(4, clock)
    slots.serving(dict.fromkeys(ADAPTERS[:4], False))
    assert slots.hot(ADAPTERS) == ()
    drive(slots, clock, [ADAPTERS[2]] * 5 + [ADAPTERS[0]] * 3 + [ADAPTERS[1], ADAPTERS[3]])
    assert slots.hot(ADAPTERS) == (Hot(ADAPTERS[2], 0.5), Hot(ADAPTERS[0], 0.3))
    clock.now += 60
    assert slots.hot(ADAPTERS) == ()


def test_pinning_what_is_hot_helps(clock):
    """The worst case again, with the advice followed."""
    slots = Slots(5, clock)
    slots.serving(dict.fromkeys(ADAPTERS[:5], False))
    drive(slots, clock, ADAPTERS[:5] * 60)
    before = slots.pressure().misses_per_minute
    hot = {version for version, _ in slots.hot(ADAPTERS)}
    slots.serving({version: version in hot for version in ADAPTERS[:5]})
    clock.now += 60
    drive(slots, clock, ADAPTERS[:5] * 60)
    assert slots.pressure().misses_per_minute <= 0.45 * before
