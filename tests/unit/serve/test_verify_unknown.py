"""Adapters without evidence: applied or not, and what of the base is asked again for each of them."""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter

import pytest

from tuneship.serve.verify import Fault, Memory, Outcome, verify


class Engine:
    """A `Scorer`: the base, adapters that add `effects` to it, and `noise` on every figure that differs by request."""

    def __init__(self, effects: dict[str, float], noise: float = 0.0, seed: int = 0) -> None:
        self.effects, self.noise = effects, noise
        self.asked: Counter[str] = Counter()
        self._draw = random.Random(seed)

    async def tokenize(self, messages, tools=None):  # noqa: ARG002 - the protocol's
        self.asked["tokenize"] += 1
        return [ord(letter) for letter in messages[0]["content"]]

    async def logprobs(self, selector, rows, starts):
        self.asked[selector or "base"] += 1
        await asyncio.sleep(0)
        effect = self.effects[selector] if selector else 0.0
        return [
            [-1 - token / 100 + effect + self._draw.gauss(0, self.noise) for token in ids[start:]]
            for ids, start in zip(rows, starts, strict=True)
        ]


@pytest.mark.parametrize("noise", [0.0, 1e-5, 0.02])
@pytest.mark.parametrize(
    ("effect", "outcome", "fault"),
    [
        (0.5, Outcome.NO_EVIDENCE, Fault.NONE),
        (0.0, Outcome.FAILED, Fault.BASE),
        (math.nan, Outcome.FAILED, Fault.UNKNOWN),
    ],
)
async def test_it_is_applied_or_it_is_not(effect, outcome, fault, noise):
    engine, memory = Engine({"a": effect}, noise), Memory()
    for _ in range(2):  # measured, and remembered
        verdict = await verify(engine, "a", [], memory=memory)
        assert (verdict.outcome, verdict.fault) == (outcome, fault), verdict
        assert verdict.rows == 4


async def test_the_base_is_measured_once_for_each_engine():
    engines = [Engine({"a": 0.5, "b": 0.4}), Engine({"a": 0.5})]
    running = engines[0]
    memory = Memory(lambda: running)
    await verify(running, "a", [], memory=memory)
    assert engines[0].asked == {"tokenize": 4, "base": 6, "a": 1}
    await verify(running, "b", [], memory=memory)
    assert engines[0].asked == {"tokenize": 4, "base": 7, "a": 1, "b": 1}
    running = engines[1]
    assert not (await verify(running, "a", [], memory=memory)).fault
    assert engines[1].asked == {"tokenize": 4, "base": 6, "a": 1}
    await verify(Engine({"a": 0.5}), "a", [])  # without a memory nothing is known


async def test_what_an_engine_said_that_ended_meanwhile_is_not_kept():
    engine = Engine({"a": 0.5})
    ended = iter([1, 2, 2, 2])
    memory = Memory(lambda: next(ended))
    for _ in range(2):
        await verify(engine, "a", [], memory=memory)
    assert engine.asked["tokenize"] == 8


async def test_a_server_that_became_noisier_is_not_taken_for_an_adapter():
    found: Counter[str] = Counter()
    for seed in range(60):
        engine, memory = Engine({"silent": 0.0, "weak": 0.03}, seed=seed), Memory()
        await memory.baseline(engine)  # while nobody else asks
        engine.noise = 0.02
        for name in engine.effects:
            verdict = await verify(engine, name, [], memory=memory)
            found[f"{name} {verdict.fault}"] += 1
    # As when all is measured at one time: two standard errors are left to chance.
    assert found["silent base"] > 54
    assert found["weak "] > 54


@pytest.mark.parametrize("effect", [0.003, 0.02])
async def test_an_adapter_is_not_held_against_the_noise_of_a_busier_time(effect: float):
    for seed in range(20):
        engine, memory = Engine({"weak": effect}, noise=0.02, seed=seed), Memory()
        await memory.baseline(engine)
        engine.noise = 1e-4
        assert not (await verify(engine, "weak", [], memory=memory)).fault


async def test_what_does_not_stand_out_clearly_is_measured_anew():
    engine, memory = Engine({"near": 2e-4}), Memory()
    await memory.baseline(engine)
    engine.asked.clear()
    assert not (await verify(engine, "near", [], memory=memory)).fault
    assert engine.asked == {"base": 1 + 5, "near": 1}
