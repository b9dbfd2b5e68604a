"""Both ways to a server: `verify` asks the same and reads the same, through the door's URL and behind it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.unit.serve.listening import answering
from tuneship.core.errors import EndpointError, EngineError, PreflightError
from tuneship.serve import engine_adapters
from tuneship.serve.catalog import Entry
from tuneship.serve.upstream import Upstream
from tuneship.serve.verify.door import DoorScorer, Served
from tuneship.serve.verify.engine import EngineScorer

BASE = Entry("org/base", "org/base@1", None, Path("/b"), "", "b")


class Server:
    """An engine (`/generate`) and a door (`/v1/logprobs`) in one: -id for each token."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.tokenizes = True
        self.status = 200
        base = {"id": BASE.name, "version": "org/base@0123"}
        self.cards = [{"id": "sql", "parent": "b"}, base, {"id": "mail", "parent": "b"}]
        self.url = ""

    async def handle(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        self.bodies.append({"path": request.path, "key": request.headers.get("Authorization"), **body})
        if self.status != 200:
            return web.json_response({"message": "no"}, status=self.status)
        if request.path == "/v1/tokenize" and not self.tokenizes:
            return web.json_response({}, status=500)
        answer = {
            "/v1/models": lambda _: {"data": self.cards},
            "/v1/tokenize": lambda _: {"tokens": [1, 2]},
            "/v1/chat/completions": lambda _: {"choices": [{"prompt_token_ids": [3, 4]}]},
            "/v1/logprobs": _as_door,
            "/generate": _as_engine,
        }[request.path]
        return web.json_response(answer(body), headers={"x-tuneship-version": f"{body.get('model')}@1"})


def _as_door(body: dict) -> dict:
    rows = [[-float(i) for i in ids[start:]] for ids, start in zip(body["input_ids"], body["start"], strict=True)]
    return {"data": [{"index": number, "token_logprobs": row} for number, row in enumerate(rows)]}


def _as_engine(body: dict) -> list[dict]:
    asked = zip(body["input_ids"], (max(start, 0) for start in body["logprob_start_len"]), strict=True)
    rows = [[[None if i == 0 else -float(token), token, None] for i, token in enumerate(ids[s:])] for ids, s in asked]
    return [{"meta_info": {"input_token_logprobs": row}} for row in rows]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    scripted = Server()
    app = web.Application(client_max_size=2**26)
    app.router.add_route("*", "/{path:.*}", scripted.handle)
    async with answering(app) as scripted.url:
        yield scripted


@pytest.fixture(params=["door", "engine"])
async def scorer(server: Server, request: pytest.FixtureRequest) -> AsyncIterator[DoorScorer | EngineScorer]:
    if request.param == "engine":
        async with Upstream(server.url) as upstream:
            yield EngineScorer(upstream, BASE)
    else:
        async with DoorScorer(f"{server.url}/v1/", "secret") as door:
            assert await door.served() == Served("org/base", ("sql", "mail"))
            assert door.listed["org/base"] == "org/base@0123"
            yield door


@pytest.mark.parametrize("selector", [None, "sql"])
async def test_figures_from_each_start_on_in_requests_of_a_bounded_size(server, scorer, selector):
    rows = [[7, 8, 9]] * 70 + [[5, 6]]
    found = await scorer.logprobs(selector, rows, [1] * 70 + [0])
    assert found[:70] == [[-8.0, -9.0]] * 70
    assert found[70][1:] == [-6.0]
    sent = [body for body in server.bodies if "input_ids" in body]
    assert [len(body["input_ids"]) for body in sent] == [64, 7]
    wanted = {"model": selector or "org/base"} if isinstance(scorer, DoorScorer) else {"lora_path": selector}
    for body in sent:
        assert {key: body.get(key) for key in wanted} == wanted


async def test_a_prompt_as_the_server_renders_it(server, scorer):
    assert await scorer.tokenize([{"role": "user", "content": "a"}]) == [1, 2]
    server.tokenizes = False
    assert await scorer.tokenize([{"role": "user", "content": "a"}]) == [3, 4]
    assert all("tools" not in body for body in server.bodies)


@pytest.mark.parametrize("tokenizes", [True, False])
async def test_a_prompt_with_tools(server, scorer, tokenizes):
    server.tokenizes = tokenizes
    tools = [{"type": "function", "function": {"name": "f"}}]
    await scorer.tokenize([{"role": "user", "content": "a"}], tools)
    assert server.bodies[-1]["tools"] == tools


@pytest.mark.parametrize("status", [400, 404, 500, 503])
async def test_a_server_that_refuses_or_fails(server, scorer, status):
    server.status = status
    for asked in (scorer.logprobs(None, [[1, 2]], [1]), scorer.tokenize([{"role": "user", "content": "a"}])):
        with pytest.raises((EngineError, EndpointError)):
            await asked


async def test_the_door_is_asked_with_a_key_and_says_which_version_answered(server):
    async with DoorScorer(server.url, "secret") as door:
        await door.logprobs("sql", [[1, 2]], [1])
    assert door.versions == {"sql": "sql@1"}
    assert server.bodies[0]["key"] == "Bearer secret"
    server.status = 401
    async with DoorScorer(server.url) as door:
        with pytest.raises(EndpointError, match="refused the key"):
            await door.served()
    server.status = 500
    async with DoorScorer(server.url) as door:
        with pytest.raises(EndpointError, match="does not say what it serves"):
            await door.served()
    server.status, server.cards = 200, server.cards[:1]
    async with DoorScorer(server.url) as door:
        with pytest.raises(EndpointError, match="shows no base"):
            await door.served()
    async with DoorScorer("http://127.0.0.1:9") as door:
        with pytest.raises(EndpointError, match="does not answer"):
            await door.served()


async def test_a_connection_that_the_engine_ends_after_a_500_takes_no_other_request_with_it():
    """SGLang does not say that it will close it, and by then it is back in the pool."""

    async def engine(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        status = 200
        while status == 200:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
            except asyncio.IncompleteReadError:
                break
            await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n")[0]))
            status = 500 if b"tokenize" in head else 200
            writer.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}" % status)
            await writer.drain()
        await asyncio.sleep(0.002)
        writer.close()
        await writer.wait_closed()

    async def one(upstream: Upstream) -> None:
        scorer = EngineScorer(upstream, BASE)
        with pytest.raises(EngineError, match="does not say how it renders"):  # its second way answers {}
            await scorer.tokenize([])

    connections: list = []
    listening = await asyncio.start_server(engine, "127.0.0.1", 0)
    async with listening, Upstream(f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}") as upstream:
        await asyncio.gather(*(one(upstream) for _ in range(50)))
    await asyncio.gather(*connections)


async def test_what_is_asked_of_an_adapter_that_has_just_come_is_one_request(server):
    """Whether it computes, its figures and the base's: one step of the engine instead of two or three."""
    loaded = asyncio.Event()
    async with Upstream(server.url) as upstream:
        scorer = EngineScorer(upstream, BASE, loaded)
        asked = [asyncio.create_task(scorer.logprobs(name, [[7, 8, 9]], [1])) for name in (None, "sql#1")]
        assert await scorer.tokenize([{"role": "user", "content": "a"}]) == [1, 2]
        await asyncio.sleep(0.02)
        assert [body["path"] for body in server.bodies] == ["/v1/tokenize"], "nobody is asked before it is loaded"
        loaded.set()
        await asyncio.gather(engine_adapters.answer_once(upstream, "sql#1"), *asked)
        assert [task.result() for task in asked] == [[[-8.0, -9.0]]] * 2
    (body,) = server.bodies[1:]
    assert sorted(map(str, body["lora_path"])) == ["None", "sql#1", "sql#1"]
    assert [each["max_new_tokens"] for each in body["sampling_params"]] == [0, 0, 0]


@pytest.mark.parametrize(("in_flight", "requests"), [({}, [2, 1]), ({"sql@1": 1}, [1, 1, 1])])
async def test_steps_are_small_while_clients_wait_for_theirs(server, in_flight, requests):
    async with Upstream(server.url) as upstream:
        scorer = EngineScorer(upstream, BASE, in_flight=lambda: in_flight)
        assert len(await scorer.logprobs(None, [[7] * 700] * 3, [1] * 3)) == 3
    assert [len(body["input_ids"]) for body in server.bodies] == requests


async def test_an_engine_that_refuses_all_is_asked_one_by_one(server):
    server.status = 400
    async with Upstream(server.url) as upstream:
        scorer = EngineScorer(upstream, BASE)
        found = await asyncio.gather(
            engine_adapters.answer_once(upstream, "sql#1"),
            scorer.logprobs("sql#1", [[7, 8, 9]], [1]),
            return_exceptions=True,
        )
    assert [type(error) for error in found] == [PreflightError, EngineError]
    assert str(found[0]).startswith("it does not answer: no")
    assert len(server.bodies) == 3


async def test_a_first_token_that_does_not_come_is_given_up(server, monkeypatch):
    async def hangs(_: dict) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(engine_adapters, "_ANSWER_S", 0.1)
    async with Upstream(server.url) as upstream:
        monkeypatch.setattr(upstream.joined, "_send", hangs)
        scoring = asyncio.create_task(EngineScorer(upstream, BASE).logprobs(None, [[7, 8, 9]], [1]))
        with pytest.raises(EngineError, match=r"said nothing to /generate within 0\.1 s"):
            await engine_adapters.answer_once(upstream, "sql#1")
        scoring.cancel()
        await asyncio.gather(scoring, return_exceptions=True)
