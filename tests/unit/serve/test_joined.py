"""What is asked at one moment is one request; where that fails, everybody asks alone and nobody waits for ever."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tuneship.serve.joined import Joined, Prompts
from tuneship.serve.refusals import Refusal

ROWS = Prompts("sql#1", [[1, 2, 3], [4, 5]], [1, 0])
BASE = Prompts(None, [[1, 2, 3]], [1])
PROMPT = Prompts("sql#1", [[7, 8]])


class Engine:
    """Answers each prompt with its ids; `fault` is raised or answered instead."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.fault: Exception | bytes | None = None
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    async def send(self, body: dict[str, Any]) -> bytes:
        self.bodies.append(body)
        await self.goes_on.wait()
        if isinstance(self.fault, Exception):
            raise self.fault
        return self.fault or json.dumps(body["input_ids"]).encode()


async def test_those_that_wait_for_one_moment_ask_in_one_request():
    engine, moment = Engine(), asyncio.Event()
    joined = Joined(engine.send)

    async def ask(prompts: Prompts) -> Any:
        await moment.wait()
        return await joined.ask(prompts)

    asked = [asyncio.create_task(ask(prompts)) for prompts in (ROWS, BASE)]
    await asyncio.sleep(0.01)
    moment.set()
    assert await asyncio.gather(joined.ask(PROMPT), *asked) == [PROMPT.ids, ROWS.ids, BASE.ids]
    (body,) = engine.bodies
    number = [body["input_ids"].index(ids) for ids in (*ROWS.ids, *PROMPT.ids)]
    assert [body["lora_path"][n] for n in number] == ["sql#1"] * 3
    assert body["lora_path"].count(None) == 1
    assert [body["return_logprob"][n] for n in number] == [True, True, False]
    assert [body["logprob_start_len"][n] for n in number] == [1, 0, -1]
    assert {each["max_new_tokens"] for each in body["sampling_params"]} == {0}, "else SGLang begins a step more"


async def test_without_adapters_none_is_named():
    engine = Engine()
    joined = Joined(engine.send)
    await asyncio.gather(joined.ask(BASE), joined.ask(BASE))
    assert "lora_path" not in engine.bodies[0]


async def test_who_is_alone_asks_alone():
    engine = Engine()
    joined = Joined(engine.send)
    assert await joined.ask(ROWS) is None
    assert await joined.ask(ROWS) is None
    assert engine.bodies == []


@pytest.mark.parametrize("fault", [Refusal(502, "engine_error", "no"), b"{}", b"[1]", b"cut"])
async def test_whose_fault_it_is_shows_when_each_asks_alone(fault):
    engine = Engine()
    engine.fault = fault
    joined = Joined(engine.send)
    assert await asyncio.gather(joined.ask(ROWS), joined.ask(PROMPT)) == [None, None]


async def test_a_request_that_nobody_waits_for_is_broken_off():
    engine = Engine()
    engine.goes_on.clear()
    joined = Joined(engine.send)
    asked = [asyncio.create_task(joined.ask(prompts)) for prompts in (ROWS, PROMPT)]
    await asyncio.sleep(0.01)
    (sending,) = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and task not in asked]
    asked[0].cancel()
    await asyncio.sleep(0.01)
    assert not sending.done(), "the other one still waits"
    asked[1].cancel()
    await asyncio.gather(*asked, return_exceptions=True)
    await asyncio.sleep(0.01)
    assert sending.cancelled()
    engine.goes_on.set()
    assert await asyncio.gather(joined.ask(ROWS), joined.ask(PROMPT)) == [ROWS.ids, PROMPT.ids]


async def test_who_gives_up_at_once_takes_nobody_along():
    engine = Engine()
    joined = Joined(engine.send)
    first = asyncio.create_task(joined.ask(ROWS))
    await asyncio.sleep(0)
    first.cancel()
    others = [asyncio.create_task(joined.ask(prompts)) for prompts in (BASE, PROMPT)]
    assert await asyncio.gather(*others) == [BASE.ids, PROMPT.ids]
    assert first.cancelled()
